"""Routing: which experts each token gets, and what keeps their load in balance.

    router            scores                            a token's experts
    softmax_top_k     softmax(W x)                      the k best (Mixtral, OLMoE, Qwen3-MoE, DeepSeekMoE)
    switch_top_1      softmax(W x)                      the best, if it has room (Switch Transformer)
    sigmoid_top_k     sigmoid(W x) + bias               the k best, of the best groups (DeepSeek-V3)
    expert_choice     softmax(W x)                      those that choose it (Zhou et al. 2022)

An expert that is chosen more often learns more, and is then chosen even more often. Two losses prevent that,
`aux_loss` (Switch) and `sequence_loss` (DeepSeek-V3), and so does DeepSeek-V3's bias, which
`Router.update_bias` moves. `z_loss` (ST-MoE) keeps the logits small.

Shapes: N tokens, D model width, E experts, k experts of a token, M = N k pairs of a token and an expert.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

ROUTERS = ("softmax", "switch", "sigmoid", "expert_choice")


class Routing(NamedTuple):
    """M pairs of a token and one of its experts, in any order, and the scores that decided on them."""

    tokens: Tensor  # (M,) int64, 0 to N - 1
    experts: Tensor  # (M,) int64
    weights: Tensor  # (M,), the factor of the expert's output; 0 for a token that is dropped
    logits: Tensor  # (N, E)
    probs: Tensor  # (N, E), the scores; those of a token add up to 1

    def load(self) -> Tensor:
        """Return the number of tokens of each expert, (E,) float32."""
        # bincount would wait for the GPU.
        ones = torch.ones_like(self.experts, dtype=torch.float32)
        return ones.new_zeros(self.logits.shape[-1]).scatter_add(0, self.experts, ones)


def token_choice(experts: Tensor, weights: Tensor, logits: Tensor, probs: Tensor) -> Routing:
    """Return the Routing where every token has chosen its k experts: experts and weights are (N, k)."""
    N, k = experts.shape
    tokens = torch.arange(N * k, device=experts.device) // k
    return Routing(tokens, experts.flatten(), weights.flatten(), logits, probs)


def outside_groups(ranked: Tensor, n_groups: int, top_groups: int, n_best: int) -> Tensor:
    """Return which experts are outside of a token's best groups: bool (N, E). ranked: the scores (N, E).

    The E experts are in n_groups groups of equal size. The score of a group is the sum of its n_best highest
    scores, and the top_groups groups with the highest are the best.
    """
    N, E = ranked.shape
    of_groups = ranked.view(N, n_groups, E // n_groups).topk(n_best, dim=-1).values.sum(dim=-1)
    best = of_groups.topk(top_groups, dim=-1).indices  # (N, top_groups)
    outside = torch.ones(N, n_groups, dtype=torch.bool, device=ranked.device).scatter(1, best, False)
    return outside.repeat_interleave(E // n_groups, dim=1)


def softmax_top_k(
    logits: Tensor, k: int, renormalize: bool, n_groups: int = 1, top_groups: int = 1
) -> Routing:
    """Return the k likeliest experts of each token, weighted by their probabilities; logits: (N, E).

    With n_groups above 1 a token chooses from the top_groups groups whose best experts are the likeliest
    (DeepSeek-V2, 2024, section 2.2.2).

    Renormalised weights are the softmax of the k best logits alone (Shazeer et al. 2017, equation 3; Mixtral,
    Jiang et al. 2024, section 2.1). The others (OLMoE, DeepSeekMoE) add up to less than 1: where the
    probabilities are spread over many experts, the layer changes the residual stream little.
    """
    probs = logits.softmax(dim=-1)
    ranked = probs.detach()
    if n_groups > 1:
        ranked = ranked.masked_fill(outside_groups(ranked, n_groups, top_groups, 1), -1.0)
    experts = ranked.topk(k, dim=-1).indices
    weights = probs.gather(1, experts)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return token_choice(experts, weights, logits, probs)


def switch_top_1(logits: Tensor, capacity: int | None) -> Routing:
    """Return the likeliest expert of each token; logits: (N, E).

    An expert takes its first `capacity` tokens and drops the others: their weight is 0, and the layer leaves
    them as they are (Switch Transformer, Fedus et al. 2021, section 2.2). None: nothing is dropped.
    """
    probs = logits.softmax(dim=-1)
    weights, experts = probs.max(dim=-1)  # (N,)
    if capacity is not None:
        chosen = F.one_hot(experts, logits.shape[-1])  # (N, E)
        place = (chosen.cumsum(dim=0) * chosen).sum(dim=-1)  # (N,), 1 for an expert's first token
        weights = weights * (place <= capacity)
    return token_choice(experts[:, None], weights[:, None], logits, probs)


def sigmoid_top_k(
    logits: Tensor, bias: Tensor, k: int, n_groups: int, top_groups: int, renormalize: bool
) -> Routing:
    """Return the k experts of each token with the highest sigmoid(logits) + bias; logits: (N, E).

    bias, (E,), balances the choice and is not in the weights. The experts are in n_groups groups; a token
    chooses from the top_groups of them whose two best experts add up to the most (DeepSeek-V3, Liu et al.
    2024, section 2.1.2).
    """
    scores = logits.sigmoid()
    ranked = scores.detach() + bias
    if n_groups > 1:
        ranked = ranked.masked_fill(outside_groups(ranked, n_groups, top_groups, 2), -torch.inf)
    experts = ranked.topk(k, dim=-1).indices  # (N, k)
    weights = scores.gather(1, experts)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return token_choice(experts, weights, logits, scores / (scores.sum(dim=-1, keepdim=True) + 1e-20))


def expert_choice(logits: Tensor, k: int) -> Routing:
    """Return the N k / E tokens of each expert that have the highest scores for it; logits: (N, E).

    The load is balanced by construction. A token has k experts on average, and may have none (Zhou et al.
    2022, section 3.2). Its experts depend on all other tokens, also on later ones: a decoder trained like
    this sees the future, so its loss is not that of a language model, and it cannot continue a text or be
    saved as one.
    """
    N, E = logits.shape
    probs = logits.softmax(dim=-1)
    weights, tokens = probs.topk(min(N, math.ceil(N * k / E)), dim=0)  # (capacity, E)
    experts = torch.arange(E, device=logits.device).expand_as(tokens)
    return Routing(tokens.flatten(), experts.flatten(), weights.flatten(), logits, probs)


def sum_over_ranks(load: Tensor) -> Tensor:
    """Sum the loads of all ranks in place: an expert is busy or not in the batch of all ranks together
    (Qiu et al. 2025, "Demons in the detail")."""
    if dist.is_initialized():
        dist.all_reduce(load)
    return load


def aux_loss(routing: Routing, load: Tensor) -> Tensor:
    """Return Switch's balance loss, E sum_e f_e P_e (Switch Transformer, equations 4 to 6).

    f_e is the share of the tokens that chose expert e, P_e the mean of its scores. f adds up to k, as in
    transformers, so the loss is k where both are uniform. Only P has a gradient: it lowers the scores of busy
    experts. load: (E,), of these N tokens, or of the batch of all ranks.
    """
    E, k = routing.logits.shape[1], len(routing.tokens) / len(routing.logits)
    return E * (k * load / load.sum() * routing.probs.mean(dim=0)).sum()


def references(config: Any) -> dict[str, str]:
    """Return the values of the balance metrics if every expert had the same load and the same scores."""
    return {
        "aux_loss": f"{config.top_k} at perfect balance",
        "sequence_loss": "1 at perfect balance",
        "max_load": "1 at perfect balance",
    }


def sequence_loss(routing: Routing, cu_seqlens: Tensor, k: int) -> Tensor:
    """Return the mean over the sequences of E / k sum_e f_e P_e (DeepSeek-V3, equations 17 to 20).

    This is Switch's loss of each sequence, over k: f_e is the share of the sequence's tokens with e among
    their k highest scores, before the bias, and P_e the mean score of e in the sequence.
    cu_seqlens: (n + 1,), where the n sequences begin and end.
    """
    probs = routing.probs  # (N, E)
    N, E = probs.shape
    chosen = torch.zeros_like(probs).scatter(-1, probs.topk(k, dim=-1).indices, 1.0)  # (N, E)

    # Average both over the tokens of each sequence.
    sequence = torch.bucketize(torch.arange(N, device=probs.device), cu_seqlens, right=True) - 1  # (N,)
    lengths = cu_seqlens.diff().clamp(min=1)[:, None]  # (n, 1)
    zeros = probs.new_zeros(len(lengths), E)
    f = zeros.index_add(0, sequence, chosen) / lengths  # (n, E)
    P = zeros.index_add(0, sequence, probs) / lengths  # (n, E)
    return E / k * (f * P).sum(dim=-1).mean()


def z_loss(routing: Routing) -> Tensor:
    """Return the mean over the tokens of (log sum exp(logits))^2 (ST-MoE, Zoph et al. 2022, equation 5).

    It keeps the logits small, where rounding does no harm.
    """
    return routing.logits.logsumexp(dim=-1).square().mean()


def switch_capacity(config: Any, N: int) -> int:
    """Return how many of N tokens an expert of a Switch takes at most; config: a moe.Config."""
    return math.ceil(config.capacity_factor * N / config.n_experts)


class Router(nn.Module):
    """The scores of all experts for a token, and the choice by one of the four functions above."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        if config.router == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_experts))
            # The number of tokens of each expert since the last update of the bias.
            self.register_buffer("load", torch.zeros(config.n_experts), persistent=False)

    def forward(self, x: Tensor) -> Routing:
        """Return the experts of x (N, D), computed in float32 also under autocast.

        Rounding would change exponentials and the choice too much (Switch Transformer, section 2.4).
        """
        c = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(wide), self.weight.to(wide))  # (N, E)

        # Choose, and count the choices that the bias follows.
        if c.router == "softmax":
            routing = softmax_top_k(logits, c.top_k, c.renormalize, c.n_groups, c.top_groups)
        elif c.router == "switch":
            routing = switch_top_1(logits, switch_capacity(c, len(x)) if self.training else None)
        elif c.router == "expert_choice":
            routing = expert_choice(logits, c.top_k)
        else:
            bias = self.e_score_correction_bias
            routing = sigmoid_top_k(logits, bias, c.top_k, c.n_groups, c.top_groups, c.renormalize)
            if self.training and c.bias_update_rate:
                self.load += routing.load()
        return routing._replace(weights=routing.weights * c.routed_scale)

    @torch.no_grad()
    def update_bias(self, finite: Tensor | bool = True) -> None:
        """Raise the bias of experts with less load than the mean by one step, lower that of the others, and
        forget the loads (DeepSeek-V3, section 2.1.2; Wang et al. 2024, algorithm 1).

        finite: if False, the bias stays as it is. Raises ValueError for a bias in half precision.
        """
        if torch.finfo(self.e_score_correction_bias.dtype).bits < 32:
            raise ValueError(f"bias in {self.e_score_correction_bias.dtype}: its steps need float32")
        load = sum_over_ranks(self.load)
        self.e_score_correction_bias += self.config.bias_update_rate * (load.mean() - load).sign() * finite
        self.load.zero_()
