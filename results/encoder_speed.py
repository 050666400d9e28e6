"""Work that an encoder leaves out because its result is not used: two pairs, measured in turn.

    python -m results.encoder_speed --out results/encoder_speed.json

masked places alone: a training step (forward and backward, without an optimizer) of bert.py's two tiny sizes
with BERT's 30,522 tokens, on 16 rows of 128. Head and loss run on the 15 percent of places that are masked.
Beside it the same step with logits at every place, of which the loss ignores all but these.

packed: forward and backward of the same encoders, without a head, on 16 texts of 8 to 128 tokens (equally
likely) that are packed end to end into one row. Beside it the same texts, each a row that is padded to the
length of the longest. The padding is not masked in attention, which would cost more.

All in float32, in one process. A figure is the median over the rounds, with the smallest and largest.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bert import BERT, SIZES
from formats import command
from language import masking
from language.encoder_inference import pack
from results.in_turn import arguments, in_milliseconds, measure_in_turn, seconds, shown, write_figures

T, BATCH, VOCABULARY = 128, 16, 30522


def forward_and_backward(loss: Callable[[], Tensor], model: BERT) -> float:
    """Return the seconds of the forward and the backward pass of a loss of the model."""
    elapsed = seconds(lambda: loss().backward())
    model.zero_grad(set_to_none=True)
    return elapsed


def masked_places(size: str) -> tuple[BERT, dict[str, Callable[[], Tensor]]]:
    """Return a model, and two functions that compute its loss on masked places."""
    model = BERT(replace(SIZES[size], vocab_size=VOCABULARY, max_seq_len=T))
    tokens = torch.randint(VOCABULARY, (BATCH, T))
    n = masking.Config().n_masked(T)
    positions = torch.arange(BATCH)[:, None] * T + torch.rand(BATCH, T).argsort(1)[:, :n]
    targets = torch.randint(VOCABULARY, (BATCH, n))
    labels = torch.full((BATCH * T,), -100).index_put((positions,), targets)
    batch = {"tokens": tokens, "positions": positions, "targets": targets}
    return model, {
        "masked places alone": lambda: masking.loss(model, batch)[0],
        "logits at every place": lambda: F.cross_entropy(model(tokens).flatten(0, 1), labels),
    }


def packed(size: str) -> tuple[BERT, dict[str, Callable[[], Tensor]]]:
    """Return an encoder, and two functions that sum its hidden states: of packed texts, and of padded
    ones."""
    model = BERT(replace(SIZES[size], vocab_size=VOCABULARY, max_seq_len=T, mlm_head=False))
    lengths = torch.randint(8, T + 1, (BATCH,))
    rows = [torch.randint(VOCABULARY, (n,)).tolist() for n in lengths]
    row, cu_seqlens = pack(rows)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return model, {
        "packed": lambda: model.hidden(row, cu_seqlens=cu_seqlens).sum(),
        "padded": lambda: model.hidden(padded).sum(),
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, 9, argv)
    load, results = os.getloadavg()[0], []
    torch.manual_seed(0)
    for size in ("tiny", "tiny-bert"):
        for pair in (masked_places, packed):
            model, losses = pair(size)
            sides = {side: partial(forward_and_backward, loss, model) for side, loss in losses.items()}
            (ours, fast), (other, slow) = measure_in_turn(sides, args.rounds, warm_up=1).items()
            row = {"size": size, "side": ours, "beside": other} | in_milliseconds(fast, slow)
            results.append(row)
            print(f"{size:10} {ours} {row['ms']:.0f} ms, {other} {row['beside_ms']:.0f} ms: {shown(row)}",
                  flush=True)  # fmt: skip
    if args.out:
        write_figures(args.out, "encoder_speed", load, results, peer=None)


if __name__ == "__main__":
    command.run(main)
