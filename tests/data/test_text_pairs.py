"""Pairs of texts: the forms of files, what is left out and counted, what is held out, and batches."""

import gzip
import json

import numpy as np
import pytest
import torch

from data.text_pairs import Pair, as_dataset, make_batch, read, read_pairs, sides_of
from data.tokenizer import Tokenizer
from formats.tokenizer_json import END_OF_TEXT, GPT2_PATTERN

PAIRS = [Pair(f"quelle {i}", f"source {i}") for i in range(60)]


def tokenizer():
    plain = Tokenizer({bytes([i]): i for i in range(256)}, GPT2_PATTERN, {END_OF_TEXT: 256})
    return plain.with_special_tokens({"pad_token": "<pad>"})


def test_tabs_records_and_gzip_hold_the_same_pairs(tmp_path):
    lines = "".join(f"{a}\t{b} \r\n\n" for a, b in PAIRS)
    (tmp_path / "a.tsv").write_bytes(lines.encode())
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in PAIRS))
    (tmp_path / "a.csv").write_text("source,target\n" + "".join(f"{a},{b}\n" for a, b in PAIRS))
    for name in ("a.tsv", "a.tsv.gz", "a.jsonl", "a.csv"):
        assert read_pairs(tmp_path / name) == PAIRS, name


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.tsv", "one\ttwo\nalone\n", "line 2: 1 cells between tabs; expected a source, a tab"),
        ("a.tsv", "one\ttwo\tthree\n", "line 1: 3 cells"),
        ("a.jsonl", '{"source": "a"}\n', 'expected a source, a tab and a target; or a record {"source"'),
        ("a.tsv", "\n", "has no pairs of texts"),
        ("a.txt", "one\ttwo", "expected a file of pairs of texts"),
    ],
)
def test_what_is_no_pair_is_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        read_pairs(tmp_path / name)
    assert message in str(error.value) and name in str(error.value)


def test_empty_sides_and_duplicates_are_counted_and_no_source_is_on_both_sides(tmp_path):
    twice = [Pair(source, f"another {i}") for i, (source, _) in enumerate(PAIRS)]  # each source comes again
    rows = [*PAIRS, *twice, PAIRS[0], Pair("", "x"), Pair("x", " ")]
    (tmp_path / "a.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    train, held_out, counts = read(str(tmp_path / "a.tsv"), None, "refuse", print)
    assert len(held_out) == 6 and len(train) == 114 and set(train + held_out) == set(PAIRS + twice)
    assert not {pair.source for pair in train} & {pair.source for pair in held_out}
    assert counts["empty"] == 2 and counts["duplicates"] == 1
    assert read(str(tmp_path / "a.tsv"), None, "refuse", print)[1] == held_out

    (tmp_path / "val.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS[:10]))
    train, held_out, counts = read(str(tmp_path / "a.tsv"), str(tmp_path / "val.tsv"), "refuse", print)
    assert held_out == PAIRS[:10] and counts["with a source that is held out"] == 20 and len(train) == 100


def test_long_pairs_are_dropped_and_counted_or_their_sources_cut():
    pairs = [Pair("abc", "d"), Pair("abcdef", "e"), Pair("a", "bcdefg")]
    dataset = as_dataset(pairs, pairs[:1], tokenizer(), 4)
    assert len(dataset.train) == 1 and "2 longer than 4 tokens" in dataset.summary
    cut = as_dataset(pairs, pairs[:1], tokenizer(), 4, cut=True)
    assert [sides_of(cut.train[i])[0] for i in range(2)] == [[*b"abc", 256]] * 2
    assert "1 longer than 4 tokens" in cut.summary and "1 with a source cut to 4 tokens" in cut.summary
    beside = as_dataset([Pair("abcdef", "e"), Pair("a", "b")], pairs[:1], tokenizer(), 4, cut=True)
    assert sides_of(beside.train[1])[0] == [*b"a", 256]  # a shorter source stays as it is
    assert cut.fingerprint != dataset.fingerprint
    with pytest.raises(ValueError, match="--seq-len 1: too short for all 3 pairs to train on"):
        as_dataset(pairs, pairs, tokenizer(), 1)


def test_the_guess_is_the_loss_by_the_frequencies_of_target_tokens_without_padding():
    # The targets to learn from have two "b", one "c", two ends; each of 258 tokens counts once more.
    dataset = as_dataset([Pair("a", "bbc"), Pair("aaaaaa", "")], [Pair("a", "b")], tokenizer(), 8)
    assert dataset.guess == f"by frequency a token of a target has {np.log(263 / 3):.2f} nats"


def test_a_batch_is_padded_and_its_targets_end():
    t = tokenizer()
    dataset = as_dataset([Pair("abc", "d"), Pair("a", "bc")], [Pair("a", "b")], t, 9)
    batch = make_batch([dataset.train[0], dataset.train[1]], None, None, t)
    assert batch["tokens"].tolist() == [[*b"abc", 256], [97, 256, t.pad_id, t.pad_id]]
    assert batch["targets"].tolist() == [[100, 256, -100], [98, 99, 256]]
    assert torch.equal(batch["lengths"], torch.tensor([4, 2]))
    assert "lengths" not in make_batch([dataset.val[0]], None, None, t)
