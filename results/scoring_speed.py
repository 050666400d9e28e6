"""Scoring of multiple choice on this machine, beside lm-evaluation-harness, of the same random model.

    python -m results.scoring_speed --out results/scoring_speed.json       (needs lm_eval[hf]==0.4.13)

Both sides score the same contexts and choices, of the default task `purpose` (stdlib_suite.py), in float32,
in batches of 16, tokenisation included, in turn (A B A B ...). The log-likelihoods are compared first.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from data.tokenizer import train_bpe
from engine import cpu
from evaluation.multiple_choice import log_likelihoods, rows_of
from evaluation.published import with_examples
from evaluation.stdlib_suite import held_out_modules, suite
from gpt import GPT, Config
from results.in_turn import compared, measure_in_turn

SHAPES = {
    "4 layers, width 128": Config(4, 4, 128, 352, 4096, 512, n_kv_heads=2),
    "4 layers, width 256": Config(4, 8, 256, 688, 4096, 512, n_kv_heads=4),
}
SHOTS = {"no examples": 0, "5 examples in front": 5}
BATCH = 16  # rows


def both_sides(config: Config, items: list) -> dict[str, Callable[[], list[float]]]:
    """Return for each side a function that scores all choices of the items."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    # The same model and tokenizer, saved once.
    torch.manual_seed(0)
    model = GPT(config).eval()
    tokenizer = train_bpe([text for _, text in held_out_modules()], config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save(Path(folder))
        theirs = HFLM(pretrained=folder, device="cpu", batch_size=BATCH, dtype="float32")

    pairs = [(item.context, item.delimiter + choice) for item in items for choice in item.choices]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]

    def ours() -> list[float]:
        rows = []
        for item in items:
            texts = [item.delimiter + choice for choice in item.choices]
            rows += rows_of(tokenizer, item.context, texts, config.max_seq_len)
        return [score.log_p for score in log_likelihoods(model, rows, BATCH)]

    return {
        "lm_eval": lambda: [log_p for log_p, _ in theirs.loglikelihood(requests, disable_tqdm=True)],
        "plinth": ours,
    }


def choices_per_second(score: Callable[[], list[float]]) -> float:
    began = time.perf_counter()
    return len(score()) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="measurements of each side (default %(default)s)")
    add("--items", type=int, default=40, help="questions per task (default %(default)s)")
    add("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    results, load = [], os.getloadavg()[0]
    purpose = next(task for task in suite(args.items) if task.name == "purpose")
    for shape, config in SHAPES.items():
        for name, n in SHOTS.items():
            sides = both_sides(config, with_examples(purpose, purpose.items, n, seed=0).items)
            a, b = (torch.tensor(score()) for score in sides.values())
            # A border inside a token is scored differently, see multiple_choice.py; all others agree.
            agree = ((a - b).abs() < 1e-3).float().mean().item()
            print(f"{shape}, {name}: {len(a)} choices, {agree:.1%} with equal log-likelihoods")
            if agree < 0.8:
                raise SystemExit("the sides compute different figures")
            timed = {side: partial(choices_per_second, score) for side, score in sides.items()}
            figures = measure_in_turn(timed, args.rounds)
            results += compared(figures, "lm_eval", shape=shape, prompt=name, agree=agree)

    if args.out:
        machine = {"cpu": cpu.name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        machine |= {"lm_eval": version("lm_eval"), "load_average": load}
        command = "python -m results.scoring_speed --out results/scoring_speed.json"
        content = {"command": command, **machine, "unit": "choices per second", "results": results}
        args.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
