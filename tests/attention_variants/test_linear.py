"""Linear attention: its three ways against each other, and the hybrid against itself and gpt.py."""

from dataclasses import replace

import pytest
import torch
from small_gpt import flags, refused, write_text
from small_variants import cache_error, costs, documented_costs, first_changes, shake, tokens_of, trained
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from attention_variants.linear import (
    SIZES,
    Config,
    LinearAttention,
    LinearGPT,
    recurrent,
    slopes,
)
from formats.open_model import concept_of, open_model
from gpt import GPT
from kernels.linear_attention import linear_attention

SMALL = Config(3, 4, 32, 24, vocab_size=61, max_seq_len=64, n_kv_heads=2, softmax_layers=(1,), chunk=5)
RATES = torch.tensor([0.0, 0.05, 0.4, 3.0], dtype=torch.float64)


def small(**changes):
    torch.manual_seed(0)
    return shake(LinearGPT(replace(SMALL, **changes)).double())


def parallel(q, k, v, s):
    return linear_attention(q, k, v, s, backend="reference")[0]


def chunked(q, k, v, s, chunk, state=None):
    return linear_attention(q, k, v, s, state, chunk=chunk, backend="torch")


def inputs(T, B=2):
    generator = torch.Generator().manual_seed(T)
    return (torch.randn(B, T, 4, 8, dtype=torch.float64, generator=generator) for _ in range(3))


# --- three ways to compute the same


@pytest.mark.parametrize("T", [1, 13, 21])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_parallel_chunked_and_recurrent_agree(T, chunk):
    q, k, v = inputs(T)
    expected = parallel(q, k, v, RATES)
    for out, state in (recurrent(q, k, v, RATES), chunked(q, k, v, RATES, chunk)):
        assert (out - expected).abs().max() < 1e-12
        assert (state - recurrent(q, k, v, RATES)[1]).abs().max() < 1e-12


def test_the_equation_written_out():
    """o_i = sum_j exp(-s (i - j)) (q_i . k_j) v_j; with s = 0 a plain sum over all earlier tokens."""
    q, k, v = inputs(6)
    out = parallel(q, k, v, RATES)
    for i in range(6):
        for h, s in enumerate(RATES.tolist()):
            terms = [
                2.718281828459045 ** (-s * (i - j)) * (q[0, i, h] @ k[0, j, h]) * v[0, j, h]
                for j in range(i + 1)
            ]
            assert (out[0, i, h] - sum(terms)).abs().max() < 1e-12
    state = torch.einsum("bshk,bshv->bshkv", k, v).cumsum(dim=1)
    plain = torch.einsum("bthk,bthkv->bthv", q, state)
    assert (out - plain)[:, :, 0].abs().max() < 1e-12


@pytest.mark.parametrize("cut", [1, 7, 12])
@pytest.mark.parametrize("first, then", [("chunked", "recurrent"), ("recurrent", "chunked")])
def test_a_state_is_handed_over_at_any_position(cut, first, then):
    ways = {"recurrent": recurrent, "chunked": lambda *a, state=None: chunked(*a, 5, state)}
    q, k, v = inputs(13)
    before, after = ([x[:, :cut] for x in (q, k, v)], [x[:, cut:] for x in (q, k, v)])
    out, state = ways[first](*before, RATES)
    rest, _ = ways[then](*after, RATES, state=state)
    assert (torch.cat((out, rest), dim=1) - parallel(q, k, v, RATES)).abs().max() < 1e-12


def test_gradients_are_those_of_finite_differences():
    q, k, v = (x[:, :, :2, :3].clone().requires_grad_() for x in inputs(5, B=1))
    assert torch.autograd.gradcheck(lambda *x: chunked(*x, RATES[1:3], 2), (q, k, v))


def test_the_work_of_a_gradient_grows_no_faster_than_the_text():
    """Twice as many chunks make about twice as many numbers, in all operations together."""

    class Numbers(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.n += out.numel() if isinstance(out, torch.Tensor) else 0
            return out

    made = []
    for T in (128, 256):
        q, k, v = (x.requires_grad_() for x in inputs(T, B=1))
        with Numbers() as numbers:
            chunked(q, k, v, RATES, 4)[0].sum().backward()
        made.append(numbers.n)
    assert made[1] < 2.2 * made[0]


def test_fast_decays_over_long_texts_do_not_overflow():
    q, k, v = (x.float() for x in inputs(600, B=1))
    for chunk in (64, 600):
        out, state = chunked(q, k, v, torch.tensor([3.0, 20.0, 90.0, 0.0]), chunk)
        assert out.isfinite().all() and state.isfinite().all()


def test_the_state_is_kept_in_float32():
    q, k, v = (x.bfloat16() for x in inputs(300, B=1))
    exact, _ = recurrent(q.double(), k.double(), v.double(), RATES)
    for out, state in (recurrent(q, k, v, RATES.float()), chunked(q, k, v, RATES.float(), 64)):
        assert state.dtype == torch.float32 and out.dtype == torch.bfloat16
        assert (out.double() - exact).norm() < 0.01 * exact.norm()


def test_decays_are_those_of_minimax():
    """2^(-8 (h + 1) / H), times 1 in the first layer, and almost 0 in the last."""
    like = torch.zeros(1, dtype=torch.float64)
    first, last = slopes(4, 0, 8, like), slopes(4, 7, 8, like)
    torch.testing.assert_close(first, torch.tensor([0.25, 1 / 16, 1 / 64, 1 / 256]).double() * (1 + 1e-5))
    assert (last > 0).all() and (last < 2e-5).all()


# --- the hybrid


@torch.no_grad()
def test_layers_with_softmax_are_those_of_gpt():
    model = small(softmax_layers=(0, 1, 2))
    plain = GPT(model.config).double()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens_of(12)), plain(tokens_of(12)))


@torch.no_grad()
def test_the_chunk_does_not_change_the_logits():
    model = small()
    expected = model(tokens_of(13))
    for block in model.model.layers:
        if isinstance(block.self_attn, LinearAttention):
            block.self_attn.options["chunk"] = 64
    assert (model(tokens_of(13)) - expected).abs().max() < 1e-12


def test_a_changed_token_changes_no_logits_before_it():
    assert first_changes(small(), 13, noise=1e-12) == list(range(13))


def test_a_cache_gives_the_logits_of_a_full_pass():
    assert cache_error(small(), 14, 7) < 1e-12
    cache = small().new_cache([7, 7], 14)
    assert [state is None for state in cache.states] == [keys is not None for keys in cache.keys]
    assert cache.states[0].shape == (2, 4, 8, 8)  # whatever the length of the text


def test_rows_of_different_lengths_are_continued_as_alone():
    model, prompts = small(), [[3, 1, 4], [1, 5, 9, 2, 6]]
    alone = [model.generate([prompt], 6, temperature=0)[0] for prompt in prompts]
    assert model.generate(prompts, 6, temperature=0) == alone


@torch.no_grad()
def test_documents_in_one_row_do_not_see_each_other():
    model, tokens = small(), tokens_of(12)[:1]
    packed = model(tokens, cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32))
    apart = torch.cat((model(tokens[:, :5]), model(tokens[:, 5:])), dim=1)
    assert (packed - apart).abs().max() < 1e-12


def test_what_it_does_not_have_is_refused():
    with pytest.raises(ValueError, match="window 8"):
        replace(SMALL, window=8)
    with pytest.raises(ValueError, match=r"full_layers .1,.: expected none; set softmax_layers instead"):
        replace(SMALL, full_layers=(1,))
    with pytest.raises(ValueError, match="softmax_layers 3: expected 0 to 2"):
        replace(SMALL, softmax_layers=(3,))
    with pytest.raises(ValueError, match="leave out --compile"):
        small().new_cache([3], 8, static=True)


def test_flops_are_those_of_the_products_that_pytorch_counts():
    """But for masked scores, which need none: of a chunk here, of the row in gpt.py."""
    model, T, c = LinearGPT(replace(SMALL, kernels="reference", chunk=4)), 16, 4
    for block in model.model.layers:
        if isinstance(block.self_attn, LinearAttention):  # of the reference, all tokens are one chunk
            block.self_attn.options["backend"] = "torch"
    with FlopCounterMode(display=False) as counter:
        model(tokens_of(T)).sum().backward()
    per_key = 12 * model.config.n_heads * model.config.K
    masked = per_key * (T - (T + 1) / 2) + 2 * per_key * (c - (c + 1) / 2)
    counted = counter.get_total_flops() / (2 * T) - masked
    # The first chunk reads a state of zeros.
    assert model.config.flops_per_token(T) == pytest.approx(counted, rel=0.02)


def test_the_page_has_what_tiny_costs():
    assert costs(LinearGPT(SIZES["tiny"])) == documented_costs("linear")


def test_it_trains_and_is_opened_again(tmp_path):
    directory = trained(tmp_path, "linear", mup=64, lr=0.003)
    assert concept_of(directory) == "attention_variants.linear"
    assert open_model(directory).config.softmax_layers == (3,)


def test_a_setting_that_makes_no_sense_is_one_line(tmp_path, capsys):
    argv = flags(write_text(tmp_path / "text.txt"), tmp_path / "run", model="linear")
    assert "softmax_layers 9" in refused(capsys, [*argv, "--set", "softmax_layers=(9,)"])
