"""Rollouts: a policy completes prompts, and all that learning from the completions needs is computed.

    y ~ pi(. | x)  ->  score R(x, y),  log pi(y_t | .), log ref(y_t | .), values V_t and a mask of the y_t

Log-probabilities are computed by the forward pass of training, at the temperature of sampling, without
dropout; those that the sampler computes on its way, token by token, differ in their last bits. So the ratio
of the first update is exactly 1, and the KL is exactly 0 as long as the policy is the reference. With one
minibatch that pass is the forward pass of the first update, too: it keeps its graph, and is computed once.

Completions are laid out behind their prompts and padded on the right. The mask is made of their lengths: a
token counts by its position, whatever its value. The last token sampled, an end token or not, carries the
score (some code puts it one place behind, where a smaller gamma or lambda weakens it).

Logits, the largest tensor of all, are computed only at the N places of (B, T) where a token was sampled.

Shapes: B completions, T tokens of prompt and completion without the first, V vocabulary, D model width.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posttraining import scores
from posttraining.adapters import adapted_layers
from posttraining.policy_gradient import in_equal_group, kl, masked_sum
from posttraining.prompts import Prompts, unpadded

# --- the policy and its reference


class Reference:
    """The model as it is now, frozen. It is no module, so it is in no checkpoint.

    Of a model with adapters, new ones or trained before, a copy of the adapters is kept, and not of the base.
    """

    def __init__(self, model: nn.Module):
        layers = adapted_layers(model).values()
        self.adapters = {
            layer: copy.deepcopy(layer.adapters[layer.active]).requires_grad_(False)
            for layer in layers
            if layer.active in layer.adapters
        }
        self.model = model if layers else copy.deepcopy(model).requires_grad_(False).eval()

    def __deepcopy__(self, memo: dict) -> "Reference":
        """Return the reference itself: the copies of a model share it."""
        return self

    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V) after tokens (B, T), or (N, V) at the N places of a mask (B, T)."""
        self.model.to(tokens.device)
        with self.as_it_was():
            hidden = self.model.hidden(tokens)
            return self.model.logits(hidden if mask is None else hidden[mask])

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Give the layers of a model the adapters of the reference within a `with` block."""
        now = {layer: layer.adapters[layer.active] for layer in self.adapters}
        for layer, adapter in self.adapters.items():
            layer.adapters[layer.active] = adapter.to(next(layer.adapters.parameters()).device)
        try:
            yield
        finally:
            for layer, adapter in now.items():
                layer.adapters[layer.active] = adapter


class Policy(nn.Module):
    """The model that is trained, and beside it a value head, the coefficient of the KL, and the reference.

    settings: ppo.Config. The value head is 0 at the start, and shares the hidden states.
    """

    def __init__(self, model: nn.Module, settings: Any):
        super().__init__()
        self.model, self.settings, self.config = model, settings, model.config
        self.reference = Reference(model)
        self.value_head = None
        if settings.row.advantage == "gae":
            self.value_head = nn.Linear(model.config.d_model, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self.register_buffer("beta", torch.tensor(settings.beta, dtype=torch.float64))

    def evaluate(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p (N, V) of all tokens at the N places of the mask, at the temperature of sampling,
        and the values (B, T) of the states before all tokens, 0 without a value head.

        tokens (B, T + 1); the mask (B, T) is of all but the first.
        """
        hidden = self.model.hidden(tokens[:, :-1])  # (B, T, D)
        log_p = self.normalised(self.model.logits(hidden[mask]))
        if self.value_head is None:
            return log_p, hidden.new_zeros(mask.shape)
        return log_p, self.value_head(hidden)[..., 0].float()

    def normalised(self, logits: Tensor) -> Tensor:
        """Return log p (..., V) in float32, at the temperature of sampling."""
        t = self.settings.temperature
        return (logits.float() if t == 1 else logits.float() / t).log_softmax(dim=-1)


def at_mask(values: Tensor, mask: Tensor) -> Tensor:
    """Return values (N,) at the N places of a mask (B, T) that are True, with 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def of_tokens(log_p: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return log p (B, T) of the tokens (B, T + 1) at the mask (B, T), from log_p (N, V); 0 elsewhere."""
    return at_mask(chosen(log_p, tokens[:, 1:][mask]), mask)


def chosen(log_p: Tensor, tokens: Tensor) -> Tensor:
    """Return log p (N,) of tokens (N,), from log_p (N, V)."""
    return log_p.gather(1, tokens[:, None])[:, 0]


def in_pieces(function: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """Return function(*columns) for a function that works row by row, computed for 256 rows at a time: its
    intermediate results then fit into a processor's cache."""
    pieces = zip(*(column.split(256) for column in columns), strict=True)
    return torch.cat([function(*piece) for piece in pieces])


# --- rollouts


class Rollout(NamedTuple):
    """The completions that a step learns from, B of them, in groups of the same prompt."""

    tokens: Tensor  # int64 (B, T + 1): prompt, completion, padding
    mask: Tensor  # bool (B, T): tokens of completions that have a score, by their positions
    scores: Tensor  # (B,), NaN where there is none
    groups: Tensor  # int64 (B,)
    ended: Tensor  # bool (B,): with an end token
    logps: Tensor  # (B, T), by the policy that sampled; with the graph of its forward pass if it was kept
    ref_logps: Tensor  # (B, T)
    values: Tensor  # (B, T), likewise
    entropies: Tensor  # (B, T)

    def detached(self) -> "Rollout":
        """Return the rollout without the graph of the forward pass."""
        return self._replace(logps=self.logps.detach(), values=self.values.detach())


def laid_out(prompts: list[list[int]], completions: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return tokens (B, T + 1) padded on the right, and the mask (B, T) of the completions' tokens.

    Column t of the mask is for token t + 1, the one that is predicted there.
    """
    starts = torch.tensor([len(p) for p in prompts])[:, None]
    ends = starts + torch.tensor([len(c) for c in completions])[:, None]
    tokens = torch.zeros(len(prompts), int(ends.max()), dtype=torch.int64)
    for row, p, c in zip(tokens, prompts, completions, strict=True):
        row[: len(p) + len(c)] = torch.tensor(p + c)
    positions = torch.arange(1, tokens.shape[1])  # of the predicted tokens
    return tokens, (starts <= positions) & (positions < ends)


@torch.no_grad()
def roll_out(
    policy: Policy, batch: dict[str, Tensor], dataset: Prompts, seed: int, n: int, keep_graph: bool = False
) -> Rollout:
    """Return the Rollout of n completions of each prompt in a batch of dataset's rows, drawn by the seed.

    keep_graph: the log-probabilities and values can be differentiated, once.
    """
    settings, device = policy.settings, policy.beta.device
    prompts = [p for p in unpadded(batch, "prompt") for _ in range(n)]
    answers = [a for a in unpadded(batch, "answer") for _ in range(n)]
    groups = torch.arange(len(prompts), device=device) // n

    # Sample, token by token with a cache of keys and values.
    room = min(settings.max_new_tokens, policy.config.max_seq_len - max(map(len, prompts)))
    generator = torch.Generator(device).manual_seed(seed)
    options = {"temperature": settings.temperature, "stop": dataset.stop, "generator": generator}
    completions = policy.model.generate(prompts, room, **options)

    # Score. What has no score is left out by the mask.
    found = scores.score(dataset.scorer, scores.Completions(prompts, completions, answers)).to(device)
    ended = torch.tensor([dataset.stop in (None, c[-1]) for c in completions], device=device)
    if settings.missing_end is not None:
        found = torch.where(ended, found, -settings.missing_end)
    tokens, mask = (t.to(device) for t in laid_out(prompts, completions))
    mask = mask & found.isfinite()[:, None]

    # Log-probabilities by the forward pass of training, in the batches of training. The weights that autocast
    # has converted while sampling pass no gradient on, so its cache of them is cleared first.
    torch.clear_autocast_cache()
    parts = []
    for rows, own in zip(tokens.chunk(settings.minibatches), mask.chunk(settings.minibatches), strict=True):
        with torch.set_grad_enabled(keep_graph):
            log_p, values = policy.evaluate(rows, own)
            logps = of_tokens(log_p, rows, own)
        ref_logits = policy.reference.logits(rows[:, :-1], own)
        ref_logps = in_pieces(lambda x, y: chosen(policy.normalised(x), y), ref_logits, rows[:, 1:][own])
        entropies = in_pieces(lambda x: -x.exp().mul_(x).sum(dim=-1), log_p)
        parts.append((logps, at_mask(ref_logps, own), values, at_mask(entropies, own)))
    columns = (column[0] if len(column) == 1 else torch.cat(column) for column in zip(*parts, strict=True))
    return Rollout(tokens, mask, found, groups, ended, *columns)


@torch.no_grad()
def metrics_of(rollout: Rollout) -> dict[str, Tensor]:
    """Return what is logged of a rollout: means over its completions that have a score, and counts."""
    mask, scored = rollout.mask, rollout.scores.isfinite()
    d = rollout.logps - rollout.ref_logps
    n = scored.sum()  # where it is 0, means are NaN
    found = {
        "reward": masked_sum(rollout.scores, scored) / n,
        "kl": masked_sum(d, mask) / n,  # the one in the reward; its sample mean may be negative
        "kl_k3": masked_sum(kl(torch.where(mask, d, 0.0), "k3"), mask) / n,
        "entropy": masked_sum(rollout.entropies, mask) / mask.sum().clamp(min=1),
        "completion_tokens": mask.sum() / n,
        "ended": rollout.ended.float().mean(),
        "unscored": (~scored).sum(),
        "equal_groups": rollout.groups[in_equal_group(rollout.scores, rollout.groups)].unique().numel(),
    }
    return {name: torch.as_tensor(value).float() for name, value in found.items()}
