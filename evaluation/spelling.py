"""Spelling: what byte pairs hide. A model reads tokens, not the letters of which they are made.

    spell parser = p a r s e r             word to letters
    turn parser = resrap                   reverse, word to word
    back parser = r e s r a p              reverse, word to letters
    back p a r s e r = r e s r a p         reverse, letters to letters
    count r in parser = 2                  count, word
    count r in p a r s e r = 2             count, letters

" parser" may be a single token, and then its letters are not in the input. A model can learn them only from
questions about words with this token. With spaces in between, every letter is a token. One small GPT with one
vocabulary of byte pairs learns all six questions at once. Half of the examples are about words of Python's
library, and half about random letters, so that there are more than 1,800 words to reverse and to count. The
test has held-out words. Those "with a new token" have a token that no training word has, and those "of one
token" are a single token.

The second part is about prompts of any model with byte pairs. Most tokens that begin a word contain the space
in front of it, so behind a prompt that ends in a space they do not fit any more. `trailing_space` measures
what that costs in nats: in the same text the space is the end of the prompt, or the beginning of the answer.

    python -m evaluation.spelling                              one seed, two minutes on a core
    python -m evaluation.spelling --model runs/gpt/model       the trailing space, for a trained model
    python -m results.prompting_studies spelling               three seeds: results/spelling.json

Shapes: B examples, T tokens.
"""

import random
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from data.corpus import documents, stdlib_files
from data.tokenizer import Tokenizer, train_bpe
from evaluation.multiple_choice import Row, load, log_likelihoods
from evaluation.small_runs import IGNORED, mean_and_range, of, run_study, small_gpt, stream, train
from evaluation.stdlib_suite import held_out_modules
from formats import command

LETTERS = "abcdefghijklmnopqrstuvwxyz"
N_VOCAB = 1024
N_WORDS, SHORTEST, LONGEST = 2000, 4, 6  # the number of words, and the letters of each
STEPS, BATCH = 1500, 64
N_TEST, N_TOKENS = 200, 48  # questions of a kind in the test; tokens that the model reads
N_BORDERS, N_BEFORE = 400, 200  # places of a text for the trailing space, and characters in front of each


# --- words


@cache
def words() -> dict[str, int]:
    """Return {word: how often it occurs} of the most frequent words in a quarter of Python's library."""
    counts: Counter[str] = Counter()
    for file in stdlib_files()[::4]:
        for text in documents([file], lambda problem: None):
            counts.update(re.findall(rf"\b[a-z]{{{SHORTEST},{LONGEST}}}\b", text))
    return dict(counts.most_common(N_WORDS))


@cache
def tokenizer() -> Tokenizer:
    """Return a tokenizer of byte pairs that is trained on the words, each with a space in front."""
    return train_bpe((f" {word}" * count for word, count in words().items()), N_VOCAB)


def split(seed: int) -> tuple[list[str], list[str]]:
    """Return the training words, and the held-out ones, which are a tenth."""
    shuffled = sorted(words())
    random.Random(seed).shuffle(shuffled)
    return shuffled[len(shuffled) // 10 :], shuffled[: len(shuffled) // 10]


def random_letters(draws: random.Random) -> str:
    """Return a random text of letters that is as long as a word."""
    return "".join(draws.choices(LETTERS, k=draws.randint(SHORTEST, LONGEST)))


# --- questions: each is a prompt that ends without a space, and an answer that begins with one

Question = tuple[str, str]


def count(word: str, written: str, draws: random.Random) -> Question:
    """Return a question for how often a letter occurs in a word. written: the word as the question has it.

    The answer is drawn first, among the counts that occur (0 is one), and then a letter with this count. So
    letters that occur more than once are more frequent than among random letters.
    """
    counts = {letter: word.count(letter) for letter in LETTERS}
    n = draws.choice(sorted(set(counts.values())))
    letter = draws.choice([letter for letter in LETTERS if counts[letter] == n])
    return f"count {letter} in {written} =", f" {n}"


QUESTIONS: dict[str, Callable[[str, random.Random], Question]] = {
    "spell, word to letters": lambda word, draws: (f"spell {word} =", f" {' '.join(word)}"),
    "reverse, word to word": lambda word, draws: (f"turn {word} =", f" {word[::-1]}"),
    "reverse, word to letters": lambda word, draws: (f"back {word} =", f" {' '.join(word[::-1])}"),
    "reverse, letters to letters": lambda word, draws: (
        f"back {' '.join(word)} =",
        f" {' '.join(word[::-1])}",
    ),
    "count, word": lambda word, draws: count(word, word, draws),
    "count, letters": lambda word, draws: count(word, " ".join(word), draws),
}


def batch_of(pairs: list[Question]) -> dict[str, Tensor]:
    """Return inputs and targets, int64 (B, T). Only answers and the line break behind them are targets."""
    encoded = [(tokenizer().encode(asked), tokenizer().encode(f"{right}\n")) for asked, right in pairs]
    width = max(len(a) + len(b) for a, b in encoded)
    tokens = torch.zeros(len(pairs), width, dtype=torch.long)
    targets = torch.full_like(tokens, IGNORED)
    for i, (a, b) in enumerate(encoded):
        tokens[i, : len(a) + len(b)] = torch.tensor([*a, *b])
        targets[i, len(a) : len(a) + len(b)] = torch.tensor(b)
    return {"tokens": tokens[:, :-1], "targets": targets[:, 1:].contiguous()}


# --- measures


def answers(model: nn.Module, prompts: list[str]) -> list[str]:
    """Return the answers by greedy decoding, up to a line break."""
    end = tokenizer().encode("\n")
    found = model.generate([tokenizer().encode(text) for text in prompts], 14, temperature=0, stop=end)
    return [tokenizer().decode(tokens).split("\n")[0] for tokens in found]


def share(right: list[bool]) -> float | None:
    """Return the share of right answers, None if there are none to count."""
    return sum(right) / len(right) if right else None


def trailing_space(model: nn.Module, tokenizer, pairs: list[Question]) -> dict[str, float]:
    """Return the mean nats of answers that begin with a space, and of the same with the space in the prompt.

    Both texts have the same characters. A space in the prompt is not predicted, so a model of characters
    would need fewer nats for the rest.
    """
    found = {}
    for name, moved in (("in the answer", False), ("in the prompt", True)):
        rows = []
        for before, after in pairs:
            texts = (f"{before} ", after[1:]) if moved else (before, after)
            a, b = (tokenizer.encode(text) for text in texts)
            tokens = [*tokenizer.begin_ids, *a, *b][-model.config.max_seq_len :]
            rows.append(Row(tokens, max(1, len(tokens) - len(b)), 0))
        scores = log_likelihoods(model, rows, 32)
        found[name] = -sum(score.log_p for score in scores) / len(scores)
    return found


def borders(text: str, n: int) -> list[Question]:
    """Return up to n random pairs of a text: N_BEFORE characters, and the space and the word behind them."""
    places = [m for m in re.finditer(r"(?<=\w) \w+", text) if m.start() > N_BEFORE]
    places = random.Random(0).sample(places, min(n, len(places)))
    return [(text[m.start() - N_BEFORE : m.start()], m[0]) for m in places]


# --- the study


def study(seed: int, steps: int | None = None) -> list[dict]:
    """Return a row for each question: the share of right answers for each group of words, and baselines."""
    learned, held_out = split(seed)
    known = {token for word in learned for token in tokenizer().encode(f" {word}")}
    model, kinds = small_gpt(tokenizer().n_vocab, N_TOKENS, seed), list(QUESTIONS.values())

    def draw(generator: Generator) -> dict[str, Tensor]:
        draws = random.Random(generator.initial_seed())
        about = draws.choices(learned, k=BATCH // 2) + [random_letters(draws) for _ in range(BATCH // 2)]
        return batch_of([draws.choice(kinds)(word, draws) for word in about])

    train(model, draw, steps or STEPS, seed)

    # The groups of words: held out, held out with a new token, held out of one token, and trained on.
    tokens = {word: tokenizer().encode(f" {word}") for word in held_out}
    groups = {
        "held out": held_out,
        "with a new token": [word for word in held_out if not set(tokens[word]) <= known],
        "of one token": [word for word in held_out if len(tokens[word]) == 1],
        "trained on": learned[:N_TEST],
    }
    rows = []
    for name, kind in QUESTIONS.items():
        row: dict = {"seed": seed, "question": name}
        for group, some in groups.items():
            draws = random.Random(stream(seed).initial_seed())
            pairs = [kind(word, draws) for word in some[:N_TEST]]
            found = answers(model, [asked for asked, _ in pairs]) if pairs else []
            row[group] = share([a == right for a, (_, right) in zip(found, pairs, strict=True)])
            row[f"n {group}"] = len(pairs)
            if group == "held out":
                row["most frequent"] = max(Counter(right for _, right in pairs).values()) / len(pairs)
                row["trailing space"] = trailing_space(model, tokenizer(), pairs)
                spaced = answers(model, [f"{asked} " for asked, _ in pairs])
                row["behind a space"] = share([a == b[1:] for a, (_, b) in zip(spaced, pairs, strict=True)])
        rows.append(row)
    return rows


COLUMNS = ("held out", "with a new token", "of one token", "trained on", "behind a space", "most frequent")


def table(rows: list[dict]) -> str:
    """Return the figures of all seeds as text: mean and range."""
    lines = [f"{'right answers':30}" + "".join(f"{name:24}" for name in COLUMNS)]
    for name in QUESTIONS:
        cells = [[row[column] for row in of(rows, question=name)] for column in COLUMNS]
        cells = [[value for value in cell if value is not None] for cell in cells]
        lines.append(f"  {name:28}" + "".join(f"{mean_and_range(c) if c else '':24}" for c in cells).rstrip())
    counts = ", ".join(f"{name} {rows[0][f'n {name}']}" for name in COLUMNS[:4])
    return "\n".join([*lines, f"words of each group: {counts}; behind a space: held-out words again"])


def of_model(directory: Path) -> str:
    """Return the cost of a trailing space for a trained model, on text that training holds out."""
    model, own = load(directory)
    text = "\n".join(text for _, text in held_out_modules())
    nats = trailing_space(model, own, borders(text, N_BORDERS))
    return "\n".join(f"space {name:14} {value:.3f} nats per word" for name, value in nats.items())


def main(argv: list[str] | None = None) -> None:
    run_study("Spelling: words, letters and byte pairs.", study, table, argv, of_model)


if __name__ == "__main__":
    command.run(main)
