"""Diffusion without a network: tables, exact denoisers in closed form, and trajectories of diffusers."""

import importlib
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vision import noise
from vision.noise import KINDS, q_sample, sample, schedule, spaced, target, to_x0_and_noise, trajectory

SAMPLERS = Path(__file__).parents[1] / "fixtures" / "diffusers_samplers.safetensors"
MEAN, DEVIATION = 0.2, 0.5  # of the Gaussian data, whose exact denoiser is linear


def exact(kind, alpha_bar):
    """Return the exact denoiser of Gaussian data: E[eps | x_t], as the target of this kind."""

    def denoise(x, t):
        a = alpha_bar[t].view(-1, *[1] * (x.ndim - 1))
        eps = (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (DEVIATION**2 * a + 1 - a)
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        return {"eps": eps, "x0": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[kind]

    return denoise


def closed_form(alpha_bar, steps, eta, variance):
    """Return mean and standard deviation of what a sampler makes of N(0, 1), with the exact denoiser.

    DDPM's posterior mean (eta 1) or DDIM's (eta 0) is a x + b in each step, and so all stays Gaussian.
    """
    mean, var = 0.0, 1.0
    for now, before in pairwise([*(alpha_bar[t].item() for t in steps), 1.0]):
        # x_0 = gain x + offset, by conditioning two Gaussians
        gain = now**0.5 * DEVIATION**2 / (DEVIATION**2 * now + 1 - now)
        offset = MEAN * (1 - gain * now**0.5)
        beta = 1 - now / before
        small = beta * (1 - before) / (1 - now)
        if eta:
            of_x0, of_x = beta * before**0.5 / (1 - now), (1 - beta) ** 0.5 * (1 - before) / (1 - now)
        else:
            of_x = ((1 - before) / (1 - now)) ** 0.5
            of_x0 = before**0.5 - of_x * now**0.5
        slope = of_x + of_x0 * gain
        drawn = 0.0 if before == 1 or not eta else small if variance == "small" else beta
        mean, var = slope * mean + of_x0 * offset, slope**2 * var + drawn
    return mean, var**0.5


def measured(monkeypatch, alpha_bar, steps, kind, eta, variance):
    """Return mean and standard deviation of what the sampler makes of N(0, 1), exactly.

    The sampler is linear in its independent draws, x_T and one z a step: row 0 has all of them 0, and row i
    has draw i alone 1, so that differences to row 0 are the slopes.
    """
    draws = torch.eye(len(steps) + 2, dtype=torch.float64)[:, 1:]  # (rows, draws)
    waiting = iter(draws[:, 1:].T)
    monkeypatch.setattr(noise, "normal_like", lambda x, generator: next(waiting)[:, None])
    out = sample(
        exact(kind, alpha_bar), draws[:, :1], alpha_bar, steps, kind=kind, eta=eta, variance=variance
    )
    return out[0].item(), (out[1:] - out[0]).square().sum().sqrt().item()


def test_alpha_bar_is_that_of_the_papers():
    expected = {  # at t = 0, 250, 500, 750, 999, from the definitions in extended precision
        ("linear", False): (0.9999, 0.5214230306, 0.07779665837, 0.003300158362, 4.035829765e-05),
        ("scaled_linear", False): (0.99915, 0.6737926252, 0.2763326838, 0.056169848, 0.004660098513),
        ("cosine", False): (0.9999587158, 0.8458879865, 0.4922851724, 0.1431786464, 2.428766907e-09),
        ("scaled_linear", True): (0.99915, 0.6524570153, 0.2410187828, 0.03279911813, 0.0),
    }
    for (kind, zero_terminal), values in expected.items():
        found = schedule(kind, zero_terminal=zero_terminal)
        assert found.dtype == torch.float64 and found.shape == (1000,)
        for t, value in zip((0, 250, 500, 750, 999), values, strict=True):
            assert found[t].item() == pytest.approx(value, rel=2e-9, abs=0)
    # Fewer, larger steps end with about as much noise.
    assert schedule("linear", 100)[-1].item() == pytest.approx(4e-5, rel=0.5)
    with pytest.raises(ValueError, match="schedule 'square': expected linear"):
        schedule("square")


@pytest.mark.parametrize("kind", KINDS)
def test_each_target_gives_back_the_data_and_the_noise(kind):
    alpha_bar, g = schedule("linear"), torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(5, 2, 3, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0, 1, 400, 998, 999])
    x = q_sample(x0, t, eps, alpha_bar)
    a = alpha_bar[t][:, None, None]
    torch.testing.assert_close(x, a.sqrt() * x0 + (1 - a).sqrt() * eps)
    found = to_x0_and_noise(kind, target(kind, x0, eps, t, alpha_bar), x, t, alpha_bar)
    torch.testing.assert_close(found, (x0, eps), rtol=1e-9, atol=1e-9)
    one = to_x0_and_noise(kind, target(kind, x0[2:3], eps[2:3], 400, alpha_bar), x[2:3], 400, alpha_bar)
    torch.testing.assert_close(one, (x0[2:3], eps[2:3]))
    # Float32 data get float32 noise.
    assert q_sample(x0.float(), t, eps.float(), alpha_bar).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", noise.SPACINGS)
def test_samplers_of_gaussian_data_end_with_the_mean_and_deviation_of_the_closed_form(
    monkeypatch, kind, spacing
):
    for name, count in (("linear", 1), ("linear", 13), ("cosine", 7)):
        alpha_bar = schedule(name)
        steps = spaced(1000, count, spacing)
        for eta, variance in ((0, "small"), (1, "small"), (1, "large")):
            found = measured(monkeypatch, alpha_bar, steps, kind, eta, variance)
            assert found == pytest.approx(closed_form(alpha_bar, steps, eta, variance), abs=1e-9)


def test_the_closed_form_has_the_figures_that_were_computed_elsewhere(monkeypatch):
    expected = {  # leading: DDIM, DDPM with the small variance, with the large one
        ("linear", 10): ((0.1988, 0.3741), (0.2, 0.3333), (0.2, 0.5890)),
        ("linear", 50): ((0.1993, 0.4724), (0.2, 0.4441), (0.2, 0.5172)),
        ("linear", 1000): ((0.1994, 0.4985), (0.2, 0.4961), (0.2, 0.5008)),
        ("cosine", 50): ((0.1971, 0.4850), (0.2, 0.4678), (0.2, 0.5092)),
        ("cosine", 1000): ((0.2, 0.4992), (0.2, 0.4980), (0.2, 0.5004)),
    }
    for (name, count), rows in expected.items():
        alpha_bar, steps = schedule(name), spaced(1000, count, "leading")
        for (eta, variance), row in zip(((0, "small"), (1, "small"), (1, "large")), rows, strict=True):
            assert closed_form(alpha_bar, steps, eta, variance) == pytest.approx(row, abs=6e-5)
            if count <= 50:  # more steps only take longer
                found = measured(monkeypatch, alpha_bar, steps, "eps", eta, variance)
                assert found == pytest.approx(row, abs=6e-5)


def test_a_schedule_that_ends_in_pure_noise_keeps_the_mean(monkeypatch):
    alpha_bar = schedule("scaled_linear", zero_terminal=True)
    steps = spaced(1000, 200, "trailing")

    def v(x, t):  # the exact v by conditioning, which is defined at a = 0, too
        a = alpha_bar[t][:, None]
        x0 = MEAN + a.sqrt() * DEVIATION**2 * (x - a.sqrt() * MEAN) / (DEVIATION**2 * a + 1 - a)
        eps = (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (DEVIATION**2 * a + 1 - a)
        return a.sqrt() * eps - (1 - a).sqrt() * x0

    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    out = sample(v, x, alpha_bar, steps)
    assert out[0].item() == pytest.approx(MEAN, abs=1e-9)
    assert (out[1] - out[0]).item() == pytest.approx(DEVIATION, abs=0.01)
    with pytest.raises(ValueError, match="nothing but noise: expected a target v or x0"):
        sample(v, x, alpha_bar, steps, kind="eps")


def test_ddim_with_eta_1_is_ddpm_to_rounding():
    for name in ("linear", "cosine"):
        alpha_bar = schedule(name)
        g = torch.Generator().manual_seed(1)
        x0, x = (torch.randn(4, dtype=torch.float64, generator=g) for _ in range(2))
        for t, s in ((1, 0), (2, 1), (500, 499), (999, 998), (999, 960)):
            now, before = alpha_bar[t].item(), alpha_bar[s].item()
            eps = (x - now**0.5 * x0) / (1 - now) ** 0.5
            variance = noise.posterior_variance(now, before)
            assert variance == pytest.approx(
                (1 - before) / (1 - now) * (1 - now / before), rel=1e-12
            )  # DDIM, equation 16
            ddim = before**0.5 * x0 + (1 - before - variance) ** 0.5 * eps
            torch.testing.assert_close(ddim, noise.posterior_mean(x0, x, now, before), rtol=1e-9, atol=1e-9)
    linear = schedule("linear")
    assert noise.posterior_variance(linear[1].item(), linear[0].item()) == pytest.approx(5.4531877e-05)


def test_the_posterior_is_bayes_rule():
    # q(x' | x, x_0) is the product of N(x'; sqrt(before) x_0, 1 - before) and N(x; sqrt(alpha) x', beta).
    now, before, x0, x = 0.42, 0.6, torch.tensor(0.3), torch.tensor(-1.1)
    alpha = now / before
    precision = 1 / (1 - before) + alpha / (1 - alpha)
    mean = (before**0.5 * x0 / (1 - before) + alpha**0.5 * x / (1 - alpha)) / precision
    assert noise.posterior_variance(now, before) == pytest.approx(1 / precision)
    torch.testing.assert_close(noise.posterior_mean(x0, x, now, before), mean)


def test_the_time_steps_that_are_visited_fall_and_keep_their_ends():
    assert spaced(1000, 50, "leading")[:2] == [980, 960] and spaced(1000, 50, "leading")[-1] == 0
    assert spaced(1000, 50, "trailing")[:2] == [999, 979] and spaced(1000, 50, "trailing")[-1] == 19
    assert spaced(1000, 50, "linspace")[::49] == [999, 0] and spaced(1000, 1, "linspace") == [999]
    # 13 do not divide 1000: the step after 922 is 845, not 922 - 1000 // 13.
    assert spaced(1000, 13, "trailing")[:3] == [999, 922, 845]
    for spacing in noise.SPACINGS:
        assert spaced(1000, 1000, spacing) == list(range(999, -1, -1))
        for count in (1, 2, 3, 7, 13, 600, 999):
            steps = spaced(1000, count, spacing)
            assert len(set(steps)) == count and steps == sorted(steps, reverse=True)
            assert steps[-1] >= 0 and steps[0] <= 999
    with pytest.raises(ValueError, match="1001 steps of a sampler: expected 1 to 1000"):
        spaced(1000, 1001)


def test_the_network_reads_the_original_times_and_the_last_step_draws_nothing():
    alpha_bar, read = schedule("cosine"), []

    def denoise(x, t):
        read.append(t.tolist())
        return torch.zeros_like(x)

    x = torch.randn(2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps = spaced(1000, 13)
    states = list(
        trajectory(denoise, x, alpha_bar, steps, kind="x0", eta=1, generator=torch.Generator().manual_seed(0))
    )
    assert read == [[t, t] for t in steps]
    assert torch.equal(states[-1], torch.zeros_like(x))  # x_0 itself, although eta is 1
    again = sample(denoise, x, alpha_bar, steps, kind="x0", eta=1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, states[-1])
    other = next(
        trajectory(denoise, x, alpha_bar, steps, kind="x0", eta=1, generator=torch.Generator().manual_seed(1))
    )
    assert not torch.equal(other, states[0])
    with pytest.raises(ValueError, match="in falling order"):
        sample(denoise, x, alpha_bar, [1, 1, 0])


def test_the_noise_is_that_of_the_clipped_data():
    alpha_bar = schedule("linear")
    x = torch.tensor([[3.0]], dtype=torch.float64)
    first = next(trajectory(lambda x, t: 0 * x + 5, x, alpha_bar, [500, 300], kind="x0", clip=1))
    now, before = alpha_bar[500].item(), alpha_bar[300].item()
    eps = (3 - now**0.5 * 1) / (1 - now) ** 0.5
    assert first.item() == pytest.approx(before**0.5 + (1 - before) ** 0.5 * eps)
    assert abs(sample(lambda x, t: 0 * x - 5, x, alpha_bar, [500, 300], clip=1, kind="x0").item()) == 1


def test_guidance_reaches_all_channels_but_those_of_a_learned_variance():
    x, t = torch.zeros(2, 4, 3, 3), torch.zeros(2, dtype=torch.long)
    g = torch.Generator().manual_seed(0)
    c, u = (torch.randn(2, 8, 3, 3, generator=g) for _ in range(2))
    out = noise.guided(lambda x, t: c, lambda x, t: u, 3.0)(x, t)
    torch.testing.assert_close(out[:, :4], u[:, :4] + 3 * (c[:, :4] - u[:, :4]))
    assert torch.equal(out[:, 4:], c[:, 4:])

    def never(x, t):
        raise AssertionError("computed without need")

    assert torch.equal(noise.guided(lambda x, t: c, never, 1)(x, t), c)
    # Rescaled, half of the way back to the deviation of the conditional prediction.
    strong, half = noise.guide(c, u, 5.0), noise.guide(c, u, 5.0, rescale=0.5)
    of = (1, 2, 3)
    torch.testing.assert_close(half.std(of), (strong.std(of) + c.std(of)) / 2)
    torch.testing.assert_close(noise.guide(c, u, 5.0, rescale=1.0).std(of), c.std(of))


def test_guidance_in_one_batch_is_guidance_in_two_with_a_learned_variance_too():
    x, t = torch.zeros(2, 1, 3, 3), torch.zeros(2, dtype=torch.long)
    g = torch.Generator().manual_seed(0)
    condition, none = (torch.randn(2, 2, 3, 3, generator=g) for _ in range(2))
    at_once = noise.guided_at_once(lambda x, t, c: c, condition, none, 3.0, 0.7)(x, t)
    apart = noise.guided(lambda x, t: condition, lambda x, t: none, 3.0, 0.7)(x, t)
    torch.testing.assert_close(at_once, apart, rtol=0, atol=0)


def test_steps_that_do_not_exist_and_a_variance_that_is_not_there_are_refused():
    x, alpha_bar = torch.zeros(2, 1, 3, 3), schedule("linear", 10)
    for steps in ([], [10, 5], [5, -1]):
        with pytest.raises(ValueError, match=r"expected some of 9 ... 0"):
            sample(lambda x, t: x, x, alpha_bar, steps)
    with pytest.raises(ValueError, match="variance learned: 1 channels, expected 2"):
        sample(lambda x, t: x, x, alpha_bar, [8, 5], eta=1.0, variance="learned")


def test_guidance_is_the_same_for_each_target():
    alpha_bar, g = schedule("cosine"), torch.Generator().manual_seed(0)
    x, eps_c, eps_u = (torch.randn(2, 3, dtype=torch.float64, generator=g) for _ in range(3))
    t = torch.tensor([300, 700])
    found = []
    for kind in KINDS:
        both = []
        for eps in (eps_c, eps_u):
            x0, _ = to_x0_and_noise("eps", eps, x, t, alpha_bar)
            both.append(target(kind, x0, eps, t, alpha_bar))
        found.append(to_x0_and_noise(kind, noise.guide(*both, 2.5), x, t, alpha_bar)[0])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_a_learned_variance_lies_between_the_small_and_the_large(monkeypatch):
    monkeypatch.setattr(noise, "normal_like", lambda x, generator: torch.ones_like(x))
    alpha_bar, x = schedule("linear"), torch.zeros(1, 2, dtype=torch.float64)

    def first(variance, value):
        def denoise(x, t):
            return torch.cat((0 * x, 0 * x + value), dim=1)

        return next(trajectory(denoise, x, alpha_bar, [700, 600], kind="eps", eta=1, variance=variance))

    small, large = first("small", 0), first("large", 0)
    torch.testing.assert_close(first("learned", -1), small)
    torch.testing.assert_close(first("learned", 1), large)
    torch.testing.assert_close(first("learned", 0), (small * large).sqrt())


def test_the_bound_has_the_values_of_its_closed_form():
    linear = schedule("linear")
    bits = 1 / math.log(2)
    ones = torch.ones(1, 4, dtype=torch.float64)
    assert noise.prior_term(ones, linear).item() * bits == pytest.approx(2.911e-5, rel=1e-3)
    assert noise.prior_term(ones / 3**0.5, linear).item() * bits == pytest.approx(9.70e-6, rel=1e-3)

    def term(x0, found, t):
        return noise.bound_term(lambda x, t: found, x0, torch.zeros_like(x0), t, linear, "x0").item() * bits

    inner = ones * (3 / 255)  # a pixel in the middle of the range
    assert term(inner, inner, 0) == pytest.approx(1.3054, abs=1e-4)
    assert term(inner, inner + 1 / 255, 0) == pytest.approx(1.4904, abs=1e-4)
    at_the_end = 0.5 * (1 + math.erf(1 / 255 / math.sqrt(2 * 5.4531877e-05)))  # its interval is open
    assert term(ones, ones, 0) == pytest.approx(-math.log2(at_the_end), abs=1e-4)
    # KL of two Gaussians of one variance; half of (SNR_{t-1} - SNR_t) times the square error of x_0.
    snr = linear / (1 - linear)
    assert term(inner, inner + 0.1, 300) / bits == pytest.approx(0.5 * (snr[299] - snr[300]).item() * 0.01)
    assert term(inner, inner, 300) == 0


def ours(name):
    """Return x after each step for the name of a recorded trajectory, see make_diffusion_fixtures.py."""
    sampler, named, kind, spacing, count, how, clip, *_ = name.split()
    alpha_bar = schedule(named.removesuffix("_zero"), zero_terminal=named.endswith("_zero"))
    how = {"eta": 1.0, "variance": how} if sampler == "ddpm" else {"eta": float(how)}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, dtype=torch.float64, generator=generator)

    def formula(x, t):
        return 0.8 * torch.tanh(x) + 0.2 * torch.sin(t[:, None] / 100)

    how |= {"kind": kind, "clip": float(clip) or None, "generator": generator}
    return torch.stack(list(trajectory(formula, x, alpha_bar, spaced(1000, int(count), spacing), **how)))


def test_trajectories_are_those_of_diffusers():
    recorded = load_file(SAMPLERS)
    assert len(recorded) == 20
    for name, expected in recorded.items():
        errors = (ours(name) - expected).abs().amax((1, 2))
        if name.endswith("float32"):  # its own tables, which are rounded
            assert 1e-9 < errors.max() < 1e-4, name
        elif name.startswith("ddim") and " trailing 13 " in name:  # it looks 1000 // 13 behind 922, at 846
            assert 1e-3 < errors.max() < 1e-1, name
        elif name.startswith("ddpm") and " trailing 13 large " in name:  # it draws in the last step, if t > 0
            assert errors[:-1].max() < 1e-6 < 1e-2 < errors[-1], name
        else:
            assert errors.max() < 1e-6, name  # t / 100 is float32


@pytest.mark.parametrize("name", ["latent_diffusion", "unclip"])
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"target": "eps", "zero_terminal": True}, "expected target=v or target=x0"),
        ({"target": "x1"}, "target"),
        ({"schedule": "square"}, "schedule"),
        ({"drop": 1.0}, "drop 1.0: expected less than 1"),
    ],
)
def test_a_config_refuses_a_process_that_cannot_be(name, fields, message):
    config = importlib.import_module(f"vision.{name}").SIZES["tiny"]
    assert config.alpha_bar.equal(noise.schedule("cosine")) and config.process["n_steps"] == 1000
    with pytest.raises(ValueError, match=message):
        replace(config, **fields)
