"""Data: what is refused, what is held out, what is kept on disk, and in which order it comes out."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data.text
from data.rows import Loader, in_order, seed_of, stack
from data.shards import Corpus, Split
from data.tokenizer import END_OF_TEXT
from formats.atomic import write_checksums


def write_corpus(folder, n_documents=40):
    """A folder of Python-like text, one document a file."""
    folder.mkdir()
    for i in range(n_documents):
        (folder / f"{i:02}.py").write_text(
            "".join(f"def f{i}_{j}(x):\n    return x + {i * j}\n\n" for j in range(9))
        )
    return folder


def prepare(what, tmp_path, tokenizer="bytes", **options):
    return data.text.prepare(str(what), tokenizer, tmp_path / "cache", **options)


# --- what is refused


BAD = {
    "latin-1": (b"caf\xe9\n" * 100, "byte 3 (0xe9) is not UTF-8"),
    "binary": (b"ELF" + bytes(200), "byte 3 is NUL"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_text_is_named_with_its_offset_and_refused_or_skipped(kind, tmp_path):
    folder = write_corpus(tmp_path / "texts")
    good = prepare(folder, tmp_path)
    raw, message = BAD[kind]
    (folder / "00a.txt").write_bytes(raw)
    with pytest.raises(ValueError) as refused:
        prepare(folder, tmp_path)
    for part in ("00a.txt", message, "--bad-text skip"):
        assert part in str(refused.value)
    said = []
    skipped = prepare(folder, tmp_path, bad_text="skip", notify=said.append)
    assert len(said) == 1 and message in said[0]
    assert np.array_equal(skipped.train.tokens, good.train.tokens)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.txt", b"", "0 bytes of text"),
        ("short.txt", b"hello", "5 bytes of text"),
        ("held.txt", b"a line\n" * 50, "350 bytes of text; expected at least 400"),
    ],
)
def test_too_small_a_corpus_is_named(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        prepare(path, tmp_path)
    assert name in str(error.value)


@pytest.mark.parametrize("tokenizer", ["bpe:12", "bpe:many", "no-such-encoding"])
def test_unknown_tokenizers_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=tokenizer):
        prepare(write_corpus(tmp_path / "texts"), tmp_path, tokenizer)


# --- shards


def test_shards_hold_the_text_with_every_document_boundary(tmp_path):
    folder = write_corpus(tmp_path / "texts")
    dataset = prepare(folder, tmp_path)
    texts = [path.read_text() for path in sorted(folder.iterdir())]
    both = np.concatenate([dataset.train.tokens, dataset.val.tokens])
    assert dataset.tokenizer.decode(both) == "".join(END_OF_TEXT + text for text in texts)
    assert dataset.train.n_documents + dataset.val.n_documents == len(texts)
    assert dataset.val.n_bytes == len(dataset.val.tokens) - dataset.val.n_documents  # one token a byte
    total = dataset.val.n_bytes + dataset.train.n_bytes
    assert 1 / 20 <= dataset.val.n_bytes / total < 1 / 10
    assert isinstance(dataset.train.tokens, np.memmap) and dataset.train.tokens.dtype == np.uint16


@pytest.mark.parametrize("text", ["line\n" * 999, "é" * 3001, "a" * 3000 + "\n"])
def test_one_document_is_divided_without_loss(text, tmp_path):
    (tmp_path / "one.txt").write_text(text)
    dataset = prepare(tmp_path / "one.txt", tmp_path)
    parts = [
        dataset.tokenizer.decode(s.tokens).removeprefix(END_OF_TEXT) for s in (dataset.train, dataset.val)
    ]
    assert "".join(parts) == text
    assert parts[0] and len(parts[1].encode()) >= 0.04 * len(text.encode())
    if "line" in text:
        assert parts[1].startswith("line")


@pytest.mark.parametrize(
    "text",
    [
        ("word " * 400 + "\n\n") * 5,  # long paragraphs, and an empty line at the end
        "x" * 20_000 + "\nend",  # a line break close to the end only
        "start\n" + "é" * 10_000,
        ("word " * 97 + "\n") * 40,
        "word " * 4_000,
    ],
)
def test_about_a_twentieth_is_held_out_wherever_line_breaks_are(text, tmp_path):
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    dataset = prepare(tmp_path / "one.txt", tmp_path)
    total = len(text.encode())
    assert dataset.train.n_bytes + dataset.val.n_bytes == total
    assert 0.75 / 20 <= dataset.val.n_bytes / total <= 1.25 / 20


@pytest.mark.parametrize("at, expected", [(10, "after"), (30, "before"), (60, "inside")])
def test_the_cut_moves_to_the_nearest_line_break_behind_or_before_it(at, expected):
    line = "x" * 19 + "\n"
    text = {"after": "x" * 9 + "\n" + "y" * 90, "before": line + "y" * 80, "inside": "y" * 100}[expected]
    head, tail = data.text.divide(text, 1000, 100, 1000 + at - (expected == "after"), tolerance=12)
    assert len(head) == {"after": 10, "before": 20, "inside": 60}[expected] and head + tail == text


def test_shards_divided_by_an_older_rule_are_built_anew(tmp_path):
    (tmp_path / "one.txt").write_text("word " * 4_000)
    good = prepare(tmp_path / "one.txt", tmp_path)
    manifest = tmp_path / "cache" / good.name / "manifest.json"
    old = json.loads(manifest.read_text())
    del old["nearest_line_break"]
    manifest.write_text(json.dumps(old))
    write_checksums(manifest.parent)
    said = []
    prepare(tmp_path / "one.txt", tmp_path, notify=said.append)
    assert len(said) == 1 and "built anew" in said[0]


# --- held-out text of one's own


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_held_out_text_may_be_named(tokenizer, tmp_path):
    folder, own = write_corpus(tmp_path / "texts"), tmp_path / "own.txt"
    own.write_text("text of its own\n" * 20)
    shared, named = prepare(folder, tmp_path, tokenizer), prepare(folder, tmp_path, tokenizer, val=str(own))
    assert named.tokenizer.decode(named.val.tokens) == END_OF_TEXT + own.read_text()
    assert named.train.n_bytes == shared.train.n_bytes + shared.val.n_bytes
    assert named.train.n_documents == 40 and named.name != shared.name
    again = data.text.reopen(tmp_path / "cache", named.name, tokenizer)
    assert np.array_equal(again.val.tokens, named.val.tokens)
    own.write_text("other text of its own\n" * 20)
    assert prepare(folder, tmp_path, tokenizer, val=str(own)).name != named.name


def test_held_out_text_that_is_trained_on_or_too_short_is_refused(tmp_path):
    folder = write_corpus(tmp_path / "texts")
    with pytest.raises(ValueError, match=r"--val \S+00\.py: \S+ is also part of --data"):
        prepare(folder, tmp_path, val=str(folder / "00.py"))
    with pytest.raises(ValueError, match=r"--val \S+: the same text as --data"):
        prepare(folder, tmp_path, val=str(write_corpus(tmp_path / "copy")))
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match=r"--val \S+short.txt: 5 bytes of text; expected at least 20"):
        prepare(folder, tmp_path, val=str(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match=r"--data \S+short.txt: 5 bytes of text; expected at least 20$"):
        prepare(tmp_path / "short.txt", tmp_path, val=str(folder))
    with pytest.raises(ValueError, match=r"--val \S+gone: no such file or folder"):
        prepare(folder, tmp_path, val=str(tmp_path / "gone"))


def test_many_bad_texts_are_counted_and_some_named(tmp_path):
    lines = ['{"text": "' + "good text " * 90 + '"}', *["bad"] * 30]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    said = []
    prepare(tmp_path / "x.jsonl", tmp_path, bad_text="skip", notify=said.append)
    assert len(said) == 6 and said[0].startswith("skipped: x.jsonl, line 2") and "30 texts in all" in said[5]


def test_text_is_read_from_a_named_field(tmp_path):
    (tmp_path / "x.csv").write_text("id,body\n" + "".join(f'{i},"body {i}"\n' for i in range(100)))
    dataset = prepare(tmp_path / "x.csv", tmp_path, text_field="body")
    assert dataset.train.n_documents + dataset.val.n_documents == 100


# --- a disk that is full


@pytest.mark.parametrize("name", ["train.bin", "manifest.json"])
def test_a_full_disk_is_named_with_the_file_and_leaves_nothing(name, tmp_path, monkeypatch):
    folder, opened = write_corpus(tmp_path / "texts"), io.open

    def open_full(path, *args, **options):
        return opened("/dev/full" if Path(path).name == name else path, *args, **options)

    monkeypatch.setattr(data.shards, "open", open_full, raising=False)
    monkeypatch.setattr(io, "open", open_full)  # of pathlib
    with pytest.raises(OSError) as full:
        prepare(folder, tmp_path)
    home = full.value.filename
    assert "the disk is full" in str(full.value) and str(tmp_path / "cache") in home
    assert home.endswith("train.bin") == (name == "train.bin")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_a_learned_tokenizer_has_not_seen_the_held_out_text(tmp_path):
    folder = write_corpus(tmp_path / "texts")
    last = sorted(folder.iterdir())[-1]
    last.write_text("zyxwvut " * 90)
    tokenizer = prepare(folder, tmp_path, "bpe:400").tokenizer
    assert tokenizer.n_vocab <= 400
    assert len(tokenizer.encode("zyxwvut")) == 7
    assert len(tokenizer.encode(" return")) == 1


def test_what_is_whole_is_not_built_again(tmp_path, monkeypatch):
    folder = write_corpus(tmp_path / "texts")
    first = prepare(folder, tmp_path, "bpe:300")
    for name in ("build_shards", "train_bpe"):
        monkeypatch.setattr(data.text, name, pytest.fail)
    second = prepare(folder, tmp_path, "bpe:300")
    assert second.name == first.name and np.array_equal(second.train.tokens, first.train.tokens)


def test_processes_started_together_share_one_cache(tmp_path):
    folder = write_corpus(tmp_path / "texts")
    # Each process writes a line for every step of its progress.
    code = (
        "import runpy, formats.progress as p; p.INTERVAL = 0.0; runpy.run_module('data.text', {}, '__main__')"
    )
    command = [sys.executable, "-c", code, folder, "--tokenizer", "bpe:300", "--cache", tmp_path / "cache"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert sum("tokenise train" in error for error in errors) == 1  # the others found it made


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("harm", [flip, truncate, lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["train.bin", "val.bin", "manifest.json", "checksums.json"])
def test_damaged_shards_are_named_and_rebuilt(name, harm, tmp_path):
    folder = write_corpus(tmp_path / "texts")
    good = prepare(folder, tmp_path)
    expected = np.array(good.train.tokens)
    harm(tmp_path / "cache" / good.name / name)
    said = []
    again = prepare(folder, tmp_path, notify=said.append)
    assert np.array_equal(again.train.tokens, expected)
    assert len(said) == 1 and "built anew" in said[0]
    assert name in said[0] or name == "checksums.json"  # a flipped checksum accuses the file it is of


def test_damaged_tokenizers_are_learned_again(tmp_path):
    folder = write_corpus(tmp_path / "texts")
    good = prepare(folder, tmp_path, "bpe:300")
    (home,) = (tmp_path / "cache").glob("*-bpe-300")
    path = home / "tokenizer.json"
    path.write_text(path.read_text().replace('"de"', '"dq"'))
    said = []
    again = prepare(folder, tmp_path, "bpe:300", notify=said.append)
    assert again.name == good.name
    assert len(said) == 1 and "tokenizer.json" in said[0]


def test_changed_text_is_never_served_from_the_cache(tmp_path):
    folder = write_corpus(tmp_path / "texts")
    before = prepare(folder, tmp_path)
    first = folder / "00.py"
    first.write_text(first.read_text().replace("return", "RETURN"))  # same size
    after = prepare(folder, tmp_path)
    assert after.name != before.name
    assert "RETURN" in after.tokenizer.decode(after.train.tokens[:500])


# --- rows


def read(loader, first_sample, n):
    return stack(loader.read(first_sample, n))["tokens"]


@pytest.mark.parametrize("n, T", [(1000, 16), (1000, 10), (1003, 10), (97, 96), (50, 7)])
def test_every_token_is_predicted_once_an_epoch_and_no_window_twice(n, T):
    """Windows tile the circle, so in E turns every token is a target E times, but for the open end."""
    rows = data.text.Windows(np.arange(n, dtype=np.uint16), T)
    loader, epochs = Loader(rows, seed=3), 5
    n_samples = rows.epoch_start(epochs)
    batch = read(loader, 0, n_samples)
    assert torch.equal(batch[:, 1:], (batch[:, :-1] + 1) % n)
    windows = [loader.row_number(i) for i in range(n_samples)]
    assert sorted(windows) == list(range(n_samples))
    times = torch.bincount(batch[:, 1:].flatten(), minlength=n)
    assert times.min() >= epochs and times.sum() == n_samples * T < epochs * n + T
    first_epoch = batch[: rows.epoch_start(1), 1:].flatten()
    assert len(first_epoch.unique()) == n


def test_order_depends_on_seed_and_epoch_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    rows = data.text.Windows(tokens, 10)
    whole = read(Loader(rows, seed=0), 0, 250)
    fresh = Loader(rows, seed=0)
    assert torch.equal(read(fresh, 137, 40), whole[137:177])  # as on resuming
    assert torch.equal(read(fresh, 12, 4), whole[12:16])  # and back in an earlier epoch
    assert not torch.equal(read(Loader(rows, seed=1), 0, 250), whole)
    assert not torch.equal(whole[:100], whole[100:200])
    assert not torch.equal(whole[:100, 0].sort().values, whole[:100, 0])


def test_any_number_of_ranks_reads_the_same_sequence():
    loader = Loader(data.text.Windows(np.arange(1000, dtype=np.uint16), 10), seed=0)
    ranks = [read(loader, 24 + rank * 4, 4) for rank in range(2)]
    assert torch.equal(torch.cat(ranks), read(loader, 24, 8))


def test_the_guess_is_the_most_frequent_token_and_the_loss_by_frequency():
    train, val = (Split(np.array(a, np.uint16), 4, 1) for a in ([1, 0, 1, 1], [1, 1, 0, 2]))
    corpus = Corpus("name", SimpleNamespace(n_vocab=3), train, val)
    # Counted once more, 0, 1 and 2 have 2, 4 and 1 of 7.
    assert data.text.as_rows(corpus, 2).guess == (
        "the most frequent token is right for 50.00% of the held out; by frequency a token has "
        f"{-np.log(4 / 7 * 4 / 7 * 2 / 7 * 1 / 7) / 4:.2f} nats"
    )


def test_too_little_text_is_named():
    with pytest.raises(ValueError, match="--seq-len 10: the training text has only 10 tokens"):
        data.text.Windows(np.arange(10), 10)


def test_held_out_text_of_less_than_a_whole_row_is_named(tmp_path):
    corpus = prepare(write_corpus(tmp_path / "texts"), tmp_path)
    n = len(corpus.val.tokens)
    assert len(data.text.as_rows(corpus, n - 1, only_whole=True).val) == 1
    assert len(data.text.as_rows(corpus, n).val) == 1
    with pytest.raises(ValueError, match=rf"--seq-len: rows are of {n + 1} tokens, but .* has only {n};"):
        data.text.as_rows(corpus, n, only_whole=True)


@pytest.mark.parametrize("n", [2, 16, 17, 18, 100, 161])
def test_held_out_batches_predict_every_token_once_in_order(n):
    held_out = data.text.HeldOut(np.arange(n, dtype=np.uint16), 16, n)
    rows = [stack(batch)["tokens"] for batch in in_order(held_out, 3)]
    targets = torch.cat([row[:, 1:].flatten() for row in rows])
    assert targets.tolist() == list(range(1, n))
    assert all(row.shape[0] <= 3 and row.shape[1] <= 17 for row in rows)


def test_cu_seqlens_begin_documents_at_rows_and_boundaries():
    tokens = torch.tensor([[7, 7, 0, 5], [0, 5, 5, 0]])
    assert data.rows.cu_seqlens(tokens, 0).tolist() == [0, 2, 4, 7, 8]
    assert data.rows.cu_seqlens(tokens, 0).dtype == torch.int32


def test_other_seeds_draw_other_numbers():
    # On a CPU torch.Generator ignores all but the lower 32 bits of a seed.
    drawn = {
        torch.rand(1, generator=torch.Generator().manual_seed(seed_of(seed, index))).item()
        for seed in range(20)
        for index in range(20)
    }
    assert len(drawn) == 400
    assert [seed_of(0, index) for index in (0, 1, 999)] == [0, 1, 999]
