"""Every configuration computes the same, none is too large for Hopper, and a measured one is used.

Without a GPU the kernels run in Triton's interpreter, with tensor descriptors too.
"""

import json
from pathlib import Path

import pytest
import torch

from kernels import (
    attention,
    backend,
    configs,
    flash_attention,
    flash_tiles,
    grouped_matmul,
    linear_chunks,
    linear_cross_entropy,
    rms_norm,
    rmsnorm,
    selected_blocks,
)
from kernels.configs import CONFIGS, Attention, CrossEntropy
from kernels.linear_attention import linear_attention
from kernels.selected_attention import selected_attention

MACHINE_CODE = Path(__file__).parents[2] / "results" / "machine_code.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGEST_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # bytes of one program
EVERY = [(operation, name) for operation, named in CONFIGS.items() for name in named]


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def attend(backend, dtype):
    q, k, v = normal(3, 1, 140, 2, 16, dtype=dtype)
    return (q, k[:, :, :1], v[:, :, :1]), lambda q, k, v: attention(
        q, k, v, causal=True, window=100, backend=backend
    )


def attend_linearly(backend, dtype):
    rates = torch.tensor([0.01, 0.1], device=DEVICE)
    return tuple(normal(3, 1, 140, 2, 64, dtype=dtype) / 8), lambda q, k, v: linear_attention(
        q, k, v, rates, backend=backend
    )[0]


def attend_to_blocks(heads):
    def make(backend, dtype):
        H, C = max(2, heads), max(2, heads) // heads
        arguments = normal(1, 6, H, 16, dtype=dtype), *normal(2, 1, 160, C, 16, dtype=dtype)
        blocks = torch.arange(2, device=DEVICE).expand(1, 6, C, 2)
        return arguments, lambda q, k, v: selected_attention(q, k, v, blocks, 150, backend=backend)

    return make


def normalise(backend, dtype):
    return (normal(37, 96, dtype=dtype), normal(96)), lambda x, w: rms_norm(x, w.to(x.dtype), backend=backend)


def predict(backend, dtype):
    targets = torch.arange(40, device=DEVICE) % 33
    arguments = normal(40, 16, dtype=dtype), normal(33, 16, dtype=dtype)
    return arguments, lambda h, w: linear_cross_entropy(h, w, targets, backend=backend)[0]


def multiply(backend, dtype):
    offsets = torch.tensor([0, 150, 157], dtype=torch.int32, device=DEVICE)
    arguments = normal(157, 72, dtype=dtype), normal(3, 150, 72, dtype=dtype)
    return arguments, lambda x, w: grouped_matmul(x, w, offsets, backend=backend)


RUN = {
    "attention_forward": attend,
    "attention_backward": attend,
    "linear_attention_forward": attend_linearly,
    "linear_attention_backward": attend_linearly,
    "selected_attention_forward": attend_to_blocks(8),
    "selected_attention_backward": attend_to_blocks(8),
    "gathered_attention_forward": attend_to_blocks(1),
    "gathered_attention_backward": attend_to_blocks(1),
    "rms_norm_backward": normalise,
    "linear_cross_entropy": predict,
    "grouped_matmul": multiply,
}


def results(operation, backend, dtype, exact=False):
    """Return the result of an operation, and the gradients of its arguments."""
    arguments, run = RUN[operation](backend, dtype)
    leaves = [x.double() if exact else x for x in arguments]
    leaves = [x.detach().requires_grad_(not operation.endswith("_forward")) for x in leaves]
    y = run(*leaves)
    if operation.endswith("_forward"):
        return [y]
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


@pytest.mark.parametrize(("operation", "name"), EVERY)
def test_every_configuration_computes_the_same(operation, name, monkeypatch):
    """The error is at most twice that of plain PyTorch, plus a few roundings. Programs own several tiles."""
    dtype = torch.float16 if "attention" in operation else torch.float32
    for module in (flash_tiles, linear_chunks, selected_blocks):
        monkeypatch.setattr(module, "uses_tma", lambda q: True)
    for module in (flash_attention, rmsnorm):
        monkeypatch.setattr(module, "n_multiprocessors", lambda device: 2)
    with configs.timed(operation, CONFIGS[operation][name]):
        ours = results(operation, "triton", dtype)
    plain, exact = results(operation, "reference", dtype), results(operation, "reference", dtype, exact=True)
    for a, b, truth in zip(ours, plain, exact, strict=True):
        error, allowed = ((x.double() - truth).abs().max() for x in (a, b))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * truth.abs().max(), (error, allowed)


def test_timing_ends_even_if_it_fails():
    config = Attention(32, 32, 4, 1)
    with pytest.raises(ZeroDivisionError), configs.timed("attention_forward", config):
        assert configs.attention("sm_80", 64, 2)[0] is config
        _ = 1 / 0
    assert configs.attention("sm_80", 64, 2)[0] is not config


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Return a function that writes tuned.json."""
    configs._tuned.cache_clear()
    monkeypatch.setattr(configs, "TUNED", tmp_path / "tuned.json")
    yield lambda found: (tmp_path / "tuned.json").write_text(json.dumps(found))
    configs._tuned.cache_clear()


def test_a_measured_configuration_is_used_where_it_was_measured(tuned):
    """At the width that was measured and at narrower ones, on that architecture, in 16 bits."""
    tuned(
        {"sm_90": {"attention_forward": {"128": "128x128"}, "linear_cross_entropy": {"50304": "8192 logits"}}}
    )
    measured, shipped = CONFIGS["attention_forward"]["128x128"], configs.ATTENTION["Hopper"]
    assert configs.attention("sm_90", 128, 2)[0] == configs.attention("sm_90", 80, 2)[0] == measured
    for arch, K, size in (("sm_90", 256, 2), ("sm_90", 64, 4), ("sm_100", 128, 2)):
        width = K * size // 2
        assert configs.attention(arch, K, size)[0] == Attention(*shipped[width][0])
    assert configs.attention("sm_90", 128, 2)[1:] == tuple(Attention(*tile) for tile in shipped[128][1:])
    assert configs.chosen("linear_cross_entropy", "sm_90", 50257) == CrossEntropy(block=8192)
    assert configs.chosen("linear_cross_entropy", "sm_90", 128256) is None


def test_short_groups_keep_their_low_tiles(tuned):
    tuned({"sm_90": {"grouped_matmul": {"64": "128x128"}}})
    long, short = (configs.grouped("sm_90", 64, rows, 2) for rows in (128, 50))
    assert long == CONFIGS["grouped_matmul"]["128x128"]
    assert short.product[:2] == (64, 128) and short.weight == long.weight


def test_the_kernels_run_with_what_was_measured(tuned, monkeypatch):
    tuned({"interpreter": {"attention_forward": {"64": "64x64, 4 warps"}}})
    seen = []
    configured = flash_attention.configured
    monkeypatch.setattr(
        flash_attention, "configured", lambda const, config: seen.append(config) or configured(const, config)
    )
    attend("triton", torch.float16)[1](*normal(3, 1, 20, 1, 16, dtype=torch.float16))
    found = (
        CONFIGS["attention_forward"]["64x64, 4 warps"] if backend.INTERPRETED else Attention(128, 64, 8, 3)
    )
    assert seen == [found]


def test_a_name_of_another_version_is_refused(tuned):
    tuned({"sm_90": {"attention_forward": {"64": "7x7"}}})
    with pytest.raises(ValueError, match=r"'7x7' is not in kernels/configs\.py; measure again"):
        configs.attention("sm_90", 64, 2)


def test_without_a_measurement_the_defaults_are_used(tuned):
    assert configs.attention("sm_90", 64, 2)[0] == CONFIGS["attention_forward"]["128x64"]
    assert configs.chosen("rms_norm_backward", "sm_90", 768) is None


def compiled(target):
    rows = json.loads(MACHINE_CODE.read_text())["results"]
    return [row for row in rows if row["target"] == target]


@pytest.mark.parametrize("operation", CONFIGS)
def test_every_configuration_for_hopper_fits_its_registers_and_shared_memory(operation):
    """By results/machine_code.json, which the compiler wrote; at least eight of attention at each width."""
    rows = [row for row in compiled("sm_90") if row["operation"].startswith(operation)]
    for key in (64, 128) if "attention" in operation else (0,):
        named = configs.names(operation, key)
        assert len(named) >= (8 if operation == "attention_forward" else 5)
        for name in named:
            cases = [row for row in rows if row["case"].endswith(f"{key}: {name}" if key else name)]
            cases = [row for row in cases if row["kernel"] not in ("delta_kernel", "sum_kernel")]
            assert cases, f"{operation}: {name} is not in results/machine_code.json; compile it"
            for row in cases:
                assert row["spills"] == 0 and row["shared"] <= LARGEST_SHARED["sm_90"], row
                assert row["programs"] >= 1, row
