"""The grouped product against a definition in float64 written in another way: every row times every matrix.

Without a GPU the kernels run in Triton's interpreter, which truncates to bfloat16 instead of rounding. There
they are tested in float32 and float16.
"""

import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend

from kernels import configs, grouped_matmul

module = import_module("kernels.grouped_matmul")  # the package has the function under this name
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "torch", "triton", "auto"]
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
# The rows of each group, D and N. A tile of the interpreter is 16 x 16 x 16.
CASES = {
    "empty groups first, in the middle and last": ([0, 0, 5, 0, 20, 1, 0], 40, 32),
    "all rows in one group": ([0, 37, 0], 24, 48),
    "one group": ([19], 16, 56),
    "fewer rows than groups": ([1, 0, 1, 0, 0, 0, 1], 48, 24),
    "whole tiles": ([16, 32, 16], 32, 16),
    "no rows": ([0, 0, 0], 16, 8),
    "odd widths": ([3, 18, 0, 1], 33, 19),
    "widths of one": ([2, 1], 1, 1),
    "no width": ([2, 1], 0, 8),
    "no result": ([2, 1], 8, 0),
}
SOME = CASES["empty groups first, in the middle and last"]


def inputs(sizes, D, N, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(sizes) * D + N)
    M, E = sum(sizes), len(sizes)
    x, w, dy = (torch.randn(shape, generator=generator) for shape in ((M, D), (E, N, D), (M, N)))
    offsets = torch.tensor(sizes).cumsum(0).int()
    return *(t.to(DEVICE, dtype) for t in (x, w, dy)), offsets.to(DEVICE)


def run(x, w, dy, offsets, backend):
    """Return y, dx and dw."""
    x, w = (t.detach().requires_grad_() for t in (x, w))
    y = grouped_matmul(x, w, offsets, backend=backend)
    return y.detach(), *torch.autograd.grad(y, (x, w), dy)


def exact(x, w, dy, offsets):
    """Return the same in float64: all rows times each matrix, of which the rows of its group count."""
    x, w, dy = (t.detach().double().requires_grad_() for t in (x, w, dy))
    group = torch.bucketize(torch.arange(len(x), device=x.device), offsets, right=True)
    y = sum((group == e)[:, None] * (x @ w[e].T) for e in range(len(w)))
    return y.detach(), *torch.autograd.grad(y, (x, w), dy)


def skip_unless_taken(backend, x, w):
    """Skip PyTorch's own operation on a GPU if rows are no multiple of 16 bytes; other tests check these."""
    if backend == "torch" and any(n * x.element_size() % 16 for n in w.shape[1:]) and DEVICE == "cuda":
        pytest.skip("rows are no multiple of 16 bytes")


def assert_as_good_as_reference(case, backend):
    """Check that the largest error is at most twice that of plain PyTorch in the same dtype.

    That may be small by chance, so one rounding of the largest number is added: sums have another order.
    """
    results = run(*case, backend), run(*case, "reference"), exact(*case)
    for name, ours, plain, truth in zip(("y", "dx", "dw"), *results, strict=True):
        assert ours.dtype == plain.dtype and ours.shape == plain.shape == truth.shape, name
        if truth.numel():
            error, allowed = ((t.double() - truth).abs().max().item() for t in (ours, plain))
            floor = torch.finfo(ours.dtype).eps * truth.abs().max().item()
            assert error <= 2 * allowed + floor, f"{name}: error {error}, plain PyTorch's is {allowed}"


@pytest.fixture(autouse=True)
def precision_as_it_was():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_those_of_the_equations(backend, case):
    x, w, dy, offsets = inputs(*case)
    skip_unless_taken(backend, x, w)
    for ours, truth in zip(run(x, w, dy, offsets, backend), exact(x, w, dy, offsets), strict=True):
        # Roundings in float32 of sums of up to 48 products of normal numbers, some as large as 30.
        torch.testing.assert_close(ours.double(), truth, atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_are_as_accurate_as_plain_pytorch(case, dtype):
    assert_as_good_as_reference(inputs(*case, dtype), "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pytorch_s_own_is_as_accurate(dtype):
    assert_as_good_as_reference(inputs(*SOME, dtype), "torch")


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 34), min_size=1, max_size=6),
    D=st.integers(1, 34),
    N=st.integers(1, 34),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_any_shape(sizes, D, N, dtype):
    assert_as_good_as_reference(inputs(sizes, D, N, dtype), "triton")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_are_the_slopes(backend):
    if DEVICE == "cuda" and backend == "torch":
        pytest.skip("PyTorch's own takes no float64 there")
    x, w, _, offsets = inputs([0, 3, 0, 2], 4, 5, torch.float64)
    x.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: grouped_matmul(x, w, offsets, backend=backend), (x, w))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_any_strides(backend):
    """Gaps between rows, groups or columns, a transposed w, and gradients expanded from one number."""
    sizes, D, N = SOME
    x, w, dy, offsets = inputs(sizes, D, N)
    layouts = [
        (apart(x, 0), apart(w, 0), apart(dy, 0), offsets),
        (apart(x, 1), apart(w, 1), dy.T.contiguous().T, apart(offsets, 0)),
        (x, w.mT.contiguous().mT, apart(dy, 1), offsets),
        (x.T.contiguous().T, apart(w, 2), dy, offsets),
    ]
    expected = run(x, w, dy, offsets, backend)
    for layout in layouts:
        for a, b in zip(run(*layout, backend), expected, strict=True):
            # The same sums of up to 40 products, perhaps in another order.
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-6)
    one = dy[:1, :1].expand_as(dy)
    for a, b in zip(run(x, w, one, offsets, backend), exact(x, w, one, offsets), strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-6)


def apart(values, dim):
    """Return the same values with a NaN, or -1, after each of them in memory."""
    others = torch.full_like(values, torch.nan if values.is_floating_point() else -1)
    both = torch.stack([values, others], dim + 1).flatten(dim, dim + 1)
    return both[(*[slice(None)] * dim, slice(None, None, 2))]


def test_rows_and_matrices_further_apart_than_32_bits_count():
    """Rows and matrices are 2^30 elements apart; the memory between them is allocated but never touched."""

    def far(values, *strides):
        memory = torch.empty(2**31 + 4096, dtype=torch.float16, device=DEVICE)
        return memory.as_strided(values.shape, strides).copy_(values)

    x, w, dy, offsets = inputs([1, 1, 1], 24, 32, torch.float16)
    strided = far(x, 2**30, 1), far(w, 2**30, 24, 1), far(dy, 2**30, 1), offsets
    for a, b in zip(run(*strided, "triton"), run(x, w, dy, offsets, "triton"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_every_element_is_written_and_every_run_gives_the_same_bits(backend):
    case = inputs(*SOME)
    first = run(*case, backend)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
    try:
        assert torch.empty(1, device=DEVICE).isnan().all()
        again = run(*case, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_only_what_is_needed_is_computed(backend, monkeypatch):
    computed = []
    for name in (f"product_{backend}", f"weight_gradient_{backend}"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, n=name: computed.append(n) or f(*a))
    x, w, dy, offsets = inputs(*SOME)
    _, dx, dw = exact(x, w, dy, offsets)
    for leaf, other, truth, operation in ((x, w, dx, "product"), (w, x, dw, "weight_gradient")):
        leaf.requires_grad_(True), other.requires_grad_(False)
        y = grouped_matmul(x, w, offsets, backend=backend)
        computed.clear()
        (grad,) = torch.autograd.grad(y, leaf, dy)
        torch.testing.assert_close(grad.double(), truth, atol=2e-5, rtol=1e-6)
        assert computed == [f"{operation}_{backend}"]
    w.requires_grad_(False)
    assert not grouped_matmul(x, w, offsets, backend=backend).requires_grad


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_second_derivative(backend):
    """It is an error: gradients that looked like constants would give a wrong result silently."""
    x, w, _, offsets = inputs(*SOME)
    x.requires_grad_()
    y = grouped_matmul(x, w, offsets, backend=backend)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"grouped_matmul: .* no second derivative"):
        (dx.square().sum() + x.sum()).backward()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_memory_is_that_of_the_results(backend, peak_memory):
    """If the gradient of each group were as large as w, this would be 32 times as much."""
    case = inputs([4] * 32, 64, 128)
    results = sum(t.nbytes for t in run(*case, backend))
    # The reference keeps the gradient of each group until it concatenates all of them.
    assert peak_memory(lambda: run(*case, backend)) <= (2.5 if backend == "reference" else 1.1) * results


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_autocast(backend):
    x, w, dy, offsets = inputs(*SOME)
    precise = run(x, w, dy, offsets, backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = grouped_matmul(x, w.double(), offsets, backend=backend)  # two different dtypes
        rounded = run(x, w, dy.bfloat16(), offsets, backend)
    assert y.dtype == torch.bfloat16 and torch.equal(y, rounded[0])
    for a, b, dtype in zip(rounded, precise, (torch.bfloat16, torch.float32, torch.float32), strict=True):
        # Three roundings to the 8 bits of bfloat16, with random signs.
        assert a.dtype == dtype and 0 < (a - b).norm() <= 0.01 * b.norm()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False), (False, False)])
def test_registered_operations(backend, needs):
    """Check the schema, fake tensors, and gradients traced with unknown sizes."""
    x, w, dy, offsets = inputs([0, 3, 2], 8, 16)
    kernel = backend == "triton"
    library.opcheck(torch.ops.plinth.grouped_matmul_backward, (dy, x, w, offsets, kernel, *needs))
    x.requires_grad_(needs[0]), w.requires_grad_(needs[1])
    library.opcheck(torch.ops.plinth.grouped_matmul, (x, w, offsets, kernel))


@pytest.mark.parametrize("backend", ["torch", "triton", "auto"])
def test_compiled_once_for_all_offsets(backend):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(grouped_matmul, fullgraph=True, backend=counter)
    for sizes in ([0, 3, 2], [5, 0, 0], [1, 1, 3]):
        x, w, dy, offsets = inputs(sizes, 8, 16)
        results = []
        for f in (grouped_matmul, compiled):
            leaves = [t.detach().requires_grad_() for t in (x, w)]
            y = f(*leaves, offsets, backend=backend)
            results.append([y, *torch.autograd.grad(y, leaves, dy)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("sizes", [[1] * 9, [17] * 9, [0, 0, 153], [1] * 8 + [145], [16] * 9])
def test_programs_are_counted_without_the_offsets(sizes, monkeypatch):
    """The tensors have no contents that could be read, and the programs are enough for all contents."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append((grid, options))

    monkeypatch.setattr(module, "product_kernel", Kernel())
    monkeypatch.setattr(module, "weight_kernel", Kernel())
    monkeypatch.setattr(module, "architecture", lambda x: "sm_80")
    monkeypatch.setattr(module, "precision", lambda x: "ieee")
    E, M, D, N = len(sizes), sum(sizes), 32, 300
    x, w, dy, offsets = (torch.empty(s, device="meta") for s in ((M, D), (E, N, D), (M, N), (E,)))
    with pytest.raises(NotImplementedError, match="meta"):
        offsets.tolist()
    module.product_triton(x, w.mT, offsets)
    module.product_triton(dy, w, offsets)
    module.weight_gradient_triton(dy, x, offsets)
    for ((programs,), options), columns in zip(launched[:2], (N, D), strict=True):
        BLOCK_M, n_columns = options["BLOCK_M"], math.ceil(columns / options["BLOCK_N"])
        needed = sum(math.ceil(size / BLOCK_M) for size in sizes) * n_columns
        assert needed <= programs < needed + E * n_columns
    (programs,), options = launched[2]
    assert programs == E * math.ceil(N / options["BLOCK_N"]) * math.ceil(D / options["BLOCK_D"])


def test_tiles_are_as_high_as_groups_are_long(monkeypatch):
    monkeypatch.setattr(configs, "_tuned", dict)
    cases = [(1, 2), (50, 2), (500, 2), (500, 4)]  # rows a group, and bytes of a number
    seen = [configs.grouped("sm_90", 8, rows, element_size).product[:2] for rows, element_size in cases]
    assert seen == [(16, 64), (64, 128), (128, 256), (128, 128)]


def test_bad_arguments_say_why():
    x, w, _, offsets = inputs([2, 3], 8, 16)

    def error(match, *arguments, backend="auto"):
        with pytest.raises(ValueError, match=match):
            grouped_matmul(*arguments, backend=backend)

    error(r"x \(5, 7\), w \(2, 16, 8\), offsets \(2,\): expected \(M, D\)", x[:, 1:], w, offsets)
    error(r"expected \(M, D\), \(E, N, D\)", x[0], w, offsets)
    error(r"expected \(M, D\), \(E, N, D\)", x, w[0], offsets)
    error(r"offsets \(3,\)", x, w, torch.cat([offsets, offsets[-1:]]))
    error("at least one group", x[:0], w[:0], offsets[:0])
    error("expected torch.int32 offsets", x, w, offsets.long())
    error("all on one device", x, w, offsets.to("meta"))
    error("all on one device", x, w.to("meta"), offsets)
    error(r"w torch\.float16: expected one float dtype", x, w.half(), offsets)
    error(r"x torch\.int32, w torch\.int32: expected one float", x.int(), w.int(), offsets)
    error("cuda-magic", x, w, offsets, backend="cuda-magic")
    error(r"not torch\.float64; use 'auto'", x.double(), w.double(), offsets, backend="triton")


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([3, 2, 5], r"offsets\[1\] is 2: expected at least 3"),
        ([-1, 2, 5], r"offsets\[0\] is -1: expected at least 0"),
        ([1, 2, 4], r"offsets\[-1\] is 4: expected 5, the rows of x"),
        ([1, 2, 600], r"offsets\[-1\] is 600: expected 5"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_offsets_that_do_not_fit(backend, ends, message):
    x, w, dy, _ = (t.cpu() for t in inputs([1, 1, 3], 8, 16))
    offsets = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        grouped_matmul(x, w, offsets, backend=backend)
    if backend == "torch":
        with pytest.raises(ValueError, match=message):
            torch.compile(grouped_matmul, fullgraph=True, backend="eager")(x, w, offsets)


@pytest.mark.parametrize("ends", [[3, 2, 5], [-9, 2, 5], [1, 2, 600], [700, 800, 900], [2**30, 0, 2**31 - 1]])
def test_kernels_touch_nothing_else_whatever_the_offsets(ends, monkeypatch):
    """The kernels do not check offsets. Before and after x, w, dy and the results there are sevens."""
    memory, fence = [], 4096

    def fenced(shape):
        whole = torch.full((2 * fence + torch.Size(shape).numel(),), 7.0, device=DEVICE)
        memory.append(whole)
        return whole[fence:-fence].view(shape)

    x, w, dy, _ = inputs([1, 1, 3], 24, 40)
    x, w, dy = (fenced(t.shape).copy_(t) for t in (x, w, dy))
    offsets = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    new_empty = torch.Tensor.new_empty

    def new_fenced(t, *shape, **by_the_interpreter):
        return new_empty(t, *shape, **by_the_interpreter) if by_the_interpreter else fenced(shape).zero_()

    monkeypatch.setattr(torch.Tensor, "new_empty", new_fenced)
    results = [
        module.product_triton(x, w.mT, offsets),
        module.product_triton(dy, w, offsets),
        module.weight_gradient_triton(dy, x, offsets),
    ]
    assert len(memory) == 6 and all(t.isfinite().all() for t in results)
    for whole in memory:
        assert (whole[:fence] == 7).all() and (whole[-fence:] == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_matrix_of_a_group_without_rows_counts_for_nothing(backend):
    x, w, dy, offsets = inputs(*SOME)
    poisoned = w.clone()
    poisoned[[0, 1, 3, 6]] = math.nan
    for ours, clean in zip(
        run(x, poisoned, dy, offsets, backend), run(x, w, dy, offsets, backend), strict=True
    ):
        assert torch.equal(ours, clean)


def uneven(rows):
    """Return sizes of groups with this many rows on average; some are empty, some several times larger."""
    share = torch.rand(24, generator=torch.Generator().manual_seed(0)) ** 3
    return [*(4 * rows * share).int().tolist(), 0, rows]


# Rows a group, and widths; one small shape in a rehearsal.
ROWS, WIDTHS = ([1, 40, 300], [(512, 768), (1000, 333)]) if DEVICE == "cuda" else ([5], [(40, 21)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: f"{rows} rows a group")
@pytest.mark.parametrize(("D", "N"), WIDTHS)
def test_large(D, N, rows, dtype):
    """On a GPU, groups of 1, 40 and 300 rows use tiles of every height."""
    assert_as_good_as_reference(inputs(uneven(rows), D, N, dtype), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "least", "most"), [("highest", 0, 1e-5), ("high", 1e-5, 2e-3)])
@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: f"{rows} rows a group")
@pytest.mark.parametrize(("D", "N"), WIDTHS)
def test_large_in_float32(D, N, rows, precision, least, most):
    """The error is that of norms. TF32 cuts or rounds factors to 10 bits, an error below 2^-10 for each.

    Three such products are almost float32, but tensor cores truncate their sums, here over 1200 rows.
    """
    if precision == "high" and (torch.version.hip or DEVICE == "cpu"):
        pytest.skip("no TF32 on AMD, nor in the interpreter")
    torch.set_float32_matmul_precision(precision)
    case = inputs(uneven(rows), D, N)
    for ours, truth in zip(run(*case, "triton"), exact(*case), strict=True):
        assert least <= (ours.double() - truth).norm() / truth.norm() < most


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pytorch_s_own_on_a_gpu(dtype, a_gpu_itself):
    assert_as_good_as_reference(inputs([0, 700, 3, 0, 90, 0], 256, 384, dtype), "torch")
    x, w, _, offsets = inputs([2, 3], 8, 9, dtype)
    with pytest.raises(ValueError, match="multiples of 16 bytes for D and N on a GPU, not 8 and 9"):
        grouped_matmul(x, w, offsets, backend="torch")
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        grouped_matmul(x.double(), w.double(), offsets, backend="torch")


@pytest.mark.gpu
def test_auto_takes_float64_on_a_gpu():
    x, w, dy, offsets = inputs(*SOME, torch.float64)
    for ours, truth in zip(run(x, w, dy, offsets, "auto"), exact(x, w, dy, offsets), strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_gpu_is_never_waited_for(backend, a_gpu_itself):
    if backend == "torch" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("PyTorch's own loops over the groups before Hopper")
    case = inputs([200, 0, 300, 12], 256, 512, torch.bfloat16)
    run(*case, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*case, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
