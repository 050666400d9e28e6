"""Backpropagation: exact gradients of what a few operations compute, in NumPy, and a network trained by them.

    forward     y = f(a, b)                     each result keeps its inputs, and how y depends on them
    backward    dL/da = sum of dL/dy dy/da      over all y computed directly from a: the chain rule

Reverse-mode differentiation (Linnainmaa 1970; for networks Rumelhart, Hinton and Williams 1986). The loss L
is one number, and every gradient dL/dx has the shape of its x. So dy/da, a matrix of all derivatives of y by
a, is never built: each operation has a function from dL/dy to dL/da (a vector-Jacobian product), the third
column:

    operation       y                   dL/da, with g = dL/dy
    sum of two      a + b               g
    product         a * b               g * b
    power           a ** n              g * n a ** (n - 1)
    exponential     exp(a)              g * y
    logarithm       log(a)              g / a
    tanh            tanh(a)             g * (1 - y ** 2)
    ReLU            max(a, 0)           g where a > 0, else 0
    matrix product  a @ b               g @ b^T;  for b: a^T @ g
    sum             sum of a over axes  g, repeated along these axes
    elements        a[index]            g added at the elements taken, 0 elsewhere
    reshape         a in another shape  g in the shape of a

An operation between different shapes repeats the smaller one (broadcasting), so its gradient is summed over
what was repeated. `Tensor.backward` visits all results from the last to the first, so that the gradient of a
result is complete before it is passed on. The backward pass needs two matrix products for each one of the
forward pass. PyTorch does the same, with more operations, on more devices.

    python -m language.backprop         a network learns to tell two spirals apart, in some seconds
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from formats import command

Array = np.ndarray


class Tensor:
    """An array of float64 numbers, with the tensors that it was computed from."""

    __array_ufunc__ = None  # so that NumPy leaves array + tensor to __radd__

    def __init__(self, value, inputs: Sequence[tuple["Tensor", Callable[[Array], Array]]] = ()):
        """value: numbers; inputs: each tensor it was computed from, with the function from dL/d(this) to its
        share of dL/d(input)."""
        self.value = np.asarray(value, dtype=np.float64)
        self.inputs = inputs
        self.grad = None  # dL/d(this), of the same shape, after `backward`

    def __add__(self, other) -> "Tensor":
        a, b = self, as_tensor(other)
        return Tensor(
            a.value + b.value,
            [(a, lambda g: summed_to(g, a.value.shape)), (b, lambda g: summed_to(g, b.value.shape))],
        )

    def __mul__(self, other) -> "Tensor":
        a, b = self, as_tensor(other)
        return Tensor(
            a.value * b.value,
            [
                (a, lambda g: summed_to(g * b.value, a.value.shape)),
                (b, lambda g: summed_to(g * a.value, b.value.shape)),
            ],
        )

    def __pow__(self, n: float) -> "Tensor":
        # For n = 0 the gradient is 0, also where a = 0 and a ** -1 would be infinite.
        return Tensor(self.value**n, [(self, lambda g: g * n * self.value ** (n - 1 if n else 0))])

    def __matmul__(self, other) -> "Tensor":
        """Return the product (..., M, N) of (..., M, K) and (..., K, N)."""
        a, b = self, as_tensor(other)
        return Tensor(
            a.value @ b.value,
            [
                (a, lambda g: summed_to(g @ b.value.swapaxes(-1, -2), a.value.shape)),
                (b, lambda g: summed_to(a.value.swapaxes(-1, -2) @ g, b.value.shape)),
            ],
        )

    def __getitem__(self, index) -> "Tensor":
        def scattered(g: Array) -> Array:
            out = np.zeros_like(self.value)
            np.add.at(out, index, g)  # an element that was taken twice gets both gradients
            return out

        return Tensor(self.value[index], [(self, scattered)])

    def __neg__(self) -> "Tensor":
        return self * -1.0

    def __sub__(self, other) -> "Tensor":
        return self + -as_tensor(other)

    def __truediv__(self, other) -> "Tensor":
        return self * as_tensor(other) ** -1.0

    # The same with a number or an array on the left, such as 1 - t.
    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other) -> "Tensor":
        return as_tensor(other) - self

    def __rtruediv__(self, other) -> "Tensor":
        return as_tensor(other) / self

    def __rmatmul__(self, other) -> "Tensor":
        return as_tensor(other) @ self

    def exp(self) -> "Tensor":
        y = np.exp(self.value)
        return Tensor(y, [(self, lambda g: g * y)])

    def log(self) -> "Tensor":
        return Tensor(np.log(self.value), [(self, lambda g: g / self.value)])

    def tanh(self) -> "Tensor":
        y = np.tanh(self.value)
        return Tensor(y, [(self, lambda g: g * (1 - y**2))])

    def relu(self) -> "Tensor":
        return Tensor(np.maximum(self.value, 0), [(self, lambda g: g * (self.value > 0))])

    def sum(self, axis: int | tuple[int, ...] | None = None) -> "Tensor":
        """Return the sum of all numbers, or over axes, which remain with the length 1."""
        total = self.value.sum(axis=axis, keepdims=axis is not None)
        return Tensor(total, [(self, lambda g: np.broadcast_to(g, self.value.shape))])

    def reshape(self, *shape: int) -> "Tensor":
        return Tensor(self.value.reshape(shape), [(self, lambda g: g.reshape(self.value.shape))])

    def backward(self) -> None:
        """Set `grad` of every tensor that this one, the loss, was computed from. It must be one number.

        A second call sets it anew, where PyTorch adds to it. Gradients are computed from the values that
        tensors have now: call this before a step of the optimizer changes them, or the gradients are wrong.
        """
        if self.value.size != 1:
            raise ValueError(f"backward: shape {self.value.shape}: expected one number, such as a mean loss")
        order = computed_in_order(self)
        for tensor in order:
            tensor.grad = np.zeros_like(tensor.value)
        self.grad = np.ones_like(self.value)
        for tensor in reversed(order):
            for source, gradient in tensor.inputs:
                source.grad = source.grad + gradient(tensor.grad)


def as_tensor(x) -> Tensor:
    return x if isinstance(x, Tensor) else Tensor(x)


def summed_to(g: Array, shape: tuple[int, ...]) -> Array:
    """Return the gradient of an array of this shape, which an operation repeated to the shape of g."""
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    repeated = tuple(axis for axis, n in enumerate(shape) if n == 1)
    return g.sum(axis=repeated, keepdims=True)


def computed_in_order(last: Tensor) -> list[Tensor]:
    """Return all tensors that the last one was computed from, and itself; each behind its own inputs."""
    order, seen, stack = [], set(), [(last, False)]
    while stack:  # a loop instead of a recursion, which a long chain of operations would exceed
        tensor, inputs_done = stack.pop()
        if inputs_done:
            order.append(tensor)
        elif id(tensor) not in seen:
            seen.add(id(tensor))
            stack.append((tensor, True))
            stack += [(source, False) for source, _ in tensor.inputs]
    return order


# --- a network, its loss, and a rule of learning


class MLP:
    """Layers x -> tanh(x W + b), the last one without tanh."""

    def __init__(self, widths: Sequence[int], seed: int = 0):
        """widths: numbers of an input, of each hidden layer, and of an output."""
        draw = np.random.default_rng(seed).normal
        pairs = list(pairwise(widths))
        # With the standard deviation 1 / sqrt(n), a sum of n products is about as large as one input (LeCun
        # et al. 1998, section 4.6).
        self.weights = [Tensor(draw(size=(n, m)) / np.sqrt(n)) for n, m in pairs]
        self.biases = [Tensor(np.zeros(m)) for _, m in pairs]

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.weights, *self.biases]

    def __call__(self, x) -> Tensor:
        """Return the outputs (B, widths[-1]) of x (B, widths[0])."""
        x = as_tensor(x)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ weight + bias
            x = x.tanh() if i < len(self.weights) - 1 else x
        return x


def cross_entropy(logits: Tensor, targets: Array) -> Tensor:
    """Return the mean of -log softmax(logits)[target] in nats, of logits (B, classes) and targets (B,)."""
    B = len(targets)
    # Softmax does not depend on a constant; the largest logit as the constant keeps exp from overflowing.
    logits = logits - logits.value.max(axis=1, keepdims=True)
    log_total = logits.exp().sum(axis=1).log()  # (B, 1)
    return (log_total.reshape(B) - logits[np.arange(B), targets]).sum() / B


class Adam:
    """w -= lr * m / (sqrt(v) + eps), with m and v the running means of g and g^2, each divided by
    1 - beta^step, because they begin at 0 (Kingma and Ba 2014, algorithm 1)."""

    def __init__(self, parameters: Sequence[Tensor], lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8):
        self.parameters, self.lr, self.betas, self.eps, self.n_steps = parameters, lr, betas, eps, 0
        self.means = [np.zeros_like(p.value) for p in parameters]  # m
        self.squares = [np.zeros_like(p.value) for p in parameters]  # v

    def step(self) -> None:
        """Change all parameters that have a gradient. Their old arrays stay as they are."""
        self.n_steps += 1
        beta1, beta2 = self.betas
        for p, m, v in zip(self.parameters, self.means, self.squares, strict=True):
            if p.grad is None:  # no loss was computed from it
                continue
            m += (1 - beta1) * (p.grad - m)
            v *= beta2
            v += (1 - beta2) * p.grad**2
            mean, square = m / (1 - beta1**self.n_steps), v / (1 - beta2**self.n_steps)
            p.value = p.value - self.lr * mean / (np.sqrt(square) + self.eps)


# --- a demonstration


def spirals(n: int, seed: int = 0) -> tuple[Array, Array]:
    """Return points (2 n, 2) of two spirals that wind around each other, n of each, and which one (2 n,)."""
    rng = np.random.default_rng(seed)
    turn = rng.uniform(0.5, 3.5 * np.pi, size=2 * n)
    label = np.arange(2 * n) % 2
    angle = turn + np.pi * label
    points = np.stack([turn * np.cos(angle), turn * np.sin(angle)], axis=1) / 5
    return points + rng.normal(size=points.shape) * 0.03, label


def learn(network: MLP, points: Array, labels: Array, steps: int, every: int = 0) -> float:
    """Train on all points at once, and print every so many steps. Return the share that is right."""
    optimizer = Adam(network.parameters, lr=0.01)
    for step in range(steps):
        logits = network(points)
        loss = cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        if every and step % every == 0:
            right = (logits.value.argmax(axis=1) == labels).mean()
            print(f"step {step:5}  loss {float(loss.value):.4f} nats  {right:.1%} right", flush=True)
    return (network(points).value.argmax(axis=1) == labels).mean()


def map_of_answers(network: MLP, size: int = 31) -> str:
    """Return the square from -2.3 to 2.3 in both directions as text, with the class of the network at each
    point."""
    side = np.linspace(-2.3, 2.3, size)
    grid = np.stack(np.meshgrid(side, -side[::2]), axis=-1)
    answers = network(grid.reshape(-1, 2)).value.argmax(axis=1).reshape(grid.shape[:2])
    return "\n".join("".join(".#"[answer] for answer in row) for row in answers)


def main() -> None:
    """Print how a network learns, and a map of what it has learned."""
    command.Parser(description="A network learns to tell two spirals apart.").parse_args()
    (points, labels), (unseen, their_labels) = spirals(200), spirals(200, seed=1)
    print("Two spirals of 200 points each; a guess is right in 50 %.\n")
    network = MLP([2, 32, 32, 2])
    learn(network, points, labels, steps=301, every=50)
    right = (network(unseen).value.argmax(axis=1) == their_labels).mean()
    linear = MLP([2, 2])
    learn(linear, points, labels, steps=301)
    right_of_linear = (linear(unseen).value.argmax(axis=1) == their_labels).mean()
    print(f"\nUnseen points: {right:.1%} right, and without hidden layers {right_of_linear:.1%}.")
    print(f"\nThe class of each point of the plane:\n\n{map_of_answers(network)}")


if __name__ == "__main__":
    command.run(main)
