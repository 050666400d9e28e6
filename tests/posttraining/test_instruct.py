"""Packed rows as trained on, and answers."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_command

import gpt
from data.rows import Loader, in_order
from data.tokenizer import GPT4_PATTERN, Tokenizer, train_bpe
from data.wordpiece import WordPiece
from formats.chat_template import end_id, prompt_tokens, render
from posttraining import instruct
from posttraining.instruct import make_batch, rows_within

TEXTS = ["What is the answer? The answer is 42.\n\ndef user(assistant):\n    return system\n<|user|>\n"] * 3
SYSTEM = {"role": "system", "content": "Be brief."}


def talk(*contents):
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def tokenizer_of(kind, pattern=GPT4_PATTERN):
    learned = train_bpe(TEXTS, 300, pattern=pattern)
    if kind == "tulu":
        return learned
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ids = {name: len(learned.ranks) + i for i, name in enumerate(special)}
    return Tokenizer(learned.ranks, pattern, ids)


TULU, CHATML = tokenizer_of("tulu"), tokenizer_of("chatml")
CONVERSATIONS = [
    talk("What is the answer?", "42."),
    talk("a\n", "b", "c  ", "d\n"),
    [SYSTEM, *talk("def f(x):\n    return x\n\n", "    return x", "Why?\n", " Because.", "", "!?\n\n")],
    [{"role": "system", "content": ""}, *talk("é\u0301 世界 😀", "  ok")],
    talk("I am\n<|assistant|>\nthe <|<|user|>user|>", "No: <|user|> and <|system|>"),
]


def numbered(n, seed=0):
    """Conversations of different lengths, some of several turns, that tell which they are."""
    rng = np.random.default_rng(seed)
    return [
        talk(*(f"{i} " + "the " * rng.integers(9) for _ in range(2 * rng.integers(1, 3)))) for i in range(n)
    ]


ID, RESPONSE, BEGIN = (1 << 32) - 1, 1 << 32, 1 << 33


def pack(conversations, tokenizer, seq_len, seed=0):
    """The conversations in rows of seq_len tokens."""
    return instruct.pack(rows_within(conversations, tokenizer, seq_len)[0], tokenizer, seq_len, seed)


def marked(rows):
    """Tokens of rows (n, T), with the bits RESPONSE and BEGIN for what the other arrays of a row say."""
    return np.stack([r["tokens"] + RESPONSE * r["in_response"] + BEGIN * r["begins"] for r in rows])


def split_conversations(tokens):
    """Of marked tokens, the pieces that begin at a BEGIN mark."""
    return np.split(tokens, np.flatnonzero(tokens & BEGIN))[1:]


def test_each_conversation_is_whole_and_there_once():
    conversations, T = numbered(60), 128
    rows = pack(conversations, TULU, T)
    packed = marked(rows)
    expected = []
    for messages in conversations:
        tokens, in_response = render(messages, TULU)
        expected.append([t + RESPONSE * r for t, r in zip(tokens, in_response, strict=True)])
    found = [piece for row in packed for piece in split_conversations(row)]
    assert all(row[0] & BEGIN for row in packed)
    padding = [piece for piece in found if not (piece & RESPONSE).any()]
    assert all((piece & ID == TULU.eot_id).all() for piece in padding)
    found = [(piece & ~BEGIN).tolist() for piece in found if (piece & RESPONSE).any()]
    assert sorted(found) == sorted(expected)
    assert sum(map(len, padding)) < 0.1 * packed.size
    assert (packed == marked(pack(conversations, TULU, T))).all()
    assert (packed[0] != marked(pack(conversations, TULU, T, seed=1))[0]).any()


def test_what_is_too_long_is_cut_or_left_out():
    long = [talk("why?", "b" * 50), talk("b" * 50, "why?"), talk("b" * 50, "4")]
    rows, n_cut = rows_within(long[:2] + CONVERSATIONS[:1], TULU, 40)
    assert (len(rows), n_cut) == (2, 1) and max(len(row["tokens"]) for row in rows) == 40
    assert len(instruct.conversations_in(pack(long[:2] + CONVERSATIONS[:1], TULU, 40), 99)) == 2
    with pytest.raises(ValueError, match="--seq-len 40: too short for all of 2 conversations"):
        rows_within(long[1:], TULU, 40)


def write(path, conversations):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path


def test_loader_and_evaluation_visit_the_rows(tmp_path):
    T, path = 64, write(tmp_path / "x.jsonl", numbered(80))
    dataset = instruct.prepare(str(path), TULU, T)
    rows = [dataset.train[i] for i in range(len(dataset.train))]
    targets_of_rows = [int(row["in_response"].sum()) for row in rows]
    visited = Loader(dataset.train, seed=3).read(0, 3 * len(rows))  # three epochs
    batch_targets = make_batch(visited, None, None)["targets"].view(-1, T)
    for epoch in range(3):
        part = slice(epoch * len(rows), (epoch + 1) * len(rows))
        assert sorted(marked(visited[part]).tolist()) == sorted(marked(rows).tolist())
        assert (batch_targets[part] != -100).sum() == sum(targets_of_rows)

    batches = list(in_order(dataset.val, 2))
    n = [int((make_batch(batch, None, None)["targets"] != -100).sum()) for batch in batches]
    assert sum(map(len, batches)) == len(dataset.val)
    assert sum(n) == sum(row["in_response"].sum() for batch in batches for row in batch) > 0


def test_prepare_holds_out_a_tenth_and_names_the_content(tmp_path):
    conversations = numbered(50)
    path = write(tmp_path / "x.jsonl", conversations + conversations[:9])
    dataset = instruct.prepare(str(path), TULU, 128)
    assert dataset.summary == "45 conversations to train on, 5 held out"
    assert dataset.tokenizer is TULU
    prompts = [
        {tuple(prompt) for prompt, _ in instruct.conversations_in(side.rows, 99)}
        for side in (dataset.train, dataset.val)
    ]
    assert len(prompts[0]) == 45 and len(prompts[1]) == 5 and not prompts[0] & prompts[1]

    names = {dataset.fingerprint, instruct.prepare(str(path), TULU, 128).fingerprint}
    assert len(names) == 1
    names |= {
        instruct.prepare(str(path), TULU, 120).fingerprint,
        instruct.prepare(str(path), CHATML, 128).fingerprint,
    }
    names |= {instruct.prepare(str(path), TULU, 128, seed=1).fingerprint}
    write(path, [*conversations[:-1], talk("another", "answer")])
    names |= {instruct.prepare(str(path), TULU, 128).fingerprint}
    assert len(names) == 5

    write(path, conversations[:1] * 3)
    with pytest.raises(ValueError, match="expected at least two"):
        instruct.prepare(str(path), TULU, 128)


def test_what_became_of_every_conversation_is_printed_and_adds_up(tmp_path):
    long = [talk(f"{i}", "b" * 80) for i in range(30)]
    silent = [talk(f"{i} " + "b" * 80, "why?") for i in range(7)]
    short = [talk(f"question {i}", f"answer {i}") for i in range(13)]
    path = write(tmp_path / "x.jsonl", long + silent + short + short[:5])
    path.write_text(path.read_text() + '{"question": "no answer"}\n' * 2)
    said = []
    options = {"bad_text": "skip", "longest": 64}
    dataset = instruct.prepare(str(path), TULU, 40, notify=said.append, **options)
    n_train, n_val = (len(instruct.conversations_in(side.rows, 99)) for side in (dataset.train, dataset.val))
    assert n_train + n_val == 30 + 13
    parts = "2 no conversations, 5 duplicates, 7 without an answer in their first 40 tokens"
    cut = "30 of these are cut to 40 tokens, as --seq-len says; up to --seq-len 64 is possible"
    assert said[2:] == [f"57 conversations read: {parts}, {n_train} to train on, {n_val} held out; {cut}"]
    assert 2 + 5 + 7 + n_train + n_val == 57
    assert dataset.summary == f"{n_train} conversations to train on, {n_val} held out"
    said.clear()
    instruct.prepare(str(path), TULU, 40, notify=said.append, bad_text="skip", longest=40)
    assert said[2].endswith("cut to 40 tokens, all that this model reads")
    with pytest.raises(ValueError, match=r"--data \S+x\.jsonl: \S+, line 56: .*--bad-text skip"):
        instruct.prepare(str(path), TULU, 40)


def test_held_out_conversations_may_be_named(tmp_path):
    conversations = numbered(20)
    data, val = (
        write(tmp_path / "x.jsonl", conversations[:15]),
        write(tmp_path / "v.jsonl", conversations[12:]),
    )
    said = []
    dataset = instruct.prepare(str(data), TULU, 128, notify=said.append, val=str(val))
    found = [len(instruct.conversations_in(side.rows, 99)) for side in (dataset.train, dataset.val)]
    assert found == [12, 8]  # what is in both is held out
    assert said == ["23 conversations read: 3 duplicates, 12 to train on, 8 held out"]
    write(val, conversations[11:])
    assert instruct.prepare(str(data), TULU, 128, val=str(val)).fingerprint != dataset.fingerprint
    write(val, conversations)
    with pytest.raises(ValueError, match="it has all conversations of --data"):
        instruct.prepare(str(data), TULU, 128, val=str(val))


def small_model(tokenizer):
    torch.manual_seed(0)
    return gpt.GPT(gpt.Config(2, 2, 32, 64, vocab_size=tokenizer.n_vocab, max_seq_len=128)).eval()


@pytest.mark.parametrize("tokenizer", [TULU, CHATML], ids=["tulu", "chatml"])
def test_a_packed_conversation_is_read_as_if_alone(tokenizer):
    model, T, conversations = small_model(tokenizer), 128, numbered(12)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    rows = pack(conversations, tokenizer, T)
    batch = make_batch(rows, model.config, torch.Generator(), tokenizer)
    assert batch["tokens"].shape == batch["targets"].shape == (1, len(rows) * T)
    assert batch["cu_seqlens"].dtype == torch.int32 and batch["cu_seqlens"][-1] == len(rows) * T

    alone, n_targets = [], 0
    with torch.no_grad():
        logits = model(batch["tokens"], cu_seqlens=batch["cu_seqlens"])[0]
        where = {}
        for start, end in zip(batch["cu_seqlens"][:-1], batch["cu_seqlens"][1:], strict=True):
            where[tuple(batch["tokens"][0, start:end].tolist())] = slice(start, end)
        for messages in conversations:
            ids, in_response = render(messages, tokenizer)
            expected = model(torch.tensor([ids]))[0]
            torch.testing.assert_close(logits[where[tuple(ids)]], expected, atol=1e-4, rtol=1e-4)
            wanted = [t if r else -100 for t, r in zip(ids[1:], in_response[1:], strict=True)]
            assert batch["targets"][0, where[tuple(ids)]].tolist() == [*wanted, -100]
            loss = F.cross_entropy(expected[:-1], torch.tensor(wanted), reduction="sum")
            alone.append(loss.item())
            n_targets += sum(in_response)
        loss, _ = model.loss(batch)
    assert (batch["targets"] != -100).sum() == n_targets
    assert loss.item() == pytest.approx(sum(alone) / n_targets, rel=1e-4)


def test_conversations_are_found_again():
    conversations = numbered(30)
    rows = pack(conversations, CHATML, 128)
    expected = set()
    for messages in conversations:
        prompt = prompt_tokens(messages[:1], CHATML)
        response = [*CHATML.encode(messages[1]["content"]), end_id(CHATML)]
        expected.add((tuple(prompt), tuple(response)))
    found = instruct.conversations_in(rows, 99)
    assert {(tuple(prompt), tuple(response)) for prompt, response in found} == expected
    assert instruct.conversations_in(rows, 3) == [found[0], found[10], found[20]]


@pytest.mark.parametrize("tokenizer", [TULU, CHATML], ids=["tulu", "chatml"])
def test_a_model_learns_to_answer(tokenizer):
    model, taught = small_model(tokenizer), [talk("What is 1?", "one"), talk("What is the sum?", "two, é")]
    batch = make_batch(pack(taught, tokenizer, 96), model.config, torch.Generator(), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss, _ = model.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    prompts = [prompt_tokens(messages[:1], tokenizer) for messages in taught]
    assert instruct.answers(model, tokenizer, prompts, batch_size=1) == ["one", "two, é"]
    assert instruct.answers(model, tokenizer, prompts) == ["one", "two, é"]
    assert instruct.answers(model, tokenizer, prompts, max_new_tokens=0) == ["", ""]
    assert instruct.answers(model, tokenizer, [prompts[0] * 20]) == [""]  # no room for an answer


def test_the_file_runs_by_itself(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "x.jsonl", [talk("Why?", "So."), talk("And?", "é", "?", "!")])
    monkeypatch.setattr(sys, "argv", ["posttraining/instruct.py", str(path)])
    instruct.main()
    shown = capsys.readouterr().out
    assert shown.startswith("2 conversations\n")
    assert "<|endoftext|><|user|>\nWhy?\n<|assistant|>\n»So.<|endoftext|>«\n" in shown

    failed = run_command("-m", "posttraining.instruct", tmp_path / "none.jsonl")
    assert failed.code == 2 and failed.out == ""
    assert failed.err.startswith("error: ") and failed.err.count("\n") == 1


def test_a_tokenizer_without_line_breaks_is_refused(tmp_path):
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "a"]
    WordPiece({word: i for i, word in enumerate(words)}).save(tmp_path)
    args = argparse.Namespace(tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="WordPiece drops the line breaks of conversations"):
        instruct.load_data(args, gpt.SIZES["tiny"])
