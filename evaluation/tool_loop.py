"""A tool loop: the model writes an expression, it is executed, and its value goes back into the text.

    question            anna has 47 and gets 8 boxes of 36 :
    the model writes    << 47 + 8 * 36
    this file adds      -> 335 >>               the value of the expression (expressions.py), not the model's
    the model goes on   335

So the model needs to translate, not to calculate (Toolformer: Schick et al. 2023, arXiv:2302.04761; the
calculator of GSM8K: Cobbe et al. 2021, arXiv:2110.14168, appendix C). Two models are trained for the same
number of steps on the same kind of questions, and answer in four ways:

    direct      trained on the answer alone
    tool        trained on the expression, its value and the answer; the expression is executed
    no tool     the model of "tool" writes the value itself: what is the expression worth without execution?
    wrong tool  the same with a value that is 10 too large: does the answer follow the tool, or does the model
                calculate?

Numbers are written digit by digit. Values in training texts come from execution, and the model learns to
write them too, so that "no tool" is a fair control.

    python -m evaluation.tool_loop          one seed: two minutes on two cores
    python -m results.tool_loop             three seeds
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from evaluation.expressions import evaluate
from evaluation.small_models import Row, Vocabulary, answers, fit, small_gpt
from formats import command
from gpt import GPT

NAMES = ("anna", "ben", "cora", "dan")
QUESTIONS = {  # how a question is put, and the expression that answers it
    "{n} has {a} and gets {b} boxes of {c} :": "{a} + {b} * {c}",
    "{n} has {b} boxes of {c} and gives away {a} :": "{b} * {c} - {a}",
    "{b} friends of {n} have {a} and {c} each :": "{b} * ({a} + {c})",
    "{n} has {a} and finds {c} :": "{a} + {c}",
}
LONGEST = 40  # tokens that the model writes at a time
WORDS = "has gets boxes of gives away friends have each finds and :"
VOCABULARY = Vocabulary([*NAMES, WORDS, "<< -> >> - + * ( ) 0 1 2 3 4 5 6 7 8 9"])


class Problem(NamedTuple):
    """A question, and the expression whose value answers it."""

    question: str
    expression: str

    @property
    def value(self) -> int:
        return evaluate(self.expression, {})


def draw_problem(generator: random.Random) -> Problem:
    """Return a random question about numbers of one or two digits, whose answer is not negative."""
    while True:
        question = generator.choice(list(QUESTIONS))
        numbers = {"a": generator.randint(2, 99), "b": generator.randint(2, 9), "c": generator.randint(2, 99)}
        text = question.format(n=generator.choice(NAMES), **numbers)
        problem = Problem(text, QUESTIONS[question].format(**numbers))
        if problem.value >= 0:
            return problem


def in_digits(text: str) -> str:
    """Return a text with spaces between digits."""
    return " ".join(" ".join(word) if word.lstrip("-").isdigit() else word for word in text.split())


def encode(text: str) -> list[int]:
    """Return the tokens of a text, one for each digit, sign and word."""
    for sign in "()":
        text = text.replace(sign, f" {sign} ")
    return VOCABULARY.encode(in_digits(text))


def decode(tokens: Sequence[int]) -> str:
    """Return the text of tokens, the digits of a number together."""
    text, pieces = "", [VOCABULARY.pieces[token] for token in tokens]
    for before, piece in zip(["", *pieces], pieces, strict=False):
        text += piece if before.isdigit() and piece.isdigit() else f" {piece}"
    return text.strip()


# --- training texts


def direct_row(problem: Problem) -> Row:
    return encode(problem.question), [*encode(str(problem.value)), Vocabulary.end]


def tool_row(problem: Problem) -> Row:
    written = f"<< {problem.expression} -> {problem.value} >> {problem.value}"
    return encode(problem.question), [*encode(written), Vocabulary.end]


def train(row: Callable[[Problem], Row], held_out: set[str], steps: int, seed: int) -> GPT:
    """Return a model that has learned from random questions, none of which is held out."""
    generator = random.Random(f"{seed} questions")

    def draw_rows() -> list[Row]:
        problems = (draw_problem(generator) for _ in range(64))
        return [row(problem) for problem in problems if problem.question not in held_out]

    model = small_gpt(VOCABULARY, 80, seed, layers=3, width=96)
    fit(model, draw_rows, steps)
    return model


# --- answering


def last_number(text: str) -> int | None:
    """Return the number that ends a text, None if there is none. One after a minus is no answer."""
    before, word = ["", "", *text.replace(">>", " ").split()][-2:]
    return int(word) if word.isdigit() and before != "-" else None


def write(model: GPT, texts: Sequence[str], stop: str) -> list[str]:
    """Return each text with what the model adds by its likeliest tokens, up to `stop` or its end."""
    found = answers(model, [encode(text) for text in texts], 1, LONGEST, torch.Generator(), temperature=0)
    added = [decode(answer.tokens) for (answer,) in found]
    return [f"{text} {new.split(stop)[0].strip()}".strip() for text, new in zip(texts, added, strict=True)]


def with_tool(model: GPT, questions: Sequence[str], tool: Callable[[str], int]) -> list[str]:
    """Return for each question the text that the model writes with one call of the tool.

    The model writes an expression, the tool's value is added, and the model goes on. A text without an
    expression, or with one that has no value, stays as it is.
    """
    texts = write(model, questions, "->")
    called, finished = [], list(texts)
    for i, text in enumerate(texts):
        try:
            value = tool(text.split("<<", 1)[1])
        except (IndexError, ValueError):
            continue
        called.append(i)
        finished[i] = f"{text} -> {value} >>"
    if called:
        for i, text in zip(called, write(model, [finished[i] for i in called], "<end>"), strict=True):
            finished[i] = text
    return finished


def execute(expression: str) -> int:
    """Return the value of an expression. Raises ValueError if it has none, or one that is no number."""
    value = evaluate(expression.strip(), {})
    if not isinstance(value, int):
        raise ValueError(f"expression {expression}: expected a number")
    return value


def study(seed: int, steps: int, n_problems: int, longer: int = 0) -> tuple[dict[str, float], dict[str, str]]:
    """Return the share of right answers of each way, and one text of each as an example.

    longer: adds a direct model with so many times the steps, since its texts have fewer tokens to learn.
    """
    # Test questions, and two models that have not seen them.
    generator = random.Random(f"{seed} test")
    problems = [draw_problem(generator) for _ in range(n_problems)]
    questions = [problem.question for problem in problems]
    held_out = set(questions)
    direct = train(direct_row, held_out, steps, seed)
    caller = train(tool_row, held_out, steps, seed)

    # The answers of each way.
    texts = {
        "direct": write(direct, questions, "<end>"),
        "tool": with_tool(caller, questions, execute),
        "no tool": write(caller, questions, "<end>"),
        "wrong tool": with_tool(caller, questions, lambda expression: execute(expression) + 10),
    }
    if longer:
        texts["direct, longer"] = write(train(direct_row, held_out, longer * steps, seed), questions, "<end>")

    # Shares: of right answers, of right expressions, and of answers that follow the wrong tool.
    figures = {}
    for way, of_way in texts.items():
        found = [last_number(text) for text in of_way]
        figures[way] = sum(x == p.value for x, p in zip(found, problems, strict=True)) / n_problems
    misled = zip(texts["wrong tool"], problems, strict=True)
    followed = [last_number(text) == problem.value + 10 for text, problem in misled]
    written = [text.partition("<<")[2].partition("->")[0] for text in texts["tool"]]
    same = [encode(text) == encode(p.expression) for text, p in zip(written, problems, strict=True)]
    figures |= {"expression right": sum(same) / n_problems, "wrong tool followed": sum(followed) / n_problems}
    return figures, {way: of_way[0] for way, of_way in texts.items()}


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Let a small model answer questions with and without a calculator.")
    add = parser.add_argument
    add("--steps", type=int, default=600, help="updates of each of the two models (default 600)")
    add("--problems", type=int, default=200, help="questions of the test (default 200)")
    add("--seed", type=int, default=0, help="start of the random draws (default 0)")
    args = parser.parse_args(argv)
    for name in ("steps", "problems"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    figures, examples = study(args.seed, args.steps, args.problems)
    for name, share in figures.items():
        print(f"{name:20} {share:6.1%}   {examples.get(name, '')}")


if __name__ == "__main__":
    command.run(main)
