"""Policy gradients for language models: estimators, advantages and losses, as pure functions.

    policy gradient    grad E[R] = E[sum_t A_t grad log pi(y_t | x, y_<t)]
    its clipped form   loss_t = max(-A_t ratio_t, -A_t clip(ratio_t, 1 - e, 1 + e)),  ratio_t = pi / pi_old

PPO, GRPO, RLOO and their relatives are one loop (posttraining/ppo.py) with other answers to four questions.
R is the reward of a completion, whose group is all completions of the same prompt. METHODS is this table:

    method    advantage of a token          KL penalty        ratio of          mean over
    ppo       GAE with a value head         in each reward    a token           all tokens
    grpo      (R - mean) / std of a group   k3 in the loss    a token           a sequence, then sequences
    dr_grpo   R - mean                      k3 in the loss    a token           sequences x longest possible
    dapo      (R - mean) / std              k3 in the loss    a token; it is    all tokens
                                                              clipped at 1.28
    gspo      (R - mean) / std              k3 in the loss    a sequence: its   sequences
                                                              geometric mean
    rloo      R - mean of the others        in R, summed      a sequence: its   sequences
                                                              product

The papers differ in settings, too. Dr. GRPO and DAPO have no KL penalty (beta=0). GSPO clips at 1 - 3e-4 and
1 + 4e-4 (section 5.1; clip=3e-4 clip_high=4e-4), since a mean varies less than one token. Two parts of DAPO
are not here: new prompts in place of groups with equal rewards, and a penalty on too long completions.

A KL penalty in the reward and one in the loss are different things. Let d = log pi - log ref, k1 = d and
k3 = exp(-d) - 1 + d, of a token that pi has sampled. In the reward, k1 is multiplied by grad log pi, and the
expectation of that is grad KL(pi || ref). In the loss, k1 would do nothing: the expectation of its gradient
is 0. That of k3 is grad KL(ref || pi), and that of ratio_t k3 is grad KL(pi || ref) (DeepSeek-V3.2, 2025).

PPO: Schulman et al. 2017; GAE: Schulman et al. 2015; for language: Ziegler et al. 2019, InstructGPT (Ouyang
et al. 2022), and the details that Huang et al. 2024 found (arXiv:2403.17031). GRPO: Shao et al. 2024. Dr.
GRPO: Liu et al. 2025. DAPO: Yu et al. 2025. GSPO: Zheng et al. 2025. RLOO: Ahmadian et al. 2024.

Shapes: B completions, T tokens. Every mask is bool (B, T): True at the tokens that were sampled. Values at
the other tokens (prompt, padding) change no result, not even if they are NaN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Method:
    """One row of the table above."""

    advantage: str  # "gae", or a kind of `group_advantages`
    penalty: str  # where the KL penalty is: "reward" or "loss"
    ratio: str  # a kind of `ratios`
    average: str  # a kind of `token_weights`
    clip_high: float | None = None  # the upper clip, if it differs from the lower


METHODS = {
    "ppo": Method("gae", "reward", "token", "dapo"),
    "grpo": Method("grpo", "loss", "token", "grpo"),
    "dr_grpo": Method("dr_grpo", "loss", "token", "dr_grpo"),
    "dapo": Method("grpo", "loss", "token", "dapo", clip_high=0.28),
    "gspo": Method("grpo", "loss", "mean", "grpo"),
    "rloo": Method("rloo", "reward", "sequence", "grpo"),
}


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of x over the mask; NaN elsewhere does not count, as it would in (x * mask).sum()."""
    return torch.where(mask, x, 0.0).sum()


# --- estimators of the KL divergence


def kl(d: Tensor, kind: str = "k1") -> Tensor:
    """Return an estimate of KL(pi || ref) per token, in nats, from d = log pi - log ref of a sample of pi.

    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (Schulman 2020, "Approximating KL divergence"). k1 and k3 are
    unbiased; k2 and k3 are never negative.
    """
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kl {kind!r}: expected k1, k2 or k3")


def adapted_coefficient(beta: float, measured: float, target: float, n: int, horizon: int = 10_000) -> float:
    """Return the coefficient of the KL penalty for the next step, after n completions with the measured KL.

    measured, target: nats per completion. In `horizon` completions beta changes by the relative error of the
    KL, by 20% at most: a proportional controller in log space (Ziegler et al. 2019, section 2.2).
    """
    error = min(max(measured / target - 1, -0.2), 0.2)
    return beta * (1 + error * n / horizon)


# --- advantages


def token_rewards(scores: Tensor, d: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Return rewards (B, T): -beta d at each sampled token, d (B, T); at the last one plus the score (B,)."""
    n_left = mask.flip(1).cumsum(1).flip(1)  # sampled tokens from here to the end of the row
    last = mask & (n_left == 1)
    return torch.where(mask, -beta * d, 0.0) + torch.where(last, scores[:, None], 0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return advantages A and returns G (B, T) of rewards r and values V (B, T); 0 where the mask is False.

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  G_t = A_t + V_t, where t + 1 is
    the next sampled token. The value after the last one is 0, also where a completion was cut for its length.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])  # A_{t+1}
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        sampled = mask[:, t]  # rows in which t is a step; the others keep what they have for t + 1
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(sampled, delta + gamma * lam * following, following)
        next_value = torch.where(sampled, values[:, t], next_value)
        advantages[:, t] = torch.where(sampled, following, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, correction: int = 0) -> Tensor:
    """Return x (B, T) scaled to variance 1 over the mask, and 0 elsewhere.

    shift_mean: the mean becomes 0; else it stays as it is. correction: 0 for the variance of a population, as
    in OpenAI's code; 1 for Bessel's correction, as in TRL.
    """
    n = mask.sum()
    mean = masked_sum(x, mask) / n
    variance = masked_sum((x - mean).square(), mask) / (n - correction).clamp(min=1)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def in_equal_group(rewards: Tensor, groups: Tensor) -> Tensor:
    """Return bool (B,): True for members of a group in which all finite rewards (B,) are equal."""
    _, group = groups.unique(return_inverse=True)
    inf = torch.full((len(group.unique()),), torch.inf, dtype=rewards.dtype, device=rewards.device)
    low, high = (torch.where(rewards.isfinite(), rewards, end) for end in (torch.inf, -torch.inf))
    least = inf.scatter_reduce(0, group, low, "amin")
    most = (-inf).scatter_reduce(0, group, high, "amax")
    return (least >= most)[group]


def group_advantages(rewards: Tensor, groups: Tensor, kind: str = "grpo") -> Tensor:
    """Return advantages (B,) of rewards (B,) against those of the same group.

    groups (B,): equal numbers for the members of a group. kind: "grpo", (R - mean) / (std + 1e-4) with
    Bessel's correction; "dr_grpo", R - mean; "rloo", R - mean of the others, n / (n - 1) times R - mean. A
    reward that is not finite has advantage 0 and is no part of the mean. In a group of equal rewards all
    advantages are exactly 0.
    """
    if kind not in ("grpo", "dr_grpo", "rloo"):
        raise ValueError(f"group_advantages {kind!r}: expected grpo, dr_grpo or rloo")

    # Sums over each group, in float64; equal rewards are found apart, since their mean may be rounded.
    _, group = groups.unique(return_inverse=True)
    counted = rewards.isfinite()
    x = torch.where(counted, rewards, 0.0).double()
    n = torch.zeros(len(group.unique()), dtype=x.dtype, device=x.device).index_add(0, group, counted.double())
    mean = torch.zeros_like(n).index_add(0, group, x) / n.clamp(min=1)
    centred = torch.where(counted & ~in_equal_group(rewards, groups), x - mean[group], 0.0)
    if kind == "rloo":
        centred = centred * (n / (n - 1).clamp(min=1))[group]
    if kind == "grpo":
        std = (torch.zeros_like(n).index_add(0, group, centred.square()) / (n - 1).clamp(min=1)).sqrt()
        centred = centred / (std[group] + 1e-4)
    return centred.to(rewards.dtype)


# --- losses


def token_weights(mask: Tensor, kind: str, longest: int | None = None, n_parts: int = 1) -> Tensor:
    """Return the weight (B, T) of each token's term in the loss, 0 outside of the mask.

    kind: "grpo", the mean over each completion, then over completions; "dapo", the mean over all tokens;
    "bnpo", the mean over the tokens of each of n_parts micro-batches, then over these; "dr_grpo", the sum
    divided by B * longest, the most tokens that B completions can have. Completions without a token do not
    count in B.
    """
    m = mask.to(torch.float32)
    n_rows = mask.any(dim=1).sum().clamp(min=1)
    if kind == "grpo":
        return m / m.sum(dim=1, keepdim=True).clamp(min=1) / n_rows
    if kind == "dapo":
        return m / m.sum().clamp(min=1)
    if kind == "bnpo":
        parts = m.chunk(n_parts)  # fewer than n_parts where these do not divide B
        return torch.cat([part / part.sum().clamp(min=1) for part in parts]) / len(parts)
    if kind == "dr_grpo":
        return m / (n_rows * (longest or mask.shape[1]))
    raise ValueError(f"token_weights {kind!r}: expected grpo, bnpo, dapo or dr_grpo")


def ratios(logps: Tensor, old_logps: Tensor, mask: Tensor, kind: str = "token") -> Tensor:
    """Return pi / pi_old (B, T).

    kind: "token", the ratio of each token; "sequence", the product of all ratios in a row; "mean", their
    geometric mean. The latter two are one number for each row, in every column.
    """
    log_ratios = torch.where(mask, logps - old_logps, 0.0)
    if kind == "token":
        return log_ratios.exp()
    total = log_ratios.sum(dim=1, keepdim=True)
    if kind == "mean":
        total = total / mask.sum(dim=1, keepdim=True).clamp(min=1)
    elif kind != "sequence":
        raise ValueError(f"ratios {kind!r}: expected token, sequence or mean")
    return total.exp().expand_as(mask)


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    *,
    clip_high: float | None = None,
    ratio: str = "token",
    weights: Tensor | None = None,
) -> Tensor:
    """Return the clipped loss () of log-probabilities (B, T); old_logps are those of the policy that sampled.

    advantages: (B, T), or (B, 1) for one per completion. clip, clip_high: e below and above 1, by default the
    same. ratio: a kind of `ratios`. weights: from `token_weights`, by default a mean over all tokens.
    """
    r, advantages = ratios(logps, old_logps, mask, ratio), torch.where(mask, advantages, 0.0)
    clipped = r.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    terms = torch.maximum(-advantages * r, -advantages * clipped)
    return masked_sum(terms * (token_weights(mask, "dapo") if weights is None else weights), mask)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    weights: Tensor | None = None,
) -> Tensor:
    """Return half the mean over tokens of max((V - G)^2, (V' - G)^2), V' clipped to V_old +- clip: ().

    values V, old_values V_old and returns G are (B, T); in all epochs the latter two are the rollout's.
    weights: from `token_weights`, by default a mean over all tokens.
    """
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    near = torch.clamp(values, old_values - clip, old_values + clip)
    terms = 0.5 * torch.maximum((values - returns).square(), (near - returns).square())
    return masked_sum(terms * (token_weights(mask, "dapo") if weights is None else weights), mask)


def kl_loss(
    logps: Tensor, ref_logps: Tensor, mask: Tensor, weights: Tensor, old_logps: Tensor | None = None
) -> Tensor:
    """Return the KL penalty of GRPO's loss, a number (): k3 of log-probabilities (B, T), summed with weights.

    With old_logps each term is multiplied by its ratio, which corrects the gradient to that of KL(pi || ref).
    """
    terms = kl(torch.where(mask, logps - ref_logps, 0.0), "k3")
    if old_logps is not None:
        terms = terms * ratios(logps, old_logps, mask)
    return masked_sum(terms * weights, mask)
