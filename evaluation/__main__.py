"""Evaluation: one command that measures models on tasks, and prints a table of figures.

Beside each figure are its standard error, the figure of random choices ("chance"), and the best figure of
rules without a model, such as always choosing the longest text.

    python -m evaluation runs/gpt/model                               the default tasks, see stdlib_suite.py
    python -m evaluation runs/gpt/model runs/moe/model --out all.json models side by side, compared in pairs
    python -m evaluation Qwen3-0.6B --tasks hellaswag_val.jsonl ARC-Easy-Test.jsonl --limit 500
    python -m evaluation Qwen3-0.6B --tasks gsm8k_test.jsonl --shots 5 --shots-from gsm8k_train.jsonl
    python -m evaluation Qwen3-0.6B --tasks HumanEval.jsonl --samples 20 --temperature 0.8

Weights are float32. A model whose predictions depend on later tokens is refused, since its figures would mean
nothing.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from evaluation import glue, sandbox
from evaluation.generation import (
    QUESTION_STOPS,
    count_passing,
    pass_at_k,
    score_question,
    write,
    write_programs,
)
from evaluation.multiple_choice import (
    RULES,
    answer_items,
    chance,
    compare,
    load,
    log_likelihoods,
    rows_of,
    standard_error,
)
from evaluation.perplexity import check_causal, nats
from evaluation.published import TaskFile, read, with_examples
from evaluation.stdlib_suite import dull_baselines, suite
from formats import command
from formats.atomic import replace_file
from formats.open_model import concept_of

PRINTED = ("acc", "acc_norm")  # the rules of multiple choice in the table; the JSON has all
NOT_SHARES = ("bits per byte", "perplexity", "matthews")  # rules whose figures are not printed in percent


@dataclass
class Figure:
    """One figure of a model on a task."""

    task: str
    rule: str  # how items become a figure, such as "acc" or "pass@1"
    value: float
    error: float  # standard error; nan where there is none
    n: int  # items
    chance: float = math.nan  # the figure of random choices
    baselines: dict[str, float] = field(default_factory=dict)  # figures of rules without a model
    n_cut: int = 0  # items whose beginning did not fit into what the model reads
    per_item: list[float] = field(default_factory=list)  # of which value is the mean; or empty


def figure(task: str, rule: str, values: Sequence[float], groups: Sequence[str] = (), **more) -> Figure:
    """Return the figure that is the mean of values, one per item. groups: see `standard_error`; more: further
    fields of Figure."""
    mean = sum(values) / len(values)
    return Figure(
        task, rule, mean, standard_error(values, groups), len(values), per_item=list(values), **more
    )


# --- one function per kind of task


def choice_figures(model, tokenizer, task: TaskFile, args: argparse.Namespace) -> list[Figure]:
    """Return the accuracy by each rule of multiple choice."""
    answers = answer_items(model, tokenizer, task.items, args.batch_size)
    more = {"chance": chance(task.items), "baselines": dull_baselines(task.items)}
    more["n_cut"] = sum(answer.n_cut > 0 for answer in answers)
    groups = [item.group for item in task.items]
    return [figure(task.name, r, [float(x.is_right(r)) for x in answers], groups, **more) for r in RULES]


def word_figures(model, tokenizer, task: TaskFile, args: argparse.Namespace) -> list[Figure]:
    """Return LAMBADA's figures: the share of words that greedy decoding writes, and exp(nats per word)."""
    max_len = model.config.max_seq_len
    rows = [rows_of(tokenizer, x.context, [x.delimiter + x.choices[0]], max_len)[0] for x in task.items]
    scores = log_likelihoods(model, rows, args.batch_size)
    n_cut, n = sum(row.n_cut > 0 for row in rows), len(rows)
    nats_per_word = -sum(score.log_p for score in scores) / n
    value = math.exp(min(nats_per_word, 700))  # exp(710) is more than a float can hold
    perplexity = Figure(task.name, "perplexity", value, math.nan, n, n_cut=n_cut)
    return [figure(task.name, "acc", [float(x.is_greedy) for x in scores], n_cut=n_cut), perplexity]


def question_figures(model, tokenizer, task: TaskFile, args: argparse.Namespace) -> list[Figure]:
    """Return the share of right answers by each rule of `score_question`."""
    # An answer of GSM8K is several lines, with "####" in front of the number; other answers are one line.
    stops = QUESTION_STOPS if any("####" in item.answer for item in task.items) else ("\n",)
    prompts = [item.prompt for item in task.items]
    texts = write(model, tokenizer, prompts, stops, args.max_new_tokens or 256, args.batch_size)
    found = [score_question(text.text, item.answer) for text, item in zip(texts, task.items, strict=True)]
    answers = [item.answer for item in task.items]
    more = {"baselines": {"most frequent answer": max(map(answers.count, set(answers))) / len(answers)}}
    more["n_cut"] = sum(text.n_cut > 0 for text in texts)
    return [figure(task.name, rule, [float(x[rule]) for x in found], **more) for rule in found[0]]


def program_figures(model, tokenizer, task: TaskFile, args: argparse.Namespace) -> list[Figure]:
    """Return pass@1, and if there are enough samples pass@10 and pass@100."""
    n = args.samples
    most = args.max_new_tokens or 512
    completions = write_programs(
        model, tokenizer, task.items, n, args.temperature, args.seed, most, args.batch_size
    )
    passing = count_passing(task.items, completions)
    figures = []
    for k in (1, 10, 100):
        if k <= n:
            values = [pass_at_k(n, c, k) for c in passing]
            figures.append(figure(task.name, f"pass@{k}", values, baselines={"`pass`": 0.0}))
    return figures


def text_figures(model, tokenizer, task: TaskFile, args: argparse.Namespace) -> list[Figure]:
    """Return the bits per byte of texts, each behind the tokens that the tokenizer puts in front of a text,
    or else behind the one that separates documents; see perplexity.py.

    Chance is 8 bits: if all 256 values of a byte are equally likely, each has probability 2^-8.
    """
    device, total, n_bytes = next(model.parameters()).device, 0.0, 0
    for text in task.items:
        begin = tokenizer.begin_ids or [tokenizer.eot_id]
        tokens = torch.tensor([*begin, *tokenizer.encode(text)], device=device)
        total += nats(model, tokens, max(1, model.config.max_seq_len // 2))
        n_bytes += len(text.encode())
    bits = total / math.log(2) / n_bytes
    return [Figure(task.name, "bits per byte", bits, math.nan, len(task.items), chance=8.0)]


FIGURES = {
    "choice": choice_figures,
    "word": word_figures,
    "question": question_figures,
    "program": program_figures,
    "text": text_figures,
}


def glue_figures(directory: Path, tasks: Sequence[TaskFile], batch_size: int) -> list[Figure]:
    """Return the figures of a text classifier on GLUE's tasks.

    The baseline is the most frequent label, and of equally frequent ones the first in the file. STS-B has
    none, since the correlation with a constant is 0.
    """
    from data.tokenizer import get_tokenizer
    from formats.open_model import open_model

    model, tokenizer, figures = open_model(directory), get_tokenizer(str(directory)), []
    for task in tasks:
        labels = [example.label for example in task.items]
        majority = Counter(labels).most_common(1)[0][0]
        found = glue.evaluate(model, tokenizer, task.name, task.items, batch_size)
        for name, value in found.items():
            dull = {}
            if task.name != "stsb":
                dull = {"most frequent label": getattr(glue, name)([majority] * len(labels), labels)}
            figures.append(Figure(task.name, name, value, math.nan, len(labels), baselines=dull))
    return figures


def is_classifier(directory: Path, tasks: Sequence[TaskFile]) -> bool:
    """Return whether the model in a directory classifies texts, which are GLUE's tasks; all others are for
    decoders. Raises ValueError for tasks that do not fit it."""
    classifies = concept_of(directory) == "posttraining.classify"
    wrong = [task.name for task in tasks if (task.kind == "glue") != classifies]
    if wrong:
        need = "a decoder" if classifies else "a text classifier"
        raise ValueError(f"{directory}: task {wrong[0]} needs {need}")
    return classifies


def evaluate(directory: Path, tasks: Sequence[TaskFile], args: argparse.Namespace) -> list[Figure]:
    """Return the figures of the model in a directory. Raises ValueError for tasks that do not fit it."""
    if is_classifier(directory, tasks):
        return glue_figures(directory, tasks, args.batch_size)
    model, tokenizer = load(directory)
    check_causal(model)
    figures = []
    for task in tasks:
        print(f"{directory}: {task.name}", file=sys.stderr)
        figures += FIGURES[task.kind](model, tokenizer, task, args)
    return figures


# --- the table and the file


def as_text(value: float, rule: str) -> str:
    """Return a figure as the table prints it: in percent where it is a share, "" for nan."""
    if math.isnan(value):
        return ""
    return f"{value:.3f}" if rule in NOT_SHARES else f"{100 * value:.1f}"


def table(models: Sequence[Path], figures: Sequence[Sequence[Figure]]) -> list[str]:
    """Return the lines of a table with a column per model: shares in percent, ± a standard error.

    figures: the list of each model, all of the same tasks and rules in the same order.
    """
    rows = [["task", "figure", "n", "chance", "without a model", *map(str, models)]]
    for same in zip(*figures, strict=True):
        # The cells that are the same for all models.
        first = same[0]
        if first.rule in RULES and first.rule not in PRINTED:
            continue
        name, best = max(first.baselines.items(), key=lambda x: x[1], default=("", math.nan))
        cells = [first.task, first.rule, str(first.n), as_text(first.chance, first.rule)]
        cells.append(f"{as_text(best, first.rule)} {name}".strip())

        # One cell for each model: its figure, the standard error, and the number of items that were cut.
        for x in same:
            error = "" if math.isnan(x.error) else f" ± {as_text(x.error, x.rule)}"
            cells.append(f"{as_text(x.value, x.rule)}{error}{f' ({x.n_cut} cut)' if x.n_cut else ''}")
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def comparisons(models: Sequence[Path], figures: Sequence[Sequence[Figure]]) -> list[dict]:
    """Return how each further model differs from the first one on the same items; see `compare`.

    Only figures of which every item is right or wrong are compared.
    """
    found = []
    for model, others in zip(models[1:], figures[1:], strict=True):
        for a, b in zip(figures[0], others, strict=True):
            if a.per_item and set(a.per_item) | set(b.per_item) <= {0.0, 1.0}:
                difference, error, p = compare(a.per_item, b.per_item)
                row = {"model": str(model), "task": a.task, "rule": a.rule, "difference": difference}
                found.append(row | {"standard_error": error, "p": p})
    return found


def without_nan(value):
    """Return a value for JSON, which has no nan: None stands in its place."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def read_tasks(args: argparse.Namespace) -> list[TaskFile]:
    """Return the tasks that the flags name. Raises ValueError for a file or a number that cannot be used."""
    # Refuse numbers out of range.
    for flag in ("batch_size", "samples", "max_new_tokens", "limit"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")
    if args.shots_from and not args.shots:
        raise ValueError(f"--shots-from {args.shots_from}: needs --shots K, the number of examples")
    if args.shots < 0 or not 0 <= args.temperature < math.inf:
        raise ValueError(f"--shots {args.shots}, --temperature {args.temperature}: expected at least 0")
    if args.samples > 1 and args.temperature == 0:
        raise ValueError(f"--samples {args.samples}: equal at --temperature 0; expected more, such as 0.8")

    # Read the tasks, and put examples in front of the questions: the first ones of another file, or random
    # ones of the task's own. The default tasks take none.
    tasks = []
    for name in args.tasks:
        if name == "stdlib":
            if args.shots:
                raise ValueError(f"--shots {args.shots}: the tasks of stdlib take no examples; expected 0")
            tasks += suite(args.limit or 200, args.seed)
            continue
        task = read(name)
        pool = read(args.shots_from, "--shots-from") if args.shots_from else task
        if pool.kind != task.kind:
            kinds = f"its items are of kind {pool.kind}, those of {task.name} are of kind {task.kind}"
            raise ValueError(f"--shots-from {args.shots_from}: {kinds}; expected the same")
        asked = TaskFile(task.name, task.kind, task.items[: args.limit])
        tasks.append(with_examples(asked, pool.items, args.shots, None if args.shots_from else args.seed))
    tasks = [TaskFile(task.name, task.kind, task.items[: args.limit]) for task in tasks]

    # Programs are run only where the sandbox lacks nothing.
    if any(task.kind == "program" for task in tasks) and not args.unprotected:
        lacking = sandbox.lacking()
        if lacking:
            advice = "use a machine with Linux, or accept the risk by --unprotected"
            raise ValueError(f"programs of a model would run with {'; '.join(lacking)}; {advice}")
    return tasks


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the values of the flags."""
    parser = command.Parser(description="Measure models on tasks, beside chance and rules without a model.")
    add = parser.add_argument
    add("models", nargs="+", type=command.path, metavar="MODEL", help="directories of models")
    files = "stdlib (default), or benchmark files, see evaluation/published.py"
    add("--tasks", nargs="+", type=command.filled, default=["stdlib"], metavar="TASK", help=files)
    add("--limit", type=int, metavar="N", help="items per task at most (default: all; 200 of stdlib)")
    add("--shots", type=int, default=0, metavar="K", help="solved examples before a question (default 0)")
    pool = "file whose first K items are the examples (default: drawn from the task's other items)"
    add("--shots-from", type=command.filled, metavar="FILE", help=pool)
    add("--batch-size", type=int, default=16, metavar="ROWS", help="rows per pass (default %(default)s)")
    length = "tokens of an answer at most (default: 256 to a question, 512 of a program)"
    add("--max-new-tokens", type=int, metavar="N", help=length)
    add("--samples", type=int, default=1, metavar="N", help="programs per problem, for pass@k (default 1)")
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="temperature of these programs (default 0)",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of all random numbers (default 0)")
    add("--out", type=command.new_file, metavar="FILE", help="write all figures, also per item, as JSON")
    add("--unprotected", action="store_true", help="run programs even if the sandbox is incomplete")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    tasks = read_tasks(args)
    for directory in args.models:
        is_classifier(directory, tasks)  # so that a mistake is named before any model is evaluated
    figures = [evaluate(directory, tasks, args) for directory in args.models]
    print("\n".join(table(args.models, figures)))

    # Compare further models with the first one.
    compared = comparisons(args.models, figures)
    for row in compared:
        if row["rule"] in ("acc", "acc_norm", "exact_match", "strict", "pass@1"):
            difference = f"{100 * row['difference']:+.1f} ± {100 * row['standard_error']:.1f}"
            what = f"{row['model']} - {args.models[0]}: {row['task']} {row['rule']}"
            print(f"{what} {difference}, p {row['p']:.2g}")

    # Write the JSON, with one figure or one comparison on each line.
    if args.out:
        results = [
            {"model": str(model)} | asdict(x)
            for model, found in zip(args.models, figures, strict=True)
            for x in found
        ]
        parts = {"results": results, "comparisons": compared}
        rows = {
            name: ",\n".join(json.dumps(without_nan(row)) for row in part) for name, part in parts.items()
        }
        text = ",\n".join(f'"{name}": [\n{lines}\n]' for name, lines in rows.items())
        with replace_file(args.out) as new:
            new.write_text(f"{{{text}}}\n", encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
