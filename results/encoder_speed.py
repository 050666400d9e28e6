"""Work that an encoder leaves out because its result is not used: two pairs, timed in turn.

    python -m results.encoder_speed --out results/encoder_speed.json

masked places alone: a training step (forward and backward, without an optimizer) of bert.py's two tiny sizes
with BERT's 30,522 tokens on rows of 128. Head and loss run on the 15 percent of places that are masked.
Beside it the same step with logits at every place, where the loss ignores all but these.

packed: forward and backward of the same encoders, without a head, on texts of mixed lengths (8 to 128 tokens,
equally likely) that are packed end to end into one row. Beside it the same texts padded to the longest. The
padding is not hidden from attention, which would cost more.

float32, one process; a figure is the median over the rounds, with the smallest and largest.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from bert import BERT, SIZES
from engine import cpu
from language import masking
from language.encoder_inference import pack

T, BATCH, VOCABULARY = 128, 16, 30522


def seconds(step: Callable[[], torch.Tensor], model: BERT) -> float:
    """Return the time of a step's forward and backward pass."""
    began = time.perf_counter()
    step().backward()
    elapsed = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return elapsed


def masked_places(size: str) -> tuple[BERT, dict[str, Callable[[], torch.Tensor]]]:
    """Return a model, and the loss on masked places computed in two ways."""
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


def packed(size: str) -> tuple[BERT, dict[str, Callable[[], torch.Tensor]]]:
    """Return an encoder, and the sum of its hidden states of texts that are packed or padded."""
    model = BERT(replace(SIZES[size], vocab_size=VOCABULARY, max_seq_len=T, mlm_head=False))
    lengths = torch.randint(8, T + 1, (BATCH,))
    rows = [torch.randint(VOCABULARY, (n,)).tolist() for n in lengths]
    row, cu_seqlens = pack(rows)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

    return model, {
        "packed": lambda: model.hidden(row, cu_seqlens=cu_seqlens).sum(),
        "padded": lambda: model.hidden(padded).sum(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=9, help="measurements of each side (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    results = []
    for size in ("tiny", "tiny-bert"):
        for pair in (masked_places, packed):
            model, sides = pair(size)
            # Time both sides in turn.
            times = {side: [] for side in sides}
            for i in range(args.rounds + 1):
                for side, step in sides.items():
                    elapsed = seconds(step, model)
                    if i > 0:  # the first warms up
                        times[side].append(elapsed)
            # Compare them round by round.
            (ours, fast), (other, slow) = times.items()
            ratios = [b / a for a, b in zip(fast, slow, strict=True)]
            row = {"size": size, "side": ours, "beside": other, "ms": 1e3 * statistics.median(fast)}
            row |= {"beside_ms": 1e3 * statistics.median(slow), "ratio": statistics.median(ratios)}
            results.append(row | {"ratio_min": min(ratios), "ratio_max": max(ratios)})
            print(f"{size:10} {ours} {row['ms']:.0f} ms, {other} {row['beside_ms']:.0f} ms: ", end="")
            print(f"{row['ratio']:.2f}x ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
    if args.out:
        machine = {"cpu": cpu.name(), "threads": torch.get_num_threads()}
        machine |= {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
        command = "python -m results.encoder_speed --out results/encoder_speed.json"
        args.out.write_text(
            json.dumps({"command": command, **machine, "results": results}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
