"""The directory of a saved model: config.json, and model.safetensors with the weights.

Hugging Face's libraries use this layout, and so does formats/native.py. Large models have several files of
weights, which model.safetensors.index.json lists. In the library diffusers, the names of the files begin with
diffusion_pytorch_model instead of model. The functions here are for models of all families:

    reading    read_weights, rename (their names to ours), then build and assign, or `filled`, which is both
    writing    write, or write_decoder for models that generate text

Weights are read from safetensors only: unlike a pickle, such a file cannot run code.
"""

import functools
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from formats.atomic import replace_file
from formats.config_json import damage_named
from formats.json_file import read_json, write_json

STEMS = ("model", "diffusion_pytorch_model")  # beginnings of the names of files with weights
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes in which models compute


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors of a safetensors file, and its metadata.

    Raises ValueError if there is no such file or if it is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected weights in safetensors format")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, which replaces the old one only once it is complete.

    Raises OSError if the file cannot be written, as on a full disk.
    """
    tensors = {name: w.detach().cpu().contiguous() for name, w in tensors.items()}
    with replace_file(path) as new:
        try:
            save_file(tensors, new, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))  # only the message has the system's error code
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from None


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """Return all tensors in the files of weights in directory, see `weight_files`.

    Raises ValueError naming a file that is missing or damaged, or a tensor that is not finite.
    """
    directory = Path(directory)
    weights = {}
    for path in weight_files(directory):
        tensors = read_tensors(path)[0]
        check_finite(path, tensors)
        weights |= tensors
    return weights


def weight_files(directory: Path) -> list[Path]:
    """Return the paths of the files of weights in directory: the single one, or those that an index names.

    Raises ValueError for a damaged index, and for a model that is a pickle. The files may be missing.
    """
    stem = next((stem for stem in STEMS if any(directory.glob(f"{stem}.safetensors*"))), STEMS[0])
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        found = read_json(index).get("weight_map")
        if not isinstance(found, dict) or not found or not all(isinstance(f, str) for f in found.values()):
            raise ValueError(
                f"{index}: weight_map {found!r:.100}: expected the file of each tensor; download it again"
            )
        paths = [directory / file for file in sorted(set(found.values()))]
        if outside := [path for path in paths if path.parent != directory]:
            raise ValueError(f"{index}: names {outside[0]}; expected a file in the same directory")
        return paths
    if pickled := sorted(directory.glob("pytorch_model*.bin")):
        convert = (
            "from transformers import AutoModelForCausalLM as M; M.from_pretrained('DIR').save_pretrained"
        )
        raise ValueError(
            f"{pickled[0]}: not read, because it is a pickle, which could run any code; expected "
            f"model.safetensors; if you trust its author, convert it: python -c \"{convert}('NEW')\""
        )
    return [single]


def check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for a tensor that was read from path and has a value that is NaN or infinite."""
    for name, w in tensors.items():
        if w.dtype in PRECISIONS and w.numel():
            least, most = w.aminmax()  # NaN if a value is NaN; 30 times as fast as w.isfinite().all()
            if not (least.isfinite() and most.isfinite()):
                raise ValueError(f"{path}: {name} is not finite; the training that wrote it has diverged")


def write(directory: str | Path, hf: dict, weights: dict[str, Tensor]) -> None:
    """Write model.safetensors, and config.json with the content hf and the dtype of the weights.

    Each file is replaced only once the new one is complete. Raises ValueError for weights that are not
    floating-point numbers.
    """
    for name, w in weights.items():
        if not w.is_floating_point():
            raise ValueError(
                f"{name} is {w.dtype}: expected floating-point weights; a model in 4 bits cannot be saved"
            )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / "model.safetensors", weights)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    write_json(directory / "config.json", hf | {"torch_dtype": dtype})


def write_decoder(directory: str | Path, hf: dict, weights: dict[str, Tensor]) -> None:
    """Write a model that generates text: `write`, and generation_config.json beside the model.

    That file makes sampling the default of transformers' `generate`, and eos_token_id the end of a text.
    Without it, transformers takes the likeliest token, and its server ignores the temperature of a request. A
    client can still have the likeliest token, by a temperature of 0 or by do_sample=False.
    """
    write(directory, hf, weights)
    generation = {"do_sample": True, "eos_token_id": hf["eos_token_id"]}
    write_json(Path(directory) / "generation_config.json", generation)


def tie(fields: dict, weights: dict[str, Tensor], embedding: str, head: str) -> None:
    """Make fields["tie_embeddings"] and the weights agree, in place, on whether the head is the embedding.

    The head is not tied if it is stored and differs from the embedding, whatever config.json says, as
    transformers 5 does it: this is the case in many models with a merged adapter or an enlarged vocabulary.
    If only the head of a tied pair is stored, it is the embedding too.

    fields: of a Config. embedding, head: the names of the two matrices in weights.
    """
    if not fields.get("tie_embeddings", True):
        return
    if embedding not in weights and head in weights:
        weights[embedding] = weights[head]
    if head in weights:
        one, other = weights[embedding], weights[head]
        if (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(one, other):
            del weights[head]
    fields["tie_embeddings"] = head not in weights


def check_weights(expected: dict[str, Tensor], weights: dict[str, Tensor], directory: str | Path) -> None:
    """Raise ValueError unless weights, read from directory, have the names and shapes of those expected."""
    for problem, names in (
        ("is missing", expected.keys() - weights.keys()),
        ("has no place in this architecture", weights.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(f"{directory}: {min(names)} {problem} ({len(names)} such tensors)")
    check_shapes(expected, weights, directory)


def check_shapes(expected: dict[str, Tensor], weights: dict[str, Tensor], directory: str | Path) -> None:
    """Raise ValueError unless weights, read from directory, have the shapes of the tensors in expected of the
    same names, and a dtype of PRECISIONS where those are floating-point numbers."""
    for name in sorted(weights.keys() & expected.keys()):
        w, place = weights[name], expected[name]
        if w.shape != place.shape:
            shapes = f"{tuple(w.shape)}, config.json says {tuple(place.shape)}"
            raise ValueError(f"{directory}: {name} has shape {shapes}")
        if place.is_floating_point() and w.dtype not in PRECISIONS:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in PRECISIONS)
            raise ValueError(f"{directory}: {name} is {w.dtype}; expected one of {names}")


def build(
    make: Callable[[], nn.Module], fields: dict, weights: dict[str, Tensor], directory: str | Path
) -> nn.Module:
    """Return make(), a model that is built on the meta device, so that it takes no memory before `assign`.

    fields: of its Config. weights: those that it will get, read from directory. Raises ValueError, which
    names config.json, for fields that the Config refuses, for more layers than there are tensors, and for
    tensors of other shapes than the model's.
    """
    path, n_layers = Path(directory) / "config.json", fields.get("n_layers", 0)
    if n_layers > len(weights) and not fields.get("share_layers"):
        raise ValueError(f"{path}: {n_layers} layers, but there are only {len(weights)} tensors of weights")
    with damage_named(path), torch.device("meta"):
        model = make()
    check_shapes(model.state_dict(), weights, directory)
    return model


def assign(model: nn.Module, weights: dict[str, Tensor], directory: str | Path) -> None:
    """Make weights, read from directory, the parameters of a model that was built on the meta device, in one
    dtype: see `in_one_dtype`. Raises ValueError unless names and shapes are those of the model.
    """
    check_weights(model.state_dict(), weights, directory)
    model.load_state_dict(in_one_dtype(weights), assign=True)


def in_one_dtype(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with all that are floating-point numbers in the widest of their dtypes.

    Some files have several, such as a T5 in float16 that transformers saved, with matrices in float32 where
    float16 would overflow; a matrix product needs one.
    """
    dtypes = {w.dtype for w in weights.values() if w.is_floating_point()}
    widest = functools.reduce(torch.promote_types, dtypes, next(iter(dtypes), None))
    return {name: w.to(widest) if w.is_floating_point() else w for name, w in weights.items()}


def filled(
    kind: type[nn.Module],
    config_kind: type,
    fields: dict,
    weights: dict[str, Tensor],
    directory: str | Path,
    kernels: str,
) -> nn.Module:
    """Return kind(config) with exactly these weights, read from directory; config is config_kind(**fields).

    kernels: the Config's field of that name. Raises ValueError as `build` and `assign` do.
    """
    model = build(lambda: kind(config_kind(**fields, kernels=kernels)), fields, weights, directory)
    assign(model, weights, directory)
    return model


def rename(name: str, table: dict[str, str]) -> str:
    """Return a tensor's name after the replacements {old: new} of table, in its order.

    An `old` that begins with a dot may stand anywhere in the name; any other must be its beginning. Only the
    first occurrence is replaced.
    """
    for old, new in table.items():
        if name.startswith(old) or (old.startswith(".") and old in name):
            name = name.replace(old, new, 1)
    return name


def inverse(table: dict[str, str]) -> dict[str, str]:
    """Return the table of the opposite direction: {new: old} for {old: new}."""
    return {new: old for old, new in table.items()}


def split_qkv(name: str, w: Tensor) -> tuple[Tensor, ...]:
    """Return the queries, keys and values of a tensor that holds them one after the other: its three thirds.

    Raises ValueError, which has the name of the tensor, if it cannot be divided by three.
    """
    if not w.ndim or len(w) % 3:
        raise ValueError(f"{name} has shape {tuple(w.shape)}: expected queries, keys and values, 3 of a size")
    return tuple(piece.contiguous() for piece in w.chunk(3))


def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 hash of a sample of the weights of a model without adapters.

    It distinguishes one base from another, and is the same in float32 and in bfloat16.
    """
    digest = hashlib.sha256()
    for name, w in sorted(model.state_dict().items()):
        flat = w.detach().flatten()
        picks = torch.linspace(0, len(flat) - 1, min(len(flat), 64), dtype=torch.float64).long()
        sample = flat[picks.to(flat.device)].bfloat16().cpu()
        digest.update(f"{name} {tuple(w.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
