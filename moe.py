"""Mixture of experts: the MLP of a block becomes many MLPs, and each token uses a few of them.

    s = softmax(W x)                                      the router's scores of E experts
    y = sum over the k best e of  w_e MLP_e(x),           w_e = s_e, or s_e / sum of the k best s

The model has the parameters of E MLPs, and a token costs the FLOPs of k: more parameters for the same compute
(Shazeer et al. 2017). The four parts:

    routing     which experts, with which weights: softmax top-k (Mixtral), Switch, DeepSeek-V3, expert choice
    balance     Switch's auxiliary loss, the router z-loss, DeepSeek-V3's bias and its sequence-wise loss
    experts     SwiGLU; many narrow ones and some shared by all tokens (DeepSeekMoE); some layers dense
    dispatch    sort the tokens by expert, one grouped matrix product per projection, add up

The first two are in language/routing.py, and everything that is not about experts in gpt.py.

    python moe.py                                   the sizes: parameters, all and active, and FLOPs per token
    python moe.py runs/moe/model --prompt "def "    continue a text
    python train.py --model moe                     train one
    python -m language.upcycle runs/gpt/model       make a mixture of a trained dense model

Shapes: B batch, T tokens of a row, N = B T tokens, D model width, E experts, k experts of a token, F width of
an expert, M = N k pairs of a token and an expert, L sparse layers.
"""

import argparse
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpt
from formats import command, mixtures
from generate import KVCache, add_sampling_flags, continue_text
from gpt import GPT, MLP
from kernels import grouped_matmul
from language import expert_usage
from language.routing import (
    ROUTERS,
    Router,
    Routing,
    aux_loss,
    references,  # noqa: F401, the report looks it up
    sequence_loss,
    sum_over_ranks,
    switch_capacity,
    z_loss,
)


@dataclass(frozen=True)
class Config(gpt.Config):
    """The fields of gpt.py's Config, and those of the experts in place of its MLP."""

    n_experts: int = 8
    top_k: int = 2  # experts of a token
    d_expert: int | None = None  # inner width of an expert; None: d_ff. See F
    n_shared_experts: int = 0  # used by every token, besides the experts it chooses
    dense_layers: tuple[int, ...] = ()  # layers with an ordinary MLP, of width d_ff
    router: str = "softmax"  # or "switch", "sigmoid", "expert_choice"
    renormalize: bool = True  # divide the weights of a token's experts by their sum
    # The experts are in groups, one for each machine, and a token chooses within its top_groups (DeepSeek).
    n_groups: int = 1
    top_groups: int = 1
    routed_scale: float = 1.0  # factor of the weights
    capacity_factor: float = 1.25  # switch: the most tokens of an expert in training, over the mean
    # Coefficients of the balance losses, each of which is the mean over the sparse layers.
    aux_loss_coef: float = 0.01  # Switch's
    z_loss_coef: float = 0.0  # the router z-loss; ST-MoE: 0.001
    sequence_loss_coef: float = 0.0  # DeepSeek-V3's; there 0.0001 times the layers, whose losses add up
    # sigmoid: the step of the bias, which balances without a loss (aux_loss_coef 0); DeepSeek-V3: 0.001.
    bias_update_rate: float = 0.0

    MAY_BE_ZERO = (
        "n_shared_experts",
        "aux_loss_coef",
        "z_loss_coef",
        "sequence_loss_coef",
        "bias_update_rate",
    )

    def __post_init__(self):
        super().__post_init__()
        E, k, router = self.n_experts, self.top_k, self.router
        groups, top, rate = self.n_groups, self.top_groups, self.bias_update_rate
        divides = E % groups == 0 and top <= groups
        mistakes = [
            (self.mlp != "swiglu" or self.bias,
             f"mlp {self.mlp!r}, bias {self.bias}: experts are swiglu, without biases"),
            (router not in ROUTERS, f"router {router!r}: expected one of {', '.join(ROUTERS)}"),
            (k > E, f"top_k {k}: expected 1 to n_experts {E}"),
            (router == "switch" and (k != 1 or self.renormalize),
             f"top_k {k}, renormalize {self.renormalize}: a switch needs top_k 1 and renormalize False"),
            (router == "expert_choice" and self.renormalize,
             "renormalize True: with expert_choice a token may have no expert; use False"),
            (not divides,
             f"n_groups {groups}, top_groups {top}: expected a divisor of n_experts {E}, at most n_groups"),
            (groups > 1 and router not in ("softmax", "sigmoid"),
             f"n_groups {groups}: router {router!r} has no groups; use softmax or sigmoid"),
            (divides and groups > 1 and (groups == E or k > top * (E // groups)),
             f"n_groups {groups}, top_groups {top}, top_k {k}: expected at least 2 experts in a group and "
             "top_k in the best groups"),
            (rate and router != "sigmoid",
             f"bias_update_rate {rate}: router {router!r} has no bias; use sigmoid"),
            (not set(self.dense_layers) < set(range(self.n_layers)),
             f"dense_layers {self.dense_layers}: expected some of 0 to {self.n_layers - 1}, not all"),
        ]  # fmt: skip
        for is_wrong, message in mistakes:
            if is_wrong:
                raise ValueError(message)

    @property
    def F(self) -> int:  # inner width of an expert
        return self.d_expert or self.d_ff

    @property
    def n_sparse_layers(self) -> int:
        return self.n_layers - len(set(self.dense_layers))

    @property
    def n_matmul_params(self) -> int:
        """Return the number of weights that a token is multiplied with: its own experts' and the router's."""
        expert = 3 * self.d_model * self.F
        sparse = self.n_experts * self.d_model + (self.top_k + self.n_shared_experts) * expert
        dense = 3 * self.d_model * self.d_ff
        return super().n_matmul_params + self.n_sparse_layers * (sparse - dense)


SIZES = {
    # As in DeepSeekMoE: an expert is a quarter of the dense tiny's MLP; one is shared, and a token chooses 3
    # of 15. Each replaces a quarter, so it must have weight 1, and the three sum to 3. See docs/moe.md.
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
        E, D, backend = config.n_experts, config.d_model, config.kernels
        self.gate_up_proj = ExpertLinear(E, D, 2 * config.F, backend)
        self.down_proj = ExpertLinear(E, config.F, D, backend)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Return (M, D) of x (M, D), in which the rows of expert e end at offsets[e], int32 (E,)."""
        gate, up = self.gate_up_proj(x, offsets).chunk(2, dim=-1)  # (M, F) each
        return self.down_proj(F.silu(gate) * up, offsets)


class MoE(nn.Module):
    """A router, its experts, and the shared experts, which are together one MLP."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = MLP(replace(config, d_ff=config.n_shared_experts * config.F))
        # With keep_routing, forward leaves its routing here: see MoEGPT.take_routings.
        self.keep_routing, self.routing = False, None

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, D) of x (B, T, D).

        A GPU adds the k terms of a token in no fixed order, so the last bits of two runs may differ there.
        """
        flat = x.flatten(0, 1)  # (N, D)
        routing = self.gate(flat)
        if self.keep_routing:
            self.routing = routing

        # Sort the pairs by expert: the rows of an expert lie side by side and end at its offset.
        experts, order = routing.experts.sort(stable=True)  # (M,) each
        all_experts = torch.arange(routing.logits.shape[-1], device=x.device)
        offsets = torch.searchsorted(experts, all_experts, right=True, out_int32=True)  # (E,)
        tokens = routing.tokens[order]  # (M,)
        rows = flat.index_select(0, tokens)  # (M, D)

        # Expert parallelism would go here: an all-to-all of the counts per expert, for which the host waits,
        # one of the rows, and a sort of the received rows by expert; after the product, the way back. The
        # loads in the balance losses would then be sums over the GPUs.
        rows = self.experts(rows, offsets)

        # Weight the outputs and add them up per token, in float32 also under autocast.
        rows = rows * routing.weights[order, None]
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
    """gpt.py's decoder, in which the MLP of each sparse layer is a mixture of experts."""

    block = Block
    matrices = (*GPT.matrices, "gate")

    @property
    def sparse_layers(self) -> list[MoE]:
        return [block.mlp for block in self.model.layers if isinstance(block.mlp, MoE)]

    def keep_routings(self) -> None:
        """Let each sparse layer keep the routing of the next pass, for `take_routings`."""
        for layer in self.sparse_layers:
            layer.keep_routing = True

    def take_routings(self) -> list[Routing]:
        """Return the routing of the last pass in each sparse layer; the layers then keep none."""
        routings = [layer.routing for layer in self.sparse_layers]
        for layer in self.sparse_layers:
            layer.keep_routing, layer.routing = False, None
        return routings

    def dropped(self, loads: Tensor, N: int) -> Tensor:
        """Return the share of N tokens that a Switch drops in training at these loads (L, E)."""
        return (loads - switch_capacity(self.config, N)).clamp(min=0).sum() / loads.sum()

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean nats per target, as in gpt.py; in training, plus the balance losses.

        Each balance loss is the mean over the sparse layers times its coefficient. The metrics are these
        losses without their coefficients; max_load, the load of the busiest expert of any layer as a multiple
        of the mean; and of a Switch dropped, the share of the tokens beyond the capacity.
        """
        self.keep_routings()
        loss, metrics = super().loss(batch)
        routings = self.take_routings()
        own = torch.stack([routing.load() for routing in routings])  # (L, E)
        loads = sum_over_ranks(own.clone())

        # The coefficient of each balance loss, and the loss of each layer.
        c, tokens = self.config, batch["tokens"]
        terms = {}
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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients to zero, and the loads that the bias follows: both add up over passes."""
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
        model = mixtures.load(cls, Config, directory, kernels)
        for layer in model.sparse_layers:
            if model.config.router == "sigmoid":  # checkpoints do not contain the loads
                layer.gate.load = torch.zeros_like(layer.gate.e_score_correction_bias)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, as the Hugging Face architecture that this config is."""
        mixtures.save(self, directory)


# --- for train.py: the task is gpt.py's

Model = MoEGPT
TASK = "gpt"
STEPS = 1100
separate_head = gpt.separate_head
show = expert_usage.show


def after_step(model: MoEGPT, finite: Tensor | bool = True) -> None:
    """Update the biases of the routers that learn; train.py calls this after each update of the weights.

    finite: False where that update was left out; then the biases stay as they are too.
    """
    if model.config.bias_update_rate:
        for layer in model.sparse_layers:
            if layer.gate.weight.requires_grad:
                layer.gate.update_bias(finite)


@contextmanager
def recomputation(block: Block):
    """Keep the block's routing while --checkpoint-activations computes the block a second time, and then drop
    it: a compiled block saves the same tensors in both passes only if it returns the same ones."""
    sparse = isinstance(block.mlp, MoE)
    if sparse:
        block.mlp.keep_routing = True
    try:
        yield
    finally:
        if sparse:
            block.mlp.keep_routing, block.mlp.routing = False, None


def n_active_params(model: MoEGPT) -> int:
    """Return the number of parameters that one token uses: without the experts that it does not choose."""
    experts = sum(p.numel() for layer in model.sparse_layers for p in layer.experts.parameters())
    idle = experts * (model.config.n_experts - model.config.top_k) // model.config.n_experts
    return sum(p.numel() for p in model.parameters()) - idle


def mlp_bytes(block: Block, config: Config, precision: tuple[int, int, bool]) -> tuple[int, int]:
    """Return the bytes per token that a block's MLP keeps for backward, and those of the gradients in it.

    precision: (e, r, autocast) of engine/activations.py. A sparse layer keeps for each of a token's k experts

        2 D e + 4 D         the expert's input and output, and the output times the router's weight
        4 F e               inside the expert: gate, up, silu(gate), product

    and once 4 D + 4 E + 32 k: the router's input, its scores, the order of the rows.
    """
    e, _, autocast = precision
    D, E, k, F, n_shared = config.d_model, config.n_experts, config.top_k, config.F, config.n_shared_experts
    inputs = D * e * (2 if autocast else 1)
    if not isinstance(block.mlp, MoE):
        return inputs + 4 * config.d_ff * e, 2 * config.d_ff * e
    kept = 4 * D + 4 * E + 32 * k + k * (2 * D * e + 4 * D) + 4 * k * F * e
    # In float32 the shared experts read the same tensor as the router, in bfloat16 a copy of their own.
    if n_shared:
        kept += 4 * n_shared * F * e + (inputs if e == 2 else 0)
    return kept, k * (2 * F * e + D * (4 + e))


def main() -> None:
    parser = command.Parser(description="Continue a text with a mixture of experts, or list the sizes.")
    add_sampling_flags(parser)
    for flag in ("--upcycle", "--out"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.upcycle or args.out:
        now = f"python -m language.upcycle {args.checkpoint or 'DIR'} --experts {args.upcycle or 8}"
        raise ValueError(f"--upcycle, --out: upcycling is a command of its own: {now} --out DIR")
    if args.checkpoint is not None:
        continue_text(MoEGPT.from_pretrained(args.checkpoint), args)
        return

    print(f"{'size':18} {'parameters':>15} {'active':>15} {'layers':>6} {'experts':>8} {'FLOPs/token':>12}")
    for name, c in SIZES.items():
        with torch.device("meta"):
            model = MoEGPT(c)
        n_params, n_active = sum(p.numel() for p in model.parameters()), n_active_params(model)
        experts = (f"{c.n_shared_experts}+" if c.n_shared_experts else "") + f"{c.top_k}/{c.n_experts}"
        flops = c.flops_per_token(c.max_seq_len)
        print(f"{name:18} {n_params:15,} {n_active:15,} {c.n_layers:6} {experts:>8} {flops:12.3e}")


if __name__ == "__main__":
    command.run(main)
