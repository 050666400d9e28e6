"""The command fit: what it prints and writes."""

import json

import pytest
from test_chinchilla import grid

from chinchilla import HOFFMANN, LAWS, main
from scaling import fit_report, identified


@pytest.mark.usefixtures("rendered")
def test_the_fit_command(tmp_path, capsys):
    assert main(["fit", "--bootstrap", "200", "--at", "5.76e23", "--out", str(tmp_path / "a" / "b")]) == 0
    printed = capsys.readouterr().out
    assert "240 points" in printed and "477.83" in printed and "1.6 orders of magnitude above" in printed
    written = json.loads((tmp_path / "a" / "b" / "fit.json").read_text())
    assert written["law"]["A"][0] == pytest.approx(477.826, rel=1e-5)
    assert written["law"]["a"][1] < 0.5139 < written["law"]["a"][2]
    assert abs(written["held_out"]["error"]) < 0.01
    (line_of_B,) = (line for line in printed.splitlines() if line.startswith("B "))
    assert len(written["residuals"]) == 240 and line_of_B.endswith("hardly determined")
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
    assert "warning: only 3 sizes" in printed
    for way in ("approach 1, envelope", "approach 2, IsoFLOP parabolas"):
        (line,) = (line for line in printed.splitlines() if line.startswith(way))
        assert "none: " in line and "expected at least" in line


def test_budgets_below_the_points_and_of_many_tokens_are_said_to_be(tmp_path, capsys):
    N, D, L = grid(LAWS["besiroglu"].law, noise=0.001, ratios=(300, 3000))
    rows = "\n".join(f"{n},{d},{loss}" for n, d, loss in zip(N, D, L, strict=True))
    (tmp_path / "long.csv").write_text("N,D,loss\n" + rows)
    flags = ["--bootstrap", "20", "--at", "1e16", "1e6", "--out", str(tmp_path / "out")]
    assert main(["fit", str(tmp_path / "long.csv"), *flags]) == 0
    printed = capsys.readouterr().out
    assert "  1e+16  no optimum" not in printed and "2.7 orders of magnitude below the points" in printed
    many = identified.doubts_of_optimum({"C": 1e20, "D/N": (400, 350, 450)}, {"C": (1e19, 1e21)})
    assert many == "above 300 tokens per parameter laws overstate what more are worth"
    assert "  1e+06  no optimum: 12.7 orders of magnitude below the points, more than 1,000 times" in printed
    few = main(["fit", str(tmp_path / "long.csv"), "--bootstrap", "19", "--out", str(tmp_path / "out")])
    assert few == 2 and "--bootstrap 19: expected at least 20" in capsys.readouterr().err


CEREBRAS = """N,D,{loss}
111e6,2.2e9,2.566
256e6,5.1e9,2.299
590e6,11.8e9,2.184
1.3e9,26.3e9,1.996
2.7e9,53e9,1.834
6.7e9,133e9,1.704
13e9,257e9,1.572
"""


def test_a_law_that_the_points_leave_open_is_neither_printed_nor_drawn_nor_shown_on_a_page(
    tmp_path, capsys, monkeypatch
):
    """Seven models of 20 tokens per parameter: the optimum of the fitted law has 1e30 parameters."""
    drawn = []
    monkeypatch.setattr(fit_report, "save_figure", lambda figure, path: drawn.append(figure))
    path = tmp_path / "cerebras.csv"
    path.write_text(CEREBRAS.format(loss="pile_test_xent"))
    flags = ["--bootstrap", "20", "--out", str(tmp_path / "out")]
    assert main(["fit", str(path), *flags]) == 2
    said = capsys.readouterr().err
    assert "it has N, D, pile_test_xent. Rename a column: loss may be called loss or l or val_loss" in said

    path.write_text(CEREBRAS.format(loss="Loss"))
    assert main(["fit", str(path), *flags]) == 0
    printed = capsys.readouterr().out
    assert "No law and no optimum" in printed and "D follows from N" in printed
    assert "D*" not in printed and "e30" not in printed and "E and B are on the border" in printed
    assert "approach 3, the law above         none: the points do not determine the law" in printed
    (left, *_) = drawn[0].axes
    assert not left.lines and "No frontier" in left.texts[0].get_text()

    page = ["page", "--points", str(path), "--fit", str(tmp_path / "out" / "fit.json")]
    assert main([*page, "--out", str(tmp_path / "page.html")]) == 2
    assert "its points do not determine a law" in capsys.readouterr().err


def test_the_papers_points_as_a_file_of_ones_own_give_the_same_law(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fit_report, "plot_fit", lambda *_: None)
    path = tmp_path / "mine.csv"
    path.write_text(HOFFMANN.read_text())
    flags = ["--bootstrap", "20", "--out", str(tmp_path / "out")]
    printed = []
    for argv in ([], [str(path)], [str(path), "--drop", "0"]):
        assert main(["fit", *argv, *flags]) == 0
        printed.append(capsys.readouterr().out)
    built_in, own, everything = (
        [line for line in text.splitlines() if line[:2] in ("E ", "B ")] for text in printed
    )
    assert built_in == own != everything
    for text in printed[:2]:
        assert "245 rows, 5 left out: " in text and "(--drop 0) a is 0.5646" in text
        for line in (190, 198, 207, 213, 229):
            assert f"left out: line {line}," in text
        assert "kept, though more than 5 robust standard deviations away: line 172," in text
    assert "245 rows, 0 left out: by --drop 0" in printed[2]
    assert "more than 11 robust standard deviations away" in printed[1]


def test_an_earlier_fit_is_replaced_only_where_out_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit_report, "plot_fit", lambda *_: None)
    assert main(["fit", "--bootstrap", "20"]) == 0
    before = (tmp_path / "runs" / "fit" / "fit.json").read_text()
    capsys.readouterr()
    assert main(["fit", "--bootstrap", "30"]) == 2
    error = capsys.readouterr().err
    assert "runs/fit holds an earlier fit" in error and error.count("\n") == 1
    assert (tmp_path / "runs" / "fit" / "fit.json").read_text() == before
    assert main(["fit", "--bootstrap", "30", "--out", "runs/fit"]) == 0
    assert (tmp_path / "runs" / "fit" / "fit.json").read_text() != before


def test_where_nothing_can_be_written_is_found_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["fit", "--out", str(tmp_path / "file")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "cannot be made a directory" in said.err and said.err.count("\n") == 1
