"""Weights in 4 bits against bitsandbytes, and layers of them against ordinary ones with the same weights."""

import copy
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import run_command
from safetensors.torch import load_file
from torch import nn

import bert
import gpt
import moe
from kernels import grouped_matmul
from posttraining import nf4
from posttraining.nf4 import (
    NF4,
    QuantizedEmbedding,
    QuantizedExpertLinear,
    QuantizedLinear,
    n_bytes,
    quantize,
)

ROOT = Path(__file__).parents[2]
FIXTURES = sorted((Path(__file__).parents[1] / "fixtures" / "nf4").glob("*.safetensors"))

PUBLISHED = [  # appendix E of the paper, as bitsandbytes has them
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
]


def normal(*shape, seed=0, std=1.0):
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_values_are_the_published_ones():
    assert torch.allclose(nf4.nf4_code(), torch.tensor(PUBLISHED), rtol=0, atol=1e-6)
    code = nf4.dynamic_code()
    assert len(code) == 256 and (code.diff() > 0).all()
    assert code[127] == 0 and code[255] == 1 and torch.equal(-code[:127].flip(0), code[128:255])
    assert code[128].item() == pytest.approx(0.55e-6) and code[254].item() == pytest.approx(1 - 0.9 / 128)


def check_against_bitsandbytes(made):
    """made: what make_nf4_fixture.py writes of a weight."""
    w = made["weight"]
    codes, absmax = nf4.quantize_blocks(w)
    n = len(made["codes"])
    assert torch.equal(codes.flatten()[:n], made["codes"]) and torch.equal(absmax, made["absmax"])
    assert (codes.flatten()[n:] == 0x77).all()  # zeros

    ours = NF4(w)
    # A mean adds up in the order that suits a processor, so its last bits differ between them.
    torch.testing.assert_close(ours.mean.view(torch.float32), made["mean"], rtol=1e-6, atol=0)
    # With constants from bitsandbytes, its values to the bit.
    theirs = copy.deepcopy(ours)
    theirs.constants.copy_(made["constants"])
    theirs.largest.copy_(made["largest"].view(torch.int32))
    theirs.mean.copy_(made["mean"].view(torch.int32))
    assert theirs.dequantize().dtype == w.dtype and torch.equal(theirs.dequantize(), made["dequantized"])
    # Ours are the same ones but where its grid is too coarse, and there they are the nearer.
    every = torch.arange(len(absmax))
    a, b = ours.absmax(every), theirs.absmax(every)
    close = 1e-6 * absmax.max()
    assert ((a - b).abs() > close).float().mean() <= 0.02
    assert ((a - absmax).abs() <= (b - absmax).abs() + close).all()


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_same_as_bitsandbytes_made(path):
    check_against_bitsandbytes(load_file(path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(512, 128), (1000, 100), (4, 33, 28), (9, 7), (64,)])
def test_same_as_bitsandbytes_makes(shape, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    from fixtures.make_nf4_fixture import quantized

    made = quantized(normal(*shape, std=0.02).to(dtype))
    made["dequantized"] = made["dequantized"].view(shape)  # that of a vector is a row
    check_against_bitsandbytes(made)
    assert torch.equal(nf4.nf4_code(), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.dynamic_code(), functional.create_dynamic_map(signed=True))


def test_error_on_normal_weights():
    w = normal(512, 512)
    quantized = NF4(w)
    off = (quantized.dequantize() - w).view(-1, 64)
    # No weight is further off than half the widest gap, times its block's constant, and that one's own error.
    _, absmax = nf4.quantize_blocks(w)
    absmax_off = (quantized.absmax(torch.arange(len(absmax))) - absmax).abs()
    bound = nf4.nf4_code().diff().max() / 2 * absmax + absmax_off
    assert (off.abs() <= 1.00001 * bound[:, None]).all()
    assert absmax_off.norm() <= 0.01 * absmax.norm()
    # The best 16 values for a normal distribution, fixed for all blocks, leave a mean square of 0.009497 (Max
    # 1960, table 1, N = 16). Constants of blocks improve on that, and cost 0.127 bits: no code of 4.127 bits
    # leaves less than 2^(-2 * 4.127) (Shannon 1959).
    mean_square = off.square().mean().item()
    assert 2 ** (-2 * 4.127) < mean_square < 0.009497
    # Evenly spaced values for the same blocks, without an error of the constants.
    step = absmax[:, None] / 7
    int4 = (w.view(-1, 64) / step).round() * step
    assert mean_square < 0.9 * (int4 - w.view(-1, 64)).square().mean().item()


@pytest.mark.parametrize("shape", [(1,), (3, 5), (65,), (2, 3, 7), (300, 64), (257, 65)])
def test_any_shape(shape):
    w = normal(*shape, std=0.02)
    quantized = NF4(w)
    assert quantized.numel() == w.numel() and quantized.dequantize().shape == w.shape
    assert relative(quantized.dequantize(), w) < 0.15
    assert quantized.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(NF4(w.mT.contiguous().mT if w.ndim > 1 else w).dequantize(), quantized.dequantize())


def test_zeros_stay_zeros():
    w = normal(8, 64)
    w[2], w[4, 3:] = 0.0, 0.0
    assert ((NF4(w).dequantize() == 0) | (w != 0)).all()
    assert (NF4(torch.zeros(5, 30)).dequantize() == 0).all()
    assert NF4(torch.full((2, 64), 1e-40)).dequantize().isfinite().all()


@pytest.mark.parametrize("D", [64, 192, 40])
def test_rows(D):
    table = NF4(normal(300, D))
    index = torch.tensor([[0, 299, 7], [7, 8, 150]])
    assert torch.equal(table.rows(index), table.dequantize()[index])
    assert table.rows(index, torch.bfloat16).dtype == torch.bfloat16
    for wrong in (-1, 300):
        with pytest.raises(IndexError):
            table.rows(torch.tensor([wrong]))


def test_moving_to_another_dtype_rounds_the_results_only():
    layer = QuantizedLinear(nn.Linear(128, 64))
    precise = layer.weight
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, precise.bfloat16())
    assert torch.equal(layer.to(torch.float32).weight, precise)
    assert layer(torch.zeros(128)).dtype == torch.float32


def test_errors():
    for w, told in (
        (torch.tensor([1.0, torch.nan]), "not finite"),
        (torch.tensor([torch.inf]), "not finite"),
        (torch.zeros(0, 4), "floating-point"),
        (torch.ones(4, dtype=torch.int64), "floating-point"),
    ):
        with pytest.raises(ValueError, match=told):
            NF4(w)
    with pytest.raises(ValueError, match="max_norm"):
        quantize(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"1\.bias"):
        quantize(model)
    assert type(model[0]) is nn.Linear


def layers():
    """Products with a weight in 4 bits, and the same with that weight dequantised: functions of x, and x."""
    linear = QuantizedLinear(nn.Linear(100, 24))
    config = moe.Config(1, 1, 48, 32, 61, 16, n_experts=3, router="softmax")
    experts = moe.Experts(config)
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(normal(*p.shape, std=0.1))
    quantize(experts)
    assert isinstance(experts.down_proj, QuantizedExpertLinear)
    offsets = torch.tensor([4, 4, 9], dtype=torch.int32)

    def plain_experts(x):
        product = partial(grouped_matmul, backend="reference")  # it alone has second derivatives
        gate, up = product(x, experts.gate_up_proj.weight, offsets).chunk(2, dim=-1)
        return product(F.silu(gate) * up, experts.down_proj.weight, offsets)

    return {
        "linear": (linear, lambda x: F.linear(x, linear.weight, linear.bias), (2, 3, 100)),
        "vector": (linear, lambda x: F.linear(x, linear.weight, linear.bias), (100,)),
        "experts": (lambda x: experts(x, offsets), plain_experts, (9, 48)),
    }


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", ["linear", "vector", "experts"])
def test_gradients(case, autocast):
    quantized, plain, shape = layers()[case]
    results = []
    for function in (quantized, plain):
        x = normal(*shape).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(x)
        y.backward(normal(*y.shape, seed=1).to(y.dtype))
        assert x.grad.dtype == torch.float32
        results.append((y, x.grad))
    (y, dx), (expected, expected_dx) = results
    assert y.dtype == expected.dtype == (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, expected_dx)


@pytest.mark.parametrize("case", ["linear", "vector", "experts"])
def test_second_derivatives(case):
    """Those of sum(tanh(y)^2), whose gradient depends on x, beside those with the weight dequantised."""
    quantized, plain, shape = layers()[case]
    results = []
    for function in (quantized, plain):
        x = normal(*shape).requires_grad_()
        (dx,) = torch.autograd.grad(function(x).tanh().square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad((dx * normal(*shape, seed=2)).sum(), x)[0])
    assert results[0].abs().max() > 1e-3
    torch.testing.assert_close(*results)


def test_only_a_bias_learns():
    layer = QuantizedLinear(nn.Linear(10, 6))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    x = normal(3, 4, 10)
    layer(x).sum().backward()  # of an x without gradient
    assert torch.equal(layer.bias.grad, torch.full((6,), 12.0))
    assert not layer.weight.requires_grad
    assert not layer.requires_grad_(False)(x).requires_grad


def test_compiles_in_one_graph():
    layer = QuantizedLinear(nn.Linear(64, 32))
    x = normal(5, 64).requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    (dx,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(dx, expected)


def test_memory_of_one_weight_at_a_time(peak_memory):
    """Forward and backward through 8 layers, each of whose weights is far larger than what passes by it."""
    n, width = 8, 256
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(n)))
    quantize(model)
    x = normal(1, width).requires_grad_()

    def naive():
        y = x
        for layer in model:
            y = F.linear(y, layer.weight)
        y.sum().backward()

    model(x).sum().backward()
    one = 4 * width * width
    # One weight and, while it is made, the bytes of the codes as int32 (half of it).
    assert peak_memory(lambda: model(x).sum().backward()) <= 2 * one
    assert peak_memory(naive) >= n * one


MODELS = {"gpt": gpt.GPT, "moe": moe.MoEGPT}


def tiny(name):
    torch.manual_seed(0)
    return MODELS[name]({"gpt": gpt, "moe": moe}[name].SIZES["tiny"]).eval()


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    model = tiny(name)
    n = sum(p.numel() for p in model.parameters())
    tokens = torch.randint(4096, (2, 32), generator=torch.Generator().manual_seed(0))
    rows = [{"tokens": row} for row in tokens.numpy()]
    batch = gpt.make_batch(rows, model.config, torch.Generator(), None)
    with torch.no_grad():
        base, base_loss = model(tokens), model.loss(batch)[0]
    assert quantize(model) is model
    assert n_bytes(model) <= 0.6 * n
    assert not any(p.requires_grad for p in model.parameters())
    kinds = {type(module) for module in model.modules()}
    assert not kinds & {nn.Linear, nn.Embedding, moe.ExpertLinear}
    rest = sum(p.numel() for p in model.parameters())
    assert rest + sum(module.numel() for module in model.modules() if isinstance(module, NF4)) == n
    logits, loss = model(tokens), model.loss(batch)[0]
    # Each weight is off by 9 percent, at random, so a sum of products is too; embeddings and head both are.
    assert relative(logits, base) <= 0.3
    assert abs(loss - base_loss).item() <= 0.01 * base_loss
    (new,) = model.generate([[1, 2, 3]], 5, temperature=0)
    assert len(new) == 5 and not logits.requires_grad


def test_encoder():
    torch.manual_seed(0)
    model = bert.BERT(
        bert.Config(2, 2, 64, 128, 61, 32, pair="nsp", share_layers=True, d_embedding=32)
    ).eval()
    tokens = torch.randint(61, (2, 16))
    with torch.no_grad():
        base = model(tokens)
    assert relative(quantize(model)(tokens), base) <= 0.3
    head = QuantizedLinear.sharing(model.bert.embeddings.word_embeddings)
    assert torch.equal(head.weight, model.embedding_weight) and head.out_features == 61


def test_what_is_shared_stays_shared():
    block = nn.Linear(64, 64, bias=False)
    model = nn.ModuleDict(
        {"a": block, "b": nn.Sequential(block), "c": nn.Linear(64, 64), "e": nn.Embedding(64, 64)}
    )
    model.c.weight = model.e.weight
    quantize(model)
    assert model.a is model.b[0] and model.c.nf4 is model.e.nf4
    assert len([m for m in model.modules() if isinstance(m, NF4)]) == 2
    assert torch.equal(model.c.weight, model.e.weight) and isinstance(model.e, QuantizedEmbedding)
    alone = nn.Linear(3, 3)
    assert isinstance(quantize(alone), QuantizedLinear)


def test_each_weight_is_freed_before_the_next_is_quantised(monkeypatch):
    model = tiny("gpt")
    weights = [weakref.ref(p) for p in model.parameters() if p.ndim == 2]
    alive = []

    def count(w):
        alive.append(sum(weight() is not None for weight in weights))
        return NF4(w)

    monkeypatch.setattr(nf4, "NF4", count)
    quantize(model)
    assert alive == list(range(len(weights), 0, -1))


def test_saved_and_loaded():
    model, other = quantize(tiny("gpt")), quantize(gpt.GPT(gpt.SIZES["tiny"]))
    other.load_state_dict(model.state_dict())
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens), other(tokens))


@pytest.mark.parametrize(
    "name, kind",
    [("gpt2", "mlp.up_proj"), ("mixtral", "mlp.experts.down_proj"), ("bert-mlm", "output.dense")],
)
def test_command_on_a_checkpoint(name, kind, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["posttraining/nf4.py", str(ROOT / "tests" / "fixtures" / name)])
    nf4.main()
    lines = {line[:28].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    bfloat16, four_bits = (float(error.rstrip("%")) for error in lines[kind][-2:])
    assert bfloat16 < 0.3 and 7 < four_bits < 12
    assert lines["float32"][-1] == "4.000" and float(lines["NF4, all in"][-1]) < 2


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["posttraining/nf4.py"])
    nf4.main()
    table = capsys.readouterr().out.splitlines()
    assert [float(line.split()[-1]) for line in table[1:]] == pytest.approx(PUBLISHED, abs=1e-6)
    wrong = run_command("-m", "posttraining.nf4", tmp_path)
    assert wrong.code == 2 and wrong.err.startswith("error: ") and wrong.err.count("\n") == 1
