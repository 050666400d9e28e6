"""Who sees whom: the pictures' tables hold zeros where a layer must not, or does not, look."""

import pytest
import torch

from results.who_sees_whom import BLOCKS, LAYERS, T, influence, made


@pytest.mark.parametrize("name", LAYERS)
def test_no_layer_sees_a_later_token_and_every_token_sees_itself(name):
    table = influence(*made(name))
    assert (table.triu(1) == 0).all()
    assert (table.diagonal() > 0).all()


@pytest.mark.parametrize("name", [name for name in LAYERS if "window" not in name and "MoBA" not in name])
def test_all_but_windows_and_chosen_blocks_reach_every_earlier_token(name):
    # A summary of native sparse attention is complete, and read, only behind its last token; until then the
    # window of 12, longer than a summary of 8, reads the tokens themselves.
    assert (influence(*made(name))[torch.ones(T, T, dtype=torch.bool).tril()] > 0).all()


def test_a_local_layer_sees_its_window_and_no_more():
    seen = influence(*made("local layer, window 12")) > 0
    i = torch.arange(T)
    distance = i[:, None] - i
    assert torch.equal(seen, (distance >= 0) & (distance < 12))


def test_moba_sees_whole_blocks_and_as_many_as_its_two_heads_choose():
    seen = influence(*made("MoBA, 3 blocks of 8")) > 0
    size = BLOCKS["block_size"]
    blocks = seen.unflatten(1, (-1, size))
    for i in range(T):
        own = i // size
        earlier = blocks[i, :own]
        assert (earlier.all(1) | ~earlier.any(1)).all()  # all of a block, or nothing
        n = min(BLOCKS["n_selected"] - 1, own)  # chosen by each head, besides its own
        assert n <= earlier.any(1).sum() <= 2 * n
