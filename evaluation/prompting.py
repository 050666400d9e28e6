"""Prompting: how much the accuracy changes if the same examples have another format, or another order.

    FileNotFoundError -> red              Input: FileNotFoundError        "FileNotFoundError": "red"
    len -> blue                           Output: red                     "len": "blue"
    KeyError ->                           ...                             ...

Format and order have no meaning, but they change the accuracy of few-shot prompting by tens of points, for
models of any size (Zhao et al. 2021, 2102.09690; Lu et al. 2022, 2104.08786; Sclar et al. 2024, 2310.11324).
So this command reports the spread of the accuracies, not the best of them. The questions are those of the
task k_shot in stdlib_suite.py: names have one of two arbitrary labels.

An accuracy p of n questions has a standard error of sqrt(p (1 - p) / n). So a spread may be due to chance:
the best and the worst of six independent accuracies are on average 2.5 standard errors apart. Three more
figures help where all accuracies are close to chance, as they are for models of a few million parameters:

    changed              share of the questions whose answer another format, or another order, changes
    last label           share of the answers that are the label of the last example (by chance 1/2)
    random labels        accuracy when the examples' labels are drawn at random. A model that learns from them
                         falls to chance; large ones hardly do (Min et al. 2022, 2202.12837)

    python -m evaluation.prompting runs/gpt/model
    python -m evaluation.prompting runs/gpt/model --questions 40 --seeds 3 --out results/few_shot.json
"""

import json
import math
import random
import statistics
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from torch import nn

from evaluation.multiple_choice import Item, answer_items, load
from evaluation.small_runs import mean_and_range
from evaluation.stdlib_suite import k_shot
from formats import command
from formats.atomic import replace_file

FORMATS = {  # of an example; a question ends where its label {y} would stand, without a space at the end
    "arrow": "{x} -> {y}\n",
    "colon": "{x}: {y}\n",
    "equals": "{x} = {y}\n",
    "is": "{x} is {y}\n",
    "question": "Input: {x}\nOutput: {y}\n",
    "comment": "{x}  # {y}\n",
}
FIRST = "arrow"  # the format in which orders are compared


@dataclass(frozen=True)
class FewShot:
    """A question, and the examples in front of it."""

    examples: tuple[tuple[str, str], ...]  # (name, label)
    name: str
    labels: tuple[str, str]
    gold: int  # the place of the right label in labels

    def item(self, form: str, order: int, random_labels: bool = False) -> Item:
        """Return the question in a format, behind its examples.

        order: 0 for the order of k_shot, else the number of a random order, which is another one for each
        question.
        """
        draws, examples = random.Random(f"{order} {self.name}"), list(self.examples)
        if order:
            draws.shuffle(examples)
        if random_labels:
            examples = [(name, draws.choice(self.labels)) for name, _ in examples]
        lines = "".join(FORMATS[form].format(x=name, y=label) for name, label in examples)
        asked = FORMATS[form].format(x=self.name, y="").rstrip()
        return Item(lines + asked, self.labels, self.gold)

    def last_label(self, order: int) -> str:
        """Return the label of the example that stands last."""
        line = self.item(FIRST, order).context.splitlines()[-2]
        return line.rpartition(" ")[2]


def few_shots(k: int, n: int, seed: int) -> list[FewShot]:
    """Return n questions of stdlib_suite, each with k examples."""
    found = []
    for item in k_shot(k, n, random.Random(f"{seed} prompting")):
        *lines, asked = item.context.splitlines()
        examples = tuple(tuple(line.split(" -> ")) for line in lines)
        found.append(FewShot(examples, asked.removesuffix(" ->"), item.choices, item.gold))
    return found


# --- measures


def changed(picks: list[list[int]]) -> float:
    """Return the share of the questions on which two lists of answers differ, a mean over all pairs of lists.

    picks: the lists, each of one answer per question, such as those of one format.
    """
    return statistics.fmean(
        statistics.fmean(a != b for a, b in zip(*pair, strict=True)) for pair in combinations(picks, 2)
    )


def measure(model: nn.Module, tokenizer, questions: list[FewShot], n_orders: int) -> dict:
    """Return the accuracy of each format and of each order, and the three further figures.

    All orders have the format FIRST.
    """

    def picks(form: str, order: int, random_labels: bool = False) -> list[int]:
        items = [question.item(form, order, random_labels) for question in questions]
        return [answer.picks["acc"] for answer in answer_items(model, tokenizer, items, alone=False)]

    def accuracy(answers: list[int]) -> float:
        return statistics.fmean(a == question.gold for a, question in zip(answers, questions, strict=True))

    by_format = {form: picks(form, 0) for form in FORMATS}
    by_order = [by_format[FIRST], *(picks(FIRST, order) for order in range(1, n_orders))]
    last = [
        question.labels[answer] == question.last_label(order)
        for order, answers in enumerate(by_order)
        for answer, question in zip(answers, questions, strict=True)
    ]
    return {
        "formats": {form: accuracy(answers) for form, answers in by_format.items()},
        "orders": [accuracy(answers) for answers in by_order],
        "changed by format": changed(list(by_format.values())),
        "changed by order": changed(by_order),
        "last label": sum(last) / len(last),
        "random labels": accuracy(picks(FIRST, 0, random_labels=True)),
    }


def table(rows: list[dict], n: int) -> str:
    """Return the figures of all seeds as text: mean and range. n: questions of a seed."""
    lines = [f"{'accuracy (chance 50.0%)':26}{n} questions a seed"]
    lines += [f"  {form:24}{mean_and_range(row['formats'][form] for row in rows)}" for form in FORMATS]
    for name, figures in (("formats", [[*row["formats"].values()] for row in rows]),
                          ("orders", [row["orders"] for row in rows])):  # fmt: skip
        spread = mean_and_range((max(f) - min(f) for f in figures), ".3f")
        deviation = statistics.mean(statistics.stdev(f) for f in figures)
        lines.append(
            f"best less worst of {len(figures[0])} {name:8}{spread}; standard deviation {deviation:.3f}"
        )
    p = statistics.mean(row["orders"][0] for row in rows)
    lines.append(f"standard error of one accuracy   {math.sqrt(p * (1 - p) / n):.3f}")
    for name in ("changed by format", "changed by order", "last label", "random labels"):
        lines.append(f"{name:26}{mean_and_range(row[name] for row in rows)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="The spread of few-shot accuracy over formats and orders.")
    add = parser.add_argument
    add("model", type=command.path, help="directory of a decoder, or of an adapter")
    add("--questions", type=int, default=100, help="questions of a seed (default %(default)s)")
    add("--shots", type=int, default=4, help="examples in front of a question (default %(default)s)")
    add("--orders", type=int, default=6, help="orders of the examples (default %(default)s)")
    add("--seeds", type=int, default=1, help="sets of questions (default %(default)s)")
    add("--out", type=command.new_file, metavar="FILE", help="write the figures of every seed as JSON")
    args = parser.parse_args(argv)
    for name, least in (("questions", 2), ("shots", 1), ("orders", 2), ("seeds", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least {least}")

    sets = [few_shots(args.shots, args.questions, seed) for seed in range(args.seeds)]
    model, tokenizer = load(args.model)
    rows = [{"seed": seed} | measure(model, tokenizer, sets[seed], args.orders) for seed in range(args.seeds)]
    print(table(rows, args.questions))
    if args.out:
        write(args.out, vars(args), rows)


def write(path: Path, settings: dict, rows: list[dict]) -> None:
    """Write the settings of a run and the figures of every seed to a file, as JSON."""
    names = ("questions", "shots", "orders")
    about = {name: settings[name] for name in names} | {"model": str(settings["model"])}
    with replace_file(path) as new:
        new.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
