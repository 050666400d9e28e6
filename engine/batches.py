"""Batches: from rows to what one rank computes in one update.

    rows -> make_batch -> this rank's part of it -> --document-mask -> the device

The batches of an update are a function of (seed, step) alone. A thread prepares those of the next update
while the device computes this one.
"""

from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.rows import Dataset, Loader, Row, cu_seqlens, in_order, seed_of, shapes
from engine import parallel
from engine.contract import Task


class Part(NamedTuple):
    """This rank's part of one batch."""

    batch: dict[str, Tensor]
    weight: float  # n_targets over the targets of the whole update, which has all parts on all ranks
    n_targets: int


class HeldOutPart(NamedTuple):
    """This rank's part of one batch of the held-out rows."""

    batch: dict[str, Tensor]
    n_targets: int
    is_whole: bool  # False for the last rows: they may have another shape, and each rank gets all of them


class Batches:
    """The batches of a run: for training by `next`, for evaluation by `held_out`."""

    def __init__(self, args: Namespace, task: Task, settings: Any, dataset: Dataset):
        self.args, self.task, self.settings, self.dataset = args, task, settings, dataset
        self.loader = Loader(dataset.train, args.seed)
        self.thread = ThreadPoolExecutor(1)
        self.step, self.ahead = -1, Future()  # the update whose parts are being prepared, and these parts

    def start(self, step: int) -> None:
        """Begin to prepare the batches of this update; ValueError if the task cannot use such rows."""
        self.step = step
        self.ahead = self.thread.submit(self.of_update, step)
        self.ahead.result()

    def peek(self) -> list[Part]:
        """Return the parts of the update that comes next."""
        return self.ahead.result()

    def next(self) -> list[Part]:
        """Return the parts of the next update, and begin to prepare those of the one after it."""
        parts = self.ahead.result()
        self.step += 1
        self.ahead = self.thread.submit(self.of_update, self.step)
        return parts

    def close(self) -> None:
        self.thread.shutdown()

    def of_update(self, step: int) -> list[Part]:
        """Return this rank's parts of the --grad-accum batches of an update, in the host's memory."""
        args, task = self.args, self.task
        parts, n_targets, n_own = [], 0, []
        for index in range(step * args.grad_accum, (step + 1) * args.grad_accum):
            # An endless stream, the shuffled rows of epoch after epoch, is cut into batches: this is batch
            # number `index` of it.
            rows = self.loader.read(index * args.batch_size, args.batch_size)
            batch = self.make(rows, seed_of(args.seed, index))
            own = self.split(batch)
            n_targets += task.count(batch)
            n_own.append(task.count(own))
            parts.append(self.finish(own))
        return [Part(batch, n / max(1, n_targets), n) for batch, n in zip(parts, n_own, strict=True)]

    def held_out(self) -> Iterator[HeldOutPart]:
        """Yield this rank's parts of all held-out rows, in order: the same batches at every evaluation."""
        rows, size = self.dataset.val, self.args.batch_size
        whole = shapes(rows[0])
        for index, some in enumerate(in_order(rows, size)):
            batch = self.make(some, index)
            is_whole = len(some) == size and shapes(some[0]) == whole
            part = self.split(batch) if is_whole else batch
            yield HeldOutPart(self.finish(part), self.task.count(part), is_whole)

    def make(self, rows: list[Row], seed: int) -> dict[str, Tensor]:
        """Return the whole batch of these rows, by the task's make_batch: for gpt.py tokens and targets."""
        generator = torch.Generator().manual_seed(seed)
        return self.task.make_batch(rows, self.settings, generator, self.dataset.tokenizer)

    def split(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's part of a batch."""
        n = parallel.world_size()
        return self.task.split(batch, parallel.rank(), n) if n > 1 else batch

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a batch with --document-mask applied; with CUDA it is in pinned memory, from which the GPU
        copies while the host goes on."""
        if self.args.document_mask and "cu_seqlens" not in batch:
            ends = cu_seqlens(batch["tokens"], self.dataset.tokenizer.eot_id)
            batch = {name: t.reshape(1, -1) for name, t in batch.items()} | {"cu_seqlens": ends}
        return {name: t.pin_memory() if self.args.device == "cuda" else t for name, t in batch.items()}


def to_device(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """Start to copy a batch to the device, without waiting for it."""
    return {name: t.to(device, non_blocking=True) for name, t in batch.items()}
