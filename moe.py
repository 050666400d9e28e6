"""Mixture of experts: an MLP of many parts, of which each token uses a few.

    s = softmax(W x)                                      the router's score of each of E experts
    y = sum over the k best e of  w_e MLP_e(x),           w_e = s_e, or s_e / sum of the k best s

The parameters are those of E MLPs and the work of a token is that of k: more knowledge for the same FLOPs
(Shazeer et al. 2017). The choice is hard, and learning follows it: an expert that is chosen more learns more
and is chosen more, so something must keep the load in balance. The four parts, in order:

    routing     which experts, with which weights: softmax top-k (Mixtral), Switch, DeepSeek-V3, expert choice
    balance     Switch's auxiliary loss, the router z-loss, DeepSeek-V3's bias and its sequence-wise loss
    experts     SwiGLU; many narrow ones and some that are always on (DeepSeekMoE); some layers dense
    dispatch    sort the tokens by expert, one grouped matrix product per projection, add up

This file is only what that changes in gpt.py.

    python moe.py                                   the sizes: parameters, all and active, and FLOPs per token
    python moe.py runs/moe/model --prompt "def "    continue a text
    python moe.py runs/gpt/model --upcycle 8 --out runs/upcycled      a mixture made of a dense model
    python train.py --model moe                     train one

Shapes: B batch, T tokens of a row, N = B T tokens, D model width, E experts, k experts of a token, F width of
an expert, M = N k pairs of a token and an expert.
"""

import argparse
import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import gpt
from data.tokenizer import get_tokenizer
from formats import mixtures
from generate import KVCache
from gpt import GPT, MLP
from kernels import grouped_matmul
from language import expert_usage

ROUTERS = ("softmax", "switch", "sigmoid", "expert_choice")


@dataclass(frozen=True)
class Config(gpt.Config):
    """gpt.py's, and what takes the place of its MLP."""

    n_experts: int = 8
    top_k: int = 2  # experts of a token
    d_expert: int | None = None  # inner width of an expert; None: d_ff
    n_shared_experts: int = 0  # every token's, besides those it chooses
    dense_layers: tuple[int, ...] = ()  # that keep an ordinary MLP, of width d_ff
    router: str = "softmax"  # or "switch", "sigmoid", "expert_choice"
    renormalize: bool = True  # the weights of the chosen add up to 1
    n_groups: int = 1  # sigmoid: the experts lie in groups (on as many machines) ...
    top_groups: int = 1  # ... and a token chooses within so many of them
    routed_scale: float = 1.0  # times the weights
    capacity_factor: float = 1.25  # switch: the most an expert takes in training, as a multiple of the mean
    # Of the balance losses; each is the mean over the sparse layers.
    aux_loss_coef: float = 0.01  # Switch's
    z_loss_coef: float = 0.0  # the router z-loss; ST-MoE: 0.001
    sequence_loss_coef: float = 0.0  # DeepSeek-V3's; there 0.0001 times the layers, whose losses add up
    # Step of sigmoid's bias, which needs no loss (set aux_loss_coef to 0); DeepSeek-V3: 0.001.
    bias_update_rate: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "d_expert", self.d_expert or self.d_ff)
        E, k, groups, top = self.n_experts, self.top_k, self.n_groups, self.top_groups
        if self.mlp != "swiglu" or self.bias:
            raise ValueError(f"mlp {self.mlp!r}, bias {self.bias}: experts are swiglu, without biases")
        if self.router not in ROUTERS:
            raise ValueError(f"router {self.router!r}: expected one of {', '.join(ROUTERS)}")
        if not 1 <= k <= E:
            raise ValueError(f"top_k {k}: expected 1 to n_experts {E}")
        if self.router == "switch" and (k != 1 or self.renormalize):
            raise ValueError(f"top_k {k}, renormalize {self.renormalize}: a switch has 1 and False")
        if self.router == "expert_choice" and self.renormalize:
            raise ValueError("renormalize True: with expert_choice a token may have no expert; use False")
        if self.d_expert < 1 or self.n_shared_experts < 0:
            raise ValueError(
                f"d_expert {self.d_expert}, n_shared_experts {self.n_shared_experts}: expected 1, 0 or more"
            )
        if not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor {self.capacity_factor}: expected more than 0")
        if groups < 1 or E % groups or not 1 <= top <= groups:
            raise ValueError(f"n_groups {groups}, top_groups {top}: expected a divisor of {E}, at most it")
        if groups > 1 and self.router != "sigmoid":
            raise ValueError(f"n_groups {groups}: router {self.router!r} has no groups; use sigmoid")
        if groups > 1 and (groups == E or k > top * (E // groups)):
            raise ValueError(
                f"n_groups {groups}, top_groups {top}, top_k {k}: expected at least 2 experts in a group and "
                "top_k in the best groups"
            )
        if self.bias_update_rate and self.router != "sigmoid":
            raise ValueError(
                f"bias_update_rate {self.bias_update_rate}: router {self.router!r} has no bias; use sigmoid"
            )
        if not set(self.dense_layers) < set(range(self.n_layers)):
            raise ValueError(
                f"dense_layers {self.dense_layers}: expected some of 0 to {self.n_layers - 1}, not all"
            )

    def changed(self, **changes) -> "Config":
        follow = {"d_expert": None} if self.d_expert == self.d_ff else {}
        return super().changed(**follow | changes)

    @property
    def n_sparse_layers(self) -> int:
        return self.n_layers - len(set(self.dense_layers))

    @property
    def n_matmul_params(self) -> int:
        """Weights that a token is multiplied with: of its own experts only, and of the router."""
        expert = 3 * self.d_model * self.d_expert
        sparse = self.n_experts * self.d_model + (self.top_k + self.n_shared_experts) * expert
        dense = 3 * self.d_model * self.d_ff
        return super().n_matmul_params + self.n_sparse_layers * (sparse - dense)

    @property
    def n_active_params(self) -> int:
        """All but the experts that a token does not use."""
        return super().n_params

    @property
    def n_params(self) -> int:
        idle = (self.n_experts - self.top_k) * 3 * self.d_model * self.d_expert
        return self.n_active_params + self.n_sparse_layers * idle


SIZES = {
    # The dense tiny's MLP in quarters, DeepSeek's way: one always on, and 3 of 15. Their weights add up to 3,
    # because parts of a whole have its weight each. results/experts.py tries others.
    "tiny": Config(
        4, 4, 128, 352, 4096, 256, n_kv_heads=2, qk_norm=True, n_experts=15, top_k=3, d_expert=88,
        n_shared_experts=1, router="sigmoid", routed_scale=3.0,
    ),
    # Switch-Base was a T5, its MLPs not gated: two thirds of their width make up for a third matrix.
    "switch-base-8-like": Config(
        12, 12, 768, 2048, 32128, 512, n_experts=8, top_k=1, router="switch", renormalize=False, qk_norm=True,
        dense_layers=(0, 2, 4, 6, 8, 10),
    ),
    "mixtral-8x7b": Config(
        32, 32, 4096, 14336, 32000, 32768, 8, norm_eps=1e-5, rope_theta=1e6, tie_embeddings=False,
        aux_loss_coef=0.02,
    ),
    "olmoe-1b-7b": Config(
        16, 16, 2048, 1024, 50304, 4096, norm_eps=1e-5, qk_norm="all", tie_embeddings=False, n_experts=64,
        top_k=8, renormalize=False, z_loss_coef=0.001,
    ),
    "qwen3-30b-a3b": Config(
        48, 32, 2048, 6144, 151936, 40960, 4, 128, rope_theta=1e6, qk_norm=True, tie_embeddings=False,
        n_experts=128, top_k=8, d_expert=768, aux_loss_coef=0.001,
    ),
    "deepseek-moe-16b": Config(
        28, 16, 2048, 10944, 102400, 4096, tie_embeddings=False, n_experts=64, top_k=6, d_expert=1408,
        n_shared_experts=2, dense_layers=(0,), renormalize=False, aux_loss_coef=0.0,
        sequence_loss_coef=27 * 0.001,
    ),
}  # fmt: skip


class Routing(NamedTuple):
    """M pairs of a token and one of its experts, in any order, and what they were chosen by."""

    tokens: Tensor  # (M,) int64, 0 to N - 1
    experts: Tensor  # (M,) int64
    weights: Tensor  # (M,) of the expert's output in the token's sum; 0: dropped
    logits: Tensor  # (N, E)
    probs: Tensor  # (N, E), the scores, each token's adding up to 1

    def load(self) -> Tensor:
        """(E,) float32: how many tokens chose each expert. Unlike bincount it never waits for a GPU."""
        ones = torch.ones_like(self.experts, dtype=torch.float32)
        return ones.new_zeros(self.logits.shape[-1]).scatter_add(0, self.experts, ones)


def token_choice(experts: Tensor, weights: Tensor, logits: Tensor, probs: Tensor) -> Routing:
    """The Routing where every token has chosen: experts and weights (N, k)."""
    N, k = experts.shape
    tokens = torch.arange(N * k, device=experts.device) // k
    return Routing(tokens, experts.flatten(), weights.flatten(), logits, probs)


def softmax_top_k(logits: Tensor, k: int, renormalize: bool) -> Routing:
    """The k likeliest experts of each of logits (N, E), weighted by their probabilities.

    Not renormalised, a token that trusts none of its experts leaves the residual stream as it is (OLMoE,
    DeepSeekMoE); renormalised is the softmax of the k best logits alone (Shazeer et al. 2017, equation 3;
    Mixtral, Jiang et al. 2024, section 2.1).
    """
    probs = logits.softmax(dim=-1)
    weights, experts = probs.topk(k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return token_choice(experts, weights, logits, probs)


def switch_top_1(logits: Tensor, capacity: int | None) -> Routing:
    """The likeliest expert of each of logits (N, E), which takes the first `capacity` tokens that come; the
    others it drops: they pass by on the residual stream (Switch Transformer, Fedus et al. 2021, section 2.2).
    """
    probs = logits.softmax(dim=-1)
    weights, experts = probs.max(dim=-1)  # (N,)
    if capacity is not None:
        chosen = F.one_hot(experts, logits.shape[-1])  # (N, E)
        came_as = (chosen.cumsum(dim=0) * chosen).sum(dim=-1)  # 1 for an expert's first token
        weights = weights * (came_as <= capacity)
    return token_choice(experts[:, None], weights[:, None], logits, probs)


def sigmoid_top_k(
    logits: Tensor, bias: Tensor, k: int, n_groups: int, top_groups: int, renormalize: bool
) -> Routing:
    """The k experts of highest sigmoid(logits) + bias of each of logits (N, E), taken from the top_groups of
    n_groups whose two best add up to the most; bias (E,) balances the choice and is not in the weights
    (DeepSeek-V3, Liu et al. 2024, section 2.1.2)."""
    N, E = logits.shape
    scores = logits.sigmoid()
    ranked = scores.detach() + bias
    if n_groups > 1:
        ranked = ranked.view(N, n_groups, E // n_groups)
        best = ranked.topk(2, dim=-1).values.sum(dim=-1).topk(top_groups, dim=-1).indices  # (N, top_groups)
        outside = torch.ones(N, n_groups, dtype=torch.bool, device=logits.device).scatter(1, best, False)
        ranked = ranked.masked_fill(outside[..., None], -torch.inf).view(N, E)
    experts = ranked.topk(k, dim=-1).indices  # (N, k)
    weights = scores.gather(1, experts)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return token_choice(experts, weights, logits, scores / (scores.sum(dim=-1, keepdim=True) + 1e-20))


def expert_choice(logits: Tensor, k: int) -> Routing:
    """Each expert of logits (N, E) takes the N k / E tokens that score it highest: balanced by construction,
    while a token gets k experts on average, or none (Zhou et al. 2022, section 3.2).

    What a token gets depends on all others, also those after it: a decoder trained like this sees the future,
    its loss is not that of a language model, and it can neither continue a text nor be saved as one.
    """
    N, E = logits.shape
    probs = logits.softmax(dim=-1)
    weights, tokens = probs.topk(min(N, math.ceil(N * k / E)), dim=0)  # (capacity, E)
    experts = torch.arange(E, device=logits.device).expand_as(tokens)
    return Routing(tokens.flatten(), experts.flatten(), weights.flatten(), logits, probs)


def over_processes(load: Tensor) -> Tensor:
    """The sum of the loads of all processes that share a batch: whether an expert is busy shows in all of it
    (Qiu et al. 2025, "Demons in the detail")."""
    if dist.is_initialized():
        dist.all_reduce(load)
    return load


def aux_loss(routing: Routing, load: Tensor) -> Tensor:
    """E sum_e f_e P_e, of the share f_e of the tokens that chose expert e and the mean P_e of its scores; k
    where both are uniform. f has no gradient, so it is P that moves, away from the busy experts (Switch
    Transformer, equations 4 to 6; f adds up to k, as transformers has it).

    load: (E,), of these N tokens, or of several times as many.
    """
    E, k = routing.logits.shape[1], len(routing.tokens) / len(routing.logits)
    return E * (k * load / load.sum() * routing.probs.mean(dim=0)).sum()


def sequence_loss(routing: Routing, cu_seqlens: Tensor, k: int) -> Tensor:
    """The same within each sequence, with f / k, of the k highest scores before any bias; then the mean over
    the sequences, which begin and end at cu_seqlens (n + 1,) (DeepSeek-V3, equations 17 to 20)."""
    probs = routing.probs  # (N, E)
    chosen = torch.zeros_like(probs).scatter(-1, probs.topk(k, dim=-1).indices, 1.0)
    sequence = torch.bucketize(torch.arange(len(probs), device=probs.device), cu_seqlens, right=True) - 1
    lengths = cu_seqlens.diff().clamp(min=1)[:, None]
    none = probs.new_zeros(len(lengths), probs.shape[-1])
    f, P = (none.index_add(0, sequence, x) / lengths for x in (chosen, probs))  # (n, E)
    return probs.shape[-1] / k * (f * P).sum(dim=-1).mean()


def z_loss(routing: Routing) -> Tensor:
    """Mean over the tokens of log^2 sum exp(logits): keeps the logits small, where rounding is harmless
    (ST-MoE, Zoph et al. 2022, equation 5)."""
    return routing.logits.logsumexp(dim=-1).square().mean()


def switch_capacity(config: Config, N: int) -> int:
    """The most of N tokens that an expert of a Switch takes."""
    return math.ceil(config.capacity_factor * N / config.n_experts)


class Router(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        if config.router == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_experts))
            # How many tokens each expert got since the last update of the bias.
            self.register_buffer("load", torch.zeros(config.n_experts), persistent=False)

    def forward(self, x: Tensor) -> Routing:
        """The experts of x (N, D). In float32 also under autocast: exponentials and a choice are no place to
        round (Switch Transformer, section 2.4)."""
        c = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(wide), self.weight.to(wide))  # (N, E)
        if c.router == "softmax":
            routing = softmax_top_k(logits, c.top_k, c.renormalize)
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
        """A step up for the experts that got less than the mean, down for the others (DeepSeek-V3, section
        2.1.2; Wang et al. 2024, algorithm 1); none where finite is False."""
        if torch.finfo(self.e_score_correction_bias.dtype).bits < 32:
            raise ValueError(f"bias in {self.e_score_correction_bias.dtype}: its steps need float32")
        load = over_processes(self.load)
        self.e_score_correction_bias += self.config.bias_update_rate * (load.mean() - load).sign() * finite
        self.load.zero_()


class ExpertLinear(nn.Module):
    """E linear maps side by side, without biases: one stack of matrices, a matrix for each expert."""

    def __init__(self, n_experts: int, in_features: int, out_features: int, backend: str):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, out_features, in_features))
        self.backend = backend

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Return each row of x (M, D) times its expert's matrix: (M, N).

        The rows of expert e end at offsets[e], int32 (E,).
        """
        return grouped_matmul(x, self.weight, offsets, backend=self.backend)


class Experts(nn.Module):
    """E MLPs side by side: down_e(silu(gate_e(x)) * up_e(x))."""

    def __init__(self, config: Config):
        super().__init__()
        E, D, width, backend = config.n_experts, config.d_model, config.d_expert, config.kernels
        self.gate_up_proj = ExpertLinear(E, D, 2 * width, backend)
        self.down_proj = ExpertLinear(E, width, D, backend)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Return (M, D) of x (M, D), in which the rows of expert e end at offsets[e], int32 (E,)."""
        gate, up = self.gate_up_proj(x, offsets).chunk(2, dim=-1)  # (M, F) each
        return self.down_proj(F.silu(gate) * up, offsets)


class MoE(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.n_shared_experts:  # all of them are one MLP
            self.shared_experts = MLP(replace(config, d_ff=config.n_shared_experts * config.d_expert))
        self.record = None  # a list that the next routing is to be added to

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) of x (B, T, D). A GPU adds a token's k terms in any order, so the last bits of two runs
        may differ there."""
        flat = x.flatten(0, 1)  # (N, D)
        routing = self.gate(flat)
        if self.record is not None:
            self.record.append(routing)
            self.record = None
        experts, order = routing.experts.sort(stable=True)
        every = torch.arange(routing.logits.shape[-1], device=x.device)
        offsets = torch.searchsorted(experts, every, right=True, out_int32=True)  # (E,)
        tokens = routing.tokens[order]
        rows = flat.index_select(0, tokens)  # (M, D), an expert's rows side by side
        # Expert parallelism goes here: an all-to-all of the counts per expert, which the host waits for, one
        # of the rows, which lie together for each GPU, and a sort by expert of what came; after the product
        # the way back. The loads that balance looks at must then be summed over the GPUs.
        rows = self.experts(rows, offsets)
        rows = rows * routing.weights[order, None]  # float32, under autocast too
        y = torch.zeros_like(flat, dtype=rows.dtype).index_add(0, tokens, rows).to(flat.dtype)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x).flatten(0, 1)
        return y.view_as(x)


class Block(gpt.Block):
    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        if layer not in config.dense_layers:
            self.mlp = MoE(config)


class MoEGPT(GPT):
    block = Block
    matrices = (*GPT.matrices, "gate")

    @property
    def sparse_layers(self) -> list[MoE]:
        return [block.mlp for block in self.model.layers if isinstance(block.mlp, MoE)]

    def record_routings(self) -> list[Routing]:
        """A list to which the next pass adds the routing of each sparse layer."""
        routings = []
        for layer in self.sparse_layers:
            layer.record = routings
        return routings

    def dropped(self, loads: Tensor, N: int) -> Tensor:
        """The share of N tokens that a Switch drops in training at these loads (L, E)."""
        return (loads - switch_capacity(self.config, N)).clamp(min=0).sum() / loads.sum()

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean nats per target, as in gpt.py; in training, plus the balance losses, each of them the mean
        over the sparse layers times its coefficient.

        In the metrics: these losses; max_load, of the busiest expert of any layer as a multiple of the mean;
        for a Switch dropped, the share of tokens past the capacity.
        """
        routings = self.record_routings()
        loss, metrics = super().loss(batch)
        c, tokens = self.config, batch["tokens"]
        terms = {}
        own = torch.stack([routing.load() for routing in routings])  # (layers, E)
        loads = over_processes(own.clone())
        if c.aux_loss_coef:
            of_layers = [aux_loss(routing, load) for routing, load in zip(routings, loads, strict=True)]
            terms["aux_loss"] = c.aux_loss_coef, of_layers
        if c.z_loss_coef:
            terms["z_loss"] = c.z_loss_coef, [z_loss(routing) for routing in routings]
        if c.sequence_loss_coef:
            B, T = tokens.shape
            ends = batch.get("cu_seqlens", T * torch.arange(B + 1, device=tokens.device))
            of_layers = [sequence_loss(routing, ends, c.top_k) for routing in routings]
            terms["sequence_loss"] = c.sequence_loss_coef, of_layers
        for name, (coefficient, of_layers) in terms.items():
            mean = torch.stack(of_layers).mean()
            metrics[name] = mean.detach()
            if self.training:
                loss = loss + coefficient * mean
        metrics["max_load"] = (loads / loads.mean(dim=1, keepdim=True)).max()
        if c.router == "switch":
            metrics["dropped"] = self.dropped(own, tokens.numel())
        return loss, metrics

    def after_step(self, finite: Tensor | bool = True) -> None:
        """The update of the bias, which has no gradient: to be called after each of the weights, or where
        finite is False, after one that was left out."""
        if self.config.bias_update_rate:
            for layer in self.sparse_layers:
                layer.gate.update_bias(finite)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Also forgets the loads that the bias is to follow: like gradients, they add up over passes."""
        super().zero_grad(set_to_none)
        if self.config.bias_update_rate:
            for layer in self.sparse_layers:
                layer.gate.load.zero_()

    def new_cache(self, lengths: list[int], max_len: int, static: bool = False) -> KVCache:
        if self.config.router == "expert_choice":
            raise ValueError(
                "router 'expert_choice': an expert chooses among all tokens of a text, so this model cannot "
                "continue one token by token"
            )
        return super().new_cache(lengths, max_len, static)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "MoEGPT":
        """Load a Hugging Face directory: Mixtral, OLMoE, Qwen3-MoE, dots.llm1 or DeepSeekMoE.

        Raises ValueError naming what is missing, damaged, of another shape, or not implemented here.
        """
        config = Config(**mixtures.read_config(directory), kernels=kernels)
        with torch.device("meta"):
            model = cls(config)
        mixtures.load_weights(model, directory)
        for layer in model.sparse_layers:
            if config.router == "sigmoid":  # no checkpoint has the loads
                layer.gate.load = torch.zeros_like(layer.gate.e_score_correction_bias)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, as the Hugging Face architecture that this config is."""
        mixtures.save(self, directory)


@torch.no_grad()
def from_dense(model: GPT, n_experts: int, top_k: int = 2, dense_layers: tuple[int, ...] = ()) -> MoEGPT:
    """A mixture of n_experts copies of a dense model's MLPs, but for dense_layers, with the same outputs: the
    weights of a token's experts add up to 1. The router is random, so the copies are given different tokens
    and grow apart (Sparse Upcycling, Komatsuzaki et al. 2022).

    Raises ValueError for an MLP that is not SwiGLU.
    """
    same = {field.name: getattr(model.config, field.name) for field in fields(gpt.Config)}
    config = Config(**same, n_experts=n_experts, top_k=top_k, dense_layers=dense_layers)
    sparse = MoEGPT(config).to(model.head_weight)
    weights = model.state_dict()
    for layer in set(range(config.n_layers)) - set(dense_layers):
        mlp = f"model.layers.{layer}.mlp."
        gate, up, down = (weights.pop(f"{mlp}{part}_proj.weight") for part in ("gate", "up", "down"))
        weights[f"{mlp}experts.gate_up_proj.weight"] = torch.cat((gate, up)).expand(n_experts, -1, -1)
        weights[f"{mlp}experts.down_proj.weight"] = down.expand(n_experts, -1, -1)
        weights[f"{mlp}gate.weight"] = sparse.model.layers[layer].mlp.gate.weight
    sparse.load_state_dict(weights)
    return sparse


Model = MoEGPT
STEPS = 1100
LEARNING_RATE = 1.0
SPECIAL_TOKENS = {}
make_batch = gpt.make_batch
show = expert_usage.show


def mlp_bytes(block: Block, config: Config, precision: tuple[int, int, bool]) -> tuple[int, int]:
    """Return the bytes per token that a block's MLP keeps for backward, and those of the gradients in it.

    precision: (e, r, autocast) of engine/memory.py. A sparse layer keeps for each of its k experts per token:

        2 D e + 4 D         rows for the expert and from it, and these times the router's weight
        4 F e               inside the expert: gate, up, silu(gate), product

    and once 4 D + 4 E + 32 k: the router's input, its scores, the order of the rows.
    """
    e, _, autocast = precision
    D, E, k, F, n_shared = (
        config.d_model, config.n_experts, config.top_k, config.d_expert, config.n_shared_experts,
    )  # fmt: skip
    inputs = D * e * (2 if autocast else 1)
    if not isinstance(block.mlp, MoE):
        return inputs + 4 * config.d_ff * e, 2 * config.d_ff * e
    kept = 4 * D + 4 * E + 32 * k + k * (2 * D * e + 4 * D) + 4 * k * F * e
    if n_shared:  # in float32 the shared expert reads the same numbers as the router
        kept += 4 * n_shared * F * e + (inputs if e == 2 else 0)
    return kept, k * (2 * F * e + D * (4 + e))


def upcycle(directory: str, n_experts: int, out: Path) -> None:
    """Write to out the mixture that from_dense makes of the dense checkpoint in directory."""
    if n_experts < 2:
        raise ValueError(f"--upcycle {n_experts}: expected at least 2 experts")
    if (out / "config.json").exists():
        raise ValueError(f"--out {out}: there is a model in it; name another directory")
    dense, tokenizer = GPT.from_pretrained(directory), get_tokenizer(directory)
    sparse = from_dense(dense, n_experts)
    sparse.save_pretrained(out)
    tokenizer.save(out)
    c = sparse.config
    print(f"{out}: {c.n_params:,} parameters, {c.n_active_params:,} active")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Continue a text with a mixture of experts, make one of a dense model, or list sizes."
    )
    gpt.add_sampling_flags(parser)
    parser.add_argument(
        "--upcycle", type=int, metavar="N", help="make N experts of each MLP of the dense checkpoint"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where --upcycle writes the mixture")
    args = parser.parse_args()
    if args.upcycle is not None or args.out is not None:
        if None in (args.upcycle, args.out, args.checkpoint):
            raise ValueError("--upcycle N needs a dense checkpoint and --out DIR")
        upcycle(args.checkpoint, args.upcycle, args.out)
        return
    if args.checkpoint is not None:
        gpt.continue_text(MoEGPT, args)
        return
    print(f"{'size':18} {'parameters':>15} {'active':>15} {'layers':>6} {'experts':>8} {'FLOPs/token':>12}")
    for name, c in SIZES.items():
        shared = f"{c.n_shared_experts}+" if c.n_shared_experts else ""
        of = f"{shared}{c.top_k}/{c.n_experts}"
        flops = c.flops_per_token(c.max_seq_len)
        print(f"{name:18} {c.n_params:15,} {c.n_active_params:15,} {c.n_layers:6} {of:>8} {flops:12.3e}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
