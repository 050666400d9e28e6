"""The comparison of runs, from files that the tests write: nothing is trained."""

from pathlib import Path

import numpy as np
import pytest
from written_runs import START, Page, append_row, make_run, n_points

from engine import compare, report

# These are the tests of the pictures.
pytestmark = pytest.mark.usefixtures("rendered")


def test_compare_returns_results_and_differing_flags(tmp_path):
    a = make_run(tmp_path / "a")
    flags = START["flags"] | {"lr": 0.002, "out": "runs/b", "schedule": "wsd"}
    b = make_run(tmp_path / "b", offset=0.5, start=START | {"flags": flags, "n_params": 7})
    append_row(b, {"step": 41, "tokens": 4100, "val_loss": 4.0, "perplexity": 50.0})
    printed = compare.compare([a, b], tmp_path / "out")
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    assert lines[str(a)] == ["3,420,160", "4k", "16", "s", "250", "3.2517", "1.5000", "3.2517"]
    assert lines[str(b)] == ["7", "4.1k", "16", "s", "250", "4.0000", "1.5000", "3.7517"]
    assert "All runs have the same held-out data" in printed and "lowest loss" in printed
    assert lines["--lr"] == ["0.001", "0.002"] and lines["--schedule"] == ["-", "wsd"]
    assert {line for line in lines if line.startswith("--")} == {"--lr", "--schedule"}
    assert printed.splitlines()[-1].split()[1:] == [
        str(tmp_path / "out" / f"compare.{x}") for x in ("html", "png")
    ]

    page = Page(tmp_path / "out" / "compare.html")
    assert [n_points(path) for path in page.paths["line"]] == [11, 12, 11, 12, 40, 40, 40, 40]
    for text in (str(a), str(b), "3.2517", "--schedule", "Validation loss over seconds"):
        assert text in page.text
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "change, verdict, ranked",
    [
        ({"fingerprint": "other"}, "compare bits per byte, not the losses", "lowest bits"),
        ({"fingerprint": "other", "text": "other"}, "neither losses nor bits per byte can be compared", None),
        ({"task": "language.masking"}, "The tasks differ (gpt, language.masking)", None),
        ({"fingerprint": None}, "the losses may be of different texts", None),
    ],
)
def test_runs_are_ranked_only_by_what_can_be_compared(tmp_path, change, verdict, ranked):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", start=START | change)]
    printed = compare.compare(runs, tmp_path)
    page = Page(tmp_path / "compare.html").text
    assert verdict in printed and verdict in page
    assert ("lowest" in printed) == ("lowest" in page) == (ranked is not None)
    assert ranked is None or ranked in printed


def test_texts_that_are_not_recorded_are_not_taken_for_the_same(tmp_path):
    changes = ({"text": None}, {"text": None, "fingerprint": "other"})
    runs = [make_run(tmp_path / f"{i}", start=START | change) for i, change in enumerate(changes)]
    assert "neither losses nor bits per byte can be compared" in compare.compare(runs, tmp_path)


def test_compare_without_run_json_says_that_flags_are_not_known(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", start=None)
    printed = compare.compare([a, b], tmp_path)
    assert f"{b}: no run.json, so its flags are not known" in printed and "no flag differs" in printed
    assert "not known" in Page(tmp_path / "compare.html").text


def test_seconds_of_evaluations_are_those_of_the_steps_before(tmp_path):
    steps, evaluations = report.read_rows(make_run(tmp_path / "a"))
    expected = [0.4 * row["step"] for row in evaluations]
    np.testing.assert_allclose(compare.seconds_of(evaluations, steps), expected)
    np.testing.assert_array_equal(compare.seconds_of(evaluations, []), np.zeros(11))


def test_compare_refuses_directories_without_a_run(tmp_path):
    a = make_run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for wrong in (tmp_path / "b", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"--compare {wrong}: expected the --out of a run"):
            compare.compare([a, wrong], tmp_path)
    (tmp_path / "b" / "metrics.jsonl").write_text('{"st')
    with pytest.raises(ValueError, match="rows in its metrics"):
        compare.compare([a, tmp_path / "b"], tmp_path)
    for few in ([a], [a, a], [a, f"{a}/."]):
        with pytest.raises(ValueError, match="expected two different runs or more"):
            compare.compare([Path(one) for one in few], tmp_path)
    assert not (tmp_path / "compare.html").exists()
