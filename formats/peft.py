"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

The tensors are named after the modules of transformers' model (see formats/peft_layers.py):

    LoRA    base_model.model.{module}.lora_A.weight (r, D_in), .lora_B.weight (D_out, r)
    DoRA    the same and .lora_magnitude_vector (D_out,)
    IA3     base_model.model.{module}.ia3_l, which scales the output (D_out, 1) or the input (1, D_in)

Three kinds of layers are stored differently:

    embeddings         .lora_embedding_A (r, V), .lora_embedding_B (D, r): a linear map of one-hot rows
    fused attention    one adapter for queries, keys and values
    stacked experts    lora_A is (E r, D_in), where r varies fastest, and lora_B (D_out, r E), where E does

A key of adapter_config.json that would change what is computed, and that is not implemented, is an error that
names it. Which modules are adapted follows from the names of the tensors, and not from target_modules.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from formats import safetensors_dir
from formats.json_file import read_json, write_json
from formats.peft_layers import (
    MODEL_PREFIXES,
    Layer,
    family_of,
    fuse_attention,
    is_stack,
    names,
    our_layers,
    selects,
    shortest,
)
from formats.safetensors_dir import write_tensors


class SavedAdapter(NamedTuple):
    """The content of the two files, under our names."""

    # method ("lora", "dora" or "ia3"), and except for ia3: r (int), alpha (float), rank_stabilized (bool) and
    # dropout (float). When an adapter is read also target_modules, as in the file (str or tuple of str);
    # `write` derives it from the layers.
    fields: dict
    # The tensors of each layer, by our path of it: lora_A, lora_B, scale (float), and with DoRA
    # lora_magnitude_vector; or ia3_l. Stacked experts have lora_A (E, r, D_in) and lora_B (E, D_out, r).
    layers: dict[str, Layer]
    base: str | None  # base_model_name_or_path
    fingerprint: str | None  # of the base, see `safetensors_dir.fingerprint`


PREFIX = "base_model.model."
KINDS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".ia3_l": "ia3_l",
}
EMBEDDING_KINDS = KINDS | {".lora_embedding_A": "lora_A", ".lora_embedding_B": "lora_B"}
EMBEDDINGS = ("embed_tokens", "embed_positions", "_embeddings")  # ends of the paths of embeddings
METHOD_KINDS = {
    "lora": ("lora_A", "lora_B"),
    "dora": ("lora_A", "lora_B", "lora_magnitude_vector"),
    "ia3": ("ia3_l",),
}

# Keys that are read, with the types of their values.
READ = {
    "peft_type": (str,), "r": (int,), "lora_alpha": (int, float), "use_rslora": (bool,), "use_dora": (bool,),
    "lora_dropout": (int, float), "target_modules": (list, str), "target_parameters": (list,),
    "rank_pattern": (dict,), "alpha_pattern": (dict,), "base_model_name_or_path": (str,),
}  # fmt: skip
# Keys of which only these values are implemented. The other initialisations (PiSSA, OLoRA, CorDA, LoftQ and
# LoRA-GA) subtract the first B A from the weights of the base, so their files do not fit the original base.
ONLY = {
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}
# Keys that do not change what the tensors compute: bookkeeping, how modules were chosen and initialised, and
# fan_in_fan_out, which describes how the base stores its matrices.
INERT = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "fan_in_fan_out",
    "exclude_modules", "layers_to_transform", "layers_pattern", "feedforward_modules", "init_ia3_weights",
    "megatron_core", "qalora_group_size", "eva_config", "loftq_config", "runtime_config",
}  # fmt: skip


def read(directory: str | Path, model: nn.Module) -> SavedAdapter:
    """Return the adapter in directory, with its layers under the paths that they have in model.

    model: one of ours, of which only class and config are used; `check_base` checks whether the adapter fits
    its weights. Raises ValueError naming the file and what in it is missing, damaged, contradictory or not
    implemented.
    """
    path, file = (Path(directory) / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    hf = read_json(path)
    fields = read_fields(path, hf)
    tensors, base_fingerprint = read_tensors(file)

    # {PEFT's path of a module: our paths of it}, without the prefix, which an adapter of a model without
    # heads does not have.
    parameters = hf.get("target_parameters") or []
    prefix = MODEL_PREFIXES[family_of(model)]
    ours: dict[str, list[str]] = {}
    for our, their in names(model, lambda stack: selects(parameters, stack)).items():
        ours.setdefault(their.removeprefix(prefix), []).append(our)

    # {PEFT's path of a module: its tensors}. If an embedding or the head is adapted, PEFT also saves the
    # base's weight, which an adapter does not change.
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith((".base_layer.weight", ".base_layer.bias")):
            continue
        end = next((end for end in EMBEDDING_KINDS if name.endswith(end)), "")
        module = name.removeprefix(PREFIX).removesuffix(end)
        if not end or not name.startswith(PREFIX) or module.removeprefix(prefix) not in ours:
            like = f"{PREFIX}{list(names(model).values())[1]}.lora_A.weight"
            raise ValueError(f"{file}: {name} fits no layer of this model; expected a name such as {like}")
        modules.setdefault(module, {})[EMBEDDING_KINDS[end]] = tensor

    # There must be an adapter, and one for each stack of experts that the config names.
    found = {our for module in modules for our in ours[module.removeprefix(prefix)]}
    missing = {our for paths in ours.values() for our in paths if is_stack(our)} - found
    if missing or not found:
        expected = min(missing, default="an adapter")
        raise ValueError(f"{file}: no tensors of {expected}; expected those of the targets in {path}")

    layers: dict[str, Layer] = {}
    for module, given in modules.items():
        paths = ours[module.removeprefix(prefix)]
        n_experts = model.config.n_experts if is_stack(paths[0]) else 1
        if fields["method"] == "ia3":
            check(file, module, given, "ia3")
        else:
            rank, scale = rank_and_scale(path, hf, target_of(module, paths[0], parameters))
            check(file, module, given, fields["method"], rank, n_experts)
            given |= {"scale": scale}
        layers |= our_layers(paths, given, n_experts)
    return SavedAdapter(fields, layers, hf.get("base_model_name_or_path"), base_fingerprint)


def target_of(module: str, our_path: str, parameters: list[str]) -> str:
    """Return the path that rank_pattern and alpha_pattern are matched with.

    That is PEFT's path of the module, or the path of a parameter in it if parameters, the target_parameters
    of the config, select it. our_path: our path of the layer.
    """
    target = module.replace(".base_layer", "")
    if is_stack(our_path):
        return f"{target}.{our_path.rpartition('.')[2]}"
    return f"{target}.weight" if selects(parameters, f"{target}.weight") else target


def check_base(
    directory: str | Path, saved: SavedAdapter, shapes: Mapping[str, torch.Size], fingerprint: str | None
) -> None:
    """Raise ValueError unless an adapter that was read from directory fits a base.

    shapes: (..., N, D) of the base's matrices, by our paths. fingerprint: of the base, None if unknown.
    """
    for path, layer in saved.layers.items():
        if path not in shapes:
            raise ValueError(
                f"{directory}: adapts {path}, which this base does not have; name the right base"
            )
        *stack, N, D = shapes[path]
        rank = layer["lora_A"].shape[-2] if "lora_A" in layer else 0
        needed = {"lora_A": (*stack, rank, D), "lora_B": (*stack, N, rank)}
        needed["lora_magnitude_vector"] = (*stack, N)
        needed["ia3_l"] = (1, D) if "ia3_l" in layer and len(layer["ia3_l"]) == 1 else (N, 1)
        for kind, w in layer.items():
            if kind != "scale" and tuple(w.shape) != needed[kind]:
                raise ValueError(
                    f"{directory}: {path}.{kind} has shape {tuple(w.shape)}, this base needs {needed[kind]}; "
                    "name the right base"
                )
    if None not in (saved.fingerprint, fingerprint) and saved.fingerprint != fingerprint:
        raise ValueError(
            f"{directory}: made for other weights than this base has; it names {saved.base}, which may have "
            "been trained since: restore those weights, or train the adapter again"
        )


def read_fields(path: Path, hf: dict) -> dict:
    """Return `SavedAdapter.fields` from hf, the content of the adapter_config.json at path.

    Raises ValueError for a key or a value that is not implemented.
    """
    kind = hf.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise ValueError(f"{path}: peft_type {kind!r} is not implemented; expected 'LORA' or 'IA3'")
    for key, value in hf.items():
        if key == "init_lora_weights" and value not in ONLY[key]:
            raise ValueError(
                f"{path}: init_lora_weights {value!r} changed the base's weights, so this does not fit "
                "the original base; let peft save it with path_initial_model_for_weight_conversion"
            )
        if key in ONLY and value not in ONLY[key]:
            raise ValueError(f"{path}: {key} {value!r} is not implemented; expected {ONLY[key][0]!r}")
        if key in READ and value is not None and type(value) not in READ[key]:  # a bool is no int here
            expected = " or ".join(kind.__name__ for kind in READ[key])
            raise ValueError(f"{path}: {key} {value!r}: expected {expected}")
        if key not in READ.keys() | INERT | ONLY.keys() and value not in (None, False, {}, []):
            raise ValueError(
                f"{path}: {key} {value!r} is not implemented; remove the key only if it has no effect"
            )
    targets = hf.get("target_modules") or []
    fields = {"target_modules": tuple(targets) if isinstance(targets, list) else targets}
    if kind == "IA3":
        return fields | {"method": "ia3"}
    rank_and_scale(path, hf | {"rank_pattern": {}, "alpha_pattern": {}}, "")  # raises for wrong defaults
    dropout = float(hf.get("lora_dropout") or 0)
    if not 0 <= dropout < 1:
        raise ValueError(f"{path}: lora_dropout {dropout}: expected at least 0 and less than 1")
    return fields | {
        "method": "dora" if hf.get("use_dora") else "lora",
        "r": hf.get("r", 8),
        "alpha": float(hf.get("lora_alpha", 8)),
        "rank_stabilized": bool(hf.get("use_rslora")),
        "dropout": dropout,
    }


def rank_and_scale(path: Path, hf: dict, target: str) -> tuple[int, float]:
    """Return r of a target and the scale of its B A. hf: the content of the adapter_config.json at path.

    r and alpha are those of the first pattern that matches the target, or the defaults if none does. Raises
    ValueError for values that are not numbers, and for patterns that are damaged.
    """
    values = []
    for key, pattern_key, kind in (("r", "rank_pattern", int), ("lora_alpha", "alpha_pattern", (int, float))):
        value = hf.get(key, 8)
        for pattern, other in (hf.get(pattern_key) or {}).items():
            try:
                matches = re.match(rf"(.*\.)?({pattern})$", target)
            except re.error as error:
                raise ValueError(f"{path}: {pattern_key} {pattern!r} is not a pattern ({error})") from None
            if matches:
                key, value = f"{pattern_key} {pattern!r}", other
                break
        is_number = isinstance(value, kind) and not isinstance(value, bool) and abs(value) < math.inf
        if not is_number or (kind is int and value < 1):
            expected = "a whole number of at least 1" if kind is int else "a number"
            raise ValueError(f"{path}: {key} {value!r}: expected {expected}")
        values.append(value)
    rank, alpha = values
    return rank, alpha / (math.sqrt(rank) if hf.get("use_rslora") else rank)


def read_tensors(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors of an adapter's file, and the fingerprint of its base in the metadata, or None.

    Raises ValueError for a file that is missing or damaged.
    """
    pickled = file.with_suffix(".bin")
    if pickled.is_file() and not file.is_file():
        raise ValueError(
            f"{file}: no such file; expected weights in safetensors format; {pickled.name} is not read: it "
            "is a pickle, which could run any code; let peft save it again"
        )
    tensors, metadata = safetensors_dir.read_tensors(file)
    return tensors, metadata.get("base_fingerprint")


def check(
    file: Path, module: str, given: dict[str, Tensor], method: str, rank: int = 0, n_experts: int = 1
) -> None:
    """Raise ValueError unless given, the tensors of a module in file, are those of the method.

    method: one of METHOD_KINDS. rank, n_experts: by adapter_config.json and the model; IA3 has no rank.
    """
    name = f"{file}: {PREFIX}{module}"
    expected = METHOD_KINDS[method]
    for problem, kinds in (
        ("is missing", set(expected) - given.keys()),
        ("has no place there", given.keys() - set(expected)),
    ):
        if kinds:
            raise ValueError(f"{name}.{min(kinds)} {problem}; expected {' and '.join(expected)} for {method}")

    n = rank * n_experts
    by = f" for rank {rank} by adapter_config.json" + f", {n_experts} experts" * (n_experts > 1)
    for kind in expected:
        shape = tuple(given[kind].shape)
        if kind == "ia3_l":
            fits, like = len(shape) == 2 and 1 in shape, "(D_out, 1) or (1, D_in)"
        elif kind == "lora_magnitude_vector":
            fits, like = shape == given["lora_B"].shape[:1], "(D_out,) as in lora_B"
        elif kind == "lora_A":
            fits, like = len(shape) == 2 and shape[0] == n, f"({n}, D_in){by}"
        else:
            fits, like = len(shape) == 2 and shape[1] == n, f"(D_out, {n}){by}"
        if not fits:
            raise ValueError(f"{name}.{kind} has shape {shape}: expected {like}")


def write(directory: str | Path, model: nn.Module, adapter: SavedAdapter) -> None:
    """Write adapter_model.safetensors and adapter_config.json to directory.

    model: one of ours, of which only class and config are used. The layers of the adapter may differ in rank
    and scale. Each file is replaced only once the new one is complete. Raises ValueError for an adapter that
    PEFT's format cannot describe.
    """
    method, layers = adapter.fields["method"], adapter.layers
    theirs = names(model, layers.__contains__)
    unknown = layers.keys() - theirs.keys()
    if unknown or not layers:
        raise ValueError(f"{directory}: {min(unknown, default='nothing')}: no layer to save an adapter of")
    if method != "lora" and any(map(is_stack, layers)):
        raise ValueError(
            f"{directory}: {method} of stacked experts: peft has none; expected lora, or target_modules that "
            "leave the experts out"
        )
    layers = fuse_attention(directory, family_of(model), method, layers)

    # The tensors, and the layers by their paths in target_modules and in target_parameters.
    tensors: dict[str, Tensor] = {}
    modules: dict[str, Layer] = {}
    parameters: dict[str, Layer] = {}
    for our, layer in layers.items():
        module = theirs[our]
        if is_stack(our):
            parameters[our] = layer
            A = layer["lora_A"].flatten(0, 1)  # (E r, D_in) of (E, r, D_in)
            B = layer["lora_B"].permute(1, 2, 0).flatten(1)  # (D_out, r E) of (E, D_out, r)
            layer = {"lora_A": A, "lora_B": B}
        elif method == "lora" and ".mlp." in our and hasattr(model.config, "n_experts"):
            # In a model with experts, PEFT takes modules named gate_proj, up_proj, down_proj and gate for
            # those of the experts, as they were before transformers 5. So these are written as parameters;
            # with DoRA and IA3 they cannot be, since PEFT has these for modules only.
            parameters[f"{module}.weight"] = layer
        else:
            modules[module] = layer
        kinds = EMBEDDING_KINDS if our.endswith(EMBEDDINGS) else KINDS
        for kind, end in {kind: end for end, kind in kinds.items() if kind in layer}.items():
            tensors[f"{PREFIX}{module}{end}"] = layer[kind].clone()

    config = adapter_config(model, adapter, modules, parameters)
    metadata = {"base_fingerprint": adapter.fingerprint} if adapter.fingerprint else {}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / "adapter_model.safetensors", tensors, metadata)
    write_json(directory / "adapter_config.json", config)


def adapter_config(
    model: nn.Module, adapter: SavedAdapter, modules: dict[str, Layer], parameters: dict[str, Layer]
) -> dict:
    """Return the content of adapter_config.json.

    modules, parameters: the layers, by their paths in target_modules and in target_parameters.
    """
    fields, every = adapter.fields, names(model)
    all_modules = {their for our, their in every.items() if not is_stack(our)}
    all_parameters = {our if is_stack(our) else f"{their}.weight" for our, their in every.items()}
    config = {
        "peft_type": "IA3" if fields["method"] == "ia3" else "LORA",
        "task_type": "CAUSAL_LM" if family_of(model) in ("gpt2", "decoder") else None,
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "fan_in_fan_out": any(".c_" in module for module in modules),  # Conv1D
    }
    if fields["method"] == "ia3":
        # PEFT requires that feedforward_modules, whose inputs are scaled, are target_modules too.
        of_input = {module for module, layer in modules.items() if len(layer["ia3_l"]) == 1}
        inputs, outputs = (shortest(some, all_modules) for some in (of_input, modules.keys() - of_input))
        return config | {"target_modules": outputs + inputs, "feedforward_modules": inputs}

    # The rank and alpha of each layer. Rounding may make alpha differ a little from the value that the scale
    # was computed from: the default, or a whole number. Then that value is written.
    ranks, alphas = {}, {}
    for target, layer in (modules | parameters).items():
        ranks[target] = layer["lora_A"].shape[-2]
        alpha = layer["scale"] * (math.sqrt(ranks[target]) if fields["rank_stabilized"] else ranks[target])
        near = [a for a in (fields["alpha"], round(alpha)) if math.isclose(a, alpha, rel_tol=1e-9)]
        alphas[target] = [*near, alpha][0]
    return config | {
        "r": fields["r"],
        "lora_alpha": fields["alpha"],
        "rank_pattern": patterns(ranks, fields["r"]),
        "alpha_pattern": patterns(alphas, fields["alpha"]),
        "use_rslora": fields["rank_stabilized"],
        "use_dora": fields["method"] == "dora",
        # PEFT refuses dropout together with parameters, and it has an effect in further training only.
        "lora_dropout": 0.0 if parameters else fields["dropout"],
        "target_modules": shortest(modules, all_modules),
        "target_parameters": shortest(parameters, all_parameters) or None,
        "init_lora_weights": True,
        "bias": "none",
    }


def patterns(values: dict[str, float], default: float) -> dict[str, float]:
    """Return {pattern: value} for the targets whose value is not the default."""
    return {
        end: value
        for value in sorted(set(values.values()) - {default})
        for end in shortest({target for target in values if values[target] == value}, values)
    }
