"""Points from CSV files."""

import csv

import fuzz
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.points import beyond, read_points

FUZZ = fuzz.drawn(60, fuzz.PER_TEST_FIXTURES)
NAMES = st.sampled_from(["N", "D", "loss", " Tokens ", "params", "flops", "C", "note", "", "n", "\ufeffN"])
CELLS = st.sampled_from(
    ["1e8", "2e9", "3.5", "0", "-1", "nan", "inf", "", "x", "1e400", " 7 ", "1_000", '"', "5"]
)


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


def rows_of(names):
    return st.tuples(st.just(names), st.lists(st.lists(CELLS, min_size=2, max_size=4), max_size=4))


@FUZZ
@given(
    table=st.one_of(
        st.lists(NAMES, min_size=1, max_size=4).flatmap(rows_of),
        rows_of(["N", "D", "loss"]),
        st.binary(max_size=60),
    )
)
def test_any_table_is_read_to_the_last_number_or_refused_by_name(table, tmp_path):
    path = tmp_path / "points.csv"
    if isinstance(table, bytes):
        path.write_bytes(table)
    else:
        path.write_text("\n".join(",".join(row) for row in [table[0], *table[1]]))
    try:
        N, D, L = read_points(path)
    except ValueError as error:
        assert "points.csv" in str(error) and "\n" not in str(error)
        return
    with path.open(newline="", encoding="utf-8-sig") as file:
        header, *rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    assert len(rows) == len(N) == len(D) == len(L) and (N > 0).all() and (D > 0).all() and (L > 0).all()
    losses = [float(row[[name.strip().lower() for name in header].index("loss")]) for row in rows]
    assert losses == L.tolist()


def test_a_budget_far_below_the_points_is_a_finite_number_of_orders_away():
    assert beyond(1e-300, (6e16, 6e20)) == pytest.approx(316.778, abs=1e-3)
    assert beyond(1e18, (6e16, 6e20)) == 0
