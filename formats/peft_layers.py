"""The names and shapes of adapted layers: those in PEFT's files, and ours.

PEFT names a layer after its module in transformers' model. Three kinds of layers have no such module alone:

    fused attention    queries, keys and values of GPT-2 and ModernBERT are one module there, and three here
    stacked experts    gate_up_proj and down_proj of all experts of a layer are parameters of one module
                       there. PEFT puts a wrapper around that module for each of them that is adapted, the
                       last one outermost: if both are adapted, .lora_A.weight belongs to down_proj, and
                       .base_layer.lora_A.weight to gate_up_proj
    tied head          a module of its own there, although it shares the weight of the embedding
"""

import re
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from formats import encoders
from formats.decoders import GPT2_NAMES
from formats.safetensors_dir import inverse, rename

# The tensors of the adapter of one layer, by kind, see `peft.SavedAdapter`.
Layer = dict[str, Tensor | float]

# What the names of all modules except the heads begin with, in a model that has heads.
MODEL_PREFIXES = {"gpt2": "transformer.", "decoder": "model.", **encoders.PREFIXES}
# Families with fused attention: how our three paths end, and how the path of their one module ends.
FUSED = {
    "gpt2": ((".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj"), ".attn.c_attn"),
    "modernbert": ((".attention.self.query", ".attention.self.key", ".attention.self.value"), ".attn.Wqkv"),
}


def family_of(model: nn.Module) -> str:
    """Return "gpt2", "decoder" for any other decoder, or the family of an encoder (formats/encoders.py).

    Raises ValueError for ALBERT and ELECTRA's discriminator, whose modules do not correspond to ours, for
    DeBERTa, and for a model that is no decoder or encoder of text, such as T5.
    """
    is_encoder, positions = hasattr(model.config, "mlm_head"), getattr(model.config, "positions", None)
    is_decoder = positions in ("learned", "rope") and hasattr(model, "lm_head")
    if hasattr(model, "discriminator") if is_encoder else not is_decoder:
        name = type(model).__name__
        raise ValueError(f"adapters of {name} are not implemented; expected a decoder, or an encoder of text")
    if not is_encoder:
        return "gpt2" if positions == "learned" else "decoder"
    family = encoders.family_of(model.config) if hasattr(model.config, "positions") else "deberta"
    if family in ("albert", "deberta"):
        raise ValueError(
            f"adapters of {family} are not implemented; expected bert, roberta, electra or modernbert"
        )
    return family


def is_stack(path: str) -> bool:
    """Return whether our path is that of the matrices of all experts of a layer."""
    return path.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def names(model: nn.Module, is_adapted: Callable[[str], bool] = lambda path: True) -> dict[str, str]:
    """Return {our path: PEFT's path} of all layers that can be adapted.

    model: one of ours, with adapters or without; only its class and config are used.
    is_adapted(path): whether these stacked experts are adapted. If not, PEFT has no path for them.
    """
    with torch.device("meta"):
        parameters = list(type(model)(model.config).named_parameters())
    family = family_of(model)
    ours = [name.removesuffix(".weight") for name, p in parameters if p.ndim == 2]

    # Encoders: formats/encoders.py translates the names of weights, fused ones as lists of our paths.
    if family not in ("gpt2", "decoder"):
        has_heads = model.config.mlm_head or model.config.pair != "none"
        weights: dict[str, list[str]] = {}
        for path in ours:
            weights.setdefault(f"{fused_path(path, family)}.weight", []).append(path)
        renamed = encoders.to_hf(weights, family, "ForMaskedLM" if has_heads else "Model")
        return {path: name.removesuffix(".weight") for name, paths in renamed.items() for path in paths}

    # Decoders: our names are those of Llama.
    if "lm_head" not in ours:
        ours.append("lm_head")
    theirs = {path: gpt2_path(path) if family == "gpt2" else path for path in ours}

    # Stacked experts: the wrapper of the last one is outermost.
    paths = [name.removesuffix(".weight") for name, p in parameters if p.ndim == 3]
    stacks = [path for path in paths if is_stack(path) and is_adapted(path)]
    for i, path in enumerate(stacks):
        module = path.rpartition(".")[0]
        n_outer = sum(later.startswith(f"{module}.") for later in stacks[i + 1 :])
        theirs[path] = module + n_outer * ".base_layer"
    return theirs


def fused_path(path: str, family: str) -> str:
    """Return our path of a layer, or with another end that of the fused module of which it is a part."""
    ends, fused = FUSED.get(family, ((), ""))
    end = next((end for end in ends if path.endswith(end)), None)
    return path.removesuffix(end) + fused if end else path


def gpt2_path(path: str) -> str:
    """Return the path of a module in transformers' GPT-2 for our path of a layer."""
    name = rename(fused_path(path, "gpt2") + ".", inverse(GPT2_NAMES))
    return path if path == "lm_head" else f"transformer.{name[:-1]}"


def selects(ends: Collection[str], path: str) -> bool:
    """Return whether path is one of ends, or ends with a dot and one of them: PEFT's rule for targets."""
    return any(f".{path}".endswith(f".{end}") for end in ends)


def shortest(chosen: Collection[str], every: Collection[str]) -> list[str]:
    """Return ends of paths that select (see `selects`) all chosen paths and no other of every.

    Each is the shortest end of a chosen path for which that is true: q_proj, for example, if it is chosen in
    all layers. Where no end is, it is the path itself.
    """
    ends = set()
    others = set(every) - set(chosen)
    for path in chosen:
        parts = re.sub(r"^.*\.\d+\.", "", path).split(".")  # what follows the number of the layer
        candidates = (".".join(parts[i:]) for i in reversed(range(len(parts))))
        ends.add(next((end for end in candidates if not any(other.endswith(end) for other in others)), path))
    return sorted(ends)


def our_layers(paths: list[str], given: Layer, n_experts: int) -> dict[str, Layer]:
    """Return {our path: its tensors} for the tensors of one module in PEFT's file.

    paths: our paths of that module, three if it is fused attention. Then each layer gets a copy of the
    tensors on the side of the input, which the three share, and its rows of those on the side of the output.
    """
    if is_stack(paths[0]):
        A = given["lora_A"].unflatten(0, (n_experts, -1))  # (E, r, D_in) of (E r, D_in)
        B = given["lora_B"].unflatten(1, (-1, n_experts)).permute(2, 0, 1).contiguous()  # (E, D_out, r)
        return {paths[0]: given | {"lora_A": A, "lora_B": B}}
    if len(paths) == 1:
        return {paths[0]: given}
    layers: dict[str, Layer] = {path: {} for path in paths}
    for kind, value in given.items():
        shared = kind in ("scale", "lora_A") or (kind == "ia3_l" and len(value) == 1)
        parts = [value] * len(paths) if shared else value.tensor_split(len(paths))
        for path, part in zip(paths, parts, strict=True):
            layers[path][kind] = part if kind == "scale" else part.clone()
    return layers


def fuse_attention(
    directory: str | Path, family: str, method: str, layers: dict[str, Layer]
) -> dict[str, Layer]:
    """Return the layers of an adapter with queries, keys and values as one layer, under the path of the
    queries, in families where transformers has one module for the three.

    directory: where they are saved, for the error. Raises ValueError where one module cannot compute what the
    three layers do.
    """
    if family not in FUSED:
        return layers
    ends = FUSED[family][0]
    fused = {path: layer for path, layer in layers.items() if not path.endswith(ends)}
    for block in sorted({path.removesuffix(end) for path in layers for end in ends if path.endswith(end)}):
        paths = [block + end for end in ends]
        three = [layers.get(path) for path in paths]
        missing = ", ".join(path for path, layer in zip(paths, three, strict=True) if layer is None)
        if missing and method == "dora":
            raise ValueError(
                f"{directory}: {missing} missing: in transformers queries, keys and values are one module, "
                "which needs the magnitudes of all three"
            )
        layer = fuse_ia3(three) if method == "ia3" else fuse_lora(three)
        if layer is None:
            raise ValueError(
                f"{directory}: ia3_l of {', '.join(paths)}: in transformers they are one module, the "
                "input of which can only be scaled for all three alike"
            )
        fused[paths[0]] = layer
    return fused


def fuse_ia3(three: list[Layer | None]) -> Layer | None:
    """Return the IA3 scales of a fused module for those of three layers, where a missing one has scales of 1.

    Scales of outputs are concatenated. Scales of inputs must be the same for all three, else return None.
    """
    ones = torch.ones_like(next(layer["ia3_l"] for layer in three if layer))
    scales = [layer["ia3_l"] if layer else ones for layer in three]
    if all(len(scale) > 1 for scale in scales):
        return {"ia3_l": torch.cat(scales)}
    return {"ia3_l": scales[0]} if all(torch.equal(scale, scales[0]) for scale in scales) else None


def fuse_lora(three: list[Layer | None]) -> Layer:
    """Return the LoRA of a fused module for those of three layers, where a missing one adds nothing.

    If all have the same lora_A and scale, the rank stays the same and lora_B is concatenated. Otherwise the
    ranks add up and lora_B is block diagonal; where scales differ, they are multiplied into lora_B.
    """
    given = [layer for layer in three if layer]
    first = given[0]
    one_scale = first["scale"] != 0 and all(layer["scale"] == first["scale"] for layer in given)
    scale = first["scale"] if one_scale else 1.0
    one_A = one_scale and all(torch.equal(layer["lora_A"], first["lora_A"]) for layer in given)
    unchanged = first["lora_B"].new_zeros(len(first["lora_B"]), len(first["lora_A"]) if one_A else 0)
    blocks = [layer["lora_B"] * (layer["scale"] / scale) if layer else unchanged for layer in three]
    fused = {
        "lora_A": first["lora_A"] if one_A else torch.cat([layer["lora_A"] for layer in given]),
        "lora_B": torch.cat(blocks) if one_A else torch.block_diag(*blocks),
        "scale": scale,
    }
    if "lora_magnitude_vector" in first:
        fused["lora_magnitude_vector"] = torch.cat([layer["lora_magnitude_vector"] for layer in given])
    return fused
