"""Gaussian diffusion without a network: how noise is added to data, and how samplers take it away.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps         eps ~ N(0, 1), t = 0 ... T - 1, a_t falls from 1 towards 0

DDPM (Ho et al. 2020, arXiv 2006.11239) adds noise in T small steps. Sums of independent Gaussian noise are
Gaussian, so x_t can be drawn from x_0 in one step (equation 4; a_t is the paper's alpha bar). A network reads
x_t and t and predicts one of three targets, each of which gives the other two by the equation above. (Here
x_0 is always the data, not x_t at t = 0, which is the data with the least noise.)

    eps    the noise; what DDPM predicts
    x0     the data
    v      sqrt(a_t) eps - sqrt(1 - a_t) x_0   (Salimans and Ho 2022, 2202.00512)

A sampler begins with noise. At each step it computes x_0 and eps from the prediction, and from them x' at a
smaller t, where a_t is a' (DDIM, Song et al. 2021, 2010.02502, equation 12; z ~ N(0, 1) is new noise):

    x' = sqrt(a') x_0 + sqrt(1 - a' - s^2) eps + s z          s^2 = eta^2 (1 - a') / (1 - a) (1 - a / a')

With eta = 0 this is DDIM, whose steps add no noise. With eta = 1 it is DDPM, where s^2 is the variance of
q(x_{t-1} | x_t, x_0). Both may skip time steps: a' belongs to the next time step that is visited, and is 1
after the last one.

All tables are float64: at small t, a / a' is so close to 1 that 1 - a / a' loses half of float32's digits.

Shapes: B batch, C channels, T time steps; x has the shape (B, ...), and channels are its dimension 1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from formats.config_values import check_values

Denoise = Callable[[Tensor, Tensor], Tensor]  # x (B, ...) and t (B,), to the prediction (B, ...)
KINDS = ("v", "x0", "eps")
SCHEDULES = ("linear", "scaled_linear", "cosine")
SPACINGS = ("leading", "trailing", "linspace")
VARIANCES = ("small", "large", "learned")
MAX_BETA = 0.999  # upper limit of beta, the noise of a single step (2102.09672, section 3.2)


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ValueError for a value that is not one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} {value!r}: expected {', '.join(allowed)}")


# --- adding noise


def schedule(kind: str = "cosine", steps: int = 1000, zero_terminal: bool = False) -> Tensor:
    """Return alpha bar (T,), float64: the data's share of the variance of x_t.

    It is the cumulative product of 1 - beta_t, where beta_t is the variance of the noise that step t adds.
    kind: "linear", betas evenly spaced from 1e-4 to 0.02 (DDPM, section 4); "scaled_linear", the square roots
    of betas evenly spaced between those of 0.00085 and 0.012 (Stable Diffusion); "cosine" (Nichol and
    Dhariwal 2021, 2102.09672, equation 17). The first two are defined for 1,000 steps; for another number,
    betas are multiplied by 1,000 / steps, so that about as much noise is added in total. zero_terminal: shift
    and scale sqrt(alpha bar) so that the last x_t is pure noise (Lin et al. 2023, 2305.08891, algorithm 1).
    Raises ValueError for another kind, and for less than 2 steps.
    """
    one_of("schedule", kind, SCHEDULES)
    if steps < 2:
        raise ValueError(f"{steps} time steps: expected 2 or more")
    if kind == "cosine":
        angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
        share = angle.cos() ** 2
        betas = 1 - share[1:] / share[:-1]
    elif kind == "linear":
        betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * 1000 / steps
    else:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2 * 1000 / steps
    alpha_bar = (1 - betas.clamp(max=MAX_BETA)).cumprod(0)
    if not zero_terminal:
        return alpha_bar
    roots = alpha_bar.sqrt()
    return ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2


def shares(alpha_bar: Tensor, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(a_t) and sqrt(1 - a_t) in the dtype of `like` (B, ...), in a shape that broadcasts to it.

    t: times (B,), or one time for all images.
    """
    shape = (-1, *[1] * (like.ndim - 1))
    tables = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()  # float64, rounded below
    data, noise = (table.to(like.device, like.dtype)[t].view(shape) for table in tables)
    return data, noise


class Process:
    """The checks and the schedule of a Config with the fields target, schedule, n_steps and zero_terminal, as
    in KINDS and in the function `schedule`, and drop, the share of rows trained without a condition."""

    def __post_init__(self):
        check_values(self, target=KINDS, schedule=SCHEDULES)
        if self.drop >= 1:
            raise ValueError(f"drop {self.drop}: expected less than 1")
        if self.target == "eps" and self.zero_terminal:
            raise ValueError("zero_terminal: the last x_t is eps itself; expected target=v or target=x0")

    @property
    def process(self) -> dict[str, Any]:
        """Return the fields of the noise and the target, which are saved beside a model."""
        return {name: getattr(self, name) for name in ("target", "schedule", "n_steps", "zero_terminal")}

    @property
    def alpha_bar(self) -> Tensor:
        """Return alpha bar of all time steps (T,), float64."""
        return schedule(self.schedule, self.n_steps, self.zero_terminal)

    def draw(self, denoise: Denoise, x: Tensor, steps: int, eta: float, seed: int, **how: Any) -> Tensor:
        """Return x_0 like x, which is the first noise, by evenly spaced time steps that begin at the last.

        seed: of the noise that the sampler adds, which is drawn on the device of x. how: further arguments of
        `sample`. Raises ValueError for more steps than the schedule has.
        """
        visited, generator = spaced(self.n_steps, steps, "trailing"), torch.Generator(x.device)
        how |= {"kind": self.target, "eta": eta, "generator": generator.manual_seed(seed)}
        return sample(denoise, x, self.alpha_bar, visited, **how)


def q_sample(x0: Tensor, t: Tensor | int, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return x_t (B, ...): the data x0 (B, ...) mixed with normal noise (B, ...) for times t (B,)."""
    of_data, of_noise = shares(alpha_bar, t, x0)
    return of_data * x0 + of_noise * noise


def target(kind: str, x0: Tensor, noise: Tensor, t: Tensor | int, alpha_bar: Tensor) -> Tensor:
    """Return what a network of this kind ("v", "x0" or "eps") has to predict from x_t, in the shape of x0."""
    one_of("target", kind, KINDS)
    if kind != "v":
        return x0 if kind == "x0" else noise
    of_data, of_noise = shares(alpha_bar, t, x0)
    return of_data * noise - of_noise * x0


def to_x0_and_noise(
    kind: str, output: Tensor, x: Tensor, t: Tensor | int, alpha_bar: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x_0 and eps, each (B, ...), that follow from a network's output (B, ...) for x = x_t.

    For "eps", x_0 is not finite where a_t = 0: x_t then holds no data. For "x0" likewise eps where a_t = 1.
    """
    one_of("target", kind, KINDS)
    of_data, of_noise = shares(alpha_bar, t, x)
    if kind == "v":
        return of_data * x - of_noise * output, of_noise * x + of_data * output
    if kind == "x0":
        return output, (x - of_data * output) / of_noise
    return (x - of_noise * output) / of_data, output


def even_times(n: int, steps: int, generator: torch.Generator) -> Tensor:
    """Return n time steps from 0 to steps - 1, int64 (n,), evenly spaced from a random start, modulo `steps`.

    Each of them is uniformly distributed, but together they cover the range, so the mean loss of a batch has
    a smaller variance than with independent time steps (Kingma et al. 2021, 2107.00630, appendix I.1).
    """
    places = (torch.rand(1, generator=generator, dtype=torch.float64) + torch.arange(n) / n) % 1
    return (places * steps).long()


# --- removing noise


def spaced(steps: int, count: int, spacing: str = "trailing") -> list[int]:
    """Return `count` of the time steps 0 ... steps - 1, from the largest to the smallest.

    For 50 of 1,000: "leading" is 980, 960 ... 0, which never visits the noisiest steps; "trailing" is 999,
    979 ... 19, which begins at the noisiest step; "linspace" is 999 ... 0, evenly spaced with both ends (Lin
    et al. 2023, section 3.3). Raises ValueError for more steps than there are.
    """
    one_of("spacing", spacing, SPACINGS)
    if not 1 <= count <= steps:
        raise ValueError(f"{count} steps of a sampler: expected 1 to {steps}")
    if spacing == "leading":
        return [i * (steps // count) for i in reversed(range(count))]
    if spacing == "trailing":
        return [round(steps - i * steps / count) - 1 for i in range(count)]
    return [round((steps - 1) * (1 - i / max(count - 1, 1))) for i in range(count)]


def posterior_variance(now: float, before: float) -> float:
    """Return the variance of q(x' | x, x_0), where alpha bar falls from `before` at x' to `now` at x.

    It is beta (1 - before) / (1 - now), with the step's beta = 1 - now / before (DDPM, equation 7).
    """
    return (1 - now / before) * (1 - before) / (1 - now)


def posterior_mean(x0: Tensor, x: Tensor, now: float, before: float) -> Tensor:
    """Return the mean of q(x' | x, x_0), with alpha bar `before` at x' and `now` at x (DDPM, equation 7).

    It is beta sqrt(before) / (1 - now) x_0 + sqrt(now / before) (1 - before) / (1 - now) x, with the step's
    beta = 1 - now / before.
    """
    of_x0 = (1 - now / before) * before**0.5 / (1 - now)
    return of_x0 * x0 + (now / before) ** 0.5 * (1 - before) / (1 - now) * x


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal noise in the shape, dtype and device of x."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def deviation(variance: str, now: float, before: float, learned: Tensor) -> Tensor | float:
    """Return the standard deviation of the noise that DDPM adds in a step.

    variance: "small" gives that of the posterior q(x' | x, x_0), "large" gives sqrt(beta); the best one lies
    between them (DDPM, section 3.2). "learned": the network has returned `learned` (B, C, ...) beside its
    prediction, from -1 for the small to 1 for the large variance, between which log variances are
    interpolated (Nichol and Dhariwal 2021, equation 15).
    """
    small, large = posterior_variance(now, before), 1 - now / before
    if variance != "learned":
        return (small if variance == "small" else large) ** 0.5
    share = (learned + 1) / 2
    return torch.exp((share * math.log(large) + (1 - share) * math.log(small)) / 2)


@torch.no_grad()
def trajectory(
    denoise: Denoise,
    x: Tensor,
    alpha_bar: Tensor,
    steps: Sequence[int],
    *,
    kind: str = "v",
    eta: float = 0.0,
    clip: float | None = None,
    generator: torch.Generator | None = None,
    variance: str = "small",
) -> Iterator[Tensor]:
    """Yield x (B, C, ...) after each step of a sampler, from noise to data.

    denoise(x, t): the prediction (B, C, ...) of this kind at the time steps t (B,); C more channels are a
    learned variance. steps: from the largest to the smallest, see `spaced`. eta: 0 for DDIM, 1 for DDPM,
    whose noise may have another `variance`, see `deviation`. clip: keep the predicted x_0 from -clip to clip,
    which suits data of a known range, such as pixels. The last step adds no noise. Raises ValueError for
    steps that do not fall or are no time steps, for "eps" at a time step without data (zero_terminal), from
    which x_0 cannot be computed, and for a denoiser without the learned variance that is asked for.
    """
    one_of("target", kind, KINDS)
    one_of("variance", variance, VARIANCES)
    T = len(alpha_bar)
    if not steps or any(a <= b for a, b in pairwise(steps)) or not 0 <= steps[-1] <= steps[0] < T:
        raise ValueError(
            f"time steps {list(steps)[:5]} ...: expected some of {T - 1} ... 0, in falling order"
        )
    if kind == "eps" and alpha_bar[steps[0]] == 0:
        raise ValueError(f"time step {steps[0]} holds nothing but noise: expected a target v or x0, not eps")

    C = x.shape[1]
    visited = [alpha_bar[t].item() for t in steps]
    for t, now, before in zip(steps, visited, [*visited[1:], 1.0], strict=True):
        output = denoise(x, torch.full((len(x),), t, device=x.device))
        if variance == "learned" and output.shape[1] != 2 * C:
            raise ValueError(
                f"variance learned: {output.shape[1]} channels, expected {2 * C} of the denoiser"
            )
        x0, eps = to_x0_and_noise(kind, output[:, :C], x, t, alpha_bar)
        if clip is not None:  # eps is computed again, from the clipped x_0
            x0 = x0.clamp(-clip, clip)
            eps = (x - now**0.5 * x0) / (1 - now) ** 0.5

        # The step of the header. At eta = 1 its mean is `posterior_mean`.
        drawn = eta**2 * posterior_variance(now, before)
        x = before**0.5 * x0 + max(1 - before - drawn, 0.0) ** 0.5 * eps
        if eta and before < 1:
            x = x + eta * deviation(variance, now, before, output[:, C:]) * normal_like(x, generator)
        yield x


def sample(denoise: Denoise, x: Tensor, alpha_bar: Tensor, steps: Sequence[int], **options) -> Tensor:
    """Return the data (B, C, ...) that a sampler makes of noise x; the options are those of `trajectory`."""
    *_, last = trajectory(denoise, x, alpha_bar, steps, **options)
    return last


def guide(conditional: Tensor, unconditional: Tensor, w: float, rescale: float = 0.0) -> Tensor:
    """Return the prediction u + w (c - u) of classifier-free guidance (Ho and Salimans 2022, 2207.12598).

    w = 1 is no guidance, as in DiT and diffusers; the paper's w is smaller by 1. rescale: a large w gives too
    much contrast. So mix the result, in this share (such as 0.7), with itself scaled to the standard
    deviation of the conditional prediction (Lin et al. 2023, section 3.4).
    """
    guided = unconditional + w * (conditional - unconditional)
    if not rescale:
        return guided
    inner = tuple(range(1, guided.ndim))
    ratio = conditional.std(inner, keepdim=True) / guided.std(inner, keepdim=True)
    return guided * (rescale * ratio + 1 - rescale)


def guided(conditional: Denoise, unconditional: Denoise, w: float, rescale: float = 0.0) -> Denoise:
    """Return the guided denoise(x, t), made of a denoiser with the condition and one without it.

    The latter is not called if w = 1. A learned variance is not guided: it is that of the denoiser with the
    condition.
    """
    if w == 1:
        return conditional

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        C, with_it = x.shape[1], conditional(x, t)
        prediction = guide(with_it[:, :C], unconditional(x, t)[:, :C], w, rescale)
        return torch.cat((prediction, with_it[:, C:]), dim=1)

    return denoise


def guided_at_once(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    condition: Tensor,
    none: Tensor,
    w: float,
    rescale: float = 0.0,
) -> Denoise:
    """Return the guided denoise(x, t) of a model(x, t, condition), as `guided` does, but with both
    predictions computed as one batch.

    condition: (B, ...), that of each image. none: (B, ...), the value that stands for no condition.
    """
    if w == 1:
        return lambda x, t: model(x, t, condition)
    both = torch.cat((condition, none))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        C, output = x.shape[1], model(torch.cat((x, x)), torch.cat((t, t)), both)
        prediction = guide(*output[:, :C].chunk(2), w, rescale)
        return torch.cat((prediction, output[: len(x), C:]), dim=1)

    return denoise


# --- the bound on the likelihood


def prior_term(x0: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return KL(q(x_T | x_0) || N(0, 1)) (B,), in nats per dimension, of the last and noisiest x_t: the first
    term of DDPM's equation 5."""
    kept = alpha_bar[-1].item()
    return ((kept * x0.double() ** 2 - kept - math.log1p(-kept)) / 2).flatten(1).mean(1)


def bound_term(
    denoise: Denoise, x0: Tensor, noise: Tensor, t: int, alpha_bar: Tensor, kind: str = "v"
) -> Tensor:
    """Return the term (B,) of time step t in the upper bound on -log p(x_0), in nats per dimension.

    The bound is the sum of these terms over all t, plus `prior_term` (DDPM, equation 5). For t > 0 the term
    is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), where p has the variance of q. For t = 0 it is -log
    p(data | x_t): pixels are k / 127.5 - 1, and each has the probability that a Gaussian around its
    prediction, with the variance of step t = 1, gives to the interval of width 1 / 127.5 around it; the
    intervals of the darkest and the brightest level extend to infinity (equation 13).
    """
    x = q_sample(x0, t, noise, alpha_bar)
    output = denoise(x, torch.full((len(x),), t, device=x.device))[:, : x.shape[1]]
    found, _ = to_x0_and_noise(kind, output, x, t, alpha_bar)
    now, before = alpha_bar[max(t, 1)].item(), alpha_bar[max(t, 1) - 1].item()
    variance = posterior_variance(now, before)
    if t > 0:
        off = posterior_mean(x0.double(), x, now, before) - posterior_mean(found.double(), x, now, before)
        return (off**2 / (2 * variance)).flatten(1).mean(1)
    off = (x0 - found).double()
    above, below = (torch.special.ndtr((off + side) / variance**0.5) for side in (1 / 255, -1 / 255))
    above, below = above.where(x0 < 0.999, 1.0), below.where(x0 > -0.999, 0.0)
    return -(above - below).clamp(min=1e-12).log().flatten(1).mean(1)
