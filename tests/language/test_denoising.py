"""BART's damages: how much is gone, what stays in order, and a model that learns from them."""

import json
from collections import Counter

import pytest
import torch
from conftest import rows_of

import train
from data.tokenizer import Tokenizer
from formats.tokenizer_json import END_OF_TEXT, GPT2_PATTERN
from language import denoising
from language.denoising import Config, infill, permute, span_lengths

MASK = -1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tokenizer():
    plain = Tokenizer({bytes([i]): i for i in range(256)}, GPT2_PATTERN, {END_OF_TEXT: 256})
    return plain.with_special_tokens({"pad_token": "<pad>", "mask_token": "<mask>"})


def test_thirty_percent_are_gone_in_any_length_and_what_stays_is_in_order():
    random = generator()
    for n in torch.randint(1, 400, (300,), generator=random).tolist():
        tokens = torch.arange(n)
        text = infill(tokens, random, MASK)
        kept = text[text != MASK].tolist()
        assert kept == sorted(set(kept)) and len(kept) == n - -(-3 * n // 10)
        assert len(text) <= n


def test_span_lengths_have_the_law_of_poisson():
    random, found = generator(), Counter()
    for _ in range(300):
        lengths = span_lengths(200, 3.0, random)
        assert lengths.sum() == 200
        found.update(lengths[:-1].tolist())  # the last is cut
    n, law = found.total(), torch.distributions.Poisson(3.0)
    for length in range(8):
        p = law.log_prob(torch.tensor(float(length))).exp().item()
        assert abs(found[length] / n - p) < 4 * (p * (1 - p) / n) ** 0.5, length


def test_spans_begin_everywhere_and_one_of_no_tokens_only_adds_a_mask():
    random, first, added = generator(), Counter(), 0
    for _ in range(200):
        text = infill(torch.arange(10), random, MASK, rate=0.1, mean_span=0.5)
        assert len(text) in (10, 9 + 1)  # one token is gone, and as many masks as tokens at most
        added += int((text == MASK).sum()) - 1
        first[int((text == MASK).nonzero()[0])] += 1
    assert set(first) == set(range(10))
    # Of three tokens gone, up to three masks stand for them.
    counts = Counter(
        int((infill(torch.arange(10), random, MASK, 0.3, 0.5) == MASK).sum()) for _ in range(100)
    )
    assert set(counts) == {1, 2, 3}


def test_every_order_of_sentences_comes_and_each_sentence_stays_whole():
    tokens, ends = torch.arange(7), torch.tensor([0, 1, 0, 0, 1, 0, 0]).bool()
    random, parts, seen = generator(), [[0, 1], [2, 3, 4], [5, 6]], Counter()
    for _ in range(600):
        text = permute(tokens, ends, random).tolist()
        order = sorted(range(3), key=lambda i: text.index(parts[i][0]))
        assert text == [token for i in order for token in parts[i]]
        seen[tuple(order)] += 1
    assert len(seen) == 6 and min(seen.values()) > 60


def test_a_batch_has_damaged_texts_and_whole_ones_with_end_tokens():
    t, text = tokenizer(), list(b"one line\nand another one\nand the last")
    rows = rows_of(torch.tensor([text, text]))
    batch = denoising.make_batch(rows, Config(), generator(), t)
    assert batch["targets"].tolist() == [[*text, t.eot_id]] * 2
    for row, n in zip(
        batch["tokens"].tolist(), batch.get("lengths", [batch["tokens"].shape[1]] * 2), strict=True
    ):
        assert row[int(n) - 1] == t.eot_id and t.mask_id in row and set(row[int(n) :]) <= {t.pad_id}
        assert not Counter(row[: int(n)]) - Counter([*text, t.eot_id]) - Counter({t.mask_id: 99})


def held_out_losses(run):
    """Return the losses of a run's evaluations."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["val_loss"] for row in rows if "val_loss" in row]


@pytest.mark.parametrize(
    "changes, message",
    [({"noise_rate": 1.0}, "noise_rate 1.0"), ({"mean_span": 0.0}, "mean"), ({"mean_span": 1e-9}, "mean")],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_the_command_trains_a_bart_that_is_better_after_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"line {i % 7} of the text.\n" for i in range(600)))
    small = "--model bart --data text.txt --tokenizer bytes --seq-len 24 --steps 30 --eval-every 30 --lr 0.01"
    sizes = "--set n_layers=1 d_model=32 d_ff=32 n_heads=2 --out run"
    assert train.main(f"{small} {sizes}".split()) == 0
    shown = (tmp_path / "run" / "samples.txt").read_text()
    assert shown.count("of the restored tokens are as in the originals") == 2 and "--- damaged" in shown
    losses = held_out_losses(tmp_path / "run")
    capsys.readouterr()
    assert losses[-1] < losses[0] - 1
    assert train.main(f"--model bart --document-mask {small[13:]} {sizes}2".split()) == 2
    assert "--document-mask: an input and its target are one text" in capsys.readouterr().err
