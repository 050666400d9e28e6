"""Learning from a reward: PPO, and in the same loop GRPO, Dr. GRPO, DAPO, GSPO and RLOO.

    max over pi  E[R(x, y)] - beta KL(pi || ref)         x a prompt, y ~ pi(. | x) a completion

    one step     roll_out     y ~ pi for each prompt, its reward, log pi and log ref of its tokens, values
                 advantages   A_t of each token, by the method
                 update       epochs over minibatches of  clipped policy loss (+ value loss, + KL)

The methods differ in a few lines, which posttraining/policy_gradient.py has in a table. The reference is a
frozen copy of the model that training starts from; with --adapter only the adapter is copied, since the base
does not change.

    python train.py --model ppo                              a Markov chain, of which the optimum is known
    python train.py --model ppo --set method=grpo beta=0.5
    python train.py --model ppo --init-from DIR --data stdlib --lr 1e-4 --set reward=exact beta=0.05
    python train.py --model ppo --init-from DIR --data questions.jsonl --lr 1e-4 --set reward=my.py:polite

posttraining/rollout.py samples completions and computes their rewards. The code calls the reward of a
completion its score; `rewards` are those of tokens. Before the first update of a step every ratio is exactly
1, and before the first of a run the KL is exactly 0; both are logged, since most mistakes show there first.

Everything random is a function of (seed, step): a run that is killed and resumed computes the same as one
that is not.

Shapes: B completions, T tokens of prompt and completion but the first, V vocabulary, D model width.
"""

import math
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.rows import Row, seed_of, stack
from engine.log import Log, UpdateResult, evaluate_and_save
from engine.optim import set_learning_rate, step_optimizers
from engine.run import Run
from engine.settings import refuse_balance_losses, with_fields
from formats.config_values import check_values
from posttraining import frontier, instruct, scores
from posttraining.policy_gradient import (
    METHODS,
    Method,
    adapted_coefficient,
    gae,
    group_advantages,
    kl_loss,
    policy_loss,
    ratios,
    token_rewards,
    token_weights,
    value_loss,
    whiten,
)
from posttraining.preference_runs import check_chain, save_tokenizer, start_model  # noqa: F401
from posttraining.prompts import Prompts, of_chain, of_conversations, unpadded
from posttraining.rollout import Policy, Rollout, metrics_of, of_tokens, roll_out

MODEL = "gpt"
DATA = "chain"
REFERENCE = True  # --resume compares the model of the start, too
STEPS = 60  # of the default run: a minute on two CPU cores
LEARNING_RATE = 0.2  # times the default rate: it suits the chain
HELD_OUT = 64  # prompts of an evaluation


@dataclass(frozen=True)
class Config:
    """The settings of a run; beta suits the chain. For rewards of standard deviation 1, take 0.05 to 0.1."""

    method: str = "ppo"  # a row of policy_gradient.METHODS
    # "chain", "exact", FILE.py:FUNCTION, MODULE:FUNCTION or a directory: see posttraining/scores.py
    reward: str = "chain"
    beta: float = 1.0  # coefficient of the KL penalty; 0 for none, where the penalty is in the loss
    samples: int = 32  # completions of each prompt: the size of a group
    max_new_tokens: int = 64  # of a completion
    temperature: float = 1.0  # of sampling, and so of every probability
    epochs: int = 4  # over the completions of a step
    minibatches: int = 1  # of an epoch, each with an update of its own
    clip: float = 0.2  # the ratio is clipped to 1 - clip ... 1 + clip
    clip_high: float | None = None  # the upper clip, in place of the method's
    average: str | None = None  # "grpo", "dapo" or "dr_grpo", in place of the method's
    value_clip: float = 0.2  # how far a value may move in one step
    value_weight: float = 0.1  # of the value loss beside the policy's
    gamma: float = 1.0  # discount of GAE
    lam: float = 0.95  # lambda of GAE
    whiten_rewards: bool = False  # of tokens, to variance 1 with their mean kept, as in OpenAI's code
    target_kl: float | None = None  # nats per completion: adapts beta, by 20% in 10,000 completions at most
    corrected_kl: bool = False  # a KL penalty in the loss is multiplied by the ratio, see policy_gradient.py
    missing_end: float | None = None  # if set, a completion without end token has the score -missing_end

    MAY_BE_ZERO = ("lam", "value_weight", "beta")

    def __post_init__(self):
        check_values(self, method=tuple(METHODS), average=(None, "grpo", "dapo", "dr_grpo"))
        if self.beta == 0 and (self.row.penalty == "reward" or self.target_kl is not None):
            where = self.method if self.target_kl is None else "target_kl, which multiplies it"
            raise ValueError(f"beta 0: expected a number above 0 with {where}; grpo and the like may have 0")
        for name in ("gamma", "lam"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at most 1")
        if self.row.advantage != "gae" and self.samples < 2:
            raise ValueError(
                f"samples {self.samples}: {self.method} compares completions; expected at least 2"
            )

    @property
    def row(self) -> Method:
        """Return the method's row of METHODS, with the changes of these settings."""
        row = METHODS[self.method]
        return replace(row, average=self.average or row.average, clip_high=self.clip_high or row.clip_high)


# --- one step


def advantages_of(rollout: Rollout, settings: Config, beta: float) -> tuple[Tensor, Tensor]:
    """Return the advantages, (B, T) or (B, 1), and the returns (B, T), which are 0 without a value head."""
    rollout = rollout.detached()
    method, mask, scores = settings.row, rollout.mask, rollout.scores
    d = rollout.logps - rollout.ref_logps  # (B, T)

    # One advantage per completion, by comparison with its group.
    if method.advantage != "gae":
        if method.penalty == "reward":
            scores = scores - beta * torch.where(mask, d, 0.0).sum(dim=1)
        return group_advantages(scores, rollout.groups, method.advantage)[:, None], torch.zeros_like(d)

    # One advantage per token, by the value head.
    per_token = token_rewards(scores, d, mask, beta)
    if settings.whiten_rewards:
        per_token = whiten(per_token, mask, shift_mean=False)
    advantages, returns = gae(per_token, rollout.values, mask, settings.gamma, settings.lam)
    return whiten(advantages, mask), returns


def loss_of(
    policy: Policy, rollout: Rollout, rows: Tensor, advantages: Tensor, returns: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss () of some rows of a rollout, and the ratios (rows, T) that it is made of.

    rows: int64, indices of completions; advantages and returns are of all completions, weights of these rows.
    """
    settings, method, mask = policy.settings, policy.settings.row, rollout.mask[rows]

    # A rollout that has kept the graph of its forward pass saves another such pass.
    tokens, old = rollout.tokens[rows], rollout.logps[rows].detach()
    if rollout.logps.requires_grad:
        logps, values = rollout.logps[rows], rollout.values[rows]
    else:
        log_p, values = policy.evaluate(tokens, mask)
        logps = of_tokens(log_p, tokens, mask)

    # The policy's loss, and what the method adds to it.
    options = {"clip_high": method.clip_high, "ratio": method.ratio, "weights": weights}
    loss = policy_loss(logps, old, advantages[rows], mask, settings.clip, **options)
    if method.advantage == "gae":
        old_values = rollout.values[rows].detach()
        of_values = (values, old_values, returns[rows], mask, settings.value_clip)
        loss = loss + settings.value_weight * value_loss(*of_values)
    if method.penalty == "loss":
        sampled_by = old if settings.corrected_kl else None
        of_kl = kl_loss(logps, rollout.ref_logps[rows], mask, weights, sampled_by)
        loss = loss + policy.beta.float() * of_kl
    return loss, ratios(logps.detach(), old, mask, method.ratio)


def update(run: Run, rollout: Rollout, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Make the updates of one step; the first epoch is in the order of the rollout, the others are shuffled.

    Returns the largest norm of a gradient, and metrics: "first_ratio", the ratio farthest from 1 before the
    first update, and "clipped", the share of the tokens of all epochs whose ratio is outside of the clipping
    range. (Not all of these are without gradient: the clipped loss is flat on one side of the range alone,
    and the advantage's sign decides on which.)
    """
    policy, settings = run.model, run.model.settings
    advantages, returns = advantages_of(rollout, settings, float(policy.beta))
    n, longest = len(rollout.tokens), min(settings.max_new_tokens, policy.config.max_seq_len - 1)

    # One update for each minibatch of each epoch.
    norms, all_ratios = [], []
    for epoch in range(settings.epochs):
        order = torch.arange(n) if epoch == 0 else torch.randperm(n, generator=generator)
        for rows in order.to(rollout.tokens.device).chunk(settings.minibatches):
            weights = token_weights(rollout.mask[rows], settings.row.average, longest)
            with run.autocast():
                loss, ratio = loss_of(policy, rollout, rows, advantages, returns, weights)
            loss.backward()
            norms.append(descend(run))
            rollout = rollout.detached()  # its graph belongs to the weights before this update
            all_ratios.append(torch.where(rollout.mask[rows], ratio, 1.0))
    run.count_step(torch.stack(norms).isfinite().all())

    high = settings.row.clip_high or settings.clip
    n_clipped = sum(((r > 1 + high) | (r < 1 - settings.clip)).sum() for r in all_ratios)
    first = all_ratios[0].flatten()
    return torch.stack(norms).max(), {
        "first_ratio": first[(first - 1).abs().argmax()],
        "clipped": n_clipped / (rollout.mask.sum() * settings.epochs).clamp(min=1),
    }


def descend(run: Run) -> Tensor:
    """Make one update of the weights from their gradients, clear these, and return their norm.

    An update whose norm is not finite is left out.
    """
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.args.grad_clip or math.inf)
    finite = norm.isfinite()
    step_optimizers(run.optimizers, finite)
    run.concept.model_file.after_step(run.concept.task.unwrap(run.model), finite)
    run.model.zero_grad(set_to_none=True)
    return norm


# --- the loop


def train(run: Run, log: Log) -> None:
    """Train to the last step, in place of train.py's `train`."""
    policy, args, settings = run.model, run.args, run.model.settings
    if log.evaluation_is_missing() and log.evaluate(evaluate):
        return  # --patience ends

    for step in run.steps():
        # Sample completions of the step's prompts, and learn from them. Without dropout, since it would make
        # ratios differ from 1.
        log.begin_step()
        policy.eval()
        lr = set_learning_rate(run.optimizers, step, args)
        batch = prompts_of_step(run)
        seed = seed_of(args.seed, step)
        with run.autocast():
            keep_graph = settings.minibatches == 1  # then the first update is of all rows, with these weights
            rollout = roll_out(policy, batch, run.dataset, seed, settings.samples, keep_graph)
        metrics = metrics_of(rollout) | {"beta": policy.beta.float()}
        norm, of_update = update(run, rollout, torch.Generator().manual_seed(seed))

        # Adapt beta to the KL that was measured.
        if settings.target_kl is not None and metrics["kl"].isfinite():
            of_step = (float(metrics["kl"]), settings.target_kl, len(rollout.tokens))
            policy.beta.fill_(adapted_coefficient(float(policy.beta), *of_step))

        # What is minimised is beta KL - reward. The loss whose gradient is taken is near 0 by construction.
        loss = metrics["beta"] * metrics["kl"] - metrics["reward"]
        log.step(UpdateResult(loss, norm, lr, metrics | of_update, max(1, int(rollout.mask.sum()))))
        if evaluate_and_save(run, log, evaluate):
            return  # --patience ends


def prompts_of_step(run: Run) -> dict[str, Tensor]:
    """Return the prompts of a step: its --grad-accum micro-batches joined to one batch."""
    parts = [part.batch for part in run.batches.next()]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def evaluate(run: Run) -> dict[str, float]:
    """Return the reward and the KL of the policy.

    On the chain they are exact. Else they are means over one completion of each of some held-out prompts,
    drawn by the same seed at every evaluation.
    """
    policy, dataset = run.model.eval(), run.dataset
    if dataset.tokenizer is None:
        reward, kl = frontier.value_of(policy.model)
        found = {"val_reward": reward, "val_kl": kl, "val_share_of_gain": frontier.share_of_gain(reward, kl)}
    else:
        batch = stack([dataset.val[i] for i in range(min(len(dataset.val), HELD_OUT))])
        metrics = metrics_of(roll_out(policy, batch, dataset, seed=0, n=1))
        names = ("reward", "kl", "completion_tokens", "ended", "unscored")
        found = {f"val_{name}": metrics[name].item() for name in names}
    return {"val_loss": float(policy.beta) * found["val_kl"] - found["val_reward"]} | found


# --- what train.py looks up by name, see engine/contract.py


def settings(config: Any) -> Config:
    """Return the default settings, whatever the model."""
    return Config()


def load_data(args: Namespace, config: Any) -> Prompts:
    """Return the prompts that --data names, with the reward that scores their completions."""
    return read_prompts(args, config, with_fields(Config(), args.set))


def read_prompts(args: Namespace, config: Any, own: Any) -> Prompts:
    """Return the prompts that --data names, with a reward.

    config: the model's; own: a task's, with the fields beta, max_new_tokens and reward. Raises ValueError for
    --parallel, for --document-mask, for a model or a number of tokens that do not fit the chain, and as
    `refuse_balance_losses` does.
    """
    refuse_balance_losses(config)
    if args.parallel != "none" or args.document_mask:
        flag = "--document-mask" if args.document_mask else f"--parallel {args.parallel}"
        raise ValueError(f"{flag}: this loop runs in one process, with one completion in a row; leave it out")
    if args.data == "chain":
        check_chain(args, config)
        if own.max_new_tokens < (T := frontier.Chain().T):
            raise ValueError(f"--set max_new_tokens={own.max_new_tokens}: the chain has {T} tokens")
    dataset = of_chain(own.beta) if args.data == "chain" else of_conversations(args, own.max_new_tokens)
    dataset.scorer = scores.find(own.reward, dataset.tokenizer, dataset.stop)
    return dataset


def make_batch(rows: list[Row], config: Config, generator, tokenizer=None) -> dict[str, Tensor]:
    """Return rows of prompts as one batch."""
    return stack(rows)


def wrap(model: nn.Module, settings: Config) -> Policy:
    """Return the policy of a model: its reference is a copy of the model as it is now."""
    return Policy(model, settings)


def unwrap(policy: Policy) -> nn.Module:
    """Return the model in a policy, without the value head, which only the checkpoint keeps."""
    return policy.model


def save(policy: Policy, dataset: Prompts, directory: Path) -> None:
    """Write the model, which needs nothing else to write text."""
    policy.model.save_pretrained(directory)


def flops_per_token(policy: Policy, settings: Config, seq_len: int) -> int:
    """Return the FLOPs of a step for one token of --seq-len, as if each completion had --seq-len tokens.

    A row is a prompt, with `samples` completions. The reward is not counted.
    """
    # Each epoch passes forward and backward. A pass that is only forward costs a third of that: to sample, by
    # the reference, and, where the graph is not kept for the first update, by the policy.
    passes = settings.epochs + (2 if settings.minibatches == 1 else 3) / 3
    return round(settings.samples * passes * policy.model.flops_per_token(seq_len))


@torch.no_grad()
def show(policy: Policy, dataset: Prompts, out: Path) -> str:
    """Return where the policy is beside the exact optimum, or completions of some held-out prompts."""
    # The chain, which has no tokenizer.
    if dataset.tokenizer is None:
        reward, kl = frontier.value_of(policy.model)
        share = frontier.share_of_gain(reward, kl)
        here = f"reward {reward:.4f} at KL {kl:.4f} nats: {share:.1%} of the gain that is possible at this KL"
        if policy.settings.row.penalty == "loss":
            return here  # the optimum of GRPO is another one: advantages are scaled, and the KL is reversed
        best, at = frontier.optimum(float(policy.beta))
        return f"{here}\nthe exact optimum at beta {float(policy.beta):g}: {best:.4f} at KL {at:.4f}"

    # The likeliest completions of four prompts.
    some = stack([dataset.val[i] for i in range(min(len(dataset.val), 4))])
    prompts, answers = unpadded(some, "prompt"), unpadded(some, "answer")
    n_new = policy.settings.max_new_tokens
    found = instruct.answers(policy.model, dataset.tokenizer, prompts, n_new)
    decode = dataset.tokenizer.decode
    shown = zip(prompts, answers, found, strict=True)
    return "\n\n".join(f"{decode(p)}\nexpected: {decode(a)}\nlikeliest: {text}" for p, a, text in shown)
