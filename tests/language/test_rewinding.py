"""The cache that goes back computes what one pass over the tokens that stay computes, for each attention."""

from dataclasses import replace

import pytest
import torch
from small_gpt import SMALL
from small_variants import shake

import gpt
from attention_variants import latent, linear, local_global, talking_heads
from language.rewinding import Rewindable, RewindingStates

FIELDS = {name: getattr(SMALL, name) for name in ("n_layers", "n_heads", "d_model", "d_ff", "max_seq_len")}
FIELDS |= {"vocab_size": 61}
MODELS = {
    "gpt": (gpt.GPT, gpt.Config(**FIELDS, n_kv_heads=2)),
    "window": (gpt.GPT, gpt.Config(**FIELDS, window=4)),
    "learned": (gpt.GPT, gpt.Config(**FIELDS, positions="learned")),
    "talking heads": (talking_heads.TalkingHeads, talking_heads.Config(**FIELDS)),
    "local and global": (
        local_global.LocalGlobal,
        replace(local_global.SIZES["tiny"], **FIELDS, n_kv_heads=2, window=4),
    ),
    "latent": (latent.LatentGPT, latent.Config(**FIELDS, kv_rank=8, d_nope=4, d_rope=4, d_value=8)),
    "linear": (linear.LinearGPT, linear.Config(**FIELDS, softmax_layers=(1,))),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_passes_of_any_length_and_ways_back_in_each_row_are_one_pass(name):
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = shake(kind(config)).double()
    texts = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(1))
    wrong = (texts + 1) % 61

    # Prompts of 3 and 6 tokens, then passes in which some tokens are wrong and are taken back.
    target, starts = Rewindable(model), [3, 6]
    cache = target.new_cache(starts, 24)
    found = target.hidden(texts[:, :6], cache=cache)
    outputs = [[found[0, :3]], [found[1, :6]]]
    for T, kept in ((4, (1, 4)), (1, (1, 1)), (5, (5, 1)), (3, (2, 3))):
        rows = [
            torch.cat((texts[row, start : start + n], wrong[row, start + n : start + T]))
            for row, (start, n) in enumerate(zip(starts, kept, strict=True))
        ]
        found = target.hidden(torch.stack(rows), cache=cache)
        for row, n in enumerate(kept):
            outputs[row].append(found[row, :n])
        starts = [start + n for start, n in zip(starts, kept, strict=True)]
        cache.go_back(starts)
    for row, n in enumerate(starts):
        expected = model.hidden(texts[row : row + 1, :n])[0]
        torch.testing.assert_close(torch.cat(outputs[row]), expected, atol=1e-9, rtol=0)


def test_a_state_is_kept_for_each_token_since_the_last_way_back_alone():
    kind, config = MODELS["linear"]
    target = Rewindable(kind(config))
    cache = target.new_cache([2], 20)
    with torch.no_grad():
        target.hidden(torch.tensor([[1, 2]]), cache=cache)
        target.hidden(torch.tensor([[3, 4, 5]]), cache=cache)
        assert isinstance(cache, RewindingStates) and len(cache.history[0]) == 4
        cache.go_back([3])
        assert len(cache.history[0]) == 1 and cache.keys[0] is None
