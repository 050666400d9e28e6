"""All comparisons in one sitting: which ratios are found in the scripts' files, and what is kept."""

import json
import sys

import pytest

from results import one_sitting

FILES = {
    "decode_speed": {
        "cpu": "a CPU",
        "results": [
            {
                "shape": "small",
                "batch": 8,
                "side": "theirs",
                "ratio": 1.0,
                "ratio_min": 1.0,
                "ratio_max": 1.0,
            },
            {"shape": "tiny", "batch": 8, "side": "ours", "ratio": 1.5, "ratio_min": 1.25, "ratio_max": 2.0},
        ],
    },
    "minhash_speed": {"python": "3.11", "from words": {"ratio": 6.0, "range": [5.5, 7.0]}},
    "fit_speed": {"cpu": "a CPU", "ours": {"seconds": 1.0}, "ratio": 79.0},
}


@pytest.fixture
def work(tmp_path):
    """Return a folder with the files of three scripts."""
    for name, found in FILES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    return tmp_path


def test_every_script_there_is():
    for name in one_sitting.SCRIPTS:
        assert (one_sitting.Path(one_sitting.__file__).parent / f"{name}.py").exists()


def test_ratios_are_found_in_every_kind_of_file_and_kept_files_are_not_made_again(work, capsys):
    argv = ["--out", str(work / "out.json"), "--work", str(work), "--names", *FILES]
    one_sitting.main(argv)
    expected = [
        "| script | what | ratio |",
        "|---|---|---|",
        "| `decode_speed` | tiny, ours, batch 8 | 1.50x (1.25 to 2.00) |",
        "| `minhash_speed` | from words | 6.00x (5.50 to 7.00) |",
        "| `fit_speed` |  | 79.00x |",
    ]
    assert capsys.readouterr().out.splitlines() == expected
    one_sitting.main(["--out", str(work / "out.json"), "--table"])
    assert capsys.readouterr().out.splitlines() == expected


def test_a_script_that_fails_is_left_out_and_says_why(work, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    argv = ["--out", str(work / "out.json"), "--work", str(work), "--names", "fit_speed", "vision_speed"]
    one_sitting.main(argv)
    printed = capsys.readouterr()
    assert "vision_speed: no message" in printed.err and "vision" not in printed.out
    assert list(json.loads((work / "out.json").read_text())["scripts"]) == ["fit_speed"]


def test_rows_that_differ_by_a_setting_alone_have_different_names():
    row = {"shape": "small", "side": "ours", "same": True, "ratio": 2.0, "range": [1.0, 3.0]}
    found = one_sitting.ratios([row | {"compiled": False}, row | {"compiled": True}])
    assert [ratio["what"] for ratio in found] == ["small, ours", "small, ours, compiled"]


def test_figures_of_other_scripts_stay_and_those_of_another_machine_are_refused(work, capsys):
    out, argv = work / "out.json", ["--out", str(work / "out.json"), "--work", str(work), "--names"]
    for name in FILES:
        one_sitting.main([*argv, name])
    assert list(json.loads(out.read_text())["scripts"]) == list(FILES)
    assert capsys.readouterr().out.splitlines()[-1] == "| `fit_speed` |  | 79.00x |"

    other = json.dumps(json.loads(out.read_text()) | {"cpu": "another CPU"})
    out.write_text(other)
    with pytest.raises(ValueError, match=r"out\.json holds ratios made with cpu 'another CPU'"):
        one_sitting.main([*argv, "fit_speed"])
    assert out.read_text() == other
    one_sitting.main(["--out", str(out), "--table"])  # which needs no machine


@pytest.mark.parametrize("flags", [["--table"], ["--names", "fit_speed"]])
def test_a_file_of_another_script_is_refused(flags, work):
    argv = ["--out", str(work / "decode_speed.json"), "--work", str(work), *flags]
    with pytest.raises(ValueError, match=r"decode_speed\.json holds no 'scripts'"):
        one_sitting.main(argv)
    assert json.loads((work / "decode_speed.json").read_text()) == FILES["decode_speed"]


def test_training_without_a_clone_of_nanogpt_is_left_out_and_says_so(work, capsys):
    one_sitting.main(["--out", str(work / "out.json"), "--work", str(work), "--names", "train_speed"])
    assert "train_speed: left out, because it needs --nanogpt" in capsys.readouterr().err
