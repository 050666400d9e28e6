"""The default tasks, made from the source of Python's library: nothing is downloaded.

    next_line        20 lines of a module; which of four lines of about equal length comes next?
    name             20 lines and the beginning of the next one; which of four names follows? All four are
                     equally frequent in the 20 lines (like LAMBADA, a word that needs its wide context)
    purpose          what does this function do? The choices are summaries of four functions of its module
    purpose_letters  the same questions; the choices are letters, as in MMLU
    k_shot_N         N lines `name -> symbol` with one of two symbols, which are drawn for each question;
                     which of them does the next name have?
    sums             sums of two numbers below 10; the text up to the line break has to be the result
    programs         five small functions to write, which are tested in the sandbox
    bits_per_byte    the bits per byte of held-out text

The modules are those that training holds out (data/text.py), so a model trained on `stdlib` has not seen
them. A random choice is right in 25 % of the questions, and in 50 % of those of k_shot. Rules without a
model, such as choosing the longest line, may be right more often: their accuracy stands beside the model's.
The questions are the same on every machine with the same Python.

    python -m evaluation.stdlib_suite           one question of each task
    python -m evaluation runs/gpt/model         a model's figures
"""

import builtins
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from inspect import isbuiltin
from itertools import accumulate

from data.corpus import documents, stdlib_files
from data.stdlib_questions import definitions
from data.text import held_out_from
from evaluation.generation import Question
from evaluation.multiple_choice import Item
from evaluation.published import LETTERS, TaskFile, mmlu
from formats import command

N_LINES = 20  # of context
NAME = r"[A-Za-z_]\w{3,}"  # a name of at least four characters; keywords count, too
SHOTS = (0, 1, 4, 16)  # solved lines of the k_shot tasks
TEXT_BYTES = 50_000  # of held-out text for bits_per_byte


@cache
def held_out_modules() -> list[tuple[str, str]]:
    """Return (name, source) of the modules that training on `stdlib` holds out.

    Raises ValueError if Python's library has no source on this machine.
    """
    # All modules; files that cannot be read are left out.
    modules = []
    for name, path in stdlib_files():
        modules += [(name, text) for text in documents([(name, path)], lambda problem: None)]

    # Training holds out the modules that begin at the byte `border` of the whole text, or later.
    n_bytes = [len(text.encode()) for _, text in modules]
    starts = [end - n for end, n in zip(accumulate(n_bytes), n_bytes, strict=True)]
    border = held_out_from(n_bytes)
    held_out = [module for module, start in zip(modules, starts, strict=True) if start >= border]
    if not held_out:
        raise ValueError("--tasks stdlib: this Python has no source files; name a file of questions instead")
    return held_out


def placed(choices: list[str], generator: random.Random) -> tuple[tuple[str, ...], int]:
    """Return the choices in a random order, and the new position of the first one, which is right."""
    order = list(range(len(choices)))
    generator.shuffle(order)
    return tuple(choices[i] for i in order), order.index(0)


def long_modules() -> list[list[str]]:
    """Return the lines of the held-out modules that are long enough for questions about their lines."""
    modules = [text.splitlines() for _, text in held_out_modules()]
    return [lines for lines in modules if len(lines) > 3 * N_LINES]


def drawn_places(n: int, generator: random.Random) -> Iterator[tuple[list[str], int]]:
    """Yield n random places: the lines of a held-out module, and the index of one behind N_LINES others."""
    modules = long_modules()
    for _ in range(n):
        lines = generator.choice(modules)
        yield lines, generator.randrange(N_LINES, len(lines))


def next_lines(n: int, generator: random.Random) -> list[Item]:
    """Return n questions for the next line. The other three are of the same module, and their lengths differ
    from that of the right one by at most a tenth.

    There are fewer questions if not enough of 20 n random places have such lines.
    """
    items: list[Item] = []
    for lines, at in drawn_places(20 * n, generator):
        gold = lines[at]
        others = {x for x in lines if x != gold and abs(len(x) - len(gold)) <= len(gold) // 10}
        if len(gold.strip()) < 12 or len(others) < 3:  # short lines, such as "else:", are left out
            continue
        choices, place = placed([gold, *generator.sample(sorted(others), 3)], generator)
        context = "\n".join(lines[at - N_LINES : at]) + "\n"
        items.append(Item(context, choices, place, delimiter=""))
        if len(items) == n:
            break
    return items


def names(n: int, generator: random.Random) -> list[Item]:
    """Return n questions for a name that occurs in the 20 lines before it, as often as the other three do.

    There are fewer questions if not enough of 50 n random places have such names.
    """
    items: list[Item] = []
    for lines, at in drawn_places(50 * n, generator):
        # Find the names of the line that occur in the 20 lines before it.
        before = "\n".join(lines[at - N_LINES : at]) + "\n"
        occurring = Counter(re.findall(NAME, before))
        found = [match for match in re.finditer(NAME, lines[at]) if match[0] in occurring]
        if not found:
            continue

        # Take one of them, and three other names that occur as often. The context ends where it begins.
        gold = generator.choice(found)
        others = [x for x, k in occurring.items() if x != gold[0] and k == occurring[gold[0]]]
        if len(others) < 3:
            continue
        choices, place = placed([gold[0], *generator.sample(sorted(others), 3)], generator)
        items.append(Item(before + lines[at][: gold.start()], choices, place, delimiter=""))
        if len(items) == n:
            break
    return items


def purposes(n: int, generator: random.Random) -> tuple[list[Item], list[Item]]:
    """Return up to n questions for the summary of a function, first with texts as choices, then the same with
    letters.

    The other three choices are summaries of other functions of the same module.
    """
    questions = []
    for module, source in held_out_modules():
        found = {d.summary: d for d in definitions(module, source)}
        for summary, d in found.items():
            others = sorted(set(found) - {summary})
            if len(others) >= 3:
                choices, place = placed([summary, *generator.sample(others, 3)], generator)
                question = f"What does {d.owner}.{d.name} do?"
                questions.append({"question": question, "choices": list(choices), "answer": place})
    questions = generator.sample(questions, min(n, len(questions)))
    texts = [Item(f"Question: {q['question']}\nAnswer:", tuple(q["choices"]), q["answer"]) for q in questions]
    return texts, [mmlu(question) for question in questions]


# The names of k_shot are of two kinds, exceptions and functions. A question has a symbol for each kind.
SYMBOLS = ("red", "blue", "up", "down", "left", "right", "yes", "no")
EXCEPTIONS = sorted(x for x in dir(builtins) if x.endswith("Error") and len(x) < 16)
FUNCTIONS = sorted(x for x in dir(builtins) if isbuiltin(getattr(builtins, x)) and x[0] != "_")


def k_shot(k: int, n: int, generator: random.Random) -> list[Item]:
    """Return n questions whose context is k solved lines `name -> symbol`, and a last one without its symbol.

    Built-in exceptions have one symbol, and built-in functions another. Both symbols are drawn for each
    question, so only the solved lines show which is which. Raises ValueError for more lines than there are
    names.
    """
    most = 2 * min(len(EXCEPTIONS), len(FUNCTIONS)) - 3
    if k > most:
        raise ValueError(f"{k} solved lines: expected at most {most}, since no name comes twice")
    items = []
    for _ in range(n):
        # The symbol and the names of kind 0 (exceptions) and of kind 1 (functions).
        symbols = generator.sample(SYMBOLS, 2)
        kinds = [i % 2 for i in range(k)]  # of the solved lines, half of each
        generator.shuffle(kinds)
        names_of = [generator.sample(EXCEPTIONS, k // 2 + 2), generator.sample(FUNCTIONS, k // 2 + 2)]
        gold = generator.randrange(2)  # the kind of the last name

        shots = [f"{names_of[kind].pop()} -> {symbols[kind]}\n" for kind in kinds]
        context = "".join(shots) + f"{names_of[gold].pop()} ->"
        items.append(Item(context, tuple(symbols), gold))
    return items


def sums(n: int, generator: random.Random) -> list[Question]:
    """Return n questions for the sum of two numbers below 10, each behind two sums with their results."""
    drawn = [[(generator.randrange(10), generator.randrange(10)) for _ in range(3)] for _ in range(n)]
    return [
        Question(f"{a[0]} + {a[1]} = {sum(a)}\n{b[0]} + {b[1]} = {sum(b)}\n{c[0]} + {c[1]} =", str(sum(c)))
        for a, b, c in drawn
    ]


# Name, parameters, summary, solution, and the condition that the function f must meet.
FUNCTIONS_TO_WRITE = (
    ("double", "x", "Return 2 * x.", "return 2 * x", "f(3) == 6 and f(0) == 0"),
    ("is_even", "n", "Return True if n is even.", "return n % 2 == 0", "f(4) is True and f(7) is False"),
    ("last", "items", "Return the last item.", "return items[-1]", "f([1, 2]) == 2 and f('abc') == 'c'"),
    ("largest", "numbers", "Return the largest number.", "return max(numbers)", "f([3, 9, 2]) == 9"),
    ("shout", "text", "Return text in upper case.", "return text.upper()", "f('ab') == 'AB' and f('') == ''"),
)  # fmt: skip


def programs() -> list[dict]:
    """Return five functions to write, in the form of HumanEval."""
    return [
        {
            "task_id": f"library/{name}",
            "prompt": f'def {name}({parameters}):\n    """{summary}"""\n',
            "entry_point": name,
            "canonical_solution": f"    {solution}\n",
            "test": f"def check(f):\n    assert {test}\n",
        }
        for name, parameters, summary, solution, test in FUNCTIONS_TO_WRITE
    ]


def suite(n: int = 200, seed: int = 0) -> list[TaskFile]:
    """Return the default tasks with n questions each, or all there are if they are fewer.

    There are at most 50 sums, five programs and one text. seed: of all random draws.
    """
    texts, letters = purposes(n, random.Random(f"{seed} purpose"))
    tasks = [
        TaskFile("next_line", "choice", next_lines(n, random.Random(f"{seed} line"))),
        TaskFile("name", "choice", names(n, random.Random(f"{seed} name"))),
        TaskFile("purpose", "choice", texts),
        TaskFile("purpose_letters", "choice", letters),
    ]
    tasks += [TaskFile(f"k_shot_{k}", "choice", k_shot(k, n, random.Random(f"{seed} {k}"))) for k in SHOTS]
    text = "\n".join(text for _, text in held_out_modules())[:TEXT_BYTES]
    tasks.append(TaskFile("sums", "question", sums(min(n, 50), random.Random(f"{seed} sums"))))
    return [*tasks, TaskFile("programs", "program", programs()), TaskFile("bits_per_byte", "text", [text])]


def dull_baselines(items: Sequence[Item]) -> dict[str, float]:
    """Return the accuracy of three rules without a model: {rule: share of right choices}.

    "same place": always the position that is most often right; "longest": the choice with most characters;
    "most shared words": the choice that shares most words with the context. Of equally good choices the first
    is taken.
    """

    def shared_words(item: Item) -> list[int]:
        words = set(re.findall(r"\w+", item.context))
        return [len(words & set(re.findall(r"\w+", choice))) for choice in item.choices]

    def is_largest(values: Sequence[int], gold: int) -> bool:
        return values.index(max(values)) == gold

    places = Counter(item.gold for item in items)
    longest = [is_largest([len(choice) for choice in x.choices], x.gold) for x in items]
    shared = [is_largest(shared_words(x), x.gold) for x in items]
    n = len(items)
    return {
        "same place": places.most_common(1)[0][1] / n,
        "longest": sum(longest) / n,
        "most shared words": sum(shared) / n,
    }


def main(argv: list[str] | None = None) -> None:
    command.Parser(description="Print one question of each default task.").parse_args(argv)
    for task in suite():
        first = task.items[0]
        print(f"\n--- {task.name}: {len(task.items)} of kind {task.kind}")
        if isinstance(first, Item):
            print("\n".join(first.context.splitlines()[-6:]))
            for i, choice in enumerate(first.choices):
                print(f"  {LETTERS[i]} {'*' if i == first.gold else ' '} {choice}")
        else:
            print(first[:300] if isinstance(first, str) else first)


if __name__ == "__main__":
    command.run(main)
