"""The comparison of dirty and clean text: the arms are what they are called, and ended runs are kept."""

import json

import pytest

from results import curation


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> curation.Texts:
    return curation.Texts(tmp_path_factory.mktemp("curation"), 24)


def test_arms_are_parts_of_the_dirty_text(texts):
    dirty = {row["id"] for row in texts.arm("dirty", 0)}
    assert len(texts.arm("clean", 0)) == 24 and len(dirty) >= 30
    cleaned, less = texts.arm("cleaned", 0), texts.arm("dirty, less", 0)
    half = texts.arm("random half", 0)
    for rows in (cleaned, less, half):
        assert {row["id"] for row in rows} < dirty
    assert not any(row["label"] == "exact copy" for row in cleaned)
    # As many bytes as what cleaning leaves, but for less than a document.
    room = curation.n_bytes(cleaned)
    assert room - 2 * curation.LONGEST < curation.n_bytes(less) <= room
    assert len(half) == len(dirty) // 2 and half != texts.arm("random half", 1)


def test_a_second_start_takes_what_was_cleaned_before(texts):
    cleaned = texts.arm("cleaned", 0)
    assert curation.Texts(texts.folder, 24).arm("cleaned", 0) == cleaned


def test_held_out_modules_are_in_no_arm(texts):
    held_out = [json.loads(line)["text"] for line in texts.paths["held_out"].read_text().splitlines()]
    assert len(held_out) == 6
    assert not any(row["text"] == text for row in texts.arm("dirty", 0) for text in held_out)


def test_runs_that_have_ended_do_not_run_again(tmp_path, monkeypatch, capsys):
    flags = ["--texts", "24", "--steps", "1", "--seeds", "1", "--cache", str(tmp_path / "cache")]
    flags += ["--arms", "clean", "random half", "--out", str(tmp_path / "runs.json")]
    curation.main(flags)
    first = json.loads((tmp_path / "runs.json").read_text())
    assert [run["arm"] for run in first["runs"]] == ["clean", "random half"]
    for run in first["runs"]:
        assert 3 < run["bits_per_byte"] < 8 and run["epochs"] == 2048 / run["tokens"]
        assert sum(run["labels"].values()) == run["bytes"]
    monkeypatch.setattr(curation, "train", None)
    curation.main(flags)
    assert json.loads((tmp_path / "runs.json").read_text()) == first
    assert "| clean | 24 |" in capsys.readouterr().out


@pytest.mark.parametrize("n", [3, 10_000])
def test_a_number_of_modules_that_there_are_not_is_refused(n):
    with pytest.raises(ValueError, match=rf"--texts {n}: expected 4 to \d+, of the \d+ modules"):
        curation.modules(n)
