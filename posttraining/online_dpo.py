"""Online DPO: the policy itself draws the pairs, and their scores decide which completion is chosen.

    y_1, y_2 ~ pi(. | x)        y_c the completion of the higher score, y_r the other
    h = log(pi(y_c | x) / ref(y_c | x)) - log(pi(y_r | x) / ref(y_r | x))
    loss = -log sigmoid(beta h), or (h - 1/(2 beta))^2 with method=ipo, as in posttraining/dpo.py

The pairs of offline DPO come from the model that training starts from, so that a policy far from it learns
from completions that it no longer gives. Here every step draws new ones (Guo et al. 2024, section 3). Scores
are as for PPO, see posttraining/scores.py. Pairs of equal scores, in which nothing is preferred, are left out
and counted, and likewise those with a completion that has no score.

    python train.py --model online_dpo                                     a Markov chain with a known optimum
    python train.py --model online_dpo --init-from runs/sft/model --data stdlib --set reward=runs/reward/model

DPO assumes preferences that are drawn: y_1 is preferred with probability sigmoid(score 1 - score 2). By
default the higher score always wins, so that h has no finite optimum: a long training passes the optimum for
its beta. With preferred=drawn the loss is least at the optimum for beta, as that of offline DPO is with
infinitely many pairs. The scale of scores then matters, since their differences become probabilities.

Shapes: B pairs, N completions, T tokens of a prompt and a completion.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.rows import Row, seed_of, stack
from engine.log import Log, UpdateResult, evaluate_and_save
from engine.optim import set_learning_rate
from engine.run import Run
from engine.settings import with_fields
from formats.config_values import check_values
from posttraining import chain_preferences, frontier, instruct, ppo, prompts, scores
from posttraining.dpo import dpo_loss, ipo_loss
from posttraining.preference_runs import save_tokenizer, start_model  # noqa: F401
from posttraining.reference import sequence_logps
from posttraining.rollout import Reference, laid_out

MODEL = "gpt"
DATA = "chain"
REFERENCE = True
STEPS = 100
LEARNING_RATE = 0.1
HELD_OUT = 64  # prompts of an evaluation


@dataclass(frozen=True)
class Config:
    """The settings of a run."""

    method: str = "dpo"  # or "ipo", of sums over tokens
    beta: float = 0.1  # per nat; tau of IPO
    reward: str = "chain"  # see posttraining/scores.py
    preferred: str = "higher"  # the completion of the higher score; or "drawn", see above
    pairs: int = 8  # of each prompt in a step
    max_new_tokens: int = 64  # of a completion
    temperature: float = 1.0  # of sampling alone: the loss and the KL are at 1

    def __post_init__(self):
        check_values(self, method=("dpo", "ipo"), preferred=("higher", "drawn"))


# --- one step


@torch.no_grad()
def draw(model: nn.Module, dataset: prompts.Prompts, batch: dict, n: int, seed: int) -> tuple[Tensor, ...]:
    """Return n completions of each prompt in a batch: tokens (N, T), mask (N, T) of the completions' tokens,
    and scores (N,)."""
    settings = model.objective
    prompt_ids = [p for p in prompts.unpadded(batch, "prompt") for _ in range(n)]
    given = [a for a in prompts.unpadded(batch, "answer") for _ in range(n)]
    room = min(settings.max_new_tokens, model.config.max_seq_len - max(map(len, prompt_ids)))
    device = next(model.parameters()).device
    options = {"temperature": settings.temperature, "stop": dataset.stop}
    drawn = model.generate(prompt_ids, room, **options, generator=torch.Generator(device).manual_seed(seed))
    found = scores.score(dataset.scorer, scores.Completions(prompt_ids, drawn, given))
    tokens, of_next = laid_out(prompt_ids, drawn)
    mask = torch.cat([torch.zeros(len(tokens), 1, dtype=torch.bool), of_next], dim=1)
    return tokens.to(device), mask.to(device), found.to(device)


def ranked(scores: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Return the order of each pair, the index of the chosen completion first, int64 (B, 2), and which pairs
    count, bool (B,).

    scores (B, 2); NaN where there is none. The higher score is chosen, and pairs of equal scores do not
    count. With a generator the preference is drawn: the first is chosen with probability sigmoid(first -
    second).
    """
    scored = scores.isfinite().all(1)
    if generator is None:
        return scores.argsort(dim=1, descending=True), scored & (scores[:, 0] != scores[:, 1])
    p = torch.sigmoid(scores[:, 0] - scores[:, 1])
    second = (torch.rand(len(p), device=p.device, generator=generator) >= p).long()  # 1: the second is chosen
    return torch.stack([second, 1 - second], dim=1), scored


def loss_of(
    model: nn.Module, tokens: Tensor, mask: Tensor, scores: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, dict]:
    """Return the mean loss of the pairs that count, 0 where none does, and metrics.

    tokens, mask (2 B, T), scores (2 B,): pair i is in the rows 2 i and 2 i + 1. generator: of drawn
    preferences, see `ranked`.
    """
    settings, (order, counts) = model.objective, ranked(scores.view(-1, 2), generator)
    policy = sequence_logps(model(tokens), tokens, mask).view(-1, 2)
    with torch.no_grad():
        reference = sequence_logps(model.reference.logits(tokens), tokens, mask).view(-1, 2)
    pair = [*policy.gather(1, order).unbind(1), *reference.gather(1, order).unbind(1)]
    losses = (dpo_loss if settings.method == "dpo" else ipo_loss)(*pair, settings.beta)
    n = counts.sum().clamp(min=1)
    metrics = {
        "reward": scores.nanmean(),
        "kl": (policy - reference).mean().detach(),  # of samples: it may be negative
        "margin": (settings.beta * ((pair[0] - pair[2]) - (pair[1] - pair[3])) * counts).sum().detach() / n,
        "ties": (scores.view(-1, 2).isfinite().all(1) & ~counts).sum().float(),
        "unscored": (~scores.isfinite()).sum().float(),
    }
    return torch.where(counts, losses, 0.0).sum() / n, metrics


# --- the loop


def train(run: Run, log: Log) -> None:
    """Train to the last step, in place of train.py's `train`."""
    model, args = run.model, run.args
    if log.evaluation_is_missing() and log.evaluate(evaluate):
        return  # --patience ends
    for step in run.steps():
        # Draw and rank the pairs of this step.
        log.begin_step()
        model.eval()  # no dropout
        lr = set_learning_rate(run.optimizers, step, args)
        batch, generator = ppo.prompts_of_step(run), None
        if model.objective.preferred == "drawn":  # by other seeds than completions
            generator = torch.Generator(args.device).manual_seed(seed_of(-1 - args.seed, step))
        with run.autocast():
            drawn = draw(model, run.dataset, batch, 2 * model.objective.pairs, seed_of(args.seed, step))
            loss, metrics = loss_of(model, *drawn, generator)

        # Learn from them once. An update whose gradient is not finite is left out.
        loss.backward()
        norm = ppo.descend(run)
        run.count_step(norm.isfinite())

        log.step(UpdateResult(loss.detach(), norm, lr, metrics, len(drawn[0])))
        if evaluate_and_save(run, log, evaluate):
            return  # --patience ends


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Return the mean score, as "val_reward", and the KL of the policy.

    On the chain they are exact. Else they are means over one completion of each of some held-out prompts,
    drawn by the same seed at every evaluation.
    """
    model, dataset = run.model.eval(), run.dataset
    if dataset.tokenizer is None:
        reward, kl = frontier.value_of(model)
    else:
        batch = stack([dataset.val[i] for i in range(min(len(dataset.val), HELD_OUT))])
        tokens, mask, found = draw(model, dataset, batch, 1, seed=0)
        d = sequence_logps(model(tokens), tokens, mask)
        d = d - sequence_logps(model.reference.logits(tokens), tokens, mask)
        reward, kl = found.nanmean().item(), d.mean().item()
    return {"val_loss": -reward, "val_reward": reward, "val_kl": kl}


# --- what train.py looks up by name, see engine/contract.py


def settings(config: Any) -> Config:
    """Return the default settings, whatever the model."""
    return Config()


def load_data(args: argparse.Namespace, config: Any) -> prompts.Prompts:
    """Return the prompts that --data names, with the reward that ranks their completions."""
    return ppo.read_prompts(args, config, with_fields(Config(), args.set))


def make_batch(rows: list[Row], config: Config, generator, tokenizer=None) -> dict[str, Tensor]:
    """Return rows of prompts as one batch."""
    return stack(rows)


def wrap(model: nn.Module, config: Config) -> nn.Module:
    """Return the model itself, with the settings and the reference, the model as it is now, as attributes.

    The reference is no module, so it is in no checkpoint.
    """
    model.objective, model.reference = config, Reference(model)
    return model


def flops_per_token(model: nn.Module, config: Config, seq_len: int) -> int:
    """Return the FLOPs of a step for one token of --seq-len, as if each completion had --seq-len tokens.

    A row is a prompt, with 2 * pairs completions. Each takes two forward passes, to sample and by the
    reference, of a third of the FLOPs of an update, and the update.
    """
    return round(2 * config.pairs * (1 + 2 / 3) * model.flops_per_token(seq_len))


@torch.no_grad()
def show(model: nn.Module, dataset: prompts.Prompts, out: Path) -> str:
    """Return where the model is under the exact frontier, or with text its likeliest completions."""
    if dataset.tokenizer is None:
        of_reward = model.objective.method == "dpo"
        return chain_preferences.placed(model, model.objective.beta if of_reward else None)
    prompt_ids = prompts.unpadded(stack([dataset.val[i] for i in range(min(len(dataset.val), 4))]), "prompt")
    found = instruct.answers(model, dataset.tokenizer, prompt_ids, model.objective.max_new_tokens)
    return "\n\n".join(f"{dataset.tokenizer.decode(p)}{a}" for p, a in zip(prompt_ids, found, strict=True))
