"""Rows: what is refused, and where documents begin that are read as one row."""

import numpy as np
import pytest
import torch

from data.rows import Loader, Rows, cu_seqlens, frequency_loss, in_order


def test_a_stream_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="no rows to learn from"):
        Loader(Rows([]), seed=0)


def test_a_row_of_another_shape_begins_a_new_batch():
    lengths = [2, 2, 2, 3, 3, 2]
    batches = in_order(Rows([{"x": np.zeros(n)} for n in lengths]), 2)
    assert [[len(row["x"]) for row in batch] for batch in batches] == [[2, 2], [2], [3, 3], [2]]


def test_documents_begin_at_each_end_of_text_and_at_each_row():
    tokens = torch.tensor([[1, 0, 2], [0, 0, 3]])
    assert cu_seqlens(tokens, 0).tolist() == [0, 1, 3, 4, 6]
    assert tokens.tolist() == [[1, 0, 2], [0, 0, 3]]


def test_loss_by_frequency():
    # Counted once more, 0 has 3 of 8, 1 has 4, and 2, which never occurs, has 1.
    counts = np.array([2, 3, 0])
    assert frequency_loss(counts, np.array([2], np.uint16)) == pytest.approx(np.log(8))
    assert frequency_loss(counts, np.array([0, 1, 1, 2])) == pytest.approx(-np.log(3 / 8 * 1 / 4 / 8) / 4)
