"""Adapters: a large trained model learns something new in a few small matrices.

    y = g * (W (u * x) + s B A x) + c * b       W, b frozen; what is trained is one or more of A, B, g, u, c

Fine-tuning moves every weight of a model, and leaves a second model as large as the first. But what a task
needs of a trained model is a change of low rank (Hu et al. 2021): W stays as it is, and beside it B A, of r
dimensions, learns. The methods differ in which letters they train, and how these begin and are scaled:

    LoRA      A (r, D), B (N, r) from 0, s = alpha / r                       Hu et al. 2021, section 4.1
    rsLoRA    s = alpha / sqrt(r), so that a large r learns as fast          Kalajdzievski 2023, section 3
    LoRA+     B learns at lr_ratio times the rate of A                       Hayou et al. 2024, section 4
    PiSSA     A, B begin as the r largest singular directions of W           Meng et al. 2024, section 3
    DoRA      and g = m / |W + s B A|, a trained length m of each row        Liu et al. 2024, section 4.1
    IA3       g = c of keys and values, u of the MLP's last matrix; no A, B  Liu et al. 2022, section 3.3
    QLoRA     LoRA on a W that is kept in 4 bits, see posttraining/nf4.py               Dettmers et al. 2023

and beside them two classical ways without adapters: training all weights, and only the head or last layers.

An adapter is a few megabytes, so that one base serves many: they have names, `use` switches between them, and
in one batch every row may have its own. `merge` adds one to W, after which the model is as fast as its base,
and `unmerge` takes it out again (all three in posttraining/adapters.py).

    python train.py --model lora --base runs/gpt/model          teach a model to answer questions
    python lora.py runs/lora --chat                             talk to it
    python lora.py runs/lora --prompt "What does os.walk do?"   one answer
    python lora.py runs/lora --merge runs/merged                one ordinary model of base and adapter
    python lora.py                                              what each method trains of Llama 3 8B

Shapes: B batch, T tokens, N outputs and D inputs of a layer, r rank, E experts, V vocabulary.
"""

import argparse
import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import bert
import data.text
import gpt
import moe
from data.tokenizer import Tokenizer, get_tokenizer
from data.wordpiece import WordPiece
from formats import decoders, encoders, mixtures, peft
from formats.peft import SavedAdapter
from language import masking
from posttraining import chat, instruct, nf4
from posttraining.adapters import (
    EMBEDDING,
    Adapted,
    AdaptedEmbedding,
    AdaptedStack,
    Factors,
    adapt_layer,
    adaptable_layers,
    adapted_layers,
    adapter_names,
    base_of,
    check_known,
    fingerprint,
    matching,
    merge,
    set_adapter,
    untie,
    use,
    weight_shape,
)

METHODS = ("lora", "dora", "ia3", "full", "head", "last")
ADAPTERS = ("lora", "dora", "ia3")
LOW_RANK = {"r", "alpha", "rank_stabilized", "dropout", "target_modules", "lr_ratio", "quantize"}
USED = {  # fields of Config that have an effect
    "lora": LOW_RANK | {"init"},
    "dora": LOW_RANK,
    "ia3": {"target_modules", "quantize"},
    "full": set(),
    "head": set(),
    "last": {"n_last"},
}
# Where IA3 goes: keys, values and what the MLP reads last, under the names of decoders and of encoders.
FEEDFORWARD = r"mlp\.(.*\.)?down_proj|layer\.\d+\.output\.dense"
IA3_TARGETS = rf"k_proj|v_proj|key|value|{FEEDFORWARD}"


@dataclass(frozen=True)
class Config:
    base: str = ""  # directory of the model that is adapted
    method: str = "lora"  # or "dora", "ia3"; without adapters "full", "head", "last"
    r: int = 16  # rank
    alpha: float = 32.0  # s = alpha / r
    rank_stabilized: bool = False  # s = alpha / sqrt(r)
    dropout: float = 0.0  # of x on its way to A
    # A regular expression for the names of layers, or for how they end. "all-linear": all but embeddings and
    # head; None: this, for IA3 its own places.
    target_modules: str | None = None
    init: str = "zero"  # B; or "pissa"
    lr_ratio: float = 1.0  # of B's learning rate to A's; LoRA+: 16
    quantize: str | None = None  # the base in "nf4"
    base_dtype: str = "float32"  # or "bfloat16", for training with --dtype bfloat16: half the memory
    n_last: int = 1  # layers that "last" trains
    kernels: str = "auto"

    def __post_init__(self):
        choices = {"method": METHODS, "init": ("zero", "pissa"), "quantize": (None, "nf4")}
        choices["base_dtype"] = ("float32", "bfloat16")
        for field, options in choices.items():
            if getattr(self, field) not in options:
                expected = " or ".join(map(str, options))
                raise ValueError(f"{field} {getattr(self, field)!r}: expected {expected}")
        if self.r < 1:
            raise ValueError(f"r {self.r}: expected a rank of at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}: expected at least 0 and less than 1")
        if not (0 < self.alpha < math.inf and 0 < self.lr_ratio < math.inf) or self.n_last < 1:
            values = f"alpha {self.alpha}, lr_ratio {self.lr_ratio}, n_last {self.n_last}"
            raise ValueError(f"{values}: expected more than 0")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            used = {"base", "method", "base_dtype", "kernels"} | USED[self.method]
            if field.name not in used and value != field.default:
                raise ValueError(f"{field.name} {value!r}: has no effect with method {self.method!r}")

    @property
    def learning_rate(self) -> float:
        """By default, as a multiple of what engine/optim.py proposes for training a model of the base's size: near
        the best that results/adapters.py found. With LoRA+ it is that of A."""
        if self.init == "pissa":
            return 0.8
        factor = {"lora": 2.0, "dora": 2.0, "ia3": 60.0, "full": 0.25, "head": 0.25, "last": 1.5}[self.method]
        return factor / math.sqrt(self.lr_ratio)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)

    @functools.cached_property
    def of_base(self) -> gpt.Config | bert.Config:
        """The Config of the model in the directory `base`; ValueError if there is none."""
        if not self.base:
            raise ValueError("which model is to be adapted? name its directory by --base, as runs/gpt/model")
        hf = decoders.read_json(Path(self.base) / "config.json")
        architecture = (hf.get("architectures") or ["none"])[0]
        if architecture in decoders.DEFAULTS:
            return gpt.Config(**decoders.read_decoder_config(self.base), kernels=self.kernels)
        if architecture in mixtures.DEFAULTS:
            return moe.Config(**mixtures.read_config(self.base), kernels=self.kernels)
        return bert.Config(**encoders.read(self.base)[0], kernels=self.kernels)

    @property
    def max_seq_len(self) -> int:
        return self.of_base.max_seq_len

    @property
    def vocab_size(self) -> int:
        return self.of_base.vocab_size

    @property
    def n_active_params(self) -> int:
        """Of the base: what the learning rate goes by."""
        return getattr(self.of_base, "n_active_params", self.of_base.n_params)

    def fitted(self, tokenizer: Tokenizer, max_seq_len: int) -> "Config":
        """Itself; ValueError if the tokenizer has more tokens than the base."""
        if tokenizer.n_vocab > self.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.n_vocab} tokens, {self.base} knows {self.vocab_size}: leave "
                "out --tokenizer to use the base's own"
            )
        return self

    def load_base(self) -> nn.Module:
        """The model in the directory `base`, in base_dtype."""
        kind = {gpt.Config: gpt.GPT, moe.Config: moe.MoEGPT, bert.Config: bert.BERT}[type(self.of_base)]
        return kind.from_pretrained(self.base, kernels=self.kernels).to(getattr(torch, self.base_dtype))

    def changed(self, **fields) -> "Config":
        return replace(self, **fields)


SIZES = {
    "lora": Config(),
    "rslora": Config(rank_stabilized=True, alpha=8.0),  # s as LoRA's at r = 16
    "lora+": Config(lr_ratio=16.0),
    "pissa": Config(init="pissa"),
    "dora": Config(method="dora"),
    "ia3": Config(method="ia3"),
    "qlora": Config(quantize="nf4"),
    "full": Config(method="full"),
    "head": Config(method="head"),
    "last": Config(method="last"),
}


class LoRA(nn.Module):
    """W + s B A. At the start B is 0, so the model is what it was."""

    parts = ("lora_A", "lora_B")

    def __init__(self, shape: Sequence[int], r: int, scale: float, dropout: float = 0.0):
        """shape: of W, (..., N, D)."""
        super().__init__()
        *stack, N, D = shape
        self.lora_A = nn.Parameter(torch.empty(*stack, r, D).uniform_(-1, 1) / math.sqrt(D))
        self.lora_B = nn.Parameter(torch.zeros(*stack, N, r))
        self.scale, self.dropout = scale, dropout

    def start_from(self, weight: Callable[[], Tensor]) -> None:
        """What depends on W (..., N, D) at the start."""

    def factors(self, weight: Callable[[], Tensor]) -> Factors:
        return Factors(self.lora_A, self.scale * self.lora_B)

    def saved(self) -> dict[str, Tensor | float]:
        """The tensors and the scale by which PEFT's format describes it."""
        return {part: getattr(self, part) for part in self.parts} | {"scale": self.scale}


class PiSSA(LoRA):
    """W + s (B A - B0 A0), where s B0 A0 = U_r S_r V_r^T is the largest part of W and A, B begin as A0, B0.

    The paper trains A and B over the residual W - s B0 A0; this is the same function, over a W that stays.
    It is saved as what it is for others, a LoRA of rank 2 r. The start takes a singular value decomposition
    of each matrix: minutes for billions of parameters.
    """

    @torch.no_grad()
    def start_from(self, weight: Callable[[], Tensor]) -> None:
        r = self.lora_A.shape[-2]
        U, S, Vt = torch.linalg.svd(weight().float(), full_matrices=False)
        root = (S[..., :r] / self.scale).sqrt()
        self.lora_A.copy_(root[..., None] * Vt[..., :r, :])
        self.lora_B.copy_(U[..., :r] * root[..., None, :])
        self.register_buffer("A0", self.lora_A.clone())
        self.register_buffer("B0", self.lora_B.clone())

    def factors(self, weight: Callable[[], Tensor]) -> Factors:
        # B A - B0 A0 = (B - B0) A + B0 (A - A0): one product of rank 2 r, and exactly 0 at the start.
        A = torch.cat((self.lora_A, self.lora_A - self.A0), dim=-2)
        B = torch.cat((self.lora_B - self.B0, self.B0), dim=-1)
        return Factors(A, self.scale * B)

    def saved(self) -> dict[str, Tensor | float]:
        A, B = self.factors(None)[:2]
        return {"lora_A": A, "lora_B": B / self.scale, "scale": self.scale}


def row_lengths(w: Tensor) -> Tensor:
    """(..., N) of w (..., N, D), at least in float32."""
    return torch.linalg.norm(w.to(torch.promote_types(w.dtype, torch.float32)), dim=-1)


class DoRA(LoRA):
    """m (W + s B A) / |W + s B A|: the length of each row and its direction, learned apart. (The paper's W
    is our W^T, so that there it is columns.)"""

    parts = ("lora_A", "lora_B", "lora_magnitude_vector")

    def __init__(self, shape: Sequence[int], r: int, scale: float, dropout: float = 0.0):
        super().__init__(shape, r, scale, dropout)
        self.lora_magnitude_vector = nn.Parameter(torch.ones(shape[:-1]))

    @torch.no_grad()
    def start_from(self, weight: Callable[[], Tensor]) -> None:
        self.lora_magnitude_vector.copy_(row_lengths(weight()))

    def factors(self, weight: Callable[[], Tensor]) -> Factors:
        A, B = self.lora_A, self.scale * self.lora_B
        # The length counts as a constant: less memory, hardly another result (section 4.3). Its changes are
        # too small for bfloat16.
        with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
            length = row_lengths(weight() + B @ A)
        return Factors(A, B, g=self.lora_magnitude_vector / length)


class IA3(nn.Module):
    """A scale of each output, or with `feedforward` of each input, of a layer."""

    parts = ("ia3_l",)

    def __init__(self, shape: Sequence[int], feedforward: bool):
        super().__init__()
        *stack, N, D = shape
        self.ia3_l = nn.Parameter(torch.ones(*stack, *((1, D) if feedforward else (N, 1))))
        self.feedforward = feedforward

    def start_from(self, weight: Callable[[], Tensor]) -> None:
        """Nothing: it begins as 1."""

    def saved(self) -> dict[str, Tensor | float]:
        return {"ia3_l": self.ia3_l}

    def factors(self, weight: Callable[[], Tensor]) -> Factors:
        if self.feedforward:
            return Factors(u=self.ia3_l.squeeze(-2))
        g = self.ia3_l.squeeze(-1)
        return Factors(g=g, c=g)


def apply(model: nn.Module, config: Config, name: str = "default") -> None:
    """Freeze the model, adapters that it has included, and add an adapter, in place, which is then the one in
    use; for a method without adapters, freeze all but what it trains.

    Raises ValueError for a name that is taken or cannot be one, and for target_modules that match no layer.
    """
    if config.method not in ADAPTERS:
        train_part(model, config)
        return
    check_name(model, name)
    default = IA3_TARGETS if config.method == "ia3" else "all-linear"
    pattern = default if config.target_modules is None else config.target_modules
    layers = adaptable_layers(model)
    paths = matching(layers, pattern)
    if config.target_modules is None and config.method != "lora":
        # PEFT's format has no place for other adapters of stacked experts.
        paths = [path for path in paths if not isinstance(layers[path], moe.Experts | AdaptedStack)]
    make = {}
    for path in paths:
        shape = weight_shape(layers[path], path)
        if config.method == "ia3":
            make[path] = partial(IA3, shape, re.fullmatch(rf"(.*\.)?({FEEDFORWARD})", path) is not None)
        else:
            kind = DoRA if config.method == "dora" else PiSSA if config.init == "pissa" else LoRA
            make[path] = partial(kind, shape, config.r, config.scale, config.dropout)
        if config.method != "lora" and isinstance(base_of(layers[path]), EMBEDDING):
            raise ValueError(f"target_modules {pattern!r}: {config.method} cannot adapt the embedding {path}")
        if config.init == "pissa" and config.r > min(shape[-2:]):
            raise ValueError(f"r {config.r}: {path} has {min(shape[-2:])} singular directions for PiSSA")
    if config.dropout and "lm_head" in paths:
        raise ValueError(f"dropout {config.dropout}: the head, whose weight goes into the loss, has none")
    model.requires_grad_(False)
    for path in paths:
        layer = adapt_layer(model, path, layers[path])
        adapter = make[path]()
        if isinstance(layer, AdaptedEmbedding):  # of zeros and a normal, so that the look-up is what is 0
            nn.init.zeros_(adapter.lora_A)
            nn.init.normal_(adapter.lora_B)
        adapter.to(layer.base_weight().device)
        adapter.start_from(layer.base_weight)
        layer.adapters[name] = adapter
    set_adapter(model, name)


def check_name(model: nn.Module, name: str) -> None:
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter name {name!r}: expected one without dots, that no method has")
    if name in adapter_names(model):
        raise ValueError(f"adapter name {name!r}: there is one of that name; choose another")


def train_part(model: nn.Module, config: Config) -> None:
    """Let only the parameters of full fine-tuning, of the head, or of the last layers learn.

    A head that is tied to the embeddings becomes a copy of them, so that it can move alone.
    """
    if config.method == "head" and getattr(model, "lm_head", 0) is None:
        untie(model, copy=True)
    patterns = {"full": "", "head": r"lm_head\.|model\.norm\.|cls\."}
    if config.method == "last":
        n = len(model.bert.encoder.layer if isinstance(model, bert.BERT) else model.model.layers)
        if config.n_last > n:
            raise ValueError(f"n_last {config.n_last}: the base has {n} layers")
        last = "|".join(str(i) for i in range(n - config.n_last, n))
        patterns["last"] = rf"(model\.layers|bert\.encoder\.layer)\.({last})\.|model\.norm\.|cls\."
    for name, p in model.named_parameters():
        p.requires_grad_(re.match(patterns[config.method], name) is not None)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"method {config.method!r}: this model has nothing of the kind to train")


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters learn, and how many there are (those in 4 bits too; shared ones once)."""
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    in_4_bits = sum(module.numel() for module in model.modules() if isinstance(module, nf4.NF4))
    return n_trained, in_4_bits + sum(p.numel() for p in model.parameters())


def save_adapter(
    model: nn.Module, directory: str | Path, name: str, config: Config, base_fingerprint: str | None = None
) -> None:
    """Write the adapter of that name as PEFT does: adapter_config.json and adapter_model.safetensors.

    config: what it was made by. base_fingerprint: of the base, so that it is not put on another one.
    """
    adapted = adapted_layers(model)
    check_known(adapted, [name])
    layers = {path: layer.adapters[name].saved() for path, layer in adapted.items() if name in layer.adapters}
    ranks = 2 if config.init == "pissa" else 1  # see PiSSA
    alpha = config.alpha * (math.sqrt(ranks) if config.rank_stabilized else ranks)
    fields = {"method": config.method, "r": config.r * ranks, "alpha": alpha, "dropout": config.dropout}
    fields |= {"rank_stabilized": config.rank_stabilized, "target_modules": config.target_modules}
    saved = SavedAdapter(fields, layers, config.base or None, base_fingerprint)
    peft.write(directory, model, saved)


def load_adapter(
    model: nn.Module, directory: str | Path, name: str = "default", base_fingerprint: str | None = None
) -> Config:
    """Add the adapter in directory, ours or PEFT's, to the model in place, under that name, and use it.

    base_fingerprint: of the model as it was at first, if it has other adapters by now or is in 4 bits;
    without it nothing is checked then. Returns the Config the adapter was made by, for training it further.
    Raises ValueError if files are missing or broken, or made for another base.
    """
    check_name(model, name)
    saved = peft.read(directory, model)
    known = adaptable_layers(model)
    in_full = not any(isinstance(layer, Adapted | nf4.NF4) for layer in model.modules())
    if base_fingerprint is None and in_full:
        base_fingerprint = fingerprint(model)
    makers = {}
    for path, tensors in saved.layers.items():
        if path not in known:
            raise ValueError(
                f"{directory}: adapts {path}, which this base does not have; name the right base"
            )
        shape = weight_shape(known[path], path)
        adapter = adapter_from(tensors, shape, saved.fields)
        for part, p in adapter.named_parameters():
            if p.shape != tensors[part].shape:
                raise ValueError(
                    f"{directory}: {path}.{part} has shape {tuple(tensors[part].shape)}, this base needs "
                    f"{tuple(p.shape)}; name the right base"
                )
        adapter.load_state_dict({part: tensors[part] for part in adapter.parts})
        makers[path] = adapter
    if None not in (saved.fingerprint, base_fingerprint) and saved.fingerprint != base_fingerprint:
        raise ValueError(
            f"{directory}: made for other weights than this base has; it names {saved.base}, which may have "
            "been trained since: bring back that state of it, or train the adapter anew"
        )
    model.requires_grad_(False)
    for path, adapter in makers.items():
        layer = adapt_layer(model, path, known[path])
        layer.adapters[name] = adapter.float().to(layer.base_weight().device)
    set_adapter(model, name)
    fields = {key: value for key, value in saved.fields.items() if key != "target_modules"}
    targets = "|".join(map(re.escape, saved.layers))
    return Config(base=saved.base or "", target_modules=targets, **fields)


def adapter_from(tensors: dict, shape: Sequence[int], fields: dict) -> nn.Module:
    """A new adapter of the kind and rank of the tensors, for a weight of that shape."""
    if "ia3_l" in tensors:
        return IA3(shape, feedforward=tensors["ia3_l"].shape[-2] == 1)
    kind = DoRA if "lora_magnitude_vector" in tensors else LoRA
    return kind(shape, tensors["lora_A"].shape[-2], tensors["scale"], fields["dropout"])


def is_encoder(config: gpt.Config | bert.Config) -> bool:
    return isinstance(config, bert.Config)


class AdaptedModel(nn.Module):
    """A base with one adapter to train, as train.py wants a model."""

    def __init__(self, config: Config):
        """Loads config.base. ValueError if that is no model, or config.target_modules matches none of it."""
        super().__init__()
        self.config = config
        self.before: list[str] | None = None  # the base's answers, see `show`
        self.base_model = config.load_base()
        self.base_fingerprint = fingerprint(self.base_model)
        if config.quantize:
            nf4.quantize(self.base_model)
        apply(self.base_model, config)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.base_model.loss(batch)

    def flops_per_token(self, seq_len: int) -> int:
        """Of the base without the gradients of weights that do not learn, a third of its products, and with
        all of the adapters'. (The gradients of inputs below the lowest layer that learns are counted too.)"""
        flops, c = self.base_model.flops_per_token(seq_len), self.base_model.config
        if self.config.method == "full":
            return flops
        head = 0 if is_encoder(c) else c.vocab_size * c.d_model
        in_layers = c.n_layers * c.n_layer_params[0] if is_encoder(c) else c.n_matmul_params - head
        flops -= 2 * (in_layers + head)
        if self.config.method == "head":
            return flops + 2 * head
        if self.config.method == "last":
            return flops + 2 * in_layers * self.config.n_last // c.n_layers
        for layer in adapted_layers(self.base_model).values():
            for adapter in layer.adapters.values():
                tensors = [*adapter.named_parameters(), *adapter.named_buffers()]  # PiSSA's start is used too
                matrices = {"lora_A", "lora_B", "A0", "B0"}
                if isinstance(layer, AdaptedEmbedding):  # A is a look-up there
                    matrices -= {"lora_A", "A0"}
                used = sum(t.numel() for name, t in tensors if name in matrices)
                flops += 6 * used * c.top_k // c.n_experts if isinstance(layer, AdaptedStack) else 6 * used
        return flops

    @property
    def n_params(self) -> int:
        return trainable_parameters(self)[1]

    def lr_factor(self, name: str) -> float:
        """LoRA+: how fast a parameter learns, as a multiple of the learning rate."""
        return self.config.lr_ratio if name.endswith("lora_B") else 1.0

    def decays(self, name: str, p: nn.Parameter) -> bool:
        """Only matrices that change nothing where they are 0: no scales, nor what PiSSA starts from."""
        if name.endswith(("ia3_l", "lora_magnitude_vector")) or self.config.init == "pissa":
            return False
        return p.ndim >= 2

    def after_step(self, finite: Tensor | bool = True) -> None:
        """moe.py's update of the routers' bias, where the routers learn."""
        if self.config.method == "full" and isinstance(self.base_model, moe.MoEGPT):
            self.base_model.after_step(finite)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base_model.zero_grad(set_to_none)

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Of what learns; the rest is in config.base. So a checkpoint is as small as the adapter."""
        weights = super().state_dict(*args, **kwargs)
        if self.config.method == "full":
            return weights
        learns = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: w for name, w in weights.items() if name in learns or ".adapters." in name}

    def load_state_dict(self, weights: dict[str, Tensor], strict: bool = True):
        """ValueError unless weights are those of `state_dict`."""
        decoders.check_weights(self.state_dict(), weights, self.config.base)
        return super().load_state_dict(weights, strict=False)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, base: str | None = None, kernels: str = "auto"
    ) -> "AdaptedModel":
        """The adapter in directory on the model in the directory base, or the one that adapter_config.json
        names, in full precision.

        Raises ValueError if either is missing or broken, or if they do not belong together.
        """
        path = Path(directory) / "adapter_config.json"
        if not path.exists() and (path.parent / "config.json").exists():
            raise ValueError(f"{directory}: a whole model and no adapter; use --base to adapt it")
        named = decoders.read_json(path).get("base_model_name_or_path")
        config = Config(base or named or "", kernels=kernels)
        if not Path(config.base).is_dir():
            raise ValueError(f"{directory}: adapts {config.base!r}, which is not here; name it by --base")
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.before = None
        model.base_model = config.load_base()
        model.base_fingerprint = fingerprint(model.base_model)
        made_by = load_adapter(model.base_model, directory, base_fingerprint=model.base_fingerprint)
        model.config = replace(made_by, base=config.base, kernels=kernels)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the adapter as PEFT does; without adapters, the whole model in Hugging Face layout."""
        if self.config.method in ADAPTERS:
            save_adapter(self.base_model, directory, "default", self.config, self.base_fingerprint)
        else:
            self.base_model.save_pretrained(directory)


Model = AdaptedModel
STEPS = 1000
SPECIAL_TOKENS = {}


def prepare_data(config: Config, args: argparse.Namespace) -> data.text.Dataset:
    """Conversations for a decoder, see posttraining/instruct.py; for an encoder a text, which it is trained on as ever."""
    if not is_encoder(config.of_base):
        return instruct.prepare(args.data, get_tokenizer(args.tokenizer), args.seq_len)
    dataset = data.text.prepare(args.data, args.tokenizer, args.cache, bad_text=args.bad_text)
    n_rows = (len(dataset.val.tokens) - 1) // args.seq_len
    if n_rows == 0:
        n = len(dataset.val.tokens)
        raise ValueError(f"--seq-len {args.seq_len}: the held-out text has only {n} tokens; give more text")
    # A shorter last row might leave special tokens no room.
    dataset.val.tokens = dataset.val.tokens[: n_rows * args.seq_len + 1]
    return dataset


def make_batch(
    tokens: Tensor, config: Config, generator: torch.Generator, tokenizer: Tokenizer
) -> dict[str, Tensor]:
    """See instruct.make_batch; of an encoder, see masking.make_batch."""
    objective = instruct if not is_encoder(config.of_base) else bert
    return objective.make_batch(tokens, config.of_base, generator, tokenizer)


def part_of(batch: dict[str, Tensor], i: int, n: int) -> dict[str, Tensor]:
    """The i-th of n equal parts of a batch."""
    objective = instruct if "cu_seqlens" in batch else masking
    return objective.part_of(batch, i, n)


def save_tokenizer(tokenizer: Tokenizer | WordPiece, directory: Path) -> None:
    """Write the tokenizer and, of a decoder's, the template of conversations."""
    tokenizer.save(directory)
    if "mask_token" not in tokenizer.roles:
        instruct.save_chat_template(tokenizer, directory)


def show(model: AdaptedModel, tokenizer: Tokenizer, held_out: Tensor, directory: Path) -> str:
    """Answers to held-out questions before and after; of an encoder, what bert.py shows."""
    base = model.base_model
    if is_encoder(model.config.of_base):
        return bert.show(base, tokenizer, held_out, directory)
    questions = instruct.conversations_in(held_out, 4)
    prompts = [prompt for prompt, _ in questions]
    if model.before is None:  # the same at every evaluation
        if model.config.method in ADAPTERS:
            with use(base, None):
                model.before = instruct.answers(base, tokenizer, prompts, 60)
        else:
            unchanged = model.config.load_base().to(base.model.norm.weight.device).eval()
            model.before = instruct.answers(unchanged, tokenizer, prompts, 60)
    after = instruct.answers(base, tokenizer, prompts, 60)
    shown = []
    for (prompt, expected), *told in zip(questions, model.before, after, strict=True):
        told = [tokenizer.decode(prompt), tokenizer.decode(expected), *told]
        lines = zip(("", "expected: ", "before:   ", "after:    "), told, strict=True)
        shown.append("\n".join(label + text.strip() for label, text in lines))
    return "\n\n".join(shown)


def load(directory: Path, base: str | None = None) -> tuple[nn.Module, Tokenizer]:
    """The adapted base, or the fully trained model, of a run or its model/, and its tokenizer."""
    directory = directory / "model" if (directory / "model").is_dir() else directory
    files = ("adapter_config.json", "config.json")
    if not any((directory / file).exists() for file in files):
        raise ValueError(f"{directory}: has no {' or '.join(files)}; expected a run of train.py --model lora")
    tokens_in = str(directory)
    if (directory / files[0]).exists():
        adapted = AdaptedModel.from_pretrained(directory, base=base)
        model = adapted.base_model
        if not (directory / "tokenizer.json").exists():  # PEFT's have none
            tokens_in = adapted.config.base
    else:
        model = Config(str(directory)).load_base()
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), get_tokenizer(tokens_in)


def adapter_bytes(
    block: nn.Module, config: gpt.Config | bert.Config, precision: tuple[int, int, bool]
) -> int:
    """Return the bytes per token that the adapters in a block of the base keep for backward.

    They keep A x, or the outputs that they scale. precision: (e, r, autocast) of engine/memory.py. An upper
    bound for IA3.
    """
    kept = 0
    for name, p in block.named_parameters():
        rows = config.top_k if p.ndim == 3 else 1  # a token has a row in each of its k experts
        if name.endswith("lora_A"):
            kept += rows * p.shape[-2]
        elif name.endswith("lora_magnitude_vector"):  # g (W x) and g (B A x)
            kept += rows * 2 * p.shape[-1]
        elif name.endswith("ia3_l"):
            kept += rows * max(p.shape[-2:])
    return kept * precision[0]


def print_table() -> None:
    """What each method trains of Llama 3 8B."""
    print(f"{'Llama 3 8B':10} {'trained':>15} {'share':>8} {'one task, 16 bits':>18}")
    for name, config in SIZES.items():
        with torch.device("meta"):
            model = gpt.GPT(gpt.SIZES["llama3-8b"])
            apply(model, config)
        trained, total = trainable_parameters(model)
        # PiSSA is saved with its start.
        megabytes = 2 * trained * (2 if config.init == "pissa" else 1) / 1e6
        print(f"{name:10} {trained:15,} {trained / total:8.3%} {megabytes:15,.1f} MB")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Ask a model that train.py --model lora has made, or merge it."
    )
    add = parser.add_argument
    add("adapter", nargs="?", type=Path, help="a run such as runs/lora, or a directory with an adapter")
    add("--base", metavar="DIR", help="the model it adapts (default: where it was when that was done)")
    add("--chat", action="store_true", help="talk to it")
    add("--prompt", help="one question")
    add("--merge", type=Path, metavar="DIR", help="write base and adapter as one ordinary model")
    add("--system", help="what the model is told before all else")
    add("--max-new-tokens", type=int, default=100, help="of an answer, at most (default %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default 0)")
    add("--top-p", type=float, default=0.95, help="only the likeliest tokens of this joint probability")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        if args.adapter is None:
            print_table()
            return 0
        if [args.chat, args.prompt is not None, args.merge is not None].count(True) != 1:
            raise ValueError(f"what with {args.adapter}? give one of --chat, --prompt and --merge")
        model, tokenizer = load(args.adapter, args.base)
        if args.merge is not None:
            if (args.merge / "config.json").exists():
                raise ValueError(f"--merge {args.merge}: there is a model in it; name another directory")
            merge(model)
            model.save_pretrained(args.merge)
            save_tokenizer(tokenizer, args.merge)
            print(f"model: {args.merge}")
        elif isinstance(model, bert.BERT):
            raise ValueError(f"{args.adapter}: an encoder gives no answers; --merge it and use bert.py")
        elif args.chat:
            chat.talk(model, tokenizer, args)
        else:
            question = {"role": "user", "content": args.prompt}
            chat.answer(model, tokenizer, [*chat.begin(args), question], args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
