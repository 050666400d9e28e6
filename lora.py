"""Adapters: a large trained model learns something new in a few small matrices.

    y = g * (W (u * x) + s B A x) + c * b       W, b frozen; what is trained is some of A, B, g, u, c

Fine-tuning changes every weight of a model, and leaves a second model as large as the first. But the change
that a task needs has a low rank (Hu et al. 2021): W stays as it is, and beside it the product B A, of rank r,
is trained. The methods differ in which letters they train, and in their initial values and scales:

    LoRA      A (r, D), B (N, r) from 0, s = alpha / r                       Hu et al. 2021, section 4.1
    rsLoRA    s = alpha / sqrt(r), so that a large r learns as fast          Kalajdzievski 2023, section 3
    LoRA+     B learns at lr_ratio times the rate of A                       Hayou et al. 2024, section 4
    PiSSA     A, B start as the r largest singular directions of W           Meng et al. 2024, section 3
    DoRA      LoRA and g = m / |W + s B A|, m a trained length of each row   Liu et al. 2024, section 4.1
    IA3       g = c of keys and values, u of the MLP's last matrix; no A, B  Liu et al. 2022, section 3.3
    QLoRA     LoRA on a W in 4 bits, see posttraining/nf4.py                 Dettmers et al. 2023

An adapter takes a few megabytes, so that one base can have many. They have names, `use` switches between
them, and the rows of one batch may have different ones: see posttraining/adapters.py, which holds the layers.
`merge` adds one to W, and the model is then as fast as its base: see posttraining/merging.py.

    python train.py --model lora --base runs/gpt/model          teach a model to answer questions
    python lora.py runs/lora --chat                             talk to it
    python lora.py runs/lora --prompt "What does os.walk do?"   one answer
    python lora.py runs/lora --merge runs/merged                one ordinary model of base and adapter
    python lora.py                                              what each method trains of Llama 3 8B

Shapes: B batch, T tokens, N outputs and D inputs of a layer, r rank, E experts, V vocabulary.
"""

import importlib
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import gpt
from formats import command, peft
from formats.config_values import check_values
from formats.peft_layers import family_of
from formats.safetensors_dir import fingerprint
from posttraining import nf4
from posttraining.adapter_costs import adapter_bytes, flops_per_token  # noqa: F401, the engine calls them
from posttraining.adapters import (
    Adapted,
    AdaptedEmbedding,
    AdaptedExpertLinear,
    Factors,
    adaptable_layers,
    adapted_layers,
    check_exist,
    check_name,
    matching,
    replace_layer,
    set_adapter,
)

# The fields of Config that have no effect, by method.
LOW_RANK = ("r", "alpha", "rank_stabilized", "dropout", "init", "lr_ratio")
UNUSED = {"lora": (), "dora": ("init",), "ia3": LOW_RANK}
# The layers that IA3 adapts: keys, values and the last matrix of the MLP, as decoders and encoders name them.
FEEDFORWARD = r"mlp\.(.*\.)?down_proj|layer\.\d+\.output\.dense"
IA3_TARGETS = rf"k_proj|v_proj|key|value|{FEEDFORWARD}"


@dataclass(frozen=True)
class Config:
    """The settings of an adapter: its method, the layers that it adapts, and the precision of its base."""

    method: str = "lora"  # or "dora", "ia3"
    r: int = 16  # rank
    alpha: float = 32.0  # s = alpha / r
    rank_stabilized: bool = False  # s = alpha / sqrt(r)
    dropout: float = 0.0  # of x where it is multiplied by A
    # A regular expression for the paths of layers, or for their ends after a dot. "all-linear": all linear
    # layers but the head; None: this, but with IA3 its own layers.
    target_modules: str | None = None
    init: str = "zero"  # B starts as 0; or "pissa"
    lr_ratio: float = 1.0  # learning rate of B over that of A; LoRA+: 16
    quantize: str | None = None  # "nf4": the base in 4 bits
    base_dtype: str = "float32"  # or "bfloat16", for training with --dtype bfloat16: half the memory

    MAY_BE_ZERO = ("dropout",)

    def __post_init__(self):
        choices = {"method": tuple(UNUSED), "init": ("zero", "pissa"), "quantize": (None, "nf4")}
        choices["base_dtype"] = ("float32", "bfloat16")
        check_values(self, **choices)
        if self.dropout >= 1:
            raise ValueError(f"dropout {self.dropout}: expected at least 0 and less than 1")
        for field in UNUSED[self.method]:
            if (value := getattr(self, field)) != getattr(Config, field):
                raise ValueError(f"{field} {value!r}: has no effect with method {self.method!r}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)


ADAPTERS = {
    "lora": Config(),
    "rslora": Config(rank_stabilized=True, alpha=8.0),  # with r = 16 the same s as LoRA
    "lora+": Config(lr_ratio=16.0),
    "pissa": Config(init="pissa"),
    "dora": Config(method="dora"),
    "ia3": Config(method="ia3"),
    "qlora": Config(quantize="nf4"),
}
# The task of an adapted model where it differs from that of its base: {task of the base: its own}.
TASK_FOR = {"gpt": "instruct"}


class LoRA(nn.Module):
    """W + s B A for W of this shape, (..., N, D). At the start B is 0, so that the model does not change."""

    def __init__(self, shape: torch.Size, r: int, scale: float, dropout: float = 0.0):
        super().__init__()
        *stack, N, D = shape
        self.lora_A = nn.Parameter(torch.empty(*stack, r, D).uniform_(-1, 1) / math.sqrt(D))
        self.lora_B = nn.Parameter(torch.zeros(*stack, N, r))
        self.scale, self.dropout = scale, dropout

    def factors(self, weight: Callable[[], Tensor]) -> Factors:
        """Return the factors of this adapter on the base weight, weight() (..., N, D)."""
        return Factors(self.lora_A, self.scale * self.lora_B)

    def saved(self) -> dict[str, Tensor | float]:
        """Return the tensors and the scale by which PEFT's format describes this adapter."""
        return dict(self.named_parameters()) | {"scale": self.scale}


class PiSSA(LoRA):
    """W + s (B A - B0 A0), where s B0 A0 = U_r S_r V_r^T is the largest part of W, and A, B start as A0, B0.

    The paper trains A and B beside the residual W - s B0 A0. This is the same function, but W stays as it is.
    The adapter is saved as a LoRA of rank 2 r, which is what it is for others. The start takes a singular
    value decomposition of each matrix: minutes for billions of parameters.
    """

    @torch.no_grad()
    def start_from(self, weight: Tensor) -> None:
        """Initialise A and B from the base weight (..., N, D)."""
        r = self.lora_A.shape[-2]
        U, S, Vt = torch.linalg.svd(weight.float(), full_matrices=False)
        root = (S[..., :r] / self.scale).sqrt()
        self.lora_A.copy_(root[..., None] * Vt[..., :r, :])
        self.lora_B.copy_(U[..., :r] * root[..., None, :])
        self.register_buffer("A0", self.lora_A.clone())
        self.register_buffer("B0", self.lora_B.clone())

    def factors(self, weight: Callable[[], Tensor] | None) -> Factors:
        # B A - B0 A0 = (B - B0) A + B0 (A - A0): one product of rank 2 r, and exactly 0 at the start.
        A = torch.cat((self.lora_A, self.lora_A - self.A0), dim=-2)
        B = torch.cat((self.lora_B - self.B0, self.B0), dim=-1)
        return Factors(A, self.scale * B)

    def saved(self) -> dict[str, Tensor | float]:
        A, B = self.factors(None)[:2]
        return {"lora_A": A, "lora_B": B / self.scale, "scale": self.scale}


def row_lengths(w: Tensor) -> Tensor:
    """Return the lengths (..., N) of the rows of w (..., N, D), at least in float32."""
    return torch.linalg.norm(w.to(torch.promote_types(w.dtype, torch.float32)), dim=-1)


class DoRA(LoRA):
    """m (W + s B A) / |W + s B A|: the length and the direction of each row are learned separately. (The
    paper's W is our W^T, so that it has columns instead.)"""

    def __init__(self, shape: torch.Size, r: int, scale: float, dropout: float = 0.0):
        super().__init__(shape, r, scale, dropout)
        self.lora_magnitude_vector = nn.Parameter(torch.ones(shape[:-1]))

    @torch.no_grad()
    def start_from(self, weight: Tensor) -> None:
        """Initialise the lengths from the base weight (..., N, D)."""
        self.lora_magnitude_vector.copy_(row_lengths(weight))

    def factors(self, weight: Callable[[], Tensor]) -> Factors:
        A, B = self.lora_A, self.scale * self.lora_B
        # The length is treated as a constant, which takes less memory and hardly changes the result (section
        # 4.3). Its changes are too small for bfloat16.
        with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
            length = row_lengths(weight() + B @ A)
        return Factors(A, B, g=self.lora_magnitude_vector / length)


class IA3(nn.Module):
    """A scale for each output N of W (..., N, D), or with `feedforward` for each input D. It starts as 1."""

    def __init__(self, shape: torch.Size, feedforward: bool):
        super().__init__()
        *stack, N, D = shape
        self.ia3_l = nn.Parameter(torch.ones(*stack, *((1, D) if feedforward else (N, 1))))
        self.feedforward = feedforward

    def factors(self, weight: Callable[[], Tensor]) -> Factors:
        if self.feedforward:
            return Factors(u=self.ia3_l.squeeze(-2))
        g = self.ia3_l.squeeze(-1)
        return Factors(g=g, c=g)

    def saved(self) -> dict[str, Tensor | float]:
        return dict(self.named_parameters())


def apply(model: nn.Module, config: Config, name: str = "default") -> None:
    """Freeze the model with all adapters that it has, add an adapter to it in place, and use that one.

    Raises ValueError for a name that is taken or impossible, and for target_modules that match no layer; the
    model is then unchanged.
    """
    # Find the layers to adapt.
    check_name(model, name)
    default = IA3_TARGETS if config.method == "ia3" else "all-linear"
    pattern = default if config.target_modules is None else config.target_modules
    layers = adaptable_layers(model)
    layers = {path: layers[path] for path in matching(layers, pattern)}
    if config.target_modules is None and config.method != "lora":
        # PEFT's format has no place for DoRA and IA3 of stacked experts.
        layers = {path: layer for path, layer in layers.items() if not isinstance(layer, AdaptedExpertLinear)}

    # Check all of them before the model changes.
    if config.dropout and "lm_head" in layers:
        raise ValueError(f"dropout {config.dropout}: the head, whose weight goes into the loss, has none")
    for path, layer in layers.items():
        n_directions = min(layer.base_weight().shape[-2:])
        if config.method != "lora" and isinstance(layer, AdaptedEmbedding):
            raise ValueError(f"target_modules {pattern!r}: {config.method} cannot adapt the embedding {path}")
        if config.init == "pissa" and config.r > n_directions:
            raise ValueError(f"r {config.r}: {path} has {n_directions} singular directions for PiSSA")

    model.requires_grad_(False)
    for path, layer in layers.items():
        layer.adapters[name] = new_adapter(config, path, layer)
        replace_layer(model, path, layer)
    set_adapter(model, name)


def new_adapter(config: Config, path: str, layer: Adapted) -> nn.Module:
    """Return an adapter for this layer, with its initial values, on the layer's device."""
    W = layer.base_weight()
    if config.method == "ia3":
        return IA3(W.shape, re.fullmatch(rf"(.*\.)?({FEEDFORWARD})", path) is not None).to(W.device)
    kind = DoRA if config.method == "dora" else PiSSA if config.init == "pissa" else LoRA
    adapter = kind(W.shape, config.r, config.scale, config.dropout)
    if isinstance(layer, AdaptedEmbedding):
        # A is the table that an embedding looks up. So here A starts as 0, and B is random.
        nn.init.zeros_(adapter.lora_A)
        nn.init.normal_(adapter.lora_B)
    adapter.to(W.device)
    if isinstance(adapter, PiSSA | DoRA):
        adapter.start_from(W)
    return adapter


def learning_rate(config: Config) -> float:
    """Return the default learning rate, as a multiple of the one that engine/optim.py proposes for training a
    model of the base's size. It is near the best that results/adapters.py has found; with LoRA+ it is A's."""
    if config.init == "pissa":
        return 0.8
    return {"lora": 2.0, "dora": 2.0, "ia3": 60.0}[config.method] / math.sqrt(config.lr_ratio)


def lr_factor(config: Config, name: str) -> float:
    """Return the learning rate of the parameter of that name, as a multiple of the model's (LoRA+)."""
    return config.lr_ratio if name.endswith("lora_B") else 1.0


def decays(config: Config, name: str, p: nn.Parameter) -> bool:
    """Return whether weight decay applies: only to matrices that change nothing where they are 0, which
    excludes the scales and the A and B of PiSSA."""
    if name.endswith(("ia3_l", "lora_magnitude_vector")) or config.init == "pissa":
        return False
    return p.ndim >= 2


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return the part of model.state_dict() that a checkpoint needs: the adapters, not the frozen base."""
    return {name: w for name, w in model.state_dict().items() if ".adapters." in name}


def prepare_base(model: nn.Module, config: Config) -> str:
    """Bring a base into the precision that config names, in place, and return the fingerprint that it had.

    Raises ValueError for a model whose adapters could not be saved.
    """
    family_of(model)
    model.to(getattr(torch, config.base_dtype))
    base_fingerprint = fingerprint(model)
    if config.quantize:
        nf4.quantize(model)
    return base_fingerprint


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    config: Config,
    base: str | None = None,
    fingerprint: str | None = None,
    name: str = "default",
) -> None:
    """Write the adapter of that name in PEFT's format, with the directory of its base.

    config: of this adapter. fingerprint: from `prepare_base`, so that it is not loaded on another base.
    """
    adapted = adapted_layers(model)
    check_exist(adapted, [name])
    layers = {path: layer.adapters[name].saved() for path, layer in adapted.items() if name in layer.adapters}
    times = 2 if config.init == "pissa" else 1  # it is saved as a LoRA of twice the rank and the same scale
    alpha = config.alpha * (math.sqrt(times) if config.rank_stabilized else times)
    fields = {"method": config.method, "r": config.r * times, "alpha": alpha, "dropout": config.dropout}
    fields |= {"rank_stabilized": config.rank_stabilized, "target_modules": config.target_modules}
    peft.write(directory, model, peft.SavedAdapter(fields, layers, base or None, fingerprint))


def load_adapter(
    model: nn.Module, directory: str | Path, name: str = "default", base_fingerprint: str | None = None
) -> Config:
    """Add the adapter in directory, ours or PEFT's, to the model in place, under that name, and use it.

    base_fingerprint: from `prepare_base`, if the model has adapters or is in 4 bits by now; without it such a
    model is not compared with the adapter's base. Returns the Config of the adapter, for training it further.
    Raises ValueError, with the model unchanged, if files are missing or damaged or belong to another base, or
    are of a DoRA of an embedding.
    """
    check_name(model, name)
    saved, layers = peft.read(directory, model), adaptable_layers(model)
    shapes = {path: layers[path].base_weight().shape for path in saved.layers if path in layers}
    if base_fingerprint is None and not any(isinstance(m, Adapted | nf4.NF4) for m in model.modules()):
        base_fingerprint = fingerprint(model)
    peft.check_base(directory, saved, shapes, base_fingerprint)
    method = saved.fields["method"]
    for path in saved.layers:
        if method != "lora" and isinstance(layers[path], AdaptedEmbedding):
            raise ValueError(f"{directory}: {method} cannot adapt the embedding {path}; expected lora there")
    try:
        config = Config(**saved.fields | {"target_modules": "|".join(map(re.escape, saved.layers))})
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None

    # Make each adapter from its tensors, and put it beside its layer.
    model.requires_grad_(False)
    for path, tensors in saved.layers.items():
        layer = layers[path]
        W = layer.base_weight()
        if "ia3_l" in tensors:
            adapter = IA3(W.shape, feedforward=tensors["ia3_l"].shape[-2] == 1)
        else:
            kind = DoRA if "lora_magnitude_vector" in tensors else LoRA
            adapter = kind(W.shape, tensors["lora_A"].shape[-2], tensors["scale"], saved.fields["dropout"])
        adapter.load_state_dict({part: tensors[part] for part, _ in adapter.named_parameters()})
        layer.adapters[name] = adapter.float().to(W.device)
        replace_layer(model, path, layer)
    set_adapter(model, name)
    return config


def print_table() -> None:
    """Print what each method trains of Llama 3 8B."""
    print(f"{'Llama 3 8B':10} {'trained':>15} {'share':>8} {'one task, 16 bits':>18}")
    for name, config in ADAPTERS.items():
        with torch.device("meta"):
            model = gpt.GPT(gpt.SIZES["llama3-8b"])
            apply(model, config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        megabytes = 2 * trained * (2 if config.init == "pissa" else 1) / 1e6  # PiSSA is saved with its start
        print(f"{name:10} {trained:15,} {trained / total:8.3%} {megabytes:15,.1f} MB")


def main(argv: list[str] | None = None) -> int:
    """Print the table, or with arguments run the command of posttraining/adapter_command.py."""
    argv = sys.argv[1:] if argv is None else argv
    if argv:
        return importlib.import_module("posttraining.adapter_command").main(argv)
    print_table()
    return 0


if __name__ == "__main__":
    command.run(main)
