"""Span corruption: lengths as published, nothing lost, and every objective of T5's table."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import SHARD, rows_of
from safetensors.torch import load_file
from small_t5 import SMALL

import train
from data.tokenizer import Tokenizer
from formats.tokenizer_json import END_OF_TEXT, GPT2_PATTERN
from language import beam_search, t5
from language import span_corruption as sc
from language.span_corruption import OBJECTIVES, SENTINELS, Config


def tokenizer():
    """Return a tokenizer of single bytes, with the sentinels of a T5."""
    plain = Tokenizer({bytes([i]): i for i in range(256)}, GPT2_PATTERN, {END_OF_TEXT: 256})
    return plain.with_special_tokens({"pad_token": "<pad>"}, reversed(SENTINELS))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


SENTINEL_IDS = torch.arange(1000, 1100)


@pytest.mark.parametrize(
    "S, n, T", [(114, 126, 26), (128, 141, 29), (256, 284, 58), (512, 568, 114), (1024, 1137, 229)]
)
def test_published_lengths(S, n, T):
    assert sc.text_length(S) == n and sc.corrupted_lengths(n) == (S, T)


def test_a_hundred_sentinels_suffice_up_to_two_thousand_tokens():
    assert sc.n_noise(2000) == (300, 100)


def test_input_and_target_restore_a_thousand_texts_whose_first_token_stays_and_whose_last_goes():
    random, known = generator(), set(SENTINEL_IDS.tolist())
    for n in torch.randint(2, 600, (1000,), generator=random).tolist():
        tokens, gone = torch.randint(0, 1000, (n,), generator=random), sc.spans(n, random)
        assert not gone[0] and gone[-1]
        text, target = sc.replace_noise(tokens, gone, SENTINEL_IDS)
        assert (len(text) + 1, len(target) + 1) == sc.corrupted_lengths(n)
        assert [t for t in text.tolist() if t in known] == [t for t in target.tolist() if t in known]
        assert sc.restore(text.tolist(), target.tolist(), known) == tokens.tolist()


def test_tokens_one_by_one_restore_the_text_too():
    random, known = generator(), set(SENTINEL_IDS.tolist())
    for n in (1, 2, 3, 50, 300):
        tokens, gone = torch.randint(0, 1000, (n,), generator=random), sc.single_tokens(n, random)
        assert gone.any()
        text, target = sc.replace_noise(tokens, gone, SENTINEL_IDS)
        assert sc.restore(text.tolist(), target.tolist(), known) == tokens.tolist()


def test_every_division_into_spans_is_equally_likely():
    random = generator()
    counts = Counter(tuple(sc.composition(6, 3, random).tolist()) for _ in range(5000))
    assert len(counts) == math.comb(5, 2)
    assert max(abs(n - 500) for n in counts.values()) < 5 * math.sqrt(500)  # five standard errors


def test_gaps_of_mean_length_three_at_fifteen_percent():
    gone = torch.stack([sc.spans(568, generator(seed)) for seed in range(50)])
    assert (gone.sum(1) == 85).all()  # round(0.15 * 568)
    begins = gone[:, 1:] & ~gone[:, :-1]
    assert (begins.sum(1) == 28).all()


def test_each_objective_makes_its_input_and_target():
    tokens, ordinary = torch.arange(90), torch.arange(90, 99)
    pairs = {
        name: sc.corrupt(tokens, Config(name, 0.3), generator(1), SENTINEL_IDS, ordinary)
        for name in OBJECTIVES
    }
    for name in ("bert_style", "mass_style", "deshuffle"):
        assert pairs[name][1].equal(tokens) and len(pairs[name][0]) == 90
    changed = {name: pairs[name][0][pairs[name][0] != tokens] for name in ("bert_style", "mass_style")}
    assert set(changed["mass_style"].tolist()) == {1000}
    masked = changed["bert_style"] == 1000
    assert masked.any() and set(changed["bert_style"][~masked].tolist()) & set(range(90, 99))
    assert pairs["deshuffle"][0].sort().values.equal(tokens) and not pairs["deshuffle"][0].equal(tokens)
    assert torch.cat(pairs["drop_tokens"]).sort().values.equal(tokens)
    assert torch.cat(pairs["prefix_lm"]).equal(tokens)


def test_a_prefix_has_every_length_but_none_and_all():
    lengths = {len(sc.prefix_lm(torch.arange(4), generator(seed))[0]) for seed in range(50)}
    assert lengths == {1, 2, 3}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_ends_with_end_tokens_and_is_padded_where_lengths_differ(name):
    words = tokenizer()
    rows = rows_of(torch.randint(0, 256, (3, 57), generator=generator()))
    batch = sc.make_batch(rows, Config(name), generator(), words)
    again = sc.make_batch(rows, Config(name), generator(), words)
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    lengths = batch.get("lengths", torch.full((3,), batch["tokens"].shape[1]))
    for text, target, n in zip(batch["tokens"], batch["targets"], lengths.tolist(), strict=True):
        assert text[n - 1] == words.eot_id and (text[n:] == words.pad_id).all()
        assert target[target >= 0][-1] == words.eot_id
    assert ("lengths" in batch) == (name in ("replace_tokens", "drop_tokens", "prefix_lm"))


def test_the_first_sentinel_has_the_last_id():
    words = tokenizer()
    assert (
        sc.sentinel_ids(words)[0] == words.n_vocab - 1 and sc.sentinel_ids(words)[99] == words.n_vocab - 100
    )
    with pytest.raises(ValueError, match="the tokenizer has no <extra_id_0>"):
        sc.sentinel_ids(Tokenizer({bytes([i]): i for i in range(256)}, GPT2_PATTERN, {END_OF_TEXT: 256}))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sc.n_noise(1), "a text of 1 tokens: expected at least 2"),
        (lambda: sc.text_length(2), "inputs of 2 tokens: expected at least 3"),
        (lambda: Config(noise_rate=1.0), "noise_rate 1.0: expected between 0 and 1"),
        (lambda: Config(mean_span=0.5), "mean_span 0.5: expected at least 1"),
        (lambda: Config("infilling"), "objective 'infilling': expected replace_spans or"),
        (
            lambda: sc.marks(torch.tensor([True, False, True]), SENTINEL_IDS[:1]),
            "2 gaps in a text: expected at",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_demonstration_shows_every_objective(capsys):
    sc.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in OBJECTIVES)


# --- training


def flags(tmp_path, out, **changes):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    (tmp_path / "text.txt").write_text("".join(f"{word} " * 60 + "\n" for _ in range(8) for word in words))
    options = {"model": "t5", "data": tmp_path / "text.txt", "tokenizer": "bytes", "seq-len": 24, "steps": 6}
    options |= {"batch-size": 8, "log-every": 1, "schedule": "constant", "cache": tmp_path / "cache"}
    options |= {"eval-every": 50, "out": out} | changes
    return [part for key, value in options.items() for part in (f"--{key}", *str(value).split())]


def test_training_fills_gaps_and_transformers_opens_the_result(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    like_tiny = {"n_layers": 1, "n_decoder_layers": 1, "mlp": "geglu", "scale_head": False}
    monkeypatch.setitem(t5.SIZES, "tiny", replace(SMALL, **like_tiny))
    out = tmp_path / "run"
    assert train.main(flags(tmp_path, out, steps=150, lr=0.01)) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert losses[-1] < 1.5 < 4 < losses[0]
    samples = (out / "samples.txt").read_text()
    assert "gaps are right; with" in samples and "<extra_id_0>" in samples

    theirs = transformers.T5ForConditionalGeneration.from_pretrained(out / "model").eval()
    model, words = t5.T5.from_pretrained(out / "model").eval(), Tokenizer.load(out / "model")
    assert model.config.start_token_id == model.config.pad_token_id == words.pad_id
    inputs = torch.tensor([[*words.encode("one on<extra_id_0> one", "all"), words.eot_id]])
    targets = torch.tensor([words.encode("<extra_id_0>e", "all")])
    assert words.n_vocab - 1 in inputs
    with torch.no_grad():
        difference = (model(inputs, targets) - theirs(input_ids=inputs, labels=targets).logits).abs().max()
    assert difference < 1e-5

    capsys.readouterr()
    beam_search.main(
        t5.T5, t5.SIZES, [str(out / "model"), "--text", "one on<extra_id_0> one", "--beams", "2"]
    )
    printed = capsys.readouterr().out
    assert printed.startswith("one on") and "extra_id" not in printed


@pytest.mark.parametrize("objective", ["replace_spans", "prefix_lm"])
def test_training_resumes_exactly(objective, tmp_path, monkeypatch):
    monkeypatch.setitem(t5.SIZES, "tiny", replace(SMALL, n_layers=1, n_decoder_layers=1))
    whole, parts, options = tmp_path / "whole", tmp_path / "parts", {"set": f"objective={objective}"}
    assert train.main(flags(tmp_path, whole, **options)) == 0
    assert train.main([*flags(tmp_path, parts, steps=3, **options), "--save-every", "3"]) == 0
    assert train.main([*flags(tmp_path, parts, **options), "--save-every", "3", "--resume"]) == 0
    a, b = (load_file(out / SHARD) for out in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("setting", ["objective=deshuffle", "noise_rate=0.05"])
def test_texts_that_bart_cannot_read_are_refused_before_training(setting, tmp_path, capsys):
    """A text of 27 tokens fits --seq-len 24 by T5's objective; as it is, it has 28 with the end token."""
    argv = flags(tmp_path, tmp_path / "run", model="bart", task="span_corruption", set=setting)
    assert train.main(argv) == 2
    assert "this model reads at most --seq-len 24; use --model t5" in capsys.readouterr().err


def test_documents_that_are_kept_apart_are_refused_in_one_line(tmp_path, capsys):
    assert train.main([*flags(tmp_path, tmp_path / "run"), "--document-mask"]) == 2
    assert "error: --document-mask: an input and its target are one text" in capsys.readouterr().err
