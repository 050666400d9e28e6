"""Spelling: what byte pairs hide. A model reads tokens, and cannot see of which letters they are made.

    reverse: parser = resrap          " parser" may be one token; its six letters are nowhere in the input
    reverse: p a r s e r = r e s r a p          the same with spaces: one token for each letter

The letters of a token can be learned only from other words with this token. The study trains the same small
GPT on the same words, with one vocabulary of byte pairs, and changes only how words are written: as words or
spaced, in the question and in the answer. It is tested on words that are held out, all of them, and those with
a token that is in no training word:

    reverse                reverse: parser = ...
    count                  count r in parser = 2          beside the most frequent answer

A third quirk belongs to prompts, and every model with byte pairs has it: tokens begin with a space, so a prompt
that ends in one leaves the likely next tokens behind. `trailing_space` measures the nats that it costs, by the
same text with the space at the end of the prompt or at the begin of the answer.

    python -m evaluation.spelling                      one seed
    python -m evaluation.spelling --model runs/gpt/model       the trailing space, for a trained model
    python -m results.prompting spelling               three seeds: results/spelling.json
"""

import random
import re
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from data.corpus import documents, stdlib_files
from data.tokenizer import Tokenizer, get_tokenizer, train_bpe
from evaluation.multiple_choice import Row, log_likelihoods
from evaluation.small_runs import IGNORED, mean_and_range, of, run_study, small_gpt, stream, train
from formats import command

N_VOCAB = 1024
N_WORDS = 4000  # the most frequent ones of 4 to 6 letters
STEPS, BATCH = 400, 64
N_TEST, N_TOKENS = 256, 48
FORMS = {  # how the question and how the answer write a word
    "reverse": (("word", "word"), ("spaced", "word"), ("word", "spaced"), ("spaced", "spaced")),
    "count": (("word", ""), ("spaced", "")),
}
N_BORDERS = 400  # places of a text where the trailing space of a trained model is measured


# --- words


@cache
def words() -> dict[str, int]:
    """Return the most frequent words of Python's library, of 4 to 6 letters, and how often each occurs."""
    counts: Counter[str] = Counter()
    for file in stdlib_files()[::4]:  # a quarter is enough
        for text in documents([file], lambda problem: None):
            counts.update(re.findall(r"\b[a-z]{4,6}\b", text))
    return dict(counts.most_common(N_WORDS))


@cache
def tokenizer() -> Tokenizer:
    """Return a vocabulary of byte pairs that is learned from the words, each with a space in front."""
    return train_bpe((f" {word}" * count for word, count in words().items()), N_VOCAB)


def split(seed: int) -> tuple[list[str], list[str]]:
    """Return the words to learn from and those that are held out, a tenth."""
    shuffled = sorted(words())
    random.Random(seed).shuffle(shuffled)
    return shuffled[len(shuffled) // 10 :], shuffled[: len(shuffled) // 10]


def is_new(word: str, known: set[int]) -> bool:
    """Return whether a word has a token that is in no training word."""
    return not set(tokenizer().encode(f" {word}")) <= known


# --- questions


def form(word: str, how: str) -> str:
    return " ".join(word) if how == "spaced" else word


def question(task: str, forms: tuple[str, str], word: str, draws: random.Random) -> tuple[str, str]:
    """Return a prompt, which ends without a space, and its answer, which begins with one."""
    if task == "reverse":
        return f"reverse: {form(word, forms[0])} =", f" {form(word[::-1], forms[1])}"
    # The number is drawn first, among those that the word offers, so that not nearly all answers are 1.
    counts = {letter: word.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"}
    n = draws.choice(sorted(set(counts.values())))
    letter = draws.choice([letter for letter, count in counts.items() if count == n])
    return f"count {letter} in {form(word, forms[0])} =", f" {n}"


def batch_of(pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Return inputs and targets (B, T): the answers and a line break are predicted."""
    encoded = [(tokenizer().encode(a), tokenizer().encode(f"{b}\n")) for a, b in pairs]
    width = max(len(a) + len(b) for a, b in encoded)
    tokens, targets = (
        torch.zeros(len(pairs), width, dtype=torch.long),
        torch.full((len(pairs), width), IGNORED),
    )
    for i, (a, b) in enumerate(encoded):
        tokens[i, : len(a) + len(b)] = torch.tensor([*a, *b])
        targets[i, len(a) : len(a) + len(b)] = torch.tensor(b)
    return {"tokens": tokens[:, :-1], "targets": targets[:, 1:].contiguous()}


# --- measures


def written(model: nn.Module, prompts: list[str]) -> list[str]:
    """Return the likeliest answers, up to a line break."""
    end = tokenizer().encode("\n")
    found = model.generate([tokenizer().encode(text) for text in prompts], 18, temperature=0, stop=end)
    return [tokenizer().decode(tokens).split("\n")[0] for tokens in found]


def trailing_space(model: nn.Module, tokenizer, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Return the mean nats of answers that begin with a space, once as they are, once with that space at the
    end of the prompt. The characters predicted are the same, but for the space, which then costs nothing."""
    found = {}
    for name, moved in (("in the answer", False), ("in the prompt", True)):
        rows = []
        for before, after in pairs:
            cut = (before + " ", after[1:]) if moved else (before, after)
            a, b = (tokenizer.encode(text) for text in cut)
            rows.append(Row(([*tokenizer.begin_ids, *a, *b])[-model.config.max_seq_len :], 0, 0))
            rows[-1] = rows[-1]._replace(start=len(rows[-1].tokens) - len(b))
        scores = log_likelihoods(model, rows, 32)
        found[name] = -sum(score.log_p for score in scores) / len(scores)
    return found


def borders(text: str, n: int) -> list[tuple[str, str]]:
    """Return n pairs (text before, a space and the next word) of places between two words of a text."""
    places = [m for m in re.finditer(r"(?<=\w) \w+", text) if m.start() > 200]
    places = random.Random(0).sample(places, min(n, len(places)))
    return [(text[m.start() - 200 : m.start()], m[0]) for m in places]


# --- the study


def study(seed: int, steps: int | None = None) -> list[dict]:
    """Return a row for each task and way of writing: right answers for held-out words."""
    learned, held_out = split(seed)
    known = {token for word in learned for token in tokenizer().encode(f" {word}")}
    rows = []
    for task, all_forms in FORMS.items():
        for forms in all_forms:
            model = small_gpt(tokenizer().n_vocab, N_TOKENS, seed)

            def draw(generator: Generator, task: str = task, forms: tuple = forms) -> dict[str, Tensor]:
                draws = random.Random(generator.initial_seed())
                return batch_of(
                    [question(task, forms, word, draws) for word in draws.choices(learned, k=BATCH)]
                )

            train(model, draw, steps or STEPS, seed)
            draws, row = (
                random.Random(stream(seed).initial_seed()),
                {"seed": seed, "task": task, "forms": forms},
            )
            for name, some in (("held out", held_out), ("trained on", learned)):
                pairs = [question(task, forms, word, draws) for word in some[:N_TEST]]
                answers = written(model.eval(), [a for a, _ in pairs])
                right = [a == b for a, (_, b) in zip(answers, pairs, strict=True)]
                row[name] = sum(right) / len(right)
                if name == "held out":
                    new = [r for r, word in zip(right, some, strict=False) if is_new(word, known)]
                    row |= {"new token": sum(new) / max(1, len(new)), "n_new": len(new)}
                    row["most frequent"] = max(Counter(b for _, b in pairs).values()) / len(pairs)
                    row["trailing space"] = trailing_space(model, tokenizer(), pairs)
                    spaced = written(model, [f"{a} " for a, _ in pairs])
                    row["right behind a space"] = sum(
                        a == b[1:] for a, (_, b) in zip(spaced, pairs, strict=True)
                    ) / len(pairs)
            rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Return the figures as lines: mean, and range of the seeds."""
    lines = [
        f"{'right answers':28}{'held-out words':26}{'with a new token':26}{'trained on':26}behind a space"
    ]
    for task, all_forms in FORMS.items():
        for forms in all_forms:
            own = [row for row in of(rows, task=task) if tuple(row["forms"]) == forms]
            name = f"{task}: {' -> '.join(x for x in forms if x)}"
            cells = [
                mean_and_range(r[k] for r in own)
                for k in ("held out", "new token", "trained on", "right behind a space")
            ]
            lines.append(f"  {name:26}" + "".join(f"{cell:26}" for cell in cells))
        lines.append(
            f"  {'most frequent answer':26}{mean_and_range(r['most frequent'] for r in of(rows, task=task))}"
        )
    return "\n".join(lines)


def of_model(directory: Path) -> str:
    """Return the cost of a trailing space for a trained model, on text that training on `stdlib` holds out."""
    from evaluation.multiple_choice import load
    from evaluation.stdlib_suite import held_out_modules

    model, own = load(directory)
    text = "\n".join(text for _, text in held_out_modules())[:400_000]
    nats = trailing_space(model, own, borders(text, N_BORDERS))
    return "\n".join(f"space {name:14} {value:.3f} nats per word" for name, value in nats.items())


def main(argv: list[str] | None = None) -> None:
    run_study("Spelling: words, letters and byte pairs.", study, table, argv, of_model)


if __name__ == "__main__":
    command.run(main)
