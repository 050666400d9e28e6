"""A large text with planted copies: data.clean finds all of them."""

import json
from pathlib import Path

import pytest

from data.near_duplicates import shingles
from results import large_text


@pytest.fixture(scope="module")
def words() -> large_text.Words:
    return large_text.Words(0)


def test_a_near_copy_is_alike_and_no_exact_copy(words):
    text = words.document()
    a, b = (set(shingles(x, 5).tolist()) for x in (text, words.near_copy(text)))
    # Each exchanged word is in 5 shingles, so 5 of 100 differ: J = 95 / 105 = 0.905.
    assert 0.85 < len(a & b) / len(a | b) < 0.95


def test_a_new_document_is_like_no_other(words):
    a, b = (set(shingles(words.document(), 5).tolist()) for _ in range(2))
    assert len(a & b) / len(a | b) < 0.01


def test_all_that_was_planted_is_found_and_only_what_was_made_is_removed(tmp_path: Path):
    """data.clean in a process of its own, on 400 kB: its counts are those of the labels."""
    work, out = tmp_path / "work", tmp_path / "figures.json"
    work.mkdir()
    (work / "text.jsonl").write_text("kept")
    flags = ["--bytes", "4e5", "--seed", "3", "--work", str(work), "--out", str(out)]
    large_text.main(flags)
    assert [(path.name, path.read_text()) for path in work.iterdir()] == [("text.jsonl", "kept")]
    found = json.loads(out.read_text())
    planted = found["planted"]
    reasons = {name: stage["reasons"] for name, stage in found["report"]["stages"].items()}
    assert planted["exact copies"] > 0 and planted["near copies"] > 0 and planted["with the passage"] > 1
    assert reasons["exact"]["exact duplicate"]["rejected"] == planted["exact copies"]
    assert reasons["near"]["near duplicate"]["rejected"] == planted["near copies"]
    shortened = reasons["substrings"]["repeated substring"]["shortened"]
    assert shortened == planted["with the passage"] - 1
    assert 20 < found["peak MB"] < 1000 and found["CPU minutes"] > 0


@pytest.mark.parametrize("n", ["0", "-5", "inf", "nan"])
def test_a_text_without_bytes_is_refused(n, tmp_path):
    with pytest.raises(ValueError, match="expected at least 1"):
        large_text.main([f"--bytes={n}", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "x.json")])
    assert not any(tmp_path.iterdir())
