"""Gaussian diffusion without a network: how noise is added to data, and how samplers take it away.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps         eps ~ N(0, 1), t = 0 ... T - 1, a_t falls from 1 towards 0

DDPM (Ho et al. 2020, 2006.11239) adds noise in T small steps; x_t can be drawn at once, since a sum of
Gaussians is one (equation 4; a_t is its alpha bar). A network reads x_t and t and predicts one of three
targets, each of which gives the other two by the line above:

    eps    the noise; what DDPM predicts
    x0     the data
    v      sqrt(a_t) eps - sqrt(1 - a_t) x_0   (Salimans and Ho 2022, 2202.00512)

A sampler begins with noise. At each step it computes x_0 and eps from the prediction and draws x at a smaller
t, with a' in the place of a (DDIM, Song et al. 2021, 2010.02502, equation 12):

    x' = sqrt(a') x_0 + sqrt(1 - a' - s^2) eps + s z          s^2 = eta^2 (1 - a') / (1 - a) (1 - a / a')

eta 0 is DDIM, which draws nothing. eta 1 is DDPM: its s^2 is the variance of q(x_{t-1} | x_t, x_0). Both may
leave out time steps; a' is that of the next time step that is visited, and 1 behind the last.

All tables are float64: at small t, 1 - a / a' loses half of the digits of float32.

Shapes: B batch, C channels, T time steps; x has the shape (B, ...), and channels are its dimension 1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # x (B, ...) and t (B,), to the prediction (B, ...)
KINDS = ("v", "x0", "eps")
SCHEDULES = ("linear", "scaled_linear", "cosine")
SPACINGS = ("leading", "trailing", "linspace")
VARIANCES = ("small", "large", "learned")
MAX_BETA = 0.999  # of a step (2102.09672, section 3.2)


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ValueError for a value that is not one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} {value!r}: expected {', '.join(allowed)}")


# --- adding noise


def schedule(kind: str = "cosine", steps: int = 1000, zero_terminal: bool = False) -> Tensor:
    """Return alpha bar (T,), float64: the share of the data in the variance of x_t.

    kind: "linear", betas from 1e-4 to 0.02 (DDPM, section 4); "scaled_linear", their roots evenly spaced from
    .00085 to .012 (Stable Diffusion); "cosine" (Nichol and Dhariwal 2021, equation 17). The first two are for
    1,000 steps, and with others betas grow so that as much noise is added. zero_terminal: shift and scale the
    roots so that the last x_t is nothing but noise (Lin et al. 2023, 2305.08891, algorithm 1).
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
    """Return sqrt(a_t) and sqrt(1 - a_t), for t (B,) or one for all, in the shape and dtype of `like`."""
    shape = (-1, *[1] * (like.ndim - 1))
    tables = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()  # in float64, before they are gathered
    data, noise = (table.to(like.device, like.dtype)[t].view(shape) for table in tables)
    return data, noise


def q_sample(x0: Tensor, t: Tensor | int, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return x_t (B, ...): data with the noise of time t (B,) added."""
    of_data, of_noise = shares(alpha_bar, t, x0)
    return of_data * x0 + of_noise * noise


def target(kind: str, x0: Tensor, noise: Tensor, t: Tensor | int, alpha_bar: Tensor) -> Tensor:
    """Return what a network of this kind has to predict from x_t."""
    one_of("target", kind, KINDS)
    if kind != "v":
        return x0 if kind == "x0" else noise
    of_data, of_noise = shares(alpha_bar, t, x0)
    return of_data * noise - of_noise * x0


def to_x0_and_noise(
    kind: str, output: Tensor, x: Tensor, t: Tensor | int, alpha_bar: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x_0 and eps according to a network's output for x_t.

    Where x_t holds no noise (or no data), it does not determine the noise (or the data): a division by zero.
    """
    one_of("target", kind, KINDS)
    of_data, of_noise = shares(alpha_bar, t, x)
    if kind == "v":
        return of_data * x - of_noise * output, of_noise * x + of_data * output
    if kind == "x0":
        return output, (x - of_data * output) / of_noise
    return (x - of_noise * output) / of_data, output


def even_times(n: int, steps: int, generator: torch.Generator) -> Tensor:
    """Return n of the time steps 0 ... steps - 1, int64 (n,), evenly spread from a random beginning, so that
    a batch holds all of them (Kingma et al. 2021, arXiv 2107.00630, appendix I.1)."""
    places = (torch.rand(1, generator=generator, dtype=torch.float64) + torch.arange(n) / n) % 1
    return (places * steps).long()


# --- taking it away


def spaced(steps: int, count: int, spacing: str = "trailing") -> list[int]:
    """Return `count` of the time steps 0 ... steps - 1, from the largest to the smallest.

    For 50 of 1,000: "leading" 980, 960 ... 0, which never visits the noisiest steps; "trailing" 999, 979 ...
    19, which begins where sampling begins; "linspace" 999 ... 0, evenly between both ends. Raises ValueError
    for more steps than there are.
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
    """Return the mean of q(x' | x, x_0): beta sqrt(before) / (1 - now) x_0 + sqrt(now / before) (1 - before)
    / (1 - now) x (DDPM, equation 7)."""
    of_x0 = (1 - now / before) * before**0.5 / (1 - now)
    return of_x0 * x0 + (now / before) ** 0.5 * (1 - before) / (1 - now) * x


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal noise in the shape, dtype and device of x."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def deviation(variance: str, now: float, before: float, learned: Tensor) -> Tensor | float:
    """Return the standard deviation of DDPM's noise in a step.

    "small" is the posterior's, "large" sqrt(beta), between which the true one lies (DDPM, section 3.2). A
    network that learns where (Nichol and Dhariwal 2021, equation 15) returns `learned` (B, C, ...), from -1
    for the small to 1 for the large, beside its prediction.
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

    denoise(x, t): the prediction (B, C, ...) of this kind at the time steps t (B,); channels behind the first
    C are a learned variance. steps: from the largest to the smallest, see `spaced`. eta: 0 for DDIM, 1 for
    DDPM, whose noise may have another `variance`. clip: keep x_0 from -clip to clip, for pixels only (never
    for latents). Nothing is drawn in the last step. Raises ValueError for steps that do not fall, and for
    "eps" from a time step without data (zero_terminal), which leaves x_0 open.
    """
    one_of("target", kind, KINDS)
    one_of("variance", variance, VARIANCES)
    if any(a <= b for a, b in pairwise(steps)):
        raise ValueError(f"time steps {list(steps)[:5]} ...: expected each smaller than the one before")
    if kind == "eps" and alpha_bar[steps[0]] == 0:
        raise ValueError(f"time step {steps[0]} holds nothing but noise: expected a target v or x0, not eps")

    C = x.shape[1]
    visited = [alpha_bar[t].item() for t in steps]
    for t, now, before in zip(steps, visited, [*visited[1:], 1.0], strict=True):
        output = denoise(x, torch.full((len(x),), t, device=x.device))
        x0, eps = to_x0_and_noise(kind, output[:, :C], x, t, alpha_bar)
        if clip is not None:  # eps, too, must be that of the clipped x_0
            x0 = x0.clamp(-clip, clip)
            eps = (x - now**0.5 * x0) / (1 - now) ** 0.5

        # DDIM's step; at eta 1 its mean is `posterior_mean`.
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

    w is 1 without guidance, as in DiT and diffusers; the paper counts from 0. rescale: the share, such as
    0.7, of a prediction whose standard deviation is brought back to the conditional's, since a large w gives
    too much contrast (Lin et al. 2023, section 3.4).
    """
    guided = unconditional + w * (conditional - unconditional)
    if not rescale:
        return guided
    inner = tuple(range(1, guided.ndim))
    ratio = conditional.std(inner, keepdim=True) / guided.std(inner, keepdim=True)
    return guided * (rescale * ratio + 1 - rescale)


def guided(conditional: Denoise, unconditional: Denoise, w: float, rescale: float = 0.0) -> Denoise:
    """Return the function denoise(x, t) with guidance on all channels of x, of one with the condition and one
    without, which is not computed where w is 1. A learned variance remains that with the condition."""
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
    """Return what `guided` does, of one model(x, t, condition) that computes both predictions as one batch.

    condition and none: (B, ...), those of each image, and those of no condition.
    """
    if w == 1:
        return lambda x, t: model(x, t, condition)
    both = torch.cat((condition, none))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        output = model(torch.cat((x, x)), torch.cat((t, t)), both)[:, : x.shape[1]]
        return guide(*output.chunk(2), w, rescale)

    return denoise


# --- the bound of the likelihood


def prior_term(x0: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return KL(q(x_T | x_0) || N(0, 1)) (B,), in nats per dimension: what the last x_t reveals of x_0."""
    kept = alpha_bar[-1].item()
    return ((kept * x0.double() ** 2 - kept - math.log1p(-kept)) / 2).flatten(1).mean(1)


def bound_term(
    denoise: Denoise, x0: Tensor, noise: Tensor, t: int, alpha_bar: Tensor, kind: str = "v"
) -> Tensor:
    """Return a term (B,) of the bound of -log p(x_0), in nats per dimension: that of one time step.

    The sum over all t, and `prior_term`, is the bound (DDPM, equation 5). For t > 0 it is KL(q(x_{t-1} | x_t,
    x_0) || p), with p's variance that of q; at 0 it is -log of the probability that a Gaussian around the
    predicted x_0, with the variance of t = 1, gives to the pixel's interval of width 1/127.5, which at both
    ends is open (equation 13). Pixels are k / 127.5 - 1.
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
