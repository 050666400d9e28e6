"""Native sparse attention: each branch against full attention or a window, its choice by hand, and itself."""

from dataclasses import replace

import pytest
import torch
from small_gpt import flags, refused, write_text
from small_variants import cache_error, costs, documented_costs, first_changes, shake, tokens_of, trained

from attention_variants import native_sparse
from attention_variants.native_sparse import SIZES, Config, NativeSparse, importance, overlaps, select
from formats.open_model import concept_of, open_model
from gpt import rope, rotate
from kernels import attention
from kernels.selected_attention import selected_keys

SMALL = Config(
    2, 4, 32, 24, vocab_size=61, max_seq_len=64, n_kv_heads=2, qk_norm=True, summary_size=4, summary_stride=2,
    block_size=4, n_selected=4, window=3,
)  # fmt: skip


def small(**changes):
    torch.manual_seed(0)
    return shake(NativeSparse(replace(SMALL, **changes)).double())


def branches(layer, T=19):
    """Return the three branches of a layer for random queries, keys and values, and these."""
    generator = torch.Generator().manual_seed(T)
    q = torch.randn(2, T, 4, 8, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 3, 2, T, 2, 8, dtype=torch.float64, generator=generator)
    return layer.whole(q, list(k), list(v)), q, k, v


# --- each branch is an attention of its own


@torch.no_grad()
def test_the_window_is_that_of_ordinary_attention():
    (_, _, out), q, k, v = branches(small().model.layers[0].self_attn)
    assert (out - attention(q, k[2], v[2], causal=True, window=3)).abs().max() < 1e-12
    for other in (2, 4):
        assert (out - attention(q, k[2], v[2], causal=True, window=other)).abs().max() > 1e-2


@pytest.mark.parametrize("n", [5, 9])
@torch.no_grad()
def test_to_select_all_blocks_is_full_attention(n):
    (_, out, _), q, k, v = branches(small(n_selected=n).model.layers[0].self_attn)
    assert (out - attention(q, k[1], v[1], causal=True)).abs().max() < 1e-12


@torch.no_grad()
def test_summaries_of_one_token_that_are_the_token_are_full_attention():
    layer = small(summary_size=1, summary_stride=1).model.layers[0].self_attn
    layer.of_keys.outer_proj.weight.zero_()
    layer.of_values.outer_proj.weight.zero_()
    (out, _, _), q, k, v = branches(layer)
    rotated = rotate(k[0], *rope(torch.arange(19)[None], 10_000.0, 8))
    assert (out - attention(q, rotated, v[0], causal=True)).abs().max() < 1e-12


@torch.no_grad()
def test_the_first_queries_see_no_summary_and_give_zeros():
    (out, _, _), *_ = branches(small().model.layers[0].self_attn)
    assert (out[:, :3] == 0).all() and (out[:, 3] != 0).all()
    (out, _, _), *_ = branches(small().model.layers[0].self_attn, T=2)
    assert (out == 0).all()


def test_the_first_tokens_have_finite_logits_and_gradients():
    for T in (1, 3, 9):
        model = small()
        logits = model(tokens_of(T))
        logits.sum().backward()
        assert logits.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# --- the choice


def test_weights_of_overlap_are_those_of_the_published_sizes():
    assert overlaps(32, 16, 64) == [1, 2, 2, 2, 1]
    assert overlaps(16, 16, 16) == [1] and overlaps(4, 2, 4) == [1, 2, 1]


@pytest.mark.parametrize("size, stride, block_size", [(4, 2, 4), (4, 4, 4), (8, 2, 4), (2, 2, 8), (6, 3, 6)])
def test_a_block_has_the_weights_of_the_summaries_that_overlap_it(size, stride, block_size):
    T = 29
    M, n_blocks = (T - size) // stride + 1, -(-T // block_size)
    weights = torch.rand(3, M, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(3, n_blocks, dtype=torch.float64)
    for i in range(M):
        for t in range(i * stride, i * stride + size):
            if t // block_size < n_blocks:
                expected[:, t // block_size] += weights[:, i] / stride
    assert (importance(weights, n_blocks, size, stride, block_size) - expected).abs().max() < 1e-12


def test_the_first_block_and_the_last_two_are_always_selected_once():
    weights = torch.rand(1, 20, 2, 5, generator=torch.Generator().manual_seed(0))
    chosen = select(weights, torch.arange(20)[None], 4, 4)
    for t in range(20):
        own = t // 4
        always = {0, own, max(own - 1, 0)}
        for g in range(2):
            rest = sorted(set(range(own)) - always, key=lambda b: -weights[0, t, g, b].item())
            expected = always | set(rest[: 4 - len(always)])
            found = chosen[0, t, g].tolist()
            assert set(found) - {-1} == expected and found.count(-1) == 4 - len(expected)


def test_one_choice_for_all_heads_of_a_key_head(monkeypatch):
    """Even if one of the heads attends to something else."""
    shapes = []
    real = native_sparse.selected_attention
    monkeypatch.setattr(
        native_sparse, "selected_attention", lambda q, k, v, blocks, *a, **o: (
            shapes.append((q.shape[2], blocks.shape[2])), real(q, k, v, blocks, *a, **o)
        )[1]
    )  # fmt: skip
    small()(tokens_of(9))
    assert shapes == [(4, 2)] * 2


# --- the model


@pytest.mark.parametrize("changes", [{}, {"n_selected": 3, "summary_stride": 4}], ids=["", "stride"])
def test_a_changed_token_changes_no_logits_before_it(changes):
    """At every position of a block, and to the last bit."""
    assert first_changes(small(**changes), 19) == list(range(19))


@pytest.mark.parametrize("n_prompt", [1, 6, 9])
def test_a_cache_gives_the_logits_of_a_full_pass(n_prompt):
    assert cache_error(small(), 19, n_prompt) < 1e-12


def test_rows_of_different_lengths_are_continued_as_alone():
    model, prompts = small(), [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5]]
    alone = [model.generate([prompt], 12, temperature=0)[0] for prompt in prompts]
    assert model.generate(prompts, 12, temperature=0) == alone


@torch.no_grad()
def test_under_autocast_rows_are_continued_by_their_likeliest_tokens_up_to_rounding():
    model, prompts = small().float(), [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.generate(prompts, 12, temperature=0)
    for prompt, new in zip(prompts, found, strict=True):
        logits = model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]
        drawn = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert (logits.amax(dim=1) - drawn).max() < 0.05 * logits.std()


@torch.no_grad()
def test_documents_in_one_row_do_not_see_each_other():
    model, tokens = small(), tokens_of(17)[:1]
    packed = model(tokens, cu_seqlens=torch.tensor([0, 5, 5, 17], dtype=torch.int32))
    apart = torch.cat((model(tokens[:, :5]), model(tokens[:, 5:])), dim=1)
    assert (packed - apart).abs().max() < 1e-12


def test_a_choice_in_parts_gives_the_same_gradients(monkeypatch):
    found = []
    for chunk in (1024, 7):
        monkeypatch.setattr(native_sparse, "CHUNK", chunk)
        model = small()
        model(tokens_of(19)).cos().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all((x - y).abs().max() < 1e-10 for x, y in zip(*found, strict=True))


def test_flops_are_those_of_the_keys_that_are_seen():
    """By the masks of the three branches."""
    T, c = 16, SMALL
    p = torch.arange(T)
    blocks = select(torch.rand(1, T, 1, 4), p[None], c.n_selected, c.block_size)
    selected = selected_keys(blocks, c.block_size, T).sum().item()
    summaries = sum(i * 2 + 3 <= t for t in range(T) for i in range(7))
    window = sum(min(t + 1, 3) for t in range(T))
    of_keys = 12 * c.n_heads * c.K * (selected + summaries + window)
    weights = NativeSparse(c).model.layers[0]
    in_matrices = sum(
        w.numel() for name, w in weights.named_parameters() if "_proj" in name and "of_" not in name
    )
    of_summaries = 6 * c.G * c.n_summaries(T) * sum(
        w.numel() for name, w in weights.named_parameters() if "inner_proj" in name or "outer_proj" in name
    )  # fmt: skip
    expected = c.n_layers * (6 * in_matrices + (of_keys + of_summaries) / T) + 6 * c.vocab_size * c.d_model
    assert c.flops_per_token(T) == pytest.approx(expected, abs=5)


def test_what_it_does_not_have_is_refused():
    for changes, message in (
        ({"full_layers": (1,)}, "every layer has a window"),
        ({"summary_stride": 3}, "expected multiples of summary_stride 3"),
        ({"n_selected": 2}, "n_selected 2: expected at least 3"),
        ({"qk_norm": "all"}, "qk_norm all"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **changes)
    with pytest.raises(ValueError, match="leave out --compile"):
        small().new_cache([3], 8, static=True)


def test_the_page_has_what_tiny_costs():
    assert costs(NativeSparse(SIZES["tiny"])) == documented_costs("native_sparse")


def test_it_trains_and_is_opened_again(tmp_path):
    directory = trained(tmp_path, "native_sparse", mup=64, lr=0.003)
    assert concept_of(directory) == "attention_variants.native_sparse"
    assert open_model(directory).config.window == 32


def test_a_setting_that_makes_no_sense_is_one_line(tmp_path, capsys):
    argv = flags(write_text(tmp_path / "text.txt"), tmp_path / "run", model="native_sparse")
    assert "n_selected 1" in refused(capsys, [*argv, "--set", "n_selected=1"])
