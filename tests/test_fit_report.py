"""The command fit: what it prints and writes."""

import json

import pytest
from test_chinchilla import grid

from chinchilla import LAWS, main


def test_the_fit_command(tmp_path, capsys):
    assert main(["fit", "--bootstrap", "200", "--at", "5.76e23", "--out", str(tmp_path / "a" / "b")]) == 0
    printed = capsys.readouterr().out
    assert "240 points" in printed and "477.83" in printed and "1.6 orders of magnitude beyond" in printed
    written = json.loads((tmp_path / "a" / "b" / "fit.json").read_text())
    assert written["law"]["A"][0] == pytest.approx(477.826, rel=1e-5)
    assert written["law"]["a"][1] < 0.5139 < written["law"]["a"][2]
    assert abs(written["held_out"]["error"]) < 0.01
    assert (tmp_path / "a" / "b" / "fit.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["fit.json", "fit.png"]


def test_the_fit_command_on_a_file_that_allows_less(tmp_path, capsys):
    N, D, L = grid(LAWS["besiroglu"].law, sizes=3, tokens=4, noise=0.01)
    rows = "\n".join(f"{n},{d},{loss}" for n, d, loss in zip(N, D, L, strict=True))
    (tmp_path / "few.csv").write_text("N,D,loss\n" + rows)
    assert main(["fit", str(tmp_path / "few.csv"), "--bootstrap", "50", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for text in ("only 3 sizes", "no approach 1", "no approach 2"):
        assert f"warning: {text}" in printed
