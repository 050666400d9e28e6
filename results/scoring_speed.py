"""Choices per second in the scoring of multiple choice, beside lm-evaluation-harness, of one random model.

    python -m results.scoring_speed --out results/scoring_speed.json       (needs lm_eval[hf]==0.4.13)

Both sides score the same contexts and choices, those of the task `purpose` (evaluation/stdlib_suite.py), in
float32, in batches of 16, tokenisation included, in turn (A B A B ...). First the log-likelihoods of both are
compared.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from data.tokenizer import train_bpe
from evaluation.multiple_choice import log_likelihoods, rows_of
from evaluation.published import with_examples
from evaluation.stdlib_suite import held_out_modules, suite
from formats import command
from gpt import GPT, Config
from results.in_turn import compared, measure_in_turn, rate, write_figures
from results.peers import require

SHAPES = {
    "4 layers, width 128": Config(4, 4, 128, 352, 4096, 512, n_kv_heads=2),
    "4 layers, width 256": Config(4, 8, 256, 688, 4096, 512, n_kv_heads=4),
}
SHOTS = {"no examples": 0, "5 examples in front": 5}
BATCH = 16  # rows


def both_sides(config: Config, items: list) -> dict[str, Callable[[], list[float]]]:
    """Return for each side a function that returns the log-likelihoods of all choices of the items."""
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


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=command.count, default=5, help="measurements of each side (default %(default)s)")
    add("--items", type=command.count, default=40, help="questions per task (default %(default)s)")
    add("--out", type=command.new_file, help="write the figures as JSON")
    args = parser.parse_args(argv)
    require("lm_eval", "lm_eval[hf]==0.4.13")

    results, load = [], os.getloadavg()[0]
    purpose = next(task for task in suite(args.items) if task.name == "purpose")
    for shape, config in SHAPES.items():
        for name, n in SHOTS.items():
            sides = both_sides(config, with_examples(purpose, purpose.items, n, seed=0).items)
            a, b = (torch.tensor(score()) for score in sides.values())
            # The sides differ where a token spans the border of context and choice, see multiple_choice.py.
            agree = ((a - b).abs() < 1e-3).float().mean().item()
            print(f"{shape}, {name}: {len(a)} choices, {agree:.1%} with equal log-likelihoods")
            if agree < 0.8:
                raise ValueError(f"{shape}, {name}: the log-likelihoods differ")
            timed = {side: partial(rate, score, len(a)) for side, score in sides.items()}
            figures = measure_in_turn(timed, args.rounds)
            labels = {"shape": shape, "prompt": name, "agree": agree}
            results += compared(figures, "lm_eval", unit="choices", **labels)

    if args.out:
        write_figures(args.out, "scoring_speed", load, results, peer="lm_eval")


if __name__ == "__main__":
    command.run(main)
