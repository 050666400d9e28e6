r"""Preferences: what people prefer among answers, in the record formats that are in common use.

A preference is a prompt (a conversation of which the last message is the user's) with two answers, of which
the first was chosen, or with one answer that is labelled good or bad. As tokens, from
formats/chat_template.py:

    tokens   <|endoftext|> <|user|>\n What is 2 + 2? \n<|assistant|>\n 4 <|endoftext|>
    mask                                                            1 1

The ids of the prompt are those from which a model generates, and so a prefix of every row. Nothing is cut: a
pair of which one answer loses its end is no longer the pair that was judged. What cannot be used is left out
and counted: two answers that are equal, an empty answer, a prompt that fills the context, an answer that does
not fit behind its prompt, a duplicate. All preferences of a prompt are on one side, to train on or held out.

    python -m data.preferences pairs.jsonl        how many, what is left out, and some of them

Shapes: C answers of a preference, T tokens of a row.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.conversations import as_messages, check
from data.records import converted, refuse
from data.rows import Dataset, Row, Rows
from data.text import bad_texts
from data.tokenizer import Tokenizer, get_tokenizer
from formats import command
from formats.chat_template import Conversation, end_id, prompt_tokens, render

HELD_OUT = 1 / 10  # share of the prompts
EXPECTED = (
    'expected {"prompt", "chosen", "rejected"} of text or messages, {"chosen", "rejected"} of two '
    'transcripts, or {"prompt", "completion", "label"}'
)
TURN = re.compile(r"\n\n(Human|Assistant):")  # of the transcripts of hh-rlhf
LABELS = {"true": True, "1": True, "false": False, "0": False}  # also as they are in a .csv
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class Preference(NamedTuple):
    """The answers to a prompt, and what was preferred."""

    prompt: Conversation
    answers: tuple[str, ...]  # (chosen, rejected), or one answer
    label: bool | None = None  # of one answer: is it good?


# --- from records


def messages_in(value: Any, role: str) -> Conversation:
    """Return the messages in a value of a record: a text of this role, a transcript (see `transcript`), one
    message, or a list of them.

    Raises ValueError for anything else.
    """
    if isinstance(value, str) and TURN.match(value):
        return transcript(value)
    turns = value if isinstance(value, list) else [value]
    if isinstance(value, str):
        turns = [{"role": role, "content": value}]
    try:
        pairs = [(t["role"], t["content"]) if "role" in t else (t["from"], t["value"]) for t in turns]
    except (KeyError, TypeError):
        raise ValueError(f"{value!r:.60}: {EXPECTED}") from None
    return as_messages(pairs)


def transcript(text: str) -> Conversation:
    r"""Return the messages of a transcript of hh-rlhf: "\n\nHuman: ...\n\nAssistant: ...".

    Raises ValueError for another text.
    """
    before, *parts = TURN.split(text)
    if before.strip() or not parts:
        raise ValueError(
            f"{text!r:.60}: expected a transcript, which begins '\\n\\nHuman:', or a prompt beside it"
        )
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": SPEAKERS[speaker], "content": content.strip()} for speaker, content in pairs]


def prompt_of(record: dict) -> Conversation | None:
    """Return the messages of the prompt of a record, None where it has none of its own.

    A transcript may end with the "Assistant:" that the answers follow.
    """
    if "instruction" in record:  # Alpaca's; "input" is the text that the instruction is about
        asked, about = record["instruction"], record.get("input")
        if about and not (isinstance(asked, str) and isinstance(about, str)):
            raise ValueError(f"instruction {asked!r:.60}, input {about!r:.60}: expected two texts")
        return messages_in(f"{asked}\n\n{about}" if about else asked, "user")
    for field in ("prompt", "conversations", "question"):
        if field in record:
            turns = messages_in(record[field], "user")
            return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else turns
    return None


def with_system(turns: Conversation, record: dict) -> Conversation:
    """Return the messages, with the text in the "system" field of their record in front if they have none.

    Raises ValueError for a field that is no text.
    """
    system = record.get("system")
    if system is None or system == "" or (turns[:1] and turns[0]["role"] == "system"):
        return turns
    if not isinstance(system, str):
        raise ValueError(f"system {system!r:.60}: expected a text")
    return [{"role": "system", "content": system}, *turns]


def to_preference(record: Any) -> Preference:
    """Return the preference in a record. Raises ValueError for a record of an unknown format.

    An empty answer is no error here, since files of preferences often have some.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{record!r:.60}: {EXPECTED}")
    label, names = None, ("chosen", "rejected")
    if "label" in record and not record.keys() & set(names):
        label = LABELS.get(str(record["label"]).lower())
        if label is None:
            raise ValueError(f"label {record['label']!r:.60}: expected true or false")
        names = ("completion",) if "completion" in record else ("messages",)
    if missing := [name for name in names if name not in record]:
        raise ValueError(f"no field {missing[0]!r}, it has {', '.join(map(repr, record)):.200}; {EXPECTED}")

    # Whole conversations, in which the prompt is what all have in common.
    prompt = prompt_of(record) if names != ("messages",) else None
    if prompt is None and isinstance(record[names[0]], str):
        whole = [transcript(record[name]) for name in names]
    else:
        whole = [(prompt or []) + messages_in(record[name], "assistant") for name in names]
        if prompt is not None:
            # Some files repeat the prompt in each conversation.
            own = [messages_in(record[name], "assistant") for name in names]
            whole = own if all(turns[: len(prompt)] == prompt for turns in own) else whole
    if empty := [name for name, turns in zip(names, whole, strict=True) if not turns]:
        raise ValueError(f"{empty[0]}: no messages; {EXPECTED}")
    whole = [with_system(turns, record) for turns in whole]
    prompt = whole[0][:-1]
    if any(turns[:-1] != prompt for turns in whole):
        raise ValueError("the two conversations differ before their last message; expected one prompt")
    for *turns, last in whole:
        is_empty = isinstance(last["content"], str) and not last["content"].strip()
        check([*turns, last | {"content": "empty"} if is_empty else last])
    return Preference(prompt, tuple(turns[-1]["content"] for turns in whole), label)


def read_preferences(path: Path, on_bad: Callable[[str], None] = refuse) -> list[Preference]:
    """Return the preferences in a file of records: .jsonl, .json, .csv ... (data/records.py).

    A record has one of these forms, where a text may also be a list of messages {"role", "content"} or
    {"from", "value"}, or one message. A field "system" begins the prompt; other fields are ignored:

        {"prompt": "...", "chosen": "...", "rejected": "..."}      also "question", "conversations"
        {"instruction": "...", "input": "...", "chosen": "...", "rejected": "..."}
        {"chosen": [messages], "rejected": [messages]}             the prompt is what both begin with
        {"chosen": "\n\nHuman: ...", "rejected": "..."}            hh-rlhf, likewise; also in a "prompt"
        {"prompt": "...", "completion": "...", "label": true}      KTO; or {"messages": [...], "label": true}

    on_bad is called with a message for a record that is none of these, and may raise an error; otherwise the
    record is left out. Raises ValueError for a file that cannot be read or has no preferences, or has both
    pairs and labels.
    """
    found = converted(path, "preferences", EXPECTED, to_preference, on_bad)
    if len({len(preference.answers) for preference in found}) > 1:
        raise ValueError(f"{path}: has pairs and labelled answers; expected a file for each")
    return found


# --- to tokens


class Example(NamedTuple):
    """A preference as token ids."""

    prompt: np.ndarray  # (P,) int64
    answers: tuple[np.ndarray, ...]  # each (n,) int64, with its end token
    label: bool | None = None


def as_example(preference: Preference, tokenizer: Tokenizer) -> Example:
    """Return a preference as token ids: the prompt's, and those of each answer with one end token."""
    prompt = prompt_tokens(preference.prompt, tokenizer)
    answers = []
    for content in preference.answers:
        tokens, _ = render([*preference.prompt, {"role": "assistant", "content": content}], tokenizer)
        if tokens[: len(prompt)] != prompt:
            raise ValueError(f"{content!r:.60}: changes the tokens of its prompt")
        # ChatML puts a line break behind the end token, which the model does not generate.
        last = len(tokens) - tokens[::-1].index(end_id(tokenizer))
        answers.append(np.array(tokens[len(prompt) : last], np.int64))
    return Example(np.array(prompt, np.int64), tuple(answers), preference.label)


def why_not(preference: Preference, example: Example, seq_len: int) -> str | None:
    """Return the reason for which a preference cannot be used, or None if it can."""
    if any(not answer.strip() for answer in preference.answers):
        return "with an empty answer"
    if len(preference.answers) == 2 and len({answer.tobytes() for answer in example.answers}) == 1:
        return "with two equal answers"
    if len(example.prompt) >= seq_len:
        return f"with a prompt that fills {seq_len} tokens"
    if len(example.prompt) + max(map(len, example.answers)) > seq_len:
        return f"longer than {seq_len} tokens"
    return None


class PreferenceRows(Rows):
    """Examples as rows of one shape, padded on the right.

    A row has "tokens" int64 (C, T) and "mask" bool (C, T), true for the tokens of the answer. Rows of single
    answers have a "label", bool. Once `reference` is set, a row has the log-probabilities "reference" (C,) of
    its answers by the reference model, float32.
    """

    def __init__(self, examples: list[Example]):
        super().__init__(examples)
        self.reference: np.ndarray | None = None  # (rows, C)
        self.length = max((len(e.prompt) + max(map(len, e.answers)) for e in examples), default=0)

    def __getitem__(self, i: int) -> Row:
        prompt, answers, label = self.rows[i % len(self.rows)]
        shape = (len(answers), self.length)
        row = {"tokens": np.zeros(shape, np.int64), "mask": np.zeros(shape, bool)}
        for c, answer in enumerate(answers):
            end = len(prompt) + len(answer)
            row["tokens"][c, :end] = np.concatenate([prompt, answer])
            row["mask"][c, len(prompt) : end] = True
        if label is not None:
            row["label"] = np.array(label)
        if self.reference is not None:
            row["reference"] = self.reference[i % len(self.rows)]
        return row


def single_answers(examples: list[Example]) -> list[Example]:
    """Return each answer of pairs as an example of its own: the chosen are good, the rejected bad."""
    return [
        Example(prompt, (answer,), label if label is not None else c == 0)
        for prompt, answers, label in examples
        for c, answer in enumerate(answers)
    ]


def mismatched(examples: list[Example], seq_len: int, more: list[Example] = ()) -> list[Example]:
    """Return each single answer with a second one: the answer of the next example with another prompt.

    KTO estimates a KL divergence from the second answers (arXiv:2402.01306). "Next" is in a shuffled order,
    always the same: in the order of the data, in which chosen and rejected answers alternate, the first
    answer to the next prompt would always be a chosen one. If all prompts are equal, any next answer is
    taken. more: further examples to choose from. Raises ValueError if no such answer fits behind a prompt.
    """
    found, n = [], len(examples)
    order = np.random.default_rng(0).permutation(n)
    place = order.argsort()
    one_prompt = len({example.prompt.tobytes() for example in (*examples, *more)}) == 1
    for i, (prompt, answers, label) in enumerate(examples):
        others = chain((examples[order[(place[i] + shift) % n]] for shift in range(1, n)), more)
        fitting = (other for other in others if len(prompt) + len(other.answers[0]) <= seq_len)
        other = next((o for o in fitting if one_prompt or not np.array_equal(o.prompt, prompt)), None)
        if other is None:
            counted = f"none of the {n - 1 + len(more)} others fits into --seq-len {seq_len}"
            raise ValueError(f"KTO needs beside each answer one to another prompt, and {counted}")
        found.append(Example(prompt, (answers[0], other.answers[0]), label))
    return found


# --- a data set


def examples_in(
    preferences: list[Preference], tokenizer: Tokenizer, seq_len: int, counts: Counter
) -> list[Example]:
    """Return the preferences that can be used as token ids, and count the others by what is wrong."""
    found = []
    for preference in preferences:
        example = as_example(preference, tokenizer)
        problem = why_not(preference, example, seq_len)
        if problem is None:
            found.append(example)
        else:
            counts[problem] += 1
    return found


def hold_out(preferences: list[Preference]) -> tuple[list[Preference], list[Preference]]:
    """Return (those to train on, those held out): a tenth of the prompts, always the same ones.

    Raises ValueError where all have one prompt.
    """
    groups: dict[str, list[Preference]] = {}
    for preference in preferences:
        groups.setdefault(json.dumps(preference.prompt), []).append(preference)
    if len(groups) < 2:
        raise ValueError("all preferences have one prompt; expected several, or others to hold out by --val")
    order = np.random.default_rng(0).permutation(len(groups))
    n_held = max(1, int(len(groups) * HELD_OUT))
    members = list(groups.values())
    sides = (sorted(order[n_held:]), sorted(order[:n_held]))
    train, held = ([p for i in side for p in members[i]] for side in sides)
    return train, held


def prepare(
    data: str,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    val: str | None = None,
    bad_text: str = "refuse",
    notify: Callable[[str], None] = print,
) -> Dataset:
    """Return the preferences in the file data: rows to train on and rows held out, see `PreferenceRows`.

    val: a file of those to hold out, None for those of a tenth of the prompts. notify is called with one line
    of what became of every record. Raises ValueError for a file that `read_preferences` refuses, and where
    nothing is left on one side.
    """
    counts = Counter()

    def read(name: str, flag: str) -> list[Preference]:
        with bad_texts(f"{flag} {name}", bad_text, notify) as on_bad_text:

            def on_bad(problem: str) -> None:
                on_bad_text(problem)
                counts.update({"read": 1, "of no known form": 1})

            found = read_preferences(Path(name), on_bad)
        counts["read"] += len(found)
        return list({json.dumps(preference): preference for preference in found}.values())

    # Read both sides; what is held out is not trained on.
    found = read(data, "--data")
    if val is None:
        train, held = hold_out(found)
    else:
        held = read(val, "--val")
        prompts = {json.dumps(preference.prompt) for preference in held}
        train = [preference for preference in found if json.dumps(preference.prompt) not in prompts]
        if len({len(preference.answers) for preference in found + held}) > 1:
            raise ValueError(f"--val {val}: pairs beside labelled answers in --data; expected the same form")
        counts["with a held-out prompt"] = len(found) - len(train)
    n_kept = len(train) + len(held) + counts["with a held-out prompt"]
    counts["duplicates"] = counts["read"] - counts["of no known form"] - n_kept

    # Turn them into tokens, and account for every record.
    sides = [examples_in(side, tokenizer, seq_len, counts) for side in (train, held)]
    summary = f"{len(sides[0]):,} to train on, {len(sides[1]):,} held out"
    left_out = [f"{n:,} {problem}" for problem, n in counts.items() if n and problem != "read"]
    notify(f"{counts['read']:,} preferences read: {', '.join([*left_out, summary])}")
    if not all(sides):
        problem = "; ".join(left_out) or "too few of them"
        raise ValueError(f"--data {data}: nothing is left to train on or to hold out ({problem})")
    return as_dataset(*sides, tokenizer, summary)


def as_dataset(train: list[Example], held: list[Example], tokenizer: Any, summary: str) -> Dataset:
    """Return examples as a Dataset with a fingerprint of their content."""
    content = hashlib.sha256(f"{tokenizer.fingerprint if tokenizer else ''} {len(train)}".encode())
    for prompt, answers, label in train + held:
        content.update(f"{len(prompt)} {[len(answer) for answer in answers]} {label}".encode())
        for ids in (prompt, *answers):
            content.update(ids.tobytes())
    fingerprint = f"preferences-{content.hexdigest()[:16]}"
    return Dataset(fingerprint, tokenizer, PreferenceRows(train), PreferenceRows(held), summary)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Count preferences, and show some of them as trained on.")
    add = parser.add_argument
    add("file", type=command.path, help="the file of preferences")
    add("--tokenizer", type=command.filled, default="bytes", help="as for train.py (default %(default)s)")
    add("--seq-len", type=int, default=1024, help="the longest that a model reads (default %(default)s)")
    add("-n", type=int, default=3, help="how many to show (default %(default)s)")
    args = parser.parse_args(argv)
    if min(args.seq_len, args.n) < 1:
        raise ValueError(f"--seq-len {args.seq_len} -n {args.n}: expected at least 1 of each")
    tokenizer = get_tokenizer(args.tokenizer)
    examples = prepare(str(args.file), tokenizer, args.seq_len).train.rows
    n = min(args.n, len(examples))
    for example in (examples[i * len(examples) // n] for i in range(n)):
        print("\n" + tokenizer.decode(example.prompt.tolist()))
        names = ("chosen", "rejected") if example.label is None else ("good" if example.label else "bad",)
        for name, answer in zip(names, example.answers, strict=True):
            print(f"{name}: »{tokenizer.decode(answer.tolist())}«")


if __name__ == "__main__":
    command.run(main)
