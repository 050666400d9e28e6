"""The loss of a language model against its definition in float64, written in another way than in the file.

Without a GPU the kernel runs in Triton's interpreter, which truncates to bfloat16 instead of rounding. There
it is tested in float32 and float16.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch.profiler import ProfilerActivity, profile

from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy, rows_per_chunk, to_gradient_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = ["chunked", "triton"]
CAP, Z, IGNORE = dict(softcap=3.0), dict(z_loss=0.02), dict(ignore_index=3)
OPTIONS = [{}, CAP, Z, IGNORE, CAP | Z, CAP | IGNORE, Z | IGNORE]
CASES = [(backend, dtype) for backend in OURS for dtype in (torch.float32, torch.float16)] + [
    ("chunked", torch.bfloat16),
    pytest.param("triton", torch.bfloat16, marks=pytest.mark.gpu),
]


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of 16 rows, the last one shorter."""
    monkeypatch.setattr(cross_entropy, "rows_per_chunk", lambda N, D, V, device: 16)
    monkeypatch.setattr(cross_entropy, "IN_CACHE", 0)


def inputs(N, D, V, dtype=torch.float32, *, ignored=0.2, ignore_index=-100, scale=1.0, leading=None):
    generator = torch.Generator().manual_seed(N * D + V)
    hidden = torch.randn(N, D, generator=generator)
    weight = scale * torch.randn(V, D, generator=generator)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = ignore_index
    hidden, targets = hidden.view(*leading or (N,), D), targets.view(leading or (N,))
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), targets.to(DEVICE)


def run(hidden, weight, targets, factor=3.5, **options):
    """Return the loss, z, and the gradients of `factor` times the loss."""
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    loss, z = linear_cross_entropy(hidden, weight, targets, **options)
    assert not z.requires_grad
    return loss.detach(), z, *torch.autograd.grad(factor * loss, (hidden, weight))


def exact(hidden, weight, targets, factor=3.5, *, ignore_index=-100, softcap=None, z_loss=0.0):
    """Return the same in float64, from the log-probabilities of the tokens that are not ignored."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    counts = targets.flatten() != ignore_index
    logits = torch.nn.functional.linear(h.flatten(0, -2)[counts], w)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    log_p = logits.log_softmax(-1)
    n = max(1, counts.sum().item())
    z = z_loss * ((logits - log_p)[:, 0] ** 2).sum() / n
    loss = z - log_p[torch.arange(len(log_p)), targets.flatten()[counts]].sum() / n
    return loss.detach(), z.detach(), *torch.autograd.grad(factor * loss, (h, w))


def assert_as_good_as_reference(case, backend, **options):
    """Check that the largest error is at most twice that of plain PyTorch in the same dtype.

    That may be small by chance, so one rounding of the largest gradient, or four of the loss, are added.
    """
    truths = exact(*case, **options)
    ours, plain = run(*case, backend=backend, **options), run(*case, backend="reference", **options)
    for name, a, b, truth in zip(("loss", "z", "dhidden", "dweight"), ours, plain, truths, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape == truth.shape, name
        if not truth.numel():
            continue
        error, allowed = ((x.double() - truth).abs().max().item() for x in (a, b))
        floor = 4 * torch.finfo(torch.float32).eps if truth.dim() == 0 else torch.finfo(a.dtype).eps
        floor *= max(1.0, truth.abs().max().item()) if truth.dim() == 0 else truth.abs().max().item()
        assert error <= 2 * allowed + floor, f"{name}: error {error}, plain PyTorch's is {allowed}"


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_values_and_gradients(backend, dtype, options, small_chunks):
    ignore_index = options.get("ignore_index", -100)
    for N, D, V in ((67, 32, 131), (1, 16, 1)):
        case = inputs(
            N, D, V, dtype, ignored=0.3 * bool(options.get("ignore_index")), ignore_index=ignore_index
        )
        assert_as_good_as_reference(case, backend, **options)


@pytest.mark.parametrize("options", [{}, CAP | Z], ids=["plain", "softcap+z"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_more_columns_than_a_block_of_the_kernel(dtype, options):
    hidden, weight, targets = inputs(5, 8, 8195, dtype, scale=0.5)
    weight[4096:] *= 2  # larger logits come later, so the sum so far must be corrected
    assert_as_good_as_reference((hidden, weight, targets), "triton", **options)


def test_many_chunks_add_up_in_float32(monkeypatch):
    """After 256 chunks the sums are so large that in bfloat16 one more chunk would change nothing."""
    monkeypatch.setattr(cross_entropy, "rows_per_chunk", lambda *shape: 1)
    hidden, weight, targets = inputs(256, 16, 33, torch.bfloat16)
    assert_as_good_as_reference((hidden.abs(), weight, torch.zeros_like(targets)), "chunked")


def test_the_factor_of_the_backward_pass_is_not_rounded():
    """In bfloat16 1.003 would be rounded to 1, the same error in all gradients."""
    case = inputs(64, 32, 131, torch.bfloat16, ignored=0)
    once, scaled = (run(*case, factor=factor, backend="chunked")[2:] for factor in (1.0, 1.003))
    for a, b in zip(once, scaled, strict=True):
        a, b = a.double().flatten(), b.double().flatten()
        assert abs(a @ b / (a @ a) - 1.003) < 5e-4


@pytest.mark.parametrize("in_cache", [0, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorch_s_own(dtype, in_cache, monkeypatch):
    if in_cache == 0 and not cross_entropy.HAS_CHUNKS:
        pytest.skip("this PyTorch has no linear_cross_entropy in chunks")
    monkeypatch.setattr(cross_entropy, "IN_CACHE", in_cache)
    case = inputs(67, 32, 131, dtype, leading=(1, 67))
    ours, truths = run(*case, backend="torch"), exact(*case)
    for a, truth in zip(ours, truths, strict=True):
        # One rounding of the loss of each token or of the gradients, and one of their logits.
        error = (a.double() - truth).norm()
        assert error <= 4 * torch.finfo(dtype).eps * max(truth.norm(), 1)


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    backend=st.sampled_from(OURS),
    N=st.integers(0, 20),
    D=st.integers(1, 40),
    V=st.integers(1, 150),
    rows=st.sampled_from([1, 8, 64]),
    options=st.sampled_from(OPTIONS[:4]),
)
def test_any_shape(backend, N, D, V, rows, options):
    case = inputs(N, D, V, ignore_index=options.get("ignore_index", -100), leading=(N, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "rows_per_chunk", lambda *shape: rows)
        assert_as_good_as_reference(case, backend, **options)


@pytest.mark.parametrize("options", OPTIONS[:3], ids=["plain", "softcap", "z"])
@pytest.mark.parametrize("backend", ["reference", *OURS])
def test_huge_logits(backend, options, small_chunks):
    """Logits of 1e4 give a softmax of 0 or 1, and exponentials that overflow and underflow."""
    hidden, weight, targets = inputs(33, 16, 131, scale=1e4 / math.sqrt(16))
    ours, truths = (f(hidden, weight, targets, **options) for f in (run_as(backend), exact))
    for a, truth in zip(ours, truths, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), truth, rtol=1e-3, atol=1e-3 * truth.abs().max().item())


def run_as(backend):
    return lambda *case, **options: run(*case, backend=backend, **options)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto", *OURS])
@pytest.mark.parametrize("N", [0, 40])
def test_nothing_to_predict(backend, N):
    hidden, weight, targets = inputs(N, 16, 33, ignored=1.1)
    for result in run(hidden, weight, targets, backend=backend):
        assert (result == 0).all()


@pytest.mark.parametrize("backend", ["reference", "torch", "auto", *OURS])
def test_a_token_without_target_counts_for_nothing(backend):
    """NaN or infinity in its row, or logits too large for float16, change no bit of the rest."""
    for dtype, poison in ((torch.float32, math.nan), (torch.float32, math.inf), (torch.float16, 6e4)):
        hidden, weight, targets = inputs(40, 16, 33, dtype)
        poisoned = hidden.clone()
        poisoned[targets == -100] = poison
        clean = run(hidden, weight, targets, backend=backend)
        for ours, expected in zip(run(poisoned, weight, targets, backend=backend), clean, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", OURS)
def test_only_what_is_needed_is_computed(backend, small_chunks):
    case = inputs(16, 32, 131)
    for needs_hidden, needs_weight in ((True, True), (True, False), (False, True), (False, False)):
        hidden = case[0].detach().requires_grad_(needs_hidden)
        weight = case[1].detach().requires_grad_(needs_weight)
        with profile(activities=[ProfilerActivity.CPU]) as events:
            loss, _ = linear_cross_entropy(hidden, weight, case[2], backend=backend)
        products = sum(e.count for e in events.key_averages() if e.key in ("aten::mm", "aten::addmm_"))
        assert products == 1 + needs_hidden + needs_weight
        assert loss.requires_grad == (needs_hidden or needs_weight)
        if loss.requires_grad:
            loss.backward()
        dhidden, dweight = exact(*case, 1.0)[2:]
        for x, needed, expected in ((hidden, needs_hidden, dhidden), (weight, needs_weight, dweight)):
            assert (x.grad is not None) == needed
            if needed:
                torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-6)
    hidden.requires_grad_()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as events:
        assert not linear_cross_entropy(hidden, weight, case[2], backend=backend)[0].requires_grad
    assert sum(e.count for e in events.key_averages() if e.key in ("aten::mm", "aten::addmm_")) == 1


@pytest.mark.parametrize("backend", OURS)
def test_one_graph_backward_twice(backend, small_chunks):
    hidden, weight, targets = inputs(40, 16, 33)
    hidden.requires_grad_(), weight.requires_grad_()
    loss, _ = linear_cross_entropy(hidden, weight, targets, backend=backend)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [x.clone() for x in first]
    twice = torch.autograd.grad(loss, (hidden, weight), torch.tensor(2.0, device=DEVICE))
    for a, b, c in zip(first, kept, twice, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(2 * a, c)
    loss = linear_cross_entropy(hidden, weight, targets, backend=backend)[0]
    (slope,) = torch.autograd.grad(loss, hidden, create_graph=True)
    assert torch.equal(slope, kept[0])
    with pytest.raises(NotImplementedError, match=r"linear_cross_entropy: .* no second derivative"):
        slope.sum().backward()


@pytest.mark.parametrize("backend", OURS)
def test_every_run_gives_the_same_bits_whatever_memory_held(backend, small_chunks):
    case = inputs(67, 32, 131)
    first = run(*case, backend=backend, **CAP, **Z)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
    try:
        assert torch.empty(1, device=DEVICE).isnan().all()
        again = run(*case, backend=backend, **CAP, **Z)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", OURS)
def test_any_strides(backend, small_chunks):
    hidden, weight, targets = inputs(60, 16, 33, leading=(20, 3))
    expected = run(hidden, weight, targets, backend=backend)
    strided = run(
        hidden.transpose(0, 1).contiguous().transpose(0, 1),
        weight.T.contiguous().T,
        targets.T.contiguous().T,
        backend=backend,
    )
    for a, b in zip(expected, strided, strict=True):
        torch.testing.assert_close(a, b)
    # The targets of the last tokens are a column, in steps of a row.
    column = run(hidden[:, -1], weight, targets[:, -1], backend=backend)
    expected = run(hidden[:, -1], weight, targets[:, -1].clone(), backend=backend)
    for a, b in zip(expected, column, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("needs", [(True, True), (False, True), (False, False)])
def test_operator_is_registered_correctly(backend, needs, small_chunks):
    hidden, weight, targets = inputs(20, 16, 33)
    hidden.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    arguments = (hidden, weight, targets, -100, 3.0, 0.02, backend == "triton", *needs)
    library.opcheck(cross_entropy._in_chunks, arguments)


@pytest.mark.parametrize("backend", [*OURS, "auto"])
def test_compiled_equals_eager(backend, small_chunks):
    hidden, weight, targets = inputs(40, 16, 33)

    def loss_and_gradients(function):
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss, z = function(h, w, targets, z_loss=0.02, backend=backend)
        return loss, z, *torch.autograd.grad(loss, (h, w))

    eager = loss_and_gradients(linear_cross_entropy)
    compiled = loss_and_gradients(torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager"))
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "torch", "chunked", "auto"])
def test_autocast(backend):
    hidden, weight, targets = inputs(300, 32, 131)
    precise = run(hidden, weight, targets, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        rounded = run(hidden, weight, targets, backend=backend)
    for a, b in zip(rounded, precise, strict=True):
        assert a.dtype == torch.float32
        assert 0 <= (a - b).norm() <= 0.01 * b.norm()
    assert not torch.equal(rounded[2], precise[2])


def test_chunks():
    """A chunk has as many logits as there are numbers of hidden on a GPU, as fit the cache elsewhere."""
    assert rows_per_chunk(2**17, 1024, 2**16, "cuda") == 2048
    assert rows_per_chunk(2**17 - 1, 1024, 2**16, "cuda") == 1024
    assert rows_per_chunk(2**15, 768, 50257, "cuda") == 1024
    assert rows_per_chunk(2**15, 768, 1000, "cpu") == 1024
    assert rows_per_chunk(2**15, 768, 50257, "cpu") == 256
    assert rows_per_chunk(100, 768, 50257, "cpu") == 100
    assert rows_per_chunk(0, 1, 2**40, "cuda") == 1


def test_memory_does_not_grow_with_the_vocabulary(peak_memory):
    """Forward needs a chunk of logits and the gradients; backward the gradients, as kept and as returned."""
    N, D = 2048 if DEVICE == "cpu" else 2**15, 512  # a chunk on a GPU has at least 1024 rows
    run(*inputs(16, 16, 33))  # libraries allocate memory when they are first used
    plain = {}
    for V in (1024, 3072):
        hidden, weight, targets = case = inputs(N, D, V)
        gradients, chunk = hidden.nbytes + weight.nbytes, hidden.nbytes
        hidden.requires_grad_(), weight.requires_grad_()
        assert peak_memory(partial(linear_cross_entropy, *case)) <= gradients + 1.1 * chunk
        assert peak_memory(partial(run, *case)) <= 2 * gradients + 0.1 * chunk
        plain[V] = peak_memory(partial(linear_cross_entropy, *case, backend="reference"))
    assert plain[3072] - plain[1024] >= N * (3072 - 1024) * 4


def test_auto_takes_pytorch_s_own_for_few_logits(monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("it is Triton there")
    case = inputs(40, 16, 33)
    same = [torch.equal(a, b) for a, b in zip(run(*case), run(*case, backend="torch"), strict=True)]
    assert all(same)
    monkeypatch.setattr(cross_entropy, "IN_CACHE", 0)
    same = [torch.equal(a, b) for a, b in zip(run(*case), run(*case, backend="chunked"), strict=True)]
    assert all(same)


@pytest.mark.parametrize("backend", OURS)
def test_bad_arguments_say_why(backend):
    hidden, weight, targets = inputs(6, 8, 10, ignored=0)
    for wrong in (
        (hidden[1:], weight, targets),
        (hidden, weight[:, 1:], targets),
        (hidden, weight, targets.int()),
        (hidden, weight[:0], targets),
        (hidden[0, 0], weight, targets[0]),
    ):
        with pytest.raises(ValueError, match=r"expected \(..., D\)"):
            linear_cross_entropy(*wrong, backend=backend)
    for pair in ((hidden, weight.double()), (hidden.long(), weight.long())):
        with pytest.raises(ValueError, match="expected one float dtype"):
            linear_cross_entropy(*pair, targets, backend=backend)
    with pytest.raises(ValueError, match=r"softcap 0\.0: expected above 0"):
        linear_cross_entropy(hidden, weight, targets, softcap=0.0, backend=backend)
    with pytest.raises(ValueError, match="cuda-magic"):
        linear_cross_entropy(hidden, weight, targets, backend="cuda-magic")
    with pytest.raises(ValueError, match="no float64"):
        linear_cross_entropy(hidden.double(), weight.double(), targets, backend="triton")
    for option in (CAP, Z):
        with pytest.raises(ValueError, match="no softcap and no z_loss"):
            linear_cross_entropy(hidden, weight, targets, backend="torch", **option)


@pytest.mark.parametrize("target", [10, -1])
@pytest.mark.parametrize("backend", ["reference", "torch", "auto", *OURS])
def test_a_target_out_of_range(backend, target):
    hidden, weight, targets = (x.cpu() for x in inputs(6, 8, 10, ignored=0))
    targets[4] = target
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=f"target {target}: expected 0 to 9 or -100"):
            linear_cross_entropy(hidden, weight, targets, backend=backend)
    if backend == "triton":  # the kernel reads nothing outside the row, and returns NaN
        logits, nll, lse = (torch.zeros(shape, device=DEVICE) for shape in ((6, 64), 6, 6))
        to_gradient_triton(logits[:, :10], targets.to(DEVICE), nll, lse, -100, None, 0.0, True)
        assert nll.isnan().tolist() == [False] * 4 + [True, False]
        assert lse.isfinite().all() and logits.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, CAP | Z], ids=["plain", "softcap+z"])
def test_a_real_vocabulary(dtype, options):
    """GPT-2's vocabulary of 50257, an odd number, in several chunks."""
    shape = (4096, 256, 50257) if DEVICE == "cuda" else (40, 16, 257)
    case = inputs(*shape, dtype, scale=0.1)
    assert_as_good_as_reference(case, "triton", **options)


@pytest.mark.gpu
def test_the_gpu_is_never_waited_for(a_gpu_itself):
    hidden, weight, targets = inputs(4096, 256, 5003, torch.bfloat16)
    run(hidden, weight, targets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(hidden, weight, targets, **Z)
    finally:
        torch.cuda.set_sync_debug_mode("default")
