"""Generation: a model writes a text, and the answer that is found in the text is compared with the right one.

    exact match     the text up to the first stop string, spaces around it removed, equals the reference
    GSM8K strict    the number behind the first "####"            (Cobbe et al. 2021, arXiv:2110.14168)
    GSM8K flexible  the last number of the text
    pass@k          1 - C(n - c, k) / C(n, k)       (Chen et al. 2021, arXiv:2107.03374, section 2.1)

pass@k is the probability that at least one of k programs passes its tests. The formula estimates it without
bias from n programs of which c pass; the simpler estimate 1 - (1 - c / n)^k is too low on average. Numbers
are compared by value: "1,080.00" is 1080. Texts of temperature 0 do not depend on the batch size.

    python -m evaluation.generation runs/gpt/model      the texts of a model for three sums, and what is found
    python -m evaluation.generation gsm8k_test.jsonl    in how many of its answers each rule finds the number
"""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from evaluation import sandbox
from evaluation.multiple_choice import load
from formats import command
from formats.progress import progress_bar
from generate import end_tokens

# Strings that end a completion of a function (those of HumanEval), and an answer in the form of GSM8K.
CODE_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
QUESTION_STOPS = ("Question:", "</s>", "<|im_end|>")


class Question(NamedTuple):
    """A prompt, and the reference answer."""

    prompt: str
    answer: str  # the whole answer, or, as in GSM8K, a solution that ends in "#### " and a number


class Text(NamedTuple):
    """A text that a model wrote."""

    text: str
    n_cut: int  # tokens of the prompt that were cut off on the left


# --- writing


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first place where one of the stop strings begins.

    Raises TypeError for a single string in place of the list: each of its letters would be a stop string.
    """
    if isinstance(stops, str):
        raise TypeError(f"stops {stops!r}: expected a list of strings")
    return text[: min((i for i in map(text.find, stops) if i >= 0), default=len(text))]


def write(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    stops: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 16,
    **options,
) -> list[Text]:
    """Return what the model writes behind each prompt, up to a stop string, an end token or max_new_tokens.

    max_new_tokens is at most half of what the model reads, max_seq_len // 2. A prompt that does not fit into
    the rest loses its beginning. options: of `generate.stream`; by default the temperature is 0.
    """
    context = model.config.max_seq_len
    max_new_tokens = min(max_new_tokens, context // 2)
    rows, cut = [], []
    for prompt in prompts:
        tokens = [*tokenizer.begin_ids, *tokenizer.encode(prompt)] or [tokenizer.eot_id]
        rows.append(tokens[-(context - max_new_tokens) :])
        cut.append(len(tokens) - len(rows[-1]))

    # Prompts of similar length share a batch.
    order, texts = sorted(range(len(rows)), key=lambda i: -len(rows[i])), [""] * len(rows)
    for first in progress_bar(range(0, len(rows), batch_size), "writing", leave=False):
        members = order[first : first + batch_size]
        batch = write_batch(model, tokenizer, [rows[i] for i in members], stops, max_new_tokens, options)
        for i, text in zip(members, batch, strict=True):
            texts[i] = text
    return [Text(text, n) for text, n in zip(texts, cut, strict=True)]


def write_batch(model, tokenizer, rows, stops, max_new_tokens, options) -> list[str]:
    """Return what the model writes behind the tokens of each row; for the other arguments see `write`."""
    ends = end_tokens(model, tokenizer)
    new, done = [[] for _ in rows], [False] * len(rows)
    for step in model.stream(rows, max_new_tokens, stop=ends, **{"temperature": 0.0} | options):
        for i, token in enumerate(step):
            if done[i] or token is None:
                continue
            if token in ends:
                done[i] = True
                continue
            new[i].append(token)
            text = tokenizer.decode(new[i])
            done[i] = len(cut_at(text, stops)) < len(text)
        if all(done):
            break
    return [cut_at(tokenizer.decode(tokens), stops) for tokens in new]


# --- finding the answer in a text

NUMBER = r"-?[0-9.,]+"


def strict_number(text: str) -> str | None:
    """Return the number behind the first "####", None if there is none.

    It is the first since a model may go on with questions of its own, which have further ones.
    """
    found = re.search(rf"#### ({NUMBER})", text)
    return found[1] if found else None


def flexible_number(text: str) -> str | None:
    """Return the last number of a text, None if there is none.

    The pattern is that of lm-evaluation-harness. It takes "..." for a number, too, which equals none.
    """
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return found[-1] if found else None


def as_number(text: str) -> Fraction | None:
    """Return the value of a number that may have commas, a $ or a final point; None if it is no number."""
    try:
        return Fraction(text.replace(",", "").replace("$", "").strip().removesuffix("."))
    except (ValueError, ZeroDivisionError):
        return None


def same_number(found: str | None, reference: str) -> bool:
    """Return whether two texts are numbers of equal value."""
    value = as_number(found or "")
    return value is not None and value == as_number(reference)


def score_question(text: str, answer: str) -> dict[str, bool]:
    """Return {rule: whether the text has the reference answer}.

    The rules are strict and flexible if the reference has a number behind "####", else exact_match.
    """
    reference = strict_number(answer)
    if reference is not None:
        found = {"strict": strict_number(text), "flexible": flexible_number(text)}
        return {rule: same_number(number, reference) for rule, number in found.items()}
    return {"exact_match": text.strip() == answer.strip()}


def count_gold(path: Path) -> dict[str, int]:
    """Return the number of answers in a file of GSM8K, and in how many of them each rule finds the final
    number, which should be all. Raises ValueError for a record without such an answer."""
    from data.records import read_records, refuse

    counts = {"answers": 0, "strict": 0, "flexible": 0}
    for where, record in read_records(path, str(path), refuse):
        answer = record.get("answer") if isinstance(record, dict) else None
        if not isinstance(answer, str) or "#### " not in answer:
            raise ValueError(f"{where}: expected the field `answer` with #### and a number at its end")
        gold = answer.rsplit("#### ", 1)[1].strip()
        counts["answers"] += 1
        counts["strict"] += same_number(strict_number(answer), gold)
        counts["flexible"] += same_number(flexible_number(answer), gold)
    return counts


# --- programs


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from n programs of which c pass.

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} programs, {c} pass: expected 1 <= k <= n and 0 <= c <= n")
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def write_programs(
    model: nn.Module,
    tokenizer,
    records: Sequence[dict],
    n: int,
    temperature: float,
    seed: int = 0,
    max_new_tokens: int = 512,
    batch_size: int = 16,
) -> list[list[str]]:
    """Return n completions of the prompt of each record, which are in HumanEval's form.

    With temperature 0 the n completions of a record are equal. With a higher one they depend on the seed, the
    record's position and the number of records, and if n is larger than batch_size, on batch_size, too.
    """

    def completions(prompts: list[str], **options) -> list[str]:
        texts = write(model, tokenizer, prompts, CODE_STOPS, max_new_tokens, batch_size, **options)
        return [text.text for text in texts]

    # Greedy decoding: the prompts of several records share a batch.
    if temperature == 0:
        return [[text] * n for text in completions([record["prompt"] for record in records])]

    # Samples: each record has a generator of its own.
    device, found = next(model.parameters()).device, []
    for index, record in enumerate(records):
        generator = torch.Generator(device).manual_seed(seed * len(records) + index)
        options = {"temperature": temperature, "top_p": 0.95, "generator": generator}  # top_p: Chen et al.
        found.append(completions([record["prompt"]] * n, **options))
    return found


def count_passing(
    records: Sequence[dict], completions: Sequence[Sequence[str]], limits: sandbox.Limits | None = None
) -> list[int]:
    """Return how many completions of each record pass its tests in the sandbox."""
    tasks = [
        sandbox.human_eval_task(record, text)
        for record, texts in zip(records, completions, strict=True)
        for text in texts
    ]
    verdicts = iter(sandbox.check_all(tasks, limits or sandbox.Limits()))
    return [sum(next(verdicts).passed for _ in texts) for texts in completions]


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Ask a model for three sums, and show what is found in its texts.")
    parser.add_argument(
        "model", type=command.path, help="directory of a decoder or an adapter; or a file of GSM8K"
    )
    path = parser.parse_args(argv).model
    if path.is_file():
        print("".join(f"{name} {n}  " for name, n in count_gold(path).items()).rstrip())
        return
    model, tokenizer = load(path)
    shot = "Question: What is 2 + 3?\nAnswer: 2 + 3 = 5\n#### 5\n\n"
    questions = [Question(f"{shot}Question: What is {a} + 4?\nAnswer:", f"#### {a + 4}") for a in (1, 5, 9)]
    texts = write(model, tokenizer, [question.prompt for question in questions], QUESTION_STOPS, 30)
    for question, text in zip(questions, texts, strict=True):
        print(f"{question.prompt.splitlines()[-2]}\n  {text.text!r}")
        print(f"  strict {strict_number(text.text)}, flexible {flexible_number(text.text)}", end="")
        print(f"; expected {question.answer}")
    print("\npass@k of 10 programs of which 3 pass:", end="")
    print("".join(f"  k {k}: {pass_at_k(10, 3, k):.3f}" for k in (1, 5, 10)))


if __name__ == "__main__":
    command.run(main)
