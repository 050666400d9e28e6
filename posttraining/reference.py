"""The reference of preference optimisation: its log-probabilities, computed once and kept on disk.

    log ref(y | x) = sum over the tokens y_t of the answer  log ref(y_t | x, y_<t)

The reference never changes. So one pass over the data before the first step takes the place of a second model
in memory and of a second forward pass in every step. The results are kept under a hash of all that decides
them: the weights of the reference, the rows, the precision.

Unless another is named, the reference is the model that training starts from, in the form in which it is
trained: with the fields of --set; with an adapter's base in the precision of training, 4 bits for example;
and with an adapter that is trained further as it is at the start. A new adapter changes nothing yet, so its
reference is the base.

Shapes: B rows, C answers of a row, T tokens, V vocabulary.
"""

import hashlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.rows import Dataset, Rows, in_order, stack
from data.tokenizer import get_tokenizer
from engine import contract, parallel, run
from engine.settings import adapter_fields
from formats.open_model import is_adapter, open_model
from formats.progress import progress_bar
from formats.safetensors_dir import read_tensors, write_tensors


def sequence_logps(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return log p of the masked tokens of each row, summed, in float32 or better: (B,).

    logits (B, T, V): the output of a model for tokens (B, T), int64; those at position t are of token t + 1.
    mask (B, T): true for the tokens that are summed, which are found by it alone and never by their value.
    The first token has no prediction and never counts.
    """
    targets = tokens[:, 1:].masked_fill(~mask[:, 1:].bool(), -100)  # (B, T - 1)
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    nats = nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return -nats.sum(-1)


def n_predicted(mask: Tensor) -> Tensor:
    """Return how many tokens `sequence_logps` sums in each row (...,) of a mask (..., T)."""
    return mask[..., 1:].sum(-1)


def trimmed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch without the columns that are padding in all of its rows."""
    length = int(batch["mask"].flatten(0, -2).any(0).nonzero().max()) + 1
    return batch | {name: batch[name][..., :length] for name in ("tokens", "mask")}


def open_reference(args: Namespace, config: Any, dataset: Dataset, directory: str | None) -> nn.Module:
    """Return the model in directory, None for the model that training starts from, frozen and in eval mode.

    config: of the model that is trained. Raises ValueError for a reference that writes no text, and for one
    with another vocabulary.
    """
    if directory is None:
        model = started(args, dataset)
    else:
        model = open_model(directory, kernels=args.kernels).float()
        flag = f"--set reference={directory}"
        if not hasattr(model, "new_cache"):
            raise ValueError(f"{flag}: a {type(model).__name__} writes no text; expected a decoder, as gpt")
        if model.config.vocab_size != config.vocab_size:
            sizes = f"{model.config.vocab_size} tokens, the trained model has {config.vocab_size}"
            raise ValueError(f"{flag}: a vocabulary of {sizes}; expected the same one")
        if (
            args.data != "chain"
            and get_tokenizer(directory).fingerprint != get_tokenizer(args.tokenizer).fingerprint
        ):
            raise ValueError(f"{flag}: another tokenizer than the trained model's; expected the same one")
    return model.to(args.device).eval().requires_grad_(False)


def started(args: Namespace, dataset: Dataset) -> nn.Module:
    """Return the model that training starts from, made as engine/run.py makes it, but without a new adapter.

    The random numbers that come next stay as they are.
    """
    concept = contract.resolve(args)
    with torch.random.fork_rng(devices=[]):
        pretrained, config = run.configure(concept, args)
        model = run.build(concept, config, pretrained, dataset, args)
        if concept.adapter is None:
            return model
        if args.init_from and is_adapter(args.init_from):
            run.choose_weights(concept, model, args)
        else:
            concept.adapter.prepare_base(model, adapter_fields(concept, model.config, args))
    return model


@torch.no_grad()
def logps_of(model: nn.Module, rows: Rows, args: Namespace) -> Tensor:
    """Return the log-probabilities (rows, C) of the answers in rows, float32, by a frozen model."""
    found, autocast = [], {"dtype": torch.bfloat16, "enabled": args.dtype == "bfloat16"}
    with progress_bar(total=len(rows), unit="row", desc="reference") as bar:
        for some in in_order(rows, args.batch_size):
            batch = trimmed(stack([{name: row[name] for name in ("tokens", "mask")} for row in some]))
            tokens, mask = (batch[name].flatten(0, 1).to(args.device) for name in ("tokens", "mask"))
            with torch.autocast(args.device, **autocast):
                logits = model(tokens)
            found.append(sequence_logps(logits, tokens, mask).view(len(some), -1).float().cpu())
            bar.update(len(some))
    return torch.cat(found)


def content_hash(model: nn.Module) -> str:
    """Return a SHA-256 hash of a model: its config, and its weights with their names and precision."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, w in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(w.shape)} {w.dtype}".encode())
        digest.update(w.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fits(path: Path, sides: dict[str, Rows]) -> bool:
    """Return whether a file has finite log-probabilities (rows, C) for just these rows of each side."""
    if not path.is_file():
        return False
    try:
        found = read_tensors(path)[0]
    except (OSError, ValueError):  # damaged
        return False
    shapes = {name: (len(rows), len(rows[0]["tokens"])) for name, rows in sides.items()}
    same = {name: tuple(values.shape) for name, values in found.items()} == shapes
    return same and all(np.isfinite(np.asarray(values)).all() for values in found.values())


def add_reference(dataset: Dataset, args: Namespace, config: Any, directory: str | None = None) -> Dataset:
    """Give all rows of dataset a "reference", the log-probabilities (C,) of their answers, and return it.

    They are read from --cache where they are known, and computed again where a file there does not fit the
    rows. Of several processes on a machine one computes them, and the others wait. Raises ValueError as
    `open_reference` does.
    """
    model = open_reference(args, config, dataset, directory)
    dataset.fingerprint += f"-{content_hash(model)[:16]}"
    key = hashlib.sha256(f"{dataset.fingerprint} {args.dtype} {args.device}".encode()).hexdigest()[:16]
    path = Path(args.cache) / f"reference-{key}.safetensors"
    sides = {"train": dataset.train, "val": dataset.val}
    with parallel.one_per_machine_first() as is_first:
        if is_first and not fits(path, sides):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {name: logps_of(model, rows, args) for name, rows in sides.items()})
    for name, values in read_tensors(path)[0].items():
        sides[name].reference = np.asarray(values)
    return dataset
