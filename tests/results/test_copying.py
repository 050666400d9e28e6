"""The task of results/copying.py: what is determined, and that a start goes on where another ended."""

import json

import pytest
import torch

from results import copying


def test_a_row_repeats_a_segment_and_only_what_is_determined_is_a_target():
    batch = copying.make_batch(50, torch.Generator().manual_seed(0))
    for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
        length = targets.count(-100) + 1
        assert 12 <= length <= 32 and targets[: length - 1] == [-100] * (length - 1)
        assert targets[length - 1 :] == [tokens[i + 1 - length] for i in range(length - 1, 64)]


def test_every_kind_learns_a_step_and_a_second_start_repeats_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(copying, "BATCH", 2)
    monkeypatch.setattr(copying, "N_TEST", 2)
    out = tmp_path / "copying.json"
    flags = ["--steps", "1", "--seeds", "1", "--out", str(out)]
    monkeypatch.setattr(copying, "plot", lambda rows, path: None)
    copying.main(flags)
    rows = json.loads(out.read_text())["results"]
    assert [row["layers"] for row in rows] == list(copying.KINDS)
    assert capsys.readouterr().out.count("seed 0") == len(rows)
    copying.main(flags)
    assert capsys.readouterr().out == ""


def test_a_model_that_copies_is_right_everywhere():
    class Copy(torch.nn.Module):
        def forward(self, tokens):
            """Return logits that find the longest earlier match by brute force."""
            n, T = tokens.shape
            logits = torch.zeros(n, T, copying.V)
            for b, row in enumerate(tokens.tolist()):
                for i in range(T):
                    for length in range(12, i + 2):  # the row begins again after so many tokens
                        if all(row[j] == row[j - length] for j in range(length, i + 1)):
                            logits[b, i, row[i + 1 - length]] = 1
                            break
            return logits

    before, copying.N_TEST = copying.N_TEST, 3
    try:
        assert copying.accuracy(Copy()) > 0.97  # before its second time, a segment may begin again earlier
    finally:
        copying.N_TEST = before
    assert copying.accuracy(copying.gpt.GPT(copying.KINDS["softmax"][1])) == pytest.approx(1 / 64, abs=0.02)
