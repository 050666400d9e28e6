"""Adapters as the ecosystem keeps them: PEFT's adapter_config.json and adapter_model.safetensors.

The tensors are named after the modules of transformers' model:

    LoRA    base_model.model.{module}.lora_A.weight (r, D_in), .lora_B.weight (D_out, r)
    DoRA    the same and .lora_magnitude_vector (D_out,)
    IA3     base_model.model.{module}.ia3_l, for what comes out (D_out, 1) or for what goes in (1, D_in)

Three kinds of layers are kept otherwise:

    embeddings         .lora_embedding_A (r, V), .lora_embedding_B (D, r): the linear map of one-hot rows
    fused attention    queries, keys and values of GPT-2 and ModernBERT are one module there, three here
    stacked experts    are parameters of one module. Each that is adapted puts a wrapper around it, the last
                       one outermost, so .lora_A.weight is of down_proj and .base_layer.lora_A.weight of
                       gate_up_proj, if both are. lora_A is (E r, D_in), in which r runs faster, and lora_B
                       (D_out, r E), in which E does

As in formats/decoders.py, a key of the config that would change what is computed and that is not implemented is an
error that names it. Which modules are adapted is told by the tensors rather than by target_modules.
"""

import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from formats import encoders, safetensors_dir
from formats.decoders import GPT2_NAMES
from formats.json_file import read_json, write_json
from formats.safetensors_dir import inverse, rename, write_tensors

Layer = dict[str, Tensor | float]


class SavedAdapter(NamedTuple):
    # method: "lora", "dora" or "ia3"; but for ia3: r (int), alpha (float), rank_stabilized (bool), dropout
    # (float); target_modules as in the file (str or tuple), which `write` works out by itself.
    fields: dict
    # Of our path of a module, or of a stack of experts: lora_A, lora_B, scale (float) and with DoRA
    # lora_magnitude_vector; or ia3_l. A stack has lora_A (E, r, D_in) and lora_B (E, D_out, r).
    layers: dict[str, Layer]
    base: str | None  # base_model_name_or_path
    fingerprint: str | None  # of the base's weights


PREFIX = "base_model.model."
KINDS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".ia3_l": "ia3_l",
}
EMBEDDING_KINDS = KINDS | {".lora_embedding_A": "lora_A", ".lora_embedding_B": "lora_B"}
EMBEDDINGS = ("embed_tokens", "embed_positions", "_embeddings")  # what their paths end with
METHOD_KINDS = {
    "lora": ("lora_A", "lora_B"),
    "dora": ("lora_A", "lora_B", "lora_magnitude_vector"),
    "ia3": ("ia3_l",),
}
# What the names of all modules but the heads begin with, in a model that has heads.
MODEL_PREFIXES = {"gpt2": "transformer.", "decoder": "model.", **encoders.PREFIXES}
# Where queries, keys and values are one module: what our three paths end with in its place, and its own.
FUSED = {
    "gpt2": ((".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj"), ".attn.c_attn"),
    "modernbert": ((".attention.self.query", ".attention.self.key", ".attention.self.value"), ".attn.Wqkv"),
}

READ = {  # and their types
    "peft_type": (str,), "r": (int,), "lora_alpha": (int, float), "use_rslora": (bool,), "use_dora": (bool,),
    "lora_dropout": (int, float), "target_modules": (list, str), "target_parameters": (list,),
    "rank_pattern": (dict,), "alpha_pattern": (dict,), "base_model_name_or_path": (str,),
}  # fmt: skip
# Keys with a few values that we implement. These initialisations leave the base as it is. PiSSA, OLoRA,
# CorDA, LoftQ and LoRA-GA take the first B A off its weights: what they save is for another base.
ONLY = {
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}
# Keys that do not change what the tensors compute: bookkeeping, how modules were chosen and initialised, and
# fan_in_fan_out, which is about the base's matrices.
INERT = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "fan_in_fan_out",
    "exclude_modules", "layers_to_transform", "layers_pattern", "feedforward_modules", "init_ia3_weights",
    "megatron_core", "qalora_group_size", "eva_config", "loftq_config", "runtime_config",
}  # fmt: skip


def family_of(model: nn.Module) -> str:
    """The encoder's family, "gpt2", or "decoder" for the others; ValueError where modules do not match."""
    if not hasattr(model.config, "mlm_head"):
        return "gpt2" if model.config.positions == "learned" else "decoder"
    family = encoders.family_of(model.config)
    if family == "albert":
        raise ValueError(
            "adapters of albert are not implemented; expected bert, roberta, electra or modernbert"
        )
    return family


def is_stack(path: str) -> bool:
    """Whether our path is of one weight of all experts of a layer."""
    return path.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def names(model: nn.Module, wrapped: Callable[[str], bool] = lambda path: True) -> dict[str, str]:
    """What can be adapted in the unadapted model: {our path: the path that peft's tensors have}.

    model: of which only class and config count. wrapped(path): whether the stack of experts is adapted; one
    that is not has no path of theirs.
    """
    with torch.device("meta"):
        parameters = list(type(model)(model.config).named_parameters())
    family = family_of(model)
    ours = [name.removesuffix(".weight") for name, p in parameters if p.ndim == 2]
    if family not in ("gpt2", "decoder"):
        headless = not model.config.mlm_head and model.config.pair == "none"
        weights: dict[str, list[str]] = {}
        for path in ours:
            weights.setdefault(f"{fused_path(path, family)}.weight", []).append(path)
        renamed = encoders.to_hf(weights, family, "Model" if headless else "ForMaskedLM")
        return {path: name.removesuffix(".weight") for name, paths in renamed.items() for path in paths}

    ours.append("lm_head")  # a module of its own there also where it shares the embedding's weight
    theirs = {path: _to_gpt2(path) if family == "gpt2" else path for path in ours}
    stacks = [name for name, _ in parameters if is_stack(name) and wrapped(name)]
    for i, path in enumerate(stacks):
        module = path.rpartition(".")[0]
        around = sum(later.startswith(f"{module}.") for later in stacks[i + 1 :])
        theirs[path] = module + around * ".base_layer"
    return theirs


def fused_path(path: str, family: str) -> str:
    """Our path, but of queries, keys and values ending as their one module does, if the family has one."""
    ends, fused = FUSED.get(family, ((), ""))
    end = next((end for end in ends if path.endswith(end)), None)
    return path.removesuffix(end) + fused if end else path


def _to_gpt2(path: str) -> str:
    name = rename(fused_path(path, "gpt2") + ".", inverse(GPT2_NAMES))
    return path if path == "lm_head" else f"transformer.{name[:-1]}"


def selects(ends: Collection[str], path: str) -> bool:
    """Whether path is one of ends or ends with one after a dot: what peft's lists of targets mean."""
    return any(f".{path}".endswith(f".{end}") for end in ends)


def read(directory: str | Path, model: nn.Module) -> SavedAdapter:
    """The adapter in directory under the paths of model, one of ours, of which only class and config count.

    Raises ValueError naming the file and what in it is missing, damaged, contradictory or not implemented.
    Whether the shapes are those of the base is not checked here.
    """
    path, file = (Path(directory) / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    hf = read_json(path)
    fields = read_fields(path, hf)
    parameters = hf.get("target_parameters") or []
    prefix = MODEL_PREFIXES[family_of(model)]  # adapters of a model without heads lack it
    ours: dict[str, list[str]] = {}
    for our, their in names(model, lambda stack: selects(parameters, stack)).items():
        ours.setdefault(their.removeprefix(prefix), []).append(our)

    tensors, fingerprint = read_tensors(file)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        # With an embedding or the head among its targets peft also saves their weights, which are the base's
        # own: an adapter does not change them.
        if name.endswith((".base_layer.weight", ".base_layer.bias")):
            continue
        end = next((end for end in EMBEDDING_KINDS if name.endswith(end)), "")
        module = name.removeprefix(PREFIX).removesuffix(end)
        if not end or not name.startswith(PREFIX) or module.removeprefix(prefix) not in ours:
            like = f"{PREFIX}{list(names(model).values())[1]}.lora_A.weight"
            raise ValueError(f"{file}: {name} fits no layer of this model; expected a name such as {like}")
        modules.setdefault(module, {})[EMBEDDING_KINDS[end]] = tensor
    found = {our for module in modules for our in ours[module.removeprefix(prefix)]}
    lost = {our for paths in ours.values() for our in paths if is_stack(our)} - found
    if lost or not found:
        raise ValueError(f"{file}: no tensors of {min(lost, default='an adapter')}; expected some by {path}")

    layers: dict[str, Layer] = {}
    for module, given in modules.items():
        paths = ours[module.removeprefix(prefix)]
        scale = {}
        if fields["method"] == "ia3":
            check(file, module, given, "ia3")
        else:
            # What peft matches patterns with: the path of the module, or of the parameter.
            target = module.replace(".base_layer", "")
            if is_stack(paths[0]):
                target += f".{paths[0].rpartition('.')[2]}"
            elif selects(parameters, f"{target}.weight"):
                target += ".weight"
            rank, scale["scale"] = rank_and_scale(path, hf, target)
            E = model.config.n_experts if is_stack(paths[0]) else 1
            check(file, module, given, fields["method"], rank, E)
            if is_stack(paths[0]):
                given["lora_A"] = given["lora_A"].unflatten(0, (E, rank))  # (E, r, D_in)
                B = given["lora_B"].unflatten(1, (rank, E))  # (D_out, r, E)
                given["lora_B"] = B.permute(2, 0, 1).contiguous()  # (E, D_out, r)
        for i, our in enumerate(paths):
            layers[our] = {kind: part(w, kind, i, len(paths)) for kind, w in given.items()} | scale
    return SavedAdapter(fields, layers, hf.get("base_model_name_or_path"), fingerprint)


def read_fields(path: Path, hf: dict) -> dict:
    """`SavedAdapter.fields` of hf, the content of path."""
    kind = hf.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise ValueError(f"{path}: peft_type {kind!r} is not implemented; expected 'LORA' or 'IA3'")
    for key, value in hf.items():
        if key == "init_lora_weights" and value not in ONLY[key]:
            raise ValueError(
                f"{path}: init_lora_weights {value!r} changed the base's weights, so this fits no "
                "plain base; have peft save it with path_initial_model_for_weight_conversion"
            )
        if key in ONLY and value not in ONLY[key]:
            raise ValueError(f"{path}: {key} {value!r} is not implemented; expected {ONLY[key][0]!r}")
        if key in READ and value is not None and not isinstance(value, READ[key]):
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
    rank_and_scale(path, hf | {"rank_pattern": {}, "alpha_pattern": {}}, "")  # checked without a layer too
    return fields | {
        "method": "dora" if hf.get("use_dora") else "lora",
        "r": hf.get("r", 8),
        "alpha": float(hf.get("lora_alpha", 8)),
        "rank_stabilized": bool(hf.get("use_rslora")),
        "dropout": float(hf.get("lora_dropout") or 0),
    }


def rank_and_scale(path: Path, hf: dict, target: str) -> tuple[int, float]:
    """r and the factor of B A for a target: as the first pattern that matches it says, or the default."""
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
        if not isinstance(value, kind) or (kind is int and value < 1):
            expected = "a whole number of at least 1" if kind is int else "a number"
            raise ValueError(f"{path}: {key} {value!r}: expected {expected}")
        values.append(value)
    rank, alpha = values
    return rank, alpha / (math.sqrt(rank) if hf.get("use_rslora") else rank)


def read_tensors(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """All tensors of a safetensors file, and the base's fingerprint in its metadata, if any."""
    if not file.is_file():
        pickled = file.with_suffix(".bin")
        more = f"; {pickled.name} is not read: it is a pickle, which may run anything; have peft save it anew"
        raise ValueError(
            f"{file}: no such file; expected weights in safetensors format{more if pickled.is_file() else ''}"
        )
    tensors, metadata = safetensors_dir.read_tensors(file)
    return tensors, metadata.get("base_fingerprint")


def check(
    file: Path, module: str, given: dict[str, Tensor], method: str, rank: int = 0, n_experts: int = 1
) -> None:
    """ValueError unless a module's tensors are those that method has, of this rank and with each other."""
    name = f"{file}: {PREFIX}{module}"
    expected = METHOD_KINDS[method]
    for problem, kinds in (
        ("is missing", set(expected) - given.keys()),
        ("has no place there", given.keys() - set(expected)),
    ):
        if kinds:
            raise ValueError(f"{name}.{min(kinds)} {problem}; expected {' and '.join(expected)} for {method}")
    for kind in expected:
        shape, rows = tuple(given[kind].shape), rank * n_experts
        if kind == "ia3_l":
            fits, like = len(shape) == 2 and 1 in shape, "(D_out, 1) or (1, D_in)"
        elif kind == "lora_magnitude_vector":
            fits, like = shape == given["lora_B"].shape[:1], "(D_out,) as in lora_B"
        else:
            dimension, like = (0, f"({rows}, D_in)") if kind == "lora_A" else (1, f"(D_out, {rows})")
            fits = len(shape) == 2 and shape[dimension] == rows
            like += f" for rank {rank} by adapter_config.json" + f", {n_experts} experts" * (n_experts > 1)
        if not fits:
            raise ValueError(f"{name}.{kind} has shape {shape}: expected {like}")


def part(w: Tensor, kind: str, i: int, n: int) -> Tensor:
    """What the i-th of our n modules has of a tensor of theirs: its rows, or all where it is of the input."""
    of_input = kind == "lora_A" or (kind == "ia3_l" and len(w) == 1)
    return w if n == 1 else (w if of_input else w.tensor_split(n)[i]).clone()


def write(directory: str | Path, model: nn.Module, adapter: SavedAdapter) -> None:
    """Write adapter_model.safetensors and adapter_config.json to directory, each replaced whole.

    model: one of ours, of which only class and config count. The layers may differ in rank and scale. Raises
    ValueError for an adapter that peft's format has no place for.
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
    if family_of(model) in FUSED:
        layers = fuse_attention(directory, method, layers, FUSED[family_of(model)][0])

    tensors: dict[str, Tensor] = {}
    modules: dict[str, Layer] = {}  # what peft is to look for ...
    parameters: dict[str, Layer] = {}  # ... and where it is a parameter
    for our, layer in layers.items():
        module = theirs[our]
        if is_stack(our):
            parameters[our] = layer
            A = layer["lora_A"].flatten(0, 1)  # (E r, D_in) of (E, r, D_in)
            B = layer["lora_B"].permute(1, 2, 0).flatten(1)  # (D_out, r E) of (E, D_out, r)
            layer = {"lora_A": A, "lora_B": B}
        elif method == "lora" and ".mlp." in our and hasattr(model.config, "n_experts"):
            # As names of modules peft would take gate_proj, up_proj, down_proj and gate for the experts',
            # which they were before transformers 5. (DoRA and IA3 know modules alone.)
            parameters[f"{module}.weight"] = layer
        else:
            modules[module] = layer
        kinds = EMBEDDING_KINDS if our.endswith(EMBEDDINGS) else KINDS
        for kind, end in {kind: end for end, kind in kinds.items() if kind in layer}.items():
            tensors[f"{PREFIX}{module}{end}"] = layer[kind].detach().cpu().contiguous().clone()

    config = adapter_config(model, adapter, modules, parameters)
    metadata = {} if adapter.fingerprint is None else {"base_fingerprint": adapter.fingerprint}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / "adapter_model.safetensors", tensors, metadata)
    write_json(directory / "adapter_config.json", config)


def fuse_attention(
    directory: str | Path, method: str, layers: dict[str, Layer], ends: tuple[str, ...]
) -> dict[str, Layer]:
    """layers, in which queries, keys and values, told by these ends of their paths, are one under the path of
    the queries.

    With the same lora_A and scale for all, the rank stays; otherwise the ranks add up, lora_B becomes block
    diagonal, and scales that differ become part of it. What is missing of the three must change nothing.
    """
    fused = {path: layer for path, layer in layers.items() if not path.endswith(ends)}
    for block in sorted({path.removesuffix(end) for path in layers for end in ends if path.endswith(end)}):
        paths = [block + end for end in ends]
        given = [layers[path] for path in paths if path in layers]
        lost = ", ".join(path for path in paths if path not in layers)
        if lost and method == "dora":
            raise ValueError(
                f"{directory}: {lost} missing: in transformers queries, keys and values are one module, "
                "which needs the magnitudes of all three"
            )
        first = given[0]
        if method == "ia3":
            ones = torch.ones_like(first["ia3_l"])
            vectors = [layers[path]["ia3_l"] if path in layers else ones for path in paths]
            of_output = all(len(vector) > 1 for vector in vectors)
            if not of_output and not all(torch.equal(vector, vectors[0]) for vector in vectors):
                raise ValueError(
                    f"{directory}: ia3_l of {', '.join(paths)}: in transformers they are one module, the "
                    "input of which can only be scaled for all three alike"
                )
            fused[paths[0]] = {"ia3_l": torch.cat(vectors) if of_output else vectors[0]}
            continue
        one_scale = first["scale"] != 0 and all(layer["scale"] == first["scale"] for layer in given)
        scale = first["scale"] if one_scale else 1.0
        one_A = one_scale and all(torch.equal(layer["lora_A"], first["lora_A"]) for layer in given)
        zeros = first["lora_B"].new_zeros(len(first["lora_B"]), len(first["lora_A"]) if one_A else 0)
        blocks = [
            layers[path]["lora_B"] * (layers[path]["scale"] / scale) if path in layers else zeros
            for path in paths
        ]
        layer = {
            "lora_A": first["lora_A"] if one_A else torch.cat([layer["lora_A"] for layer in given]),
            "lora_B": torch.cat(blocks) if one_A else torch.block_diag(*blocks),
            "scale": scale,
        }
        if method == "dora":
            layer["lora_magnitude_vector"] = torch.cat([layer["lora_magnitude_vector"] for layer in given])
        fused[paths[0]] = layer
    return fused


def adapter_config(
    model: nn.Module, adapter: SavedAdapter, modules: dict[str, Layer], parameters: dict[str, Layer]
) -> dict:
    """adapter_config.json for an adapter of these modules and parameters, under their names."""
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
        of_input = {module for module, layer in modules.items() if len(layer["ia3_l"]) == 1}
        # Of these lists the second must be part of the first.
        inputs, outputs = (shortest(some, all_modules) for some in (of_input, modules.keys() - of_input))
        return config | {"target_modules": outputs + inputs, "feedforward_modules": inputs}
    ranks, alphas = {}, {}
    for target, layer in (modules | parameters).items():
        ranks[target] = layer["lora_A"].shape[-2]
        alpha = layer["scale"] * (math.sqrt(ranks[target]) if fields["rank_stabilized"] else ranks[target])
        # A scale is rounded, so alpha need not be quite the number that it came from.
        near = [a for a in (fields["alpha"], round(alpha)) if math.isclose(a, alpha, rel_tol=1e-9)]
        alphas[target] = [*near, alpha][0]
    return config | {
        "r": fields["r"],
        "lora_alpha": fields["alpha"],
        "rank_pattern": patterns(ranks, fields["r"]),
        "alpha_pattern": patterns(alphas, fields["alpha"]),
        "use_rslora": fields["rank_stabilized"],
        "use_dora": fields["method"] == "dora",
        # peft opens no adapter of parameters that has dropout, which only further training would use.
        "lora_dropout": 0.0 if parameters else fields["dropout"],
        "target_modules": shortest(modules, all_modules),
        "target_parameters": shortest(parameters, all_parameters) or None,
        "init_lora_weights": True,
        "bias": "none",
    }


def patterns(values: dict[str, float], default: float) -> dict[str, float]:
    """{pattern: value} of the targets whose value is not the default."""
    return {
        end: value
        for value in sorted(set(values.values()) - {default})
        for end in shortest({target for target in values if values[target] == value}, values)
    }


def shortest(chosen: Collection[str], every: Collection[str]) -> list[str]:
    """The fewest ends of paths that all chosen ones have and no others of every, such as q_proj if it is
    chosen in all layers; whole paths where there are none."""
    ends = set()
    others = set(every) - set(chosen)
    for path in chosen:
        parts = re.sub(r"^.*\.\d+\.", "", path).split(".")  # what follows the number of the layer
        candidates = (".".join(parts[i:]) for i in reversed(range(len(parts))))
        ends.add(next((end for end in candidates if not any(other.endswith(end) for other in others)), path))
    return sorted(ends)
