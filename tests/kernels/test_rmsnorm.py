"""RMSNorm against its definition in float64, and its gradient against the formula in the file's header.

Without a GPU the kernels run in Triton's interpreter, which truncates to bfloat16 instead of rounding. There
they are tested in float32 and float16.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from kernels import rms_norm, rmsnorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "torch", "triton", "auto"]
LOW = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (3 * torch.randn(5, 7, 48, generator=generator).to(dtype) for _ in range(3))
    weight = 1 + 0.3 * torch.randn(48, generator=generator).to(dtype)
    return [t.to(DEVICE) for t in (x, residual, weight, dy)]


def run(x, weight, residual, dy, dh, backend, eps=1e-5):
    """Return y, h, dx, dweight and dresidual; without a residual y, dx and dweight."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, residual) if t is not None]
    out = rms_norm(*leaves[:2], eps, residual=leaves[2] if residual is not None else None, backend=backend)
    out, grads = (out, (dy, dh)) if residual is not None else ((out,), (dy,))
    return [t.detach() for t in out] + list(torch.autograd.grad(out, leaves, grads))


def random_case(shape, dtype, residual, weight_dtype=torch.float32):
    generator = torch.Generator().manual_seed(math.prod(shape))
    x, h, dy, dh = (3 * torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    weight = (1 + 0.3 * torch.randn(shape[-1], generator=generator)).to(weight_dtype)
    x, h, dy, dh, weight = (t.to(DEVICE) for t in (x, h, dy, dh, weight))
    return x, weight, h if residual else None, dy, dh


def assert_as_good_as_reference(case):
    """Check that the largest error of the kernels is at most twice that of plain PyTorch in the same dtypes.

    PyTorch may be exact by chance, so 2e-6 is added: roundings in float32 of intermediate values up to ten.
    """
    exact = run(*(t if t is None else t.double() for t in case), "reference")
    names = ("y", "dx", "dweight") if case[2] is None else ("y", "h", "dx", "dweight", "dresidual")
    results = run(*case, "triton"), run(*case, "reference"), exact
    for name, ours, reference, truth in zip(names, *results, strict=True):
        assert ours.dtype == reference.dtype and ours.shape == reference.shape, name
        if truth.numel():
            error, allowed = ((t.double() - truth).abs().max().item() for t in (ours, reference))
            assert math.isfinite(allowed) and error <= 2 * allowed + 2e-6, (
                f"{name}: error {error}, plain PyTorch's is {allowed}"
            )


@pytest.fixture
def few_programs(monkeypatch):
    """One multiprocessor, so that each program of the backward kernel goes through several tiles."""
    monkeypatch.setattr(rmsnorm, "n_multiprocessors", lambda device: 1)


@pytest.fixture
def fenced(monkeypatch):
    """New tensors are filled with NaN, between sevens that nothing may overwrite."""
    memory, fence, original = [], 4096, torch.Tensor.new_empty

    def new(shape, dtype):
        whole = torch.full((math.prod(shape) + 2 * fence,), 7, dtype=dtype, device=DEVICE)
        memory.append(whole)
        return whole[fence:-fence].fill_(math.nan).view(shape)

    def new_empty(x, shape, dtype=None, **by_the_interpreter):
        if by_the_interpreter:
            return original(x, shape, dtype=dtype, **by_the_interpreter)
        return new((shape,) if isinstance(shape, int) else shape, dtype or x.dtype)

    monkeypatch.setattr(torch, "empty_like", lambda x, memory_format=None: new(x.shape, x.dtype))
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield memory
    for whole in memory:
        assert (whole[:fence] == 7).all() and (whole[-fence:] == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradient_equal_the_equations(backend):
    x, _, weight, dy = inputs()
    x.requires_grad_(), weight.requires_grad_()
    y = rms_norm(x, weight, 1e-3, backend=backend)
    y.backward(dy)
    X, W, DY = (t.detach().double() for t in (x, weight, dy))
    r = (X.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    n, g = X * r, DY * W
    # Roundings in float32 of sums over 48 features (for the weight over 35 rows) of order one to ten.
    torch.testing.assert_close(y.double(), n * W, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(
        x.grad.double(), r * (g - n * (g * n).mean(-1, keepdim=True)), atol=5e-6, rtol=1e-6
    )
    torch.testing.assert_close(weight.grad.double(), (DY * n).sum((0, 1)), atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_is_added_first_and_returned(backend):
    x, residual, weight, _ = inputs()
    y, h = rms_norm(x, weight, residual=residual, backend=backend)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, rms_norm(h, weight, backend=backend))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_residual_of_another_dtype_takes_the_wider(backend):
    x, residual, weight, dy = inputs()
    x = x.half().requires_grad_()
    y, h = rms_norm(x, weight, residual=residual, backend=backend)
    assert y.dtype == h.dtype == torch.float32 and torch.equal(h, x + residual)
    y.backward(dy)
    assert x.grad.dtype == torch.float16


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_statistics_are_float32(dtype, backend):
    """The squares of the row overflow float16, and it is so long that a 16-bit sum would stop growing."""
    x = torch.full((2, 8192), 300.0, device=DEVICE).to(dtype)
    y = rms_norm(x, torch.ones(8192, device=DEVICE), backend=backend)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), torch.ones_like(x).float(), atol=torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_dtype_alone(backend):
    x, residual, weight, dy = inputs(torch.float16)
    x.requires_grad_()
    with torch.autocast(DEVICE, torch.float16):
        y, h = rms_norm(x, weight.float(), residual=residual, backend=backend)
    assert y.dtype == h.dtype == torch.float16
    y.backward(dy)
    assert x.grad.dtype == torch.float16


SHAPES = [
    (1, 1),
    (70, 1),
    (1, 48),
    (0, 48),
    (2, 0, 5),
    (33, 768),
    (300, 96),
    (9, 1000),
    (3, 3000),
    (2, 16384),
]


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_are_as_accurate_as_plain_pytorch(shape, dtype, residual, few_programs):
    assert_as_good_as_reference(random_case(shape, dtype, residual))


@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [(torch.float16, 1e-3), (torch.float16, 5e3), (torch.float32, 1e-17), (torch.float32, 1e17)],
)
def test_large_and_small_numbers(dtype, magnitude, few_programs):
    """Numbers near the largest of the dtype, or with squares near it, and rows of zeros."""
    x, weight, _, dy, dh = random_case((6, 200), dtype, False)
    x, dy = x * magnitude, dy * max(1, magnitude)
    x[::2] = 0
    dy[::2] /= max(1, magnitude)
    assert_as_good_as_reference((x, weight, None, dy, dh))


def lay_out(values, order, steps, last_step):
    """Return the same values with the outer axes in another order in memory, and NaN between elements."""
    steps = (*steps, last_step)
    order = (*order, values.ndim - 1)
    memory = values.new_full([values.shape[i] * steps[i] for i in order], math.nan)
    view = memory.permute([order.index(i) for i in range(values.ndim)])[
        tuple(slice(None, None, s) for s in steps)
    ]
    return view.copy_(values)


@st.composite
def layouts(draw):
    shape = (*draw(st.lists(st.integers(1, 5), max_size=3)), draw(st.integers(1, 140)))
    outer = len(shape) - 1
    layout = st.tuples(
        st.permutations(range(outer)),
        st.tuples(*[st.integers(1, 3)] * outer),
        st.sampled_from([1, 1, 1, 2]),
    )
    return shape, draw(st.lists(layout, min_size=4, max_size=4))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(layouts(), st.sampled_from([torch.float32, torch.float16]), st.booleans())
def test_any_shape_and_strides(layouts, dtype, residual):
    shape, layout = layouts
    x, weight, r, dy, dh = random_case(shape, dtype, residual)
    laid_out = [t if t is None else lay_out(t, *how) for t, how in zip((x, r, dy, dh), layout, strict=True)]
    strided = laid_out[0], lay_out(weight, (), (), 2), *laid_out[1:]
    for a, b in zip(run(*strided, "triton"), run(x, weight, r, dy, dh, "triton"), strict=True):
        assert torch.equal(a, b)
    assert_as_good_as_reference(strided)


@pytest.mark.parametrize("expanded", [(), (1,), (48,), (7, 1)])
def test_expanded_gradients(expanded):
    x, residual, weight, dy = inputs()
    small = dy.flatten()[: math.prod(expanded)].view(expanded)
    dy = small.expand(5, 7, 48)
    for a, b in zip(
        run(x, weight, residual, dy, dy, "triton"),
        run(x, weight, residual, dy.contiguous(), dy.contiguous(), "triton"),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_rows_further_apart_than_32_bits_count():
    """Three rows are 2^30 elements apart; the memory between them is allocated but never touched."""
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided((3, 64), (2**30, 1))
    near = torch.randn(3, 64).to(far)
    far.copy_(near)
    weight = torch.ones(64, device=DEVICE)
    for a, b in zip(
        run(far, weight, None, far, None, "triton"),
        run(near, weight, None, near, None, "triton"),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("shape", [(70, 1), (5, 48), (21, 768), (3, 3000)])
def test_every_element_is_written_and_none_beside(shape, residual, few_programs, fenced):
    results = run(*random_case(shape, torch.float16, residual), "triton")
    assert len(fenced) >= 5  # y, h, 1 / rms, dx and the partial sums of dweight were allocated there
    assert all(t.isfinite().all() for t in results)


def test_repeats_are_equal_bit_for_bit(few_programs):
    case = random_case((300, 96), torch.float32, True)
    first = run(*case, "triton")
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, run(*case, "triton"), strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradients_only_where_they_are_asked_for(backend):
    x, residual, weight, dy = inputs()
    _, _, dx, dweight, _ = run(x, weight, residual, dy, torch.zeros_like(dy), backend)
    for leaf, expected in ((x, dx), (weight, dweight), (residual, dx)):
        leaf.requires_grad_()
        y, h = rms_norm(x, weight, 1e-5, residual=residual, backend=backend)
        (grad,) = torch.autograd.grad(y, leaf, dy)
        torch.testing.assert_close(grad, expected)
        leaf.requires_grad_(False)
    x.requires_grad_(), weight.requires_grad_()
    _, h = rms_norm(x, weight, residual=residual, backend=backend)
    dx, dweight = torch.autograd.grad(h, (x, weight), dy, allow_unused=True)
    assert torch.equal(dx, dy) and (dweight is None or not dweight.any())


def test_no_second_derivative():
    """It is an error: results that looked like constants would give a wrong result silently."""
    x, _, weight, _ = inputs()
    x.requires_grad_()
    (dx,) = torch.autograd.grad(rms_norm(x, weight, backend="triton").sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"rms_norm: .* no second derivative"):
        (dx.square().sum() + x.sum()).backward()


def test_bad_arguments_say_why():
    x, residual, weight, _ = inputs()
    for wrong in ((x, weight[:-1]), (x[0, 0], weight[0]), (x.long(), weight)):
        with pytest.raises(ValueError, match=r"expected x \(..., D\) of a float dtype and weight \(D,\)"):
            rms_norm(*wrong, backend="reference")
    with pytest.raises(ValueError, match="the same shape"):
        rms_norm(x, weight, residual=residual[0])
    with pytest.raises(ValueError, match="cuda-magic"):
        rms_norm(x, weight, backend="cuda-magic")
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        rms_norm(x.double(), weight, backend="triton")
    wide, ones = torch.ones(1, 16385, device=DEVICE), torch.ones(16385, device=DEVICE)
    with pytest.raises(ValueError, match="1 to 16384 features, not 16385; use 'auto'"):
        rms_norm(wide, ones, backend="triton")
    torch.testing.assert_close(rms_norm(wide, ones, backend="auto"), wide)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_registered_operations(residual):
    """Check the schema, fake tensors, and gradients traced with unknown sizes."""
    x, weight, r, dy, dh = random_case((3, 4, 20), torch.float32, residual, torch.float16)
    x, weight, r = (t if t is None else t.requires_grad_() for t in (x, weight, r))
    library.opcheck(torch.ops.plinth.rms_norm, (x, weight, r, 1e-6))
    rstd = torch.ones(12, device=DEVICE)
    for needs_dweight in (False, True):
        arguments = dy, dh if residual else None, x.detach(), weight.detach(), rstd, needs_dweight
        library.opcheck(torch.ops.plinth.rms_norm_backward, arguments)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_compiled_equals_eager(residual):
    torch.compiler.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(rms_norm, fullgraph=True, backend=backend)
    for n in (5, 6):
        x, weight, r, dy, dh = random_case((n, 48), torch.float32, residual)
        results = []
        for f in (rms_norm, compiled):
            leaves = [t.detach().requires_grad_() for t in (x, weight, r) if t is not None]
            out = f(*leaves[:2], residual=leaves[2] if residual else None, backend="triton")
            out, grads = (out, (dy, dh)) if residual else ((out,), (dy,))
            results.append([*out, *torch.autograd.grad(out, leaves, grads)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all("plinth.rms_norm" in code for code in graphs) and graphs


def test_auto_is_fusible_when_compiled():
    """Also on a GPU, where "auto" is Triton without torch.compile."""
    torch.compiler.reset()
    graphs = []
    compiled = torch.compile(
        rms_norm, fullgraph=True, backend=lambda graph, _: graphs.append(graph.code) or graph
    )
    x, _, weight, _ = inputs()
    torch.testing.assert_close(compiled(x, weight), rms_norm(x, weight))
    assert len(graphs) == 1 and "plinth" not in graphs[0]


LARGE = [(8, 1024, 768), (16384, 2048), (4095, 5000), (2048, 16384), (100000, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", LARGE if DEVICE == "cuda" else [(9, 768)])
def test_large(shape, dtype):
    assert_as_good_as_reference(random_case(shape, dtype, residual=True, weight_dtype=dtype))
