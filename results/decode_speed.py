"""Cached greedy decoding on this machine, beside transformers' generate, of small random models.

    python -m results.decode_speed --out results/decode_speed.json        (needs tests/requirements.txt)

Both sides continue the same prompts by the same tokens (checked), in float32, prefill included, measured in
turn (A B A B ...).
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from gpt import GPT, SIZES, Config
from results.in_turn import compared, measure_in_turn, opened_by, rate, write_figures

SHAPES = {
    "4 layers, width 64": Config(4, 4, 64, 176, 8192, 512, n_kv_heads=2),
    "4 layers, width 128": Config(4, 4, 128, 352, 8192, 512, n_kv_heads=2),
    "4 layers, width 256": Config(4, 8, 256, 688, 8192, 512, n_kv_heads=4),
    "10M parameters": SIZES["10m"],  # a Qwen3
}
PROMPT, NEW = 16, 128  # tokens


def both_models(config: Config):
    """Return our model with random weights, and the same one as transformers opens it."""
    import transformers

    torch.manual_seed(0)
    ours = GPT(config).eval()
    return ours, opened_by(transformers.AutoModelForCausalLM, ours)


def generators(ours: GPT, theirs, batch: int) -> dict[str, Callable[[], list[list[int]]]]:
    """Return for each side a function that continues the same random prompts."""
    prompts = torch.randint(ours.config.vocab_size, (batch, PROMPT))
    mask = torch.ones_like(prompts)
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}
    return {
        "transformers": lambda: theirs.generate(prompts, attention_mask=mask, **options)[:, PROMPT:].tolist(),
        "plinth": lambda: ours.generate(prompts, NEW, temperature=0),
        "plinth, compiled": lambda: ours.generate(prompts, NEW, temperature=0, compile=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="measurements of each side (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    results, load = [], os.getloadavg()[0]
    for name, shape in SHAPES.items():
        ours, theirs = both_models(shape)
        for batch in (1, 8):
            sides = generators(ours, theirs, batch)
            first, *others = [generate() for generate in sides.values()]
            if any(tokens != first for tokens in others):
                raise SystemExit(f"{name}, batch {batch}: the tokens differ")
            print(f"{name}, batch {batch}")
            timed = {side: partial(rate, generate, batch * NEW) for side, generate in sides.items()}
            figures = measure_in_turn(timed, args.rounds)
            results += compared(figures, "transformers", shape=name, batch=batch)

    if args.out:
        write_figures(args.out, "decode_speed", load, results)


if __name__ == "__main__":
    main()
