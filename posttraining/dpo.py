"""Direct preference optimisation: a model learns from pairs of answers, without a reward model.

    h    = (log pi(y_c | x) - log ref(y_c | x)) - (log pi(y_r | x) - log ref(y_r | x))
    loss = -log sigmoid(beta h)            y_c the chosen answer to the prompt x, y_r the rejected one

The policy that maximises E[reward] - beta KL(pi || ref) is pi = ref exp(reward / beta) / Z(x). Solved for
the reward, this gives reward = beta log(pi / ref) + beta log Z(x). Z cancels in a pair, so beta log(pi / ref)
is the implicit reward of a policy, and the Bradley-Terry model of a reward, p(y_c preferred) =
sigmoid(reward_c - reward_r), becomes a loss on the policy itself (DPO, Rafailov et al. 2023, section 4). The
reference is the model that training starts from, or --set reference=DIR. It does not change, so its
log-probabilities are computed once, see posttraining/reference.py.

    --set method=   loss, with h as above; l is the log-probability of an answer, n the number of its tokens
    dpo             -log sigmoid(beta h)
    conservative    -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h), e the probability of a wrong
                    label                          (Mitchell 2023, "A note on DPO with noisy preferences")
    robust          (-(1-e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1-2e)    (Chowdhury et al. 2024)
    hinge           max(0, 1 - beta h)                                     (RSO's hinge-norm, Liu et al. 2024;
                    SLiC, Zhao et al. 2023, has max(0, margin - l_c + l_r), without a reference, and a second
                    term)
    ipo             (h - 1/(2 tau))^2 with tau = beta, of sums over tokens            (Azar et al. 2023, (17))
    ipo_mean        the same with every log-probability divided by its n, so with tau of another scale
    kto             1 - sigmoid(+-(beta (R - z))), R = log pi - log ref of single answers that are labelled
                    good (+) or bad (-); z estimates KL(pi || ref)            (Ethayarajh et al. 2024, (8))
    simpo           -log sigmoid(beta (l_c/n_c - l_r/n_r) - gamma); no reference       (Meng et al. 2024, (6))
    orpo            -l_c/n_c - lam log sigmoid(log-odds ratio); no reference           (Hong et al. 2024, (6))

All sums are over the tokens of the answer and its end token, without the prompt's: in h these would cancel,
but not in a mean. Both log-probabilities may fall while h rises: only their difference counts.

    python train.py --model dpo                                            a Markov chain with a known optimum
    python train.py --model dpo --init-from runs/sft/model --data pairs.jsonl        see data/preferences.py
    python train.py --model dpo --init-from runs/sft/model --data pairs.jsonl --adapter lora

Shapes: B pairs of 2 answers each, T tokens of a prompt and an answer.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import preferences
from data.preferences import PreferenceRows
from data.rows import Dataset, Row, stack
from engine import parallel
from engine.settings import with_fields
from formats.config_values import check_values
from posttraining.preference_runs import load_preferences, save_tokenizer, show, start_model  # noqa: F401
from posttraining.reference import add_reference, n_predicted, sequence_logps, trimmed

MODEL = "gpt"
DATA = "chain"  # the task whose optimum is known, see posttraining/frontier.py
REFERENCE = True  # --resume compares the model of the start, too
STEPS = 300
LEARNING_RATE = 0.25
TOKEN_LOSS = "chosen_nats"  # the metric that perplexity is of
METHODS = ("dpo", "conservative", "robust", "hinge", "ipo", "ipo_mean", "kto", "simpo", "orpo")
WITHOUT_REFERENCE = ("simpo", "orpo")


@dataclass(frozen=True)
class Config:
    """The settings of the objective."""

    method: str = "dpo"  # one of METHODS
    beta: float | None = None  # per nat; tau of IPO. By default 0.1, but SimPO's is 2, see `scale`
    smoothing: float = 0.1  # e of conservative and robust: the probability that a label is wrong
    gamma: float = 1.0  # SimPO's margin: half of its beta, as in the paper
    lam: float = 0.1  # ORPO's weight of the log-odds ratio
    # KTO's lam_D and lam_U. With n_D good and n_U bad answers, lam_D n_D / (lam_U n_U) should be between 1
    # and 4/3 (section 4.2).
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: str | None = None  # the directory of another reference than the model in --init-from

    MAY_BE_ZERO = ("smoothing", "gamma", "lam", "desirable_weight", "undesirable_weight")

    def __post_init__(self):
        check_values(self, method=METHODS)
        if self.smoothing >= 0.5:
            raise ValueError(
                f"smoothing {self.smoothing}: expected less than 0.5, more right labels than wrong"
            )
        if self.reference is not None and self.method in WITHOUT_REFERENCE:
            raise ValueError(f"reference {self.reference}: {self.method} has no reference; leave it out")

    @property
    def scale(self) -> float:
        """Return beta as it is set, or the method's default.

        It is 2 for SimPO, which has a mean over tokens where the others have a sum, and 0.1 for the others.
        """
        return self.beta or (2.0 if self.method == "simpo" else 0.1)


# --- losses of pairs: each takes and returns (B,)


def log_ratio(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """Return h (B,): how much more than the reference the policy prefers the chosen answer, in nats."""
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    smoothing: float = 0.0,
) -> Tensor:
    """Return the loss of each pair, (B,): -log sigmoid(beta h), or conservative DPO's with smoothing = e.

    The four tensors (B,) are log-probabilities of whole answers, of the policy and of the reference. Without
    smoothing the gradient by `chosen` is -beta sigmoid(-beta h), and by `rejected` its opposite.
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
    """Return the robust loss of each pair, (B,), of labels that are wrong with probability `smoothing`.

    It is an unbiased estimate of DPO's loss with the right labels. It may be negative.
    """
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
    chosen: Tensor,
    rejected: Tensor,
    n_chosen: Tensor,
    n_rejected: Tensor,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    """Return -log sigmoid(beta (mean log-probability of the chosen - of the rejected) - gamma), (B,)."""
    return -F.logsigmoid(beta * (chosen / n_chosen - rejected / n_rejected) - gamma)


def log_odds(logp: Tensor) -> Tensor:
    """Return log(p / (1 - p)) from log p; p = 1, where it is infinite, counts as 1 - eps."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


def orpo_loss(
    chosen: Tensor, rejected: Tensor, n_chosen: Tensor, n_rejected: Tensor, lam: float = 0.1
) -> Tensor:
    """Return -mean log p of the chosen answer - lam log sigmoid(log-odds ratio of the two answers), (B,).

    The odds are p / (1 - p) of the geometric mean p of an answer's token probabilities.
    """
    chosen, rejected = chosen / n_chosen, rejected / n_rejected
    return -chosen - lam * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


# --- the loss of single answers


def kto_z(policy: Tensor, reference: Tensor) -> Tensor:
    """Return KTO's estimate of KL(pi || ref), a number () without gradient: a mean over B and all ranks.

    policy, reference (B,): log-probabilities of answers to *other* prompts. Negative estimates become 0.
    """
    mean = (policy - reference).detach().mean()
    return parallel.all_reduce_sum(mean).clamp(min=0) / parallel.world_size()


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
    """Return the loss of each pair, (B,), by config.method. Raises ValueError for a method not for pairs.

    policy, reference, n (B, 2): log-probabilities and numbers of tokens of chosen and rejected answers.
    """
    own, both = policy.unbind(1), (*policy.unbind(1), *reference.unbind(1))
    match config.method:
        case "dpo":
            return dpo_loss(*both, config.scale)
        case "conservative":
            return dpo_loss(*both, config.scale, config.smoothing)
        case "robust":
            return robust_dpo_loss(*both, config.scale, config.smoothing)
        case "hinge":
            return hinge_loss(*both, config.scale)
        case "ipo":
            return ipo_loss(*both, config.scale)
        case "ipo_mean":
            return ipo_mean_loss(*both, *n.unbind(1), config.scale)
        case "simpo":
            return simpo_loss(*own, *n.unbind(1), config.scale, config.gamma)
        case "orpo":
            return orpo_loss(*own, *n.unbind(1), config.lam)
    raise ValueError(f"method {config.method}: not for pairs; expected one of {', '.join(METHODS)}")


# --- what train.py looks up by name, see engine/contract.py


def settings(config: Any) -> Config:
    """Return the task's Config; --set changes its fields."""
    return Config()


def load_data(args: argparse.Namespace, config: Any) -> Dataset:
    """Return the preferences that --data names, with the log-probabilities of the reference.

    With method kto the rows are single answers, each beside a second one that belongs to another prompt.
    Raises ValueError for labels of single answers with any other method.
    """
    own = with_fields(Config(), args.set)
    dataset = load_preferences(args, config, "dpo")
    sides = (dataset.train, dataset.val)
    if own.method == "kto":
        train, held_out = (preferences.single_answers(side.rows) for side in sides)
        dataset.train = PreferenceRows(preferences.mismatched(train, args.seq_len))
        dataset.val = PreferenceRows(preferences.mismatched(held_out, args.seq_len, train))
        dataset.fingerprint += f"-single-{args.seq_len}"  # --seq-len decides which second answers fit
    elif sides[0].rows[0].label is not None:
        raise ValueError(f"--data {args.data}: labels of single answers; expected pairs, or --set method=kto")
    if own.method in WITHOUT_REFERENCE:
        return dataset
    return add_reference(dataset, args, config, own.reference)


def make_batch(rows: list[Row], config: Config, generator: torch.Generator, tokenizer: Any = None) -> dict:
    """Return B rows of `PreferenceRows` as tensors, without columns that are padding in all of them.

    "tokens" and "mask" (B, 2, T); "reference" (B, 2), but for methods without one; for KTO "label" (B,).
    """
    return trimmed(stack(rows))


def wrap(model: nn.Module, config: Config) -> nn.Module:
    """Return the model itself, with the task's Config as its attribute `objective`, which `loss` reads."""
    model.objective = config
    return model


def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean loss of B preferences from `make_batch`, and metrics. For those of KTO see `kto`.

    Those of pairs are "accuracy", the share whose implicit reward is larger for the chosen answer (equal ones
    count half); "margin", the mean difference of the two rewards; both rewards; both log-probabilities; and
    "chosen_nats", the nats per token of chosen answers. The implicit reward is beta log(pi / ref), divided by
    n for ipo_mean; without a reference it is beta log pi / n.
    """
    config = model.objective
    if config.method == "kto":
        return kto(model, batch, config)

    # Log-probabilities of all answers in one pass.
    tokens, mask = batch["tokens"], batch["mask"]
    logps = sequence_logps(model(tokens.flatten(0, 1)), tokens.flatten(0, 1), mask.flatten(0, 1))
    policy, n = logps.view(-1, 2), n_predicted(mask)  # (B, 2)
    without = config.method in WITHOUT_REFERENCE
    reference = torch.zeros_like(policy) if without else batch["reference"]
    losses = pair_losses(policy, reference, n, config)

    # Metrics.
    with torch.no_grad():
        rewards = config.scale * (policy - reference)
        if config.method in (*WITHOUT_REFERENCE, "ipo_mean"):
            rewards = rewards / n
        margin = rewards[:, 0] - rewards[:, 1]
        metrics = {
            "accuracy": ((margin.sign() + 1) / 2).mean(),
            "margin": margin.mean(),
            "chosen_reward": rewards[:, 0].mean(),
            "rejected_reward": rewards[:, 1].mean(),
            "chosen_logp": policy[:, 0].mean(),
            "rejected_logp": policy[:, 1].mean(),
            "chosen_nats": (-policy[:, 0] / n[:, 0]).mean(),
        }
    return losses.mean(), metrics


def kto(model: nn.Module, batch: dict[str, Tensor], config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean KTO loss of B answers, and metrics.

    z is estimated from the B answers of this micro-batch, on all ranks: with --grad-accum each micro-batch of
    an update has a z of its own, and a large --batch-size estimates it better. The metrics are "z" in nats;
    "margin", the mean of beta (R - z) for good answers and -beta (R - z) for bad ones; "accuracy", the share
    of answers for which this is above 0 (those at 0 count half); and "chosen_nats", the nats per token of all
    answers.
    """
    # The second answers, to other prompts, only estimate z.
    (own, other), (mask, other_mask) = batch["tokens"].unbind(1), batch["mask"].unbind(1)
    reference, other_reference = batch["reference"].unbind(1)
    with torch.no_grad():
        z = kto_z(sequence_logps(model(other), other, other_mask), other_reference)

    # The loss of the first answers.
    policy, label = sequence_logps(model(own), own, mask), batch["label"]
    weights = (config.desirable_weight, config.undesirable_weight)
    losses = kto_loss(policy, reference, label, z, config.scale, *weights)
    with torch.no_grad():
        margin = config.scale * (policy - reference - z) * (2 * label.float() - 1)
        nats = -policy / n_predicted(mask)
        metrics = {"accuracy": ((margin.sign() + 1) / 2).mean(), "margin": margin.mean(), "z": z}
    return losses.mean(), metrics | {"chosen_nats": nats.mean()}


def flops_per_token(model: nn.Module, config: Config, seq_len: int) -> int:
    """Return the FLOPs of training on one token of --seq-len, twice a model's: a row has two sequences."""
    return 2 * model.flops_per_token(seq_len)
