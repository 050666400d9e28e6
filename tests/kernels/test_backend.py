"""What all operations have in common: second derivatives, torch.func and Triton's interpreter."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, vmap

from kernels import attention, attention_cpu, gelu, grouped_matmul, linear_cross_entropy, rms_norm
from kernels.linear_attention import linear_attention
from kernels.selected_attention import selected_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


K, V = normal(1, 5, 2, 8), normal(2, 5, 2, 8)[:1]
BLOCKS = torch.tensor([0, 1, 2], device=DEVICE).expand(1, 5, 2, 3)
RATES = torch.tensor([0.1, 0.5], device=DEVICE)
W, HEAD = normal(2, 6, 8), normal(11, 8)
ENDS = torch.tensor([2, 5], dtype=torch.int32, device=DEVICE)
TARGETS = torch.tensor([3, 10, -100, 0, 5], device=DEVICE)
# A function of x and a backend, and x.
OPERATIONS = {
    "attention": (lambda x, b: attention(x, K.to(x), V.to(x), causal=True, backend=b), normal(1, 5, 2, 8)),
    "linear_attention": (
        lambda x, b: linear_attention(x, V.to(x), V.to(x) + 1, RATES, backend=b)[0],
        normal(1, 5, 2, 8),
    ),
    "selected_attention": (
        lambda x, b: selected_attention(x, V.to(x), V.to(x) + 1, BLOCKS, 2, backend=b),
        normal(1, 5, 2, 8),
    ),
    "rms_norm": (lambda x, b: rms_norm(x, HEAD[0].to(x), backend=b), normal(5, 8)),
    "grouped_matmul": (lambda x, b: grouped_matmul(x, W.to(x), ENDS, backend=b), normal(5, 8)),
    "linear_cross_entropy": (
        lambda x, b: linear_cross_entropy(x, HEAD.to(x), TARGETS, z_loss=0.1, backend=b)[0],
        normal(5, 8),
    ),
}
REGISTERED = [
    *((name, "triton") for name in OPERATIONS),
    ("grouped_matmul", "torch"),
    ("linear_cross_entropy", "chunked"),
]


def scalar(name, backend):
    """Return an operation as a function of x to a number, with a second derivative."""
    f = OPERATIONS[name][0]
    return lambda x: f(x, backend).square().sum()


def second(f, x):
    """Return the product of the Hessian of f at x with a vector of ones, and the gradient."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(slope.sum(), x)[0], slope.detach()


@pytest.mark.parametrize(("name", "backend"), REGISTERED)
def test_a_second_derivative_is_refused_in_one_sentence(name, backend):
    """The first derivative is right with create_graph=True too; the reference has both."""
    f, x = scalar(name, backend), OPERATIONS[name][1]
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    expected, first = second(scalar(name, "reference"), x.double())
    torch.testing.assert_close(slope.double(), first, atol=1e-4, rtol=1e-4)
    with pytest.raises(
        NotImplementedError, match=f'{name}: .* no second derivative; use backend="reference"'
    ):
        torch.autograd.grad(slope.sum(), leaf)
    ours, _ = second(scalar(name, "reference"), x)
    torch.testing.assert_close(ours.double(), expected, atol=1e-3, rtol=1e-3)


def test_so_it_is_by_attention_of_short_rows_on_a_cpu(monkeypatch):
    monkeypatch.setattr(attention_cpu, "onednn_multiplies", lambda: True)
    f, x = scalar("attention", "torch"), OPERATIONS["attention"][1].cpu()
    K_cpu, V_cpu = K.cpu(), V.cpu()
    assert attention_cpu.applies(x, K_cpu)
    with pytest.raises(NotImplementedError, match=r'attention: .*use backend="reference"'):
        second(lambda x: attention(x, K_cpu, V_cpu, causal=True).square().sum(), x)
    torch.testing.assert_close(grad(f)(x.to(DEVICE)), grad(scalar("attention", "reference"))(x.to(DEVICE)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_auto_runs_under_every_transform_of_torch_func(name):
    f, x = scalar(name, "auto"), OPERATIONS[name][1]
    exact, first = second(scalar(name, "reference"), x.double())
    torch.testing.assert_close(grad(f)(x).double(), first, atol=1e-4, rtol=1e-4)
    rows = vmap(grad(f))(torch.stack([x, -x]))
    torch.testing.assert_close(rows[0].double(), first, atol=1e-4, rtol=1e-4)
    product = hessian(f)(x).flatten(x.dim()).sum(-1)
    torch.testing.assert_close(product.double(), exact, atol=1e-3, rtol=1e-3)
    # Forward mode gives the slope along x.
    with forward_ad.dual_level():
        along = forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(along.double(), (first * x).sum(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "backend"), REGISTERED)
def test_a_registered_operation_refuses_these_transforms_in_one_sentence(name, backend):
    """In forward mode PyTorch would leave out the slope without a word."""
    f, x = scalar(name, backend), OPERATIONS[name][1]
    message = f"{name}: backend '{backend}' does not run under torch.func .*; use backend=\"reference\""
    for transform in (lambda: grad(f)(x), lambda: vmap(f)(x[None])):
        with pytest.raises(ValueError, match=message):
            transform()
    with forward_ad.dual_level(), pytest.raises(ValueError, match=message):
        f(forward_ad.make_dual(x, x))


def test_samples_with_targets_of_their_own_have_gradients_of_their_own():
    """vmap(grad(...)) over hidden and targets together, which are then not checked for their range."""
    x, targets = normal(3, 4, 8), torch.arange(12, device=DEVICE).view(3, 4) % 11

    def loss(x, targets):
        return linear_cross_entropy(x, HEAD, targets)[0]

    for row, one, t in zip(vmap(grad(loss))(x, targets), x, targets, strict=True):
        torch.testing.assert_close(row, grad(loss)(one, t))


def test_gelu_has_every_derivative():
    def f(x):
        return gelu(x).sum()

    def assert_near(ours, truth):  # a few roundings of numbers of order one
        torch.testing.assert_close(ours.double(), truth, atol=4e-6, rtol=0)

    x = torch.linspace(-4, 4, 15, device=DEVICE)
    exact, first = second(f, x.double())
    for ours, truth in zip(second(f, x), (exact, first), strict=True):
        assert_near(ours, truth)
    assert_near(grad(f)(x), first)
    assert_near(hessian(f)(x).sum(1), exact)
    assert_near(vmap(grad(f))(x[None])[0], first)
    with forward_ad.dual_level():
        assert_near(forward_ad.unpack_dual(gelu(forward_ad.make_dual(x, torch.ones_like(x)))).tangent, first)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter runs only without a GPU")
@pytest.mark.parametrize("name", ["attention", "grouped_matmul"])
def test_the_interpreter_refuses_products_in_bfloat16(name):
    f, x = OPERATIONS[name]
    with pytest.raises(ValueError, match=f"{name}: .*no bfloat16 in Triton's interpreter"):
        f(x.bfloat16(), "triton")
    assert f(x.bfloat16(), "auto").dtype == torch.bfloat16
