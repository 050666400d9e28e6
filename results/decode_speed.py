"""How fast is greedy decoding with a cache beside `generate` of transformers, for small random models?

    python -m results.decode_speed --out results/decode_speed.json        (needs tests/requirements.txt)

Both sides have the same weights, in float32, and continue prompts of 16 tokens by 128. They must choose the
same tokens, which is checked before any timing, and are measured in turn. The time includes that of the
prompts.
"""

import os
from collections.abc import Callable
from functools import partial

import torch

from formats import command
from gpt import GPT, SIZES, Config
from results.in_turn import arguments, compared, measure_in_turn, opened_by, rate, write_figures
from results.peers import require

SHAPES = {
    "4 layers, width 64": Config(4, 4, 64, 176, 8192, 512, n_kv_heads=2),
    "4 layers, width 128": Config(4, 4, 128, 352, 8192, 512, n_kv_heads=2),
    "4 layers, width 256": Config(4, 8, 256, 688, 8192, 512, n_kv_heads=4),
    "10M parameters": SIZES["10m"],  # a Qwen3
}
PROMPT, NEW = 16, 128  # tokens


def both_models(config: Config) -> tuple[GPT, torch.nn.Module]:
    """Return our model with random weights, and the same one as transformers opens it."""
    import transformers

    torch.manual_seed(0)
    ours = GPT(config).eval()
    return ours, opened_by(transformers.AutoModelForCausalLM, ours)


def generators(ours: GPT, theirs, batch: int) -> dict[str, Callable[[], list[list[int]]]]:
    """Return for each side a function that continues the same random prompts and returns the new tokens."""
    prompts = torch.randint(ours.config.vocab_size, (batch, PROMPT))
    mask = torch.ones_like(prompts)
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}
    return {
        "transformers": lambda: theirs.generate(prompts, attention_mask=mask, **options)[:, PROMPT:].tolist(),
        "plinth": lambda: ours.generate(prompts, NEW, temperature=0),
        "plinth, compiled": lambda: ours.generate(prompts, NEW, temperature=0, compile=True),
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, 7, argv)
    require("transformers")
    results, load = [], os.getloadavg()[0]
    for name, shape in SHAPES.items():
        ours, theirs = both_models(shape)
        for batch in (1, 8):
            sides = generators(ours, theirs, batch)
            first, *others = [generate() for generate in sides.values()]
            if any(tokens != first for tokens in others):
                raise ValueError(f"{name}, batch {batch}: the two sides choose different tokens")
            print(f"{name}, batch {batch}")
            timed = {side: partial(rate, generate, batch * NEW) for side, generate in sides.items()}
            figures = measure_in_turn(timed, args.rounds)
            results += compared(figures, "transformers", shape=name, batch=batch)
    if args.out:
        write_figures(args.out, "decode_speed", load, results)


if __name__ == "__main__":
    command.run(main)
