"""Rows: the form in which the trainer reads every kind of data.

    text, conversations, images, pairs ...  ->  Dataset of rows, row i a dict of arrays  ->  batches

A data set is two sequences of rows, one to learn from and one held out, and a fingerprint of their content.
`Loader` turns the first into an endless stream of samples: every epoch has each row once, in an order that is
a function of (seed, epoch) alone. So a checkpoint holds only the number of samples drawn, and the stream is
the same for any number of processes.

Shapes: B rows, T tokens of each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Row = dict[str, np.ndarray]


class Rows:
    """A sequence of rows: `len(rows)` of them, each `rows[i]` a dict of arrays."""

    # Rows of held-out text have these numbers, by which nats per token become bits per byte.
    n_targets: int | None = None  # targets if every token is predicted
    n_bytes: int | None = None  # bytes in UTF-8 that these tokens encode

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Row:
        return self.rows[i % len(self.rows)]

    def epoch_start(self, epoch: int) -> int:
        """Return the place of the first row of an epoch, where the first row of epoch 0 has place 0.

        The rows of epoch e are rows[epoch_start(e)] ... rows[epoch_start(e + 1) - 1]. Subclasses whose epochs
        differ in their number of rows override this.
        """
        return epoch * len(self)


@dataclass
class Dataset:
    """The rows that a task learns from, and those that it is evaluated on."""

    fingerprint: str  # a hash of everything that decides the rows
    tokenizer: Any  # Tokenizer, WordPiece, or None where there is no text
    train: Rows
    val: Rows  # held out
    summary: str = ""  # one line that describes the data
    text: str = ""  # a hash of the text alone, the same for every tokenizer; "" where there is no text
    guess: str = ""  # one line: the figures of a trivial guess on the held-out part
    unit: str = "tokens"  # what a run counts: a row is seq_len tokens, one image, or some seconds of sound
    units_per_row: float | None = None  # None: seq_len
    labels: tuple[str, ...] = ()  # the names of the classes, in the order of their numbers


def frequency_loss(counts: np.ndarray, held_out: np.ndarray) -> float:
    """Return the mean cross-entropy, in nats, of held-out tokens whose probabilities are their frequencies.

    counts: how often each token of the vocabulary occurs in training; each is counted once more.
    """
    return -float(np.log((counts + 1) / (counts + 1).sum())[held_out].mean())


class Loader:
    """An endless stream of samples from rows, shuffled anew in each epoch.

    Sample s is the same row for the same seed, whenever and wherever it is read. Raises ValueError if there
    are no rows.
    """

    def __init__(self, rows: Rows, seed: int):
        if not len(rows):
            raise ValueError("the data has no rows to learn from; expected at least one")
        self.rows, self.seed = rows, seed
        self.epoch, self.order = -1, np.empty(0, np.int64)  # the order of the epoch that was read last

    def row_number(self, sample: int) -> int:
        """Return the place of the row that is sample number `sample` of the stream."""
        # Find the epoch of this sample, starting at the epoch that was read last.
        epoch = max(self.epoch, 0)
        while self.rows.epoch_start(epoch) > sample:
            epoch -= 1
        while self.rows.epoch_start(epoch + 1) <= sample:
            epoch += 1
        first = self.rows.epoch_start(epoch)
        # Draw the order of the epoch if it is a new one.
        if epoch != self.epoch:
            n = self.rows.epoch_start(epoch + 1) - first
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(n)
        return first + int(self.order[sample - first])

    def read(self, first_sample: int, n: int) -> list[Row]:
        """Return samples first_sample ... first_sample + n - 1."""
        return [self.rows[self.row_number(first_sample + i)] for i in range(n)]


def seed_of(seed: int, index: int) -> int:
    """Return the seed, below 2^32, of the draws with number `index` of a run with this --seed.

    The draws of a run count up from seed * 0x9E3779B1, and runs with successive --seed begin a golden section
    of 2^32 apart. So of the first thousand runs no two share a draw within a million numbers. With --seed 0
    the result is `index`. It is below 2^32, since on a CPU torch.Generator reads only 32 bits.
    """
    return (seed * 0x9E3779B1 + index) % (1 << 32)


def in_order(rows: Rows, batch_size: int) -> Iterator[list[Row]]:
    """Yield all rows in order, in lists of batch_size rows; a row with other shapes begins a new list."""
    batch: list[Row] = []
    for i in range(len(rows)):
        row = rows[i]
        if batch and (len(batch) == batch_size or shapes(row) != shapes(batch[0])):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def shapes(row: Row) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in row.items()}


def stack(rows: list[Row]) -> dict[str, Tensor]:
    """Return one tensor (B, ...) per array of the B rows, whose arrays must have equal shapes."""
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def cu_seqlens(tokens: Tensor, eot_id: int) -> Tensor:
    """Return the places at which the n documents in tokens (B, T) begin, and B T at the end: int32 (n + 1,).

    Places count through all rows, as in `tokens.view(1, -1)`. With these rows and this cu_seqlens
    `kernels.attention` does not attend from one document to another. A document begins at each end-of-text
    token and at each row.
    """
    begins = tokens == eot_id
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([tokens.numel()])]).int()
