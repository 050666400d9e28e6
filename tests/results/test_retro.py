"""The bits per byte over overlap of results/retro.py by hand, and both of its parts on little."""

import json
import math

import numpy as np
import pytest
import torch

from language import retro_rows
from results import retro


def test_bits_per_byte_are_those_of_the_chunks_up_to_an_overlap():
    nats = np.log(2) * np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 100])  # the last token is in no whole chunk
    n_bytes = np.array([1, 1, 2, 2, 3, 3, 4, 4, 9])
    found = retro.by_overlap(nats, n_bytes, np.array([0, 2, 1, 1]), m=2)
    assert found == {
        "0.125": pytest.approx(3 / 2),
        "0.25": pytest.approx(3 / 2),
        "0.5": pytest.approx((3 + 11 + 15) / (2 + 6 + 8)),
        "1.0": pytest.approx(36 / 20),
    }


def test_both_parts_write_their_rows(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    monkeypatch.setattr(retro_rows, "N_FACTS", 320)
    monkeypatch.setattr(retro_rows, "N_HELD_OUT", 64)
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(12):
        lines = [f"the line {(i * 3 + j) % 17} of all is {(i + j) % 17 * 37}\n" for j in range(120)]
        (folder / f"{i:02}.txt").write_text("".join(lines))
    argv = ["--out", str(tmp_path / "retro.json"), "--work", str(tmp_path / "work"), "--seeds", "0"]
    argv += ["--steps", "2", "--data", str(folder), "--parts", "facts", "text"]
    retro.main(argv)
    facts, *text = json.loads((tmp_path / "retro.json").read_text())["rows"]
    assert 0 <= facts["with"] <= 1 and facts["facts"] == 48  # 16 rows of three
    names = [(row["model"], row["neighbours"]) for row in text]
    assert names == [("gpt", "without"), ("retro", "with"), ("retro", "without"), ("retro", "of others")]
    for row in text:
        assert row["share"]["1.0"] == 1.0 and 0 < row["bits per byte"]["1.0"] < math.log2(4096)
    capsys.readouterr()
    retro.main(argv)
    assert len(capsys.readouterr().out.splitlines()) == 5
