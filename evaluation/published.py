"""Published benchmarks: from a record of the files that people download to a question.

    HellaSwag    activity_label, ctx_a, ctx_b, endings, label          (Zellers et al. 2019, arXiv:1905.07830)
    ARC          question, choices {text, label}, answerKey            (Clark et al. 2018, arXiv:1803.05457)
    MMLU         question, choices, answer; or .csv without header   (Hendrycks et al. 2020, arXiv:2009.03300)
    LAMBADA      text, the last word of which is to be predicted       (Paperno et al. 2016, arXiv:1606.06031)
    GSM8K        question, answer                                      (Cobbe et al. 2021, arXiv:2110.14168)
    HumanEval    prompt, entry_point, canonical_solution, test         (Chen et al. 2021, arXiv:2107.03374)
    GLUE         sst2:FILE, mrpc:FILE ..., or a file in a folder named as in the archive    (see glue.py)
    your own     context, choices, answer (a number from 0); or prompt, answer; or text

The fields of a file's first record decide which of these it is. A file with a field `text` is LAMBADA if its
name contains "lambada", else texts to predict. FORMAT:FILE names the format, as in `lambada:FILE`. The
choices of MMLU are letters; those of `mmlu_texts:FILE` are the texts of the answers. Prompts are those of
lm-evaluation-harness 0.4. Records may be .jsonl, .json, .csv, .tsv or .parquet, compressed by gzip or not.
Any other file is one text to predict.

    python -m evaluation.published FILE...      the first question of each file as a model sees it
"""

import ast
import io
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.records import RECORDS, decode, open_utf8, read_records, refuse, rows_of, suffix_of
from evaluation import glue
from evaluation.generation import Question, strict_number
from evaluation.multiple_choice import Item
from evaluation.sandbox import human_eval_record
from formats import command

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class TaskFile:
    """The items of a file, all of one kind."""

    name: str
    kind: str  # "choice", "word", "question", "program", "text" or "glue"
    # Items (of "choice" and "word"), Questions, records of HumanEval ("program"), texts, or glue.Examples.
    items: list


# --- one record of each benchmark


def clean_wikihow(text: str) -> str:
    """Return a text of HellaSwag without WikiHow's markup such as [title], as lm-evaluation-harness does."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag(record: dict) -> Item:
    """Return the item. Its context ends in the first words of a sentence, which the endings finish."""
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    endings = tuple(clean_wikihow(ending) for ending in listed(record["endings"]))
    return Item(clean_wikihow(context), endings, int(record["label"]))


def arc(record: dict) -> Item:
    """Return the item of a record in AI2's form or in Hugging Face's."""
    # In AI2's form the choices are in the field `question`, in Hugging Face's beside it.
    question, choices = record["question"], record.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, list):
        choices = {key: [choice[key] for choice in choices] for key in ("text", "label")}
    gold = list(choices["label"]).index(record["answerKey"])
    return Item(f"Question: {question}\nAnswer:", tuple(choices["text"]), gold)


def mmlu(record: dict) -> Item:
    """Return the item whose choices are letters; the context has the text of each letter.

    Raises ValueError for more choices than there are letters.
    """
    choices = listed(record["choices"])
    if len(choices) > len(LETTERS):
        raise ValueError(f"{len(choices)} choices, more than the letters {LETTERS}")
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)]
    context = "\n".join([record["question"].strip(), *lines, "Answer:"])
    return Item(context, tuple(LETTERS[: len(choices)]), mmlu_gold(record), about=about(record))


def mmlu_texts(record: dict) -> Item:
    """Return the item whose choices are the texts of the answers."""
    context = f"Question: {record['question'].strip()}\nAnswer:"
    return Item(context, tuple(listed(record["choices"])), mmlu_gold(record), about=about(record))


def mmlu_gold(record: dict) -> int:
    """Return the position of the right choice, which a record has as a letter or as a number from 0."""
    answer = str(record["answer"])
    # The tuple has letters only; the texts "" and "AB" are in the string LETTERS, too.
    return LETTERS.index(answer) if answer in tuple(LETTERS) else int(answer)


def about(record: dict) -> str:
    """Return MMLU's line about the subject, "" where the record has none."""
    subject = str(record.get("subject", "")).replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}." if subject else ""


def listed(value: Any) -> list[str]:
    """Return a list as strings. In a .csv it is one text, as Python or numpy prints a list of strings."""
    if isinstance(value, str):
        literals = re.findall(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", value)
        value = [ast.literal_eval(literal.replace("\n", r"\n")) for literal in literals]
    return [str(text) for text in value]


def text_of(record: dict, key: str) -> str:
    """Return a field that is a text, or a number, as text. Raises ValueError for anything else."""
    if not isinstance(record[key], str | int | float):
        raise ValueError(f"{key} {record[key]!r}")
    return str(record[key])


def lambada(record: dict) -> Item:
    """Return an item with one choice: the last word."""
    context, _, word = record["text"].strip().rpartition(" ")
    return Item(context, (word,), 0)


def gsm8k(record: dict) -> Question:
    """Return the question, whose answer is a solution that ends in #### and the number."""
    return Question(f"Question: {record['question']}\nAnswer:", text_of(record, "answer"))


def own_choice(record: dict) -> Item:
    """Return the item. If the context ends in white space, no space is put in front of the choices."""
    delimiter = "" if record["context"][-1:].isspace() else " "
    choices, group = tuple(listed(record["choices"])), str(record.get("group", ""))
    return Item(record["context"], choices, int(record["answer"]), delimiter, group)


def own_question(record: dict) -> Question:
    """Return the question, whose prompt is taken as it is."""
    return Question(text_of(record, "prompt"), text_of(record, "answer"))


# Name: (fields that a record must have, kind of task, the function that converts a record to an item).
# If no format is named, the first one whose fields a record has is taken.
FORMATS: dict[str, tuple[set[str], str, Callable[[dict], Any]]] = {
    "hellaswag": ({"activity_label", "ctx_a", "ctx_b", "endings", "label"}, "choice", hellaswag),
    "arc": ({"question", "answerKey"}, "choice", arc),
    "humaneval": ({"prompt", "entry_point", "canonical_solution", "test"}, "program", human_eval_record),
    "mmlu": ({"question", "choices", "answer"}, "choice", mmlu),
    "mmlu_texts": ({"question", "choices", "answer"}, "choice", mmlu_texts),
    "gsm8k": ({"question", "answer"}, "question", gsm8k),
    "choices": ({"context", "choices", "answer"}, "choice", own_choice),
    "questions": ({"prompt", "answer"}, "question", own_question),
    "lambada": ({"text"}, "word", lambada),
    "text": ({"text"}, "text", lambda record: text_of(record, "text")),
}


def check_item(item: Any) -> None:
    """Raise ValueError for an Item with an empty choice, or without the right one, and for an empty text."""
    if item == "":
        raise ValueError("an empty text")
    if isinstance(item, Item):
        if not 0 <= item.gold < len(item.choices):
            raise ValueError(f"answer {item.gold} of {len(item.choices)} choices, counted from 0")
        if "" in item.choices:
            raise ValueError("an empty choice")


def check_answers(places: Sequence[str], questions: Sequence[Question]) -> None:
    """Raise ValueError where some answers have a number behind ####, as GSM8K's, and others have none: texts
    are scored by other rules for these. places: of the questions in their file."""
    has_number = [strict_number(question.answer) is not None for question in questions]
    for place, question, has in zip(places, questions, has_number, strict=True):
        if has != has_number[0]:
            found = f"answer {question.answer[-40:]!r} {'has a' if has else 'has no'} number behind ####"
            raise ValueError(f"{place}: {found}; expected one in every answer of the file, or in none")


# --- files


def read(name: str, flag: str = "--tasks") -> TaskFile:
    """Return the items of a file, named by its path or as `format:path`. flag: of the name, for errors.

    Raises ValueError for a file that is missing or of no known format, and for a record that cannot be
    converted: the message names the file and the record.
    """
    # The format, where the name has one; a path may contain a colon, too.
    given, _, path = name.partition(":")
    if given not in FORMATS and given not in glue.TASKS:
        given, path = "", name
    path = Path(path)
    if not path.is_file():
        known = f"a file, stdlib, or FORMAT:FILE, with a format of {', '.join([*FORMATS, *glue.TASKS])}"
        raise ValueError(f"{flag} {name}: no such file; expected {known}")

    # Files of GLUE, and files without records.
    glue_task = given or glue.task_of(path)
    if glue_task in glue.TASKS:
        return TaskFile(glue_task, "glue", glue.read_examples(path, glue_task))
    if suffix_of(path) not in RECORDS:
        with open_utf8(path, str(path), refuse) as file:
            text = decode(file.read(), str(path), 0, refuse)
        if not text:
            raise ValueError(f"{path}: no text in it")
        return TaskFile(path.name, "text", [text])

    # Files of records, each of which becomes an item.
    records = headerless_mmlu(path) or list(read_records(path, str(path), refuse))
    if not records:
        raise ValueError(f"{path}: no record in it")
    format_name = given or recognised(path, records[0][1])
    fields, kind, convert = FORMATS[format_name]
    items = []
    for place, record in records:
        try:
            item = convert(record)
            check_item(item)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, SyntaxError) as error:
            expected = f"expected the fields {', '.join(sorted(fields))} of {format_name}"
            raise ValueError(f"{place}: {type(error).__name__} {error}; {expected}, with a label") from None
        items.append(item)
    if kind == "question":
        check_answers([place for place, _ in records], items)
    return TaskFile(f"{format_name}:{path.name}", kind, items)


def recognised(path: Path, record: Any) -> str:
    """Return the name of the format whose fields a record has. Raises ValueError if there is none."""
    has = set(record) if isinstance(record, dict) else set()
    if "text" in has and "lambada" in path.name.lower():
        return "lambada"
    names = [name for name, (fields, _, _) in FORMATS.items() if fields <= has and name != "lambada"]
    if not names:
        known = "; ".join(f"{name}: {', '.join(sorted(fields))}" for name, (fields, _, _) in FORMATS.items())
        raise ValueError(f"{path}: fields {sorted(has)}; expected those of one of: {known}")
    return names[0]


def headerless_mmlu(path: Path) -> list[tuple[str, dict]]:
    """Return the records of a .csv of MMLU as its authors publish it, [] for any other file.

    Such a file has no header; its columns are the question, four choices and the right one's letter. Its name
    is that of the subject, such as us_history_test.csv.
    """
    if suffix_of(path) != ".csv":
        return []
    with open_utf8(path, str(path), refuse) as file:
        text = decode(file.read(), str(path), 0, refuse)
    rows = [row for _, row in rows_of(io.StringIO(text), str(path), refuse, {})]
    if not rows or any(len(row) != 6 or row[5] not in tuple("ABCD") for row in rows):
        return []
    subject = re.sub(r"_(dev|val|test)$", "", path.name.partition(".")[0])
    fields = {"subject": subject}
    return [
        (f"{path}, row {i}", fields | {"question": row[0], "choices": row[1:5], "answer": row[5]})
        for i, row in enumerate(rows, 1)
    ]


# --- examples in front of a question


def solved(example: Item | Question) -> str:
    """Return a question with its answer."""
    if isinstance(example, Item):
        return example.context + example.delimiter + example.choices[example.gold]
    return f"{example.prompt} {example.answer}"


def with_examples(task: TaskFile, examples: Sequence, n: int, seed: int | None = None) -> TaskFile:
    """Return the task with n solved examples in front of each question, joined by blank lines.

    The examples are the first n of `examples`, or with a seed n random ones, drawn for each question.
    Examples on another subject, and the question itself, are left out. An item's line about its subject
    stands in front of them, also if n is 0. Raises ValueError if there are too few examples, and for a kind
    of task that takes none.
    """
    if n and task.kind not in ("choice", "question"):
        raise ValueError(f"--shots {n}: {task.name} has no examples in its prompts; expected 0")
    items = []
    for index, item in enumerate(task.items):
        subject = getattr(item, "about", "")  # only Items have one
        pool = [x for x in examples if x != item and getattr(x, "about", "") == subject] if n else []
        if len(pool) < n:
            raise ValueError(f"--shots {n}: there are {len(pool)} examples for a question of {task.name}")
        drawn = pool[:n] if seed is None else random.Random(f"{seed} {index}").sample(pool, n)
        front = "".join(f"{text}\n\n" for text in [subject, *map(solved, drawn)] if text)
        if isinstance(item, Item):
            item = item._replace(context=front + item.context)
        elif isinstance(item, Question):
            item = item._replace(prompt=front + item.prompt)
        items.append(item)
    return replace(task, items=items)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Print the first question of benchmark files as a model sees it.")
    parser.add_argument(
        "files", nargs="+", type=command.filled, metavar="FILE", help="a file, or format:file"
    )
    for name in parser.parse_args(argv).files:
        task = read(name)
        print(f"{task.name}: {len(task.items):,} items, {task.kind}")
        first = task.items[0]
        print(getattr(first, "context", None) or getattr(first, "prompt", None) or str(first)[:500])
        if isinstance(first, Item):
            for i, text in enumerate(first.choices):
                print(f"  {'*' if i == first.gold else '-'} {text}")


if __name__ == "__main__":
    command.run(main)
