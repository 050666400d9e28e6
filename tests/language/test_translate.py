"""Translation: smoothed targets, dates, the picture, and the commands."""

import datetime
import json

import pytest
import torch
import torch.nn.functional as F
from small_t5 import OLD, small

import train
from data.text_pairs import Pair
from language import translate
from language.translate import Config, cross_attention, dates, spellings


def batch(B=2, S=9, T=6):
    generator = torch.Generator().manual_seed(3)
    tokens, targets = (torch.randint(2, 61, (B, n), generator=generator) for n in (S, T))
    targets[1, 4:] = -100
    return {"tokens": tokens, "targets": targets, "lengths": torch.tensor([S, S - 3])}


@pytest.mark.parametrize("changes", [{}, OLD], ids=["1.0", "original"])
def test_the_smoothed_loss_and_its_gradient_are_those_of_torch_and_held_out_loss_is_not_smoothed(changes):
    gradients = []
    for ours in (True, False):
        model = translate.wrap(small(**changes), Config(0.3)).train()
        if ours:
            loss, _ = translate.loss(model, batch())
        else:
            logits = model(**batch())
            expected = F.cross_entropy(
                logits.flatten(0, 1), batch()["targets"].flatten(), label_smoothing=0.3
            )
            loss, found = expected, loss
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert abs(found - expected) < 1e-5
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert translate.loss(model.eval(), batch())[0] == model.loss(batch())[0]


def test_dates_are_spelled_in_six_ways_and_none_is_on_both_sides():
    day = datetime.date(1987, 3, 3)
    assert "Tuesday, 3 March 1987" in spellings(day) and len(set(spellings(day))) == 6
    train_pairs, held_out = dates(300, 50)
    assert len(train_pairs) == 300 and len(held_out) == 50 and dates(300, 50)[1] == held_out
    assert not {pair.target for pair in train_pairs} & {pair.target for pair in held_out}
    for source, target in held_out:
        assert source in spellings(datetime.date.fromisoformat(target))


@torch.no_grad()
def test_the_weights_of_the_picture_are_those_that_the_decoder_uses():
    model, (source, target) = small(**OLD), ([5, 6, 7, 8, 9], [10, 11, 12])
    found = cross_attention(model, source, target)
    assert [w.shape for w in found] == [(3, 5)] * 2
    assert all(torch.allclose(w.sum(1), torch.ones(3)) for w in found)
    # The first layer's output of cross attention, from the weights of each head.
    block, tokens, targets = model.decoder.block[0], torch.tensor([source]), torch.tensor([target])
    cross, seen = block.layer[1].EncDecAttention, []
    hook = cross.register_forward_hook(lambda m, args, output: seen.append((args, output)))
    model.hidden(tokens, targets)
    hook.remove()
    (q, k, v), output = seen[0]
    weights = (torch.einsum("bthk,bshk->bhts", cross.heads(q), k) * cross.scale).softmax(-1)
    mixed = torch.einsum("bhts,bshk->bthk", weights, v).flatten(2)
    assert torch.allclose(cross.o(mixed), output, atol=1e-5)
    assert torch.allclose(weights[0].mean(0), found[0], atol=1e-6)


def held_out_losses(run):
    """Return the losses of a run's evaluations."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["val_loss"] for row in rows if "val_loss" in row]


SMALL = "--model t5 --task translate --tokenizer bytes --seq-len 40 --batch-size 8"
SIZES = "--set original=True mlp=relu n_layers=1 d_model=32 d_ff=32 n_heads=2 d_head=16"


def test_a_run_learns_draws_and_translates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = [Pair(f"eins {i % 10} zwei", f"one {i % 10} two") for i in range(100)]
    lines = [f"{a} {i}\t{b} {i}\n" for i, (a, b) in enumerate(pairs)]
    (tmp_path / "pairs.tsv").write_text("".join(lines))
    (tmp_path / "test.tsv").write_text("".join(lines[:3]))
    flags = f"{SMALL} {SIZES} --data pairs.tsv --eval-every 10 --schedule constant --warmup 2 --lr 0.01"
    assert train.main(f"{flags} --steps 20 --out whole".split()) == 0
    losses = held_out_losses(tmp_path / "whole")
    capsys.readouterr()
    assert losses[-1] < losses[0] - 1
    assert "BLEU" in (tmp_path / "whole" / "samples.txt").read_text()
    assert (tmp_path / "whole" / "attention.png").exists()

    translate.main(["whole/model", "--score", "test.tsv", "--beams", "2", "--max-new-tokens", "12"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and printed[-1].startswith("BLEU ") and printed[-1].endswith("of 3 texts")
    with pytest.raises(ValueError, match="expected one of --text"):
        translate.main(["whole/model"])
    with pytest.raises(ValueError, match="--beams 0: expected at least 1"):
        translate.main(["whole/model", "--text", "eins", "--beams", "0"])


def test_a_model_with_few_positions_writes_translations_no_longer_than_these(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f"eins {i % 10} zwei {i}\tone {i % 10} two {i}\n" for i in range(40)]
    (tmp_path / "pairs.tsv").write_text("".join(lines))
    sizes = "--set n_layers=1 d_model=32 d_ff=32 n_heads=2"
    flags = f"--model bart --task translate --data pairs.tsv --tokenizer bytes --seq-len 24 {sizes}"
    # Targets have 11 to 13 tokens, of which translations may have twice as many: more than 24.
    assert train.main(f"{flags} --steps 1 --eval-every 1 --out run".split()) == 0
    assert "BLEU" in (tmp_path / "run" / "samples.txt").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data none.tsv", "--data none.tsv: no such file; expected a source, a tab and a target"),
        ("--document-mask", "--document-mask: a pair is one text and its translation"),
        ("--set label_smoothing=1.0", "label_smoothing 1.0: expected 0 to less than 1"),
    ],
)
def test_mistakes_end_in_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(f"{SMALL} --steps 1 {flags} --out run".split()) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0]
