"""Points from CSV files."""

import pytest

from scaling.points import read_points


def test_reading_points(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("Model Size, TOKENS ,Loss,note\n1e8,2e9,3.5,x\n\n2e8,4e9,3.1,\n")
    N, D, L = read_points(path)
    assert (N == [1e8, 2e8]).all() and (D == [2e9, 4e9]).all() and (L == [3.5, 3.1]).all()
    path.write_text("n,flops,loss\n1e8,6e18,3.5\n")
    assert read_points(path)[1] == pytest.approx([1e10])
    for text, message in (
        (
            "N,loss\n1,2\n",
            r"points.csv, line 1: expected columns .* it has N, loss. Rename a column: D or C may be",
        ),
        ("", "it has nothing"),
        ("N,D,loss\n", "no points"),
        ("N,D,loss\n1,2,3\n1,nan,3\n", "line 3: D is 'nan'"),
        ("N,D,loss\n1,2,-3\n", "line 2: loss is '-3'"),
        ("N,D,loss\n1,2\n", "line 2: loss is None"),
        ("N,D,loss\nseven,2,3\n", "line 2: N is 'seven'"),
        ("N,n,D,loss\n7,1,2,3\n", "line 1: columns N and n: expected one of this name"),
        ("N,D,loss\n1,2,3,5\n", "line 2: more cells than columns"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_points(path)
