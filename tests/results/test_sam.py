"""The sharpness of results/sam.py against matrices whose eigenvalues are known, and a short comparison."""

import json
import math
from dataclasses import replace

import pytest
import torch

from results import sam
from vision import vit


def test_power_iteration_finds_the_largest_eigenvalue():
    torch.manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    for top in (9.0, -9.0):
        matrix = q @ torch.diag(torch.tensor([top, 3, 2, 1, 1, 0, 0, -1], dtype=torch.float64)) @ q.T
        weights = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (3, 5)]

        def loss(weights=weights, matrix=matrix):
            w = torch.cat(weights)
            return w @ matrix @ w / 2 + w.sum()

        # The share of the next eigenvalue falls by (3/9)^2 in each iteration.
        assert sam.largest_eigenvalue(loss, weights, 20) == pytest.approx(top, rel=1e-12)


def test_a_comparison_measures_each_run_once_and_keeps_its_rows(tmp_path, capsys, monkeypatch):
    asked = []

    def run(out, seed, *flags):
        """Stand for train.py: save a model with fresh weights, and return figures."""
        asked.append(flags)
        torch.manual_seed(seed)
        vit.ViT(replace(vit.SIZES["tiny"], n_layers=1)).save_pretrained(out / "model")
        return {"val_accuracy": 0.25, "val_loss": 3.0}

    monkeypatch.setattr(sam, "run", run)
    argv = ["--out", str(tmp_path / "sam.json"), "--work", str(tmp_path / "work"), "--seeds", "0"]
    argv += ["--steps", "7", "--iterations", "2", "--rho", "0.05"]
    sam.main(argv)
    found = json.loads((tmp_path / "sam.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["muon", "muon, twice", "sam, 0.05"]
    for row in found["rows"]:
        # By the slope |g| along g and the curvature: above the loss here, and not by much.
        assert 0 < row["loss at the worst point"] - row["loss"] < 1
        assert row["loss"] == pytest.approx(math.log(62), rel=0.1)
    assert [flags[flags.index("--steps") + 1] for flags in asked] == ["7", "14", "7"]
    assert ["--sam-rho" in flags for flags in asked] == [False, False, True]
    sam.main(argv)
    assert len(asked) == 3 and json.loads((tmp_path / "sam.json").read_text()) == found
    assert "sam, 0.05\n    unseen accuracy 0.250\n" in capsys.readouterr().out
