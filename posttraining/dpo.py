r"""Direct preference optimisation: a model learns from pairs of answers, without a reward model.

    h    = (log pi(y_c | x) - log ref(y_c | x)) - (log pi(y_r | x) - log ref(y_r | x))
    loss = -log sigmoid(beta h)            y_c the chosen answer to the prompt x, y_r the rejected one

The policy that maximises E[reward] - beta KL(pi || ref) is ref exp(reward / beta) / Z. Solved for the reward,
this gives reward = beta log(pi / ref) + beta log Z(x), and Z cancels in a pair. So the Bradley-Terry model of
a reward, p(y_c preferred) = sigmoid(reward_c - reward_r), becomes a loss on the policy itself (DPO, Rafailov
et al. 2023, section 4). The reference is the model that training starts from. It does not change, so its
log-probabilities are computed once, see posttraining/reference.py.

    --set method=   loss, with h as above and l the log-probability of an answer, n its tokens
    dpo             -log sigmoid(beta h)
    conservative    -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h)    labels flipped with probability e
    robust          (-(1-e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1-2e)     (Chowdhury et al. 2024)
    hinge           max(0, 1 - beta h)                                                 (SLiC, Zhao et al. 2023)
    ipo             (h - 1/(2 tau))^2, tau = beta; of sums over tokens                 (Azar et al. 2023, (17))
    ipo_mean        the same with every log-probability divided by its n: another tau, not comparable
    kto             1 - sigmoid(+-(beta (R - z))), R = log pi - log ref of single answers that are labelled
                    good (+) or bad (-); z estimates KL(pi || ref)             (Ethayarajh et al. 2024, (8))
    simpo           -log sigmoid(beta (l_c/n_c - l_r/n_r) - gamma); no reference        (Meng et al. 2024, (6))
    orpo            -l_c/n_c - lam log sigmoid(log-odds ratio); no reference            (Hong et al. 2024, (6))

All sums are over the tokens of the answer and its end token. The prompt is no part of them: in h it would
cancel, but not in a mean. Both log-probabilities may fall while h rises, since only their difference counts.

    python train.py --model dpo                                             a Markov chain with a known optimum
    python train.py --model dpo --init-from runs/sft/model --data pairs.jsonl             see data/preferences.py
    python train.py --model gpt --task dpo --adapter lora --init-from runs/sft/model --data pairs.jsonl

Shapes: B pairs, C = 2 answers of each, T tokens of a prompt and an answer, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from formats.config_values import check_values

MODEL = "gpt"
METHODS = ("dpo", "conservative", "robust", "hinge", "ipo", "ipo_mean", "kto", "simpo", "orpo")
WITHOUT_REFERENCE = ("simpo", "orpo")


@dataclass(frozen=True)
class Config:
    """The settings of the objective."""

    method: str = "dpo"
    beta: float = 0.1  # per nat; tau of IPO. SimPO's is about 2
    smoothing: float = 0.1  # e of conservative and robust: the probability that a label is wrong
    gamma: float = 1.0  # SimPO's margin
    lam: float = 0.1  # ORPO's weight of the log-odds ratio
    desirable_weight: float = 1.0  # KTO's lam_D and lam_U; with unequally many labels, lam_D n_D / (lam_U n_U)
    undesirable_weight: float = 1.0  # should be between 1 and 4/3 (section 4.2)
    reference: str | None = None  # the directory of another reference than the model in --init-from

    MAY_BE_ZERO = ("smoothing", "gamma", "lam", "desirable_weight", "undesirable_weight")

    def __post_init__(self):
        check_values(self, method=METHODS)
        if self.smoothing >= 0.5:
            raise ValueError(f"smoothing {self.smoothing}: expected less than 0.5, more right labels than wrong")


# --- log-probabilities


def sequence_logps(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return log p of the masked tokens of each row, summed, in float32 or better: (B,).

    logits (B, T, V): the output of a model for tokens (B, T), int64; those at position t are of token t + 1.
    mask (B, T): true for the tokens that are summed, which are found by it alone and never by their value.
    The first token has no prediction and never counts.
    """
    targets = tokens[:, 1:].masked_fill(~mask[:, 1:].bool(), -100)  # (B, T - 1)
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")  # (B, T - 1)
    return -nats.sum(-1)


def n_predicted(mask: Tensor) -> Tensor:
    """Return how many tokens `sequence_logps` sums in each row (...,) of a mask (..., T)."""
    return mask[..., 1:].sum(-1)


# --- losses of pairs: each takes and returns (B,)


def log_ratio(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """Return h, by how much more the policy prefers the chosen answer than the reference does: (B,)."""
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    smoothing: float = 0.0,
) -> Tensor:
    """Return the loss of each pair, (B,): -log sigmoid(beta h); with smoothing conservative DPO.

    The four tensors (B,) are log-probabilities of whole answers, of the policy and of the reference. The
    gradient by `chosen` is -beta sigmoid(-beta h), and by `rejected` its opposite.
    """
    x = beta * log_ratio(chosen, rejected, ref_chosen, ref_rejected)
    return -(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)


def robust_dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    smoothing: float = 0.1,
) -> Tensor:
    """Return an unbiased estimate (B,) of DPO's loss without noise from labels that are flipped with
    probability `smoothing`. It may be negative."""
    x = beta * log_ratio(chosen, rejected, ref_chosen, ref_rejected)
    return (-(1 - smoothing) * F.logsigmoid(x) + smoothing * F.logsigmoid(-x)) / (1 - 2 * smoothing)


def hinge_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """Return max(0, 1 - beta h), (B,)."""
    return (1 - beta * log_ratio(chosen, rejected, ref_chosen, ref_rejected)).relu()


def ipo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, tau: float = 0.1
) -> Tensor:
    """Return (h - 1/(2 tau))^2, (B,), of log-probabilities summed over tokens, as in the paper.

    Unlike DPO's it has a finite minimum where all labels agree: tau h = 1/2.
    """
    return (log_ratio(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * tau)).square()


def ipo_mean_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    n_chosen: Tensor,
    n_rejected: Tensor,
    tau: float = 0.1,
) -> Tensor:
    """Return `ipo_loss` (B,) of means over the n tokens of each answer, the form of TRL and HALOs."""
    chosen, ref_chosen = chosen / n_chosen, ref_chosen / n_chosen
    return ipo_loss(chosen, rejected / n_rejected, ref_chosen, ref_rejected / n_rejected, tau)


def simpo_loss(
    chosen: Tensor, rejected: Tensor, n_chosen: Tensor, n_rejected: Tensor, beta: float = 2.0, gamma: float = 1.0
) -> Tensor:
    """Return -log sigmoid(beta (mean log-probability of the chosen - of the rejected) - gamma), (B,)."""
    return -F.logsigmoid(beta * (chosen / n_chosen - rejected / n_rejected) - gamma)


def log_odds(logp: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of log p; p = 1 counts as the largest number below 1."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


def orpo_loss(
    chosen: Tensor, rejected: Tensor, n_chosen: Tensor, n_rejected: Tensor, lam: float = 0.1
) -> Tensor:
    """Return the nats per token of the chosen answer, and lam times -log sigmoid of the log-odds ratio: (B,).

    The odds are those of the geometric mean of an answer's token probabilities.
    """
    chosen, rejected = chosen / n_chosen, rejected / n_rejected
    return -chosen - lam * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


# --- the loss of single answers


def kto_z(policy: Tensor, reference: Tensor) -> Tensor:
    """Return KTO's estimate of KL(pi || ref), a scalar without gradient.

    policy, reference (B,): log-probabilities of answers to *other* prompts. Negative estimates become 0.
    """
    return (policy - reference).detach().mean().clamp(min=0)


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    z: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return the loss of each answer, (B,): weight * (1 - sigmoid(+-beta (R - z))), R = policy - reference.

    policy, reference (B,): log-probabilities of answers. desirable (B,): bool. z: see `kto_z`.
    """
    x = beta * (policy - reference - z)
    good = desirable_weight * torch.sigmoid(-x)  # 1 - sigmoid(x)
    return torch.where(desirable.bool(), good, undesirable_weight * torch.sigmoid(x))


def pair_losses(policy: Tensor, reference: Tensor, n: Tensor, config: Config) -> Tensor:
    """Return the loss of each pair, (B,), by config.method.

    policy, reference, n (B, 2): log-probabilities and numbers of tokens of the chosen and the rejected answer.
    """
    own, both = policy.unbind(1), (*policy.unbind(1), *reference.unbind(1))
    match config.method:
        case "dpo":
            return dpo_loss(*both, config.beta)
        case "conservative":
            return dpo_loss(*both, config.beta, config.smoothing)
        case "robust":
            return robust_dpo_loss(*both, config.beta, config.smoothing)
        case "hinge":
            return hinge_loss(*both, config.beta)
        case "ipo":
            return ipo_loss(*both, config.beta)
        case "ipo_mean":
            return ipo_mean_loss(*both, *n.unbind(1), config.beta)
        case "simpo":
            return simpo_loss(*own, *n.unbind(1), config.beta, config.gamma)
        case "orpo":
            return orpo_loss(*own, *n.unbind(1), config.lam)
    raise ValueError(f"method {config.method}: not for pairs; expected one of {', '.join(METHODS)}")
