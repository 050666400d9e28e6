"""The command fit: what it prints and writes."""

import json

import pytest
from test_chinchilla import grid

from chinchilla import LAWS, main


@pytest.mark.usefixtures("rendered")
def test_the_fit_command(tmp_path, capsys):
    assert main(["fit", "--bootstrap", "200", "--at", "5.76e23", "--out", str(tmp_path / "a" / "b")]) == 0
    printed = capsys.readouterr().out
    assert "240 points" in printed and "477.83" in printed and "1.6 orders of magnitude above" in printed
    written = json.loads((tmp_path / "a" / "b" / "fit.json").read_text())
    assert written["law"]["A"][0] == pytest.approx(477.826, rel=1e-5)
    assert written["law"]["a"][1] < 0.5139 < written["law"]["a"][2]
    assert abs(written["held_out"]["error"]) < 0.01
    assert len(written["residuals"]) == 240 and "B and E are hardly determined" in printed
    assert written["approach1"]["a"] == pytest.approx(0.5329, abs=1e-3)
    bias = written["approach2"]["bias"]
    assert bias["C"] == 5.76e23 and f"put D* off by {bias['D']:+.1%} at 5.8e+23 FLOPs" in printed
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


def test_budgets_below_the_points_and_of_many_tokens_are_said_to_be(tmp_path, capsys):
    N, D, L = grid(LAWS["besiroglu"].law, noise=0.001, ratios=(300, 3000))
    rows = "\n".join(f"{n},{d},{loss}" for n, d, loss in zip(N, D, L, strict=True))
    (tmp_path / "long.csv").write_text("N,D,loss\n" + rows)
    flags = ["--bootstrap", "20", "--at", "1e15", "1e6", "--out", str(tmp_path / "out")]
    assert main(["fit", str(tmp_path / "long.csv"), *flags]) == 0
    printed = capsys.readouterr().out
    assert "orders of magnitude below the points" in printed
    few = main(["fit", str(tmp_path / "long.csv"), "--bootstrap", "19", "--out", str(tmp_path / "out")])
    assert few == 2 and "--bootstrap 19: expected at least 20" in capsys.readouterr().err


def test_where_nothing_can_be_written_is_found_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["fit", "--out", str(tmp_path / "file")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "cannot be made a directory" in said.err and said.err.count("\n") == 1
