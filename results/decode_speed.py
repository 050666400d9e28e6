"""Cached greedy decoding on this machine, beside transformers' generate, of a small random Llama.

    python -m results.decode_speed --out results/decode_speed.json        (needs tests/requirements.txt)

Both sides continue the same prompts by the same tokens (checked), in float32, prefill included, in turn (A
B A B ...).
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from engine import cpu
from gpt import GPT, Config

SHAPES = {
    "4 layers, width 64": (4, 4, 2, 64, 176),
    "4 layers, width 128": (4, 4, 2, 128, 352),
    "4 layers, width 256": (4, 8, 4, 256, 688),
}
PROMPT, NEW = 16, 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    import transformers

    results = []
    for name, (n_layers, n_heads, n_kv_heads, d_model, d_ff) in SHAPES.items():
        torch.manual_seed(0)
        ours = GPT(Config(n_layers, n_heads, d_model, d_ff, 8192, 512, n_kv_heads=n_kv_heads)).eval()
        with tempfile.TemporaryDirectory() as folder:
            ours.save_pretrained(folder)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        for batch in (1, 8):
            prompts = torch.randint(8192, (batch, PROMPT))
            mask, options = (
                torch.ones_like(prompts),
                {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0},
            )

            def transformers_generate(prompts=prompts, mask=mask, options=options, model=theirs):
                return model.generate(prompts, attention_mask=mask, **options)[:, PROMPT:].tolist()

            def plinth_generate(prompts=prompts, model=ours, compile=False):
                return model.generate(prompts, NEW, temperature=0, compile=compile)

            sides = {
                "transformers": transformers_generate,
                "plinth": plinth_generate,
                "plinth, compiled": partial(plinth_generate, compile=True),
            }
            if not sides["transformers"]() == sides["plinth"]() == sides["plinth, compiled"]():
                raise SystemExit(f"{name}, batch {batch}: the tokens differ")
            seconds = {side: [] for side in sides}
            for _ in range(args.rounds):
                for side, run in sides.items():
                    began = time.perf_counter()
                    run()
                    seconds[side].append(time.perf_counter() - began)
            print(f"{name}, batch {batch}")
            for side, times in seconds.items():
                ratios = [theirs / mine for theirs, mine in zip(seconds["transformers"], times, strict=True)]
                row = {"shape": name, "batch": batch, "side": side}
                row |= {"tokens_per_second": batch * NEW / statistics.median(times)}
                row |= {
                    "ratio": statistics.median(ratios),
                    "ratio_min": min(ratios),
                    "ratio_max": max(ratios),
                }
                results.append(row)
                print(f"  {side:16} {row['tokens_per_second']:9,.0f} tokens/s   {row['ratio']:.2f}x", end="")
                print(f" ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})", flush=True)
    if args.out:
        machine = {"cpu": cpu.name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        machine |= {"transformers": transformers.__version__}
        command = "python -m results.decode_speed --out results/decode_speed.json"
        args.out.write_text(json.dumps({"command": command, **machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
