"""Scratchpad: does it help a model to write down intermediate steps? A task that needs them, and controls.

    AB BC BC AC ?   A -> B -> C -> B -> B   = B      three cups, a ball under A: where is it after n swaps?

The three possible swaps are equally likely. So if one swap of a game is not known, the ball is equally likely
under each of the cups: there is no approximate answer, and a guess is right in 1/3 of the games. A model of
fixed depth that answers at once has to combine all swaps in a few layers. One that writes the ball's place
after each swap (a scratchpad, Nye et al. 2021, 2112.00114) makes one easy step at a time. Transformers can
represent functions that depend on every input, but gradients hardly find them (Hahn and Rofin 2024,
2402.09963).

Model, learning rate and batch size are the same everywhere. What stands between question and answer differs:

    direct                    ? = B               as many games in training as the others have
    direct, equal tokens      ? = B               more games: as many tokens as with a scratchpad
    scratchpad                ? B C B B = B       in the test the model writes the scratchpad itself
    filler                    ? . . . . = B       as many tokens without content: does more computation help?
    wrong scratchpads         ? A A B C = B       the places of another game, and the right answer

The loss is that of all tokens behind the question; the figure is the share of right final answers. In a last
test the model continues the first half of a right scratchpad whose last place has been changed. Does its
answer follow from what is written, or from the swaps?

    python -m evaluation.scratchpad                      one seed, three minutes on a core
    python -m results.prompting_studies scratchpad       three seeds, and the picture

Shapes: B games, n swaps, T tokens.
"""

import math

import torch
from torch import Generator, Tensor

from evaluation.small_runs import mean_and_range, next_token_batch, of, run_study, small_gpt, stream, train
from formats import command
from gpt import GPT

SWAPS = ((0, 1), (1, 2), (0, 2))  # the cups that swap i exchanges; its token is i
CUP, QUESTION, FILLER, EQUALS = 3, 6, 7, 8  # further tokens: cup c is CUP + c
N_VOCAB = 9
LENGTHS = (2, 4, 8, 12)  # swaps
LONGEST = LENGTHS[-1]
STEPS, BATCH = 300, 64
N_TEST = 512  # games
KINDS = ("direct", "direct, equal tokens", "scratchpad", "filler", "wrong scratchpads")
EVERYWHERE = KINDS[:3]  # the other two are trained on the longest games only

# PLACE[i, c]: the cup with the ball after swap i, if the ball was under cup c.
PLACE = torch.tensor([[{a: b, b: a}.get(cup, cup) for cup in range(3)] for a, b in SWAPS])


# --- games


def places(swaps: Tensor, start: Tensor | int = 0) -> Tensor:
    """Return the cup with the ball, int64 (B, n), after each of the swaps (B, n).

    start: the cup with the ball before the first swap, one for all games or one for each (B,).
    """
    found, now = [], torch.zeros(len(swaps), dtype=torch.long) + start
    for i in range(swaps.shape[1]):
        now = PLACE[swaps[:, i], now]
        found.append(now)
    return torch.stack(found, 1)


def between(kind: str, swaps: Tensor, draws: Generator) -> Tensor:
    """Return the tokens (B, 0 or n) that stand between question and answer in training. kind: of KINDS."""
    if kind.startswith("direct"):
        return swaps[:, :0]
    if kind == "filler":
        return torch.full_like(swaps, FILLER)
    if kind == "wrong scratchpads":
        swaps = torch.randint(len(SWAPS), swaps.shape, generator=draws)
    return CUP + places(swaps)


def rows_of(kind: str, n: int, n_games: int, draws: Generator) -> Tensor:
    """Return games of n swaps as rows of tokens, int64 (n_games, T): swaps, ?, `between`, =, answer."""
    swaps = torch.randint(len(SWAPS), (n_games, n), generator=draws)
    answer = CUP + places(swaps)[:, -1:]
    question, equals = torch.full_like(answer, QUESTION), torch.full_like(answer, EQUALS)
    return torch.cat((swaps, question, between(kind, swaps, draws), equals, answer), 1)


def n_tokens(kind: str, n: int) -> int:
    """Return the number of tokens of a game of n swaps."""
    return n + 3 + (0 if kind.startswith("direct") else n)


def n_steps(kind: str, n: int, steps: int) -> int:
    """Return the steps of a run, which are more for "direct, equal tokens", since its games are shorter."""
    if kind != "direct, equal tokens":
        return steps
    return math.ceil(steps * n_tokens("scratchpad", n) / n_tokens("direct", n))


# --- measures


def go_on(model: GPT, begun: Tensor, n_new: int) -> Tensor:
    """Return the n_new tokens (B, n_new) that greedy decoding writes behind the tokens begun (B, T)."""
    return torch.tensor(model.generate(begun.tolist(), n_new, temperature=0))


def accuracy(model: GPT, kind: str, n: int, draws: Generator) -> float:
    """Return the share of right final answers, where the model writes everything behind the question."""
    rows = rows_of(kind, n, N_TEST, draws)
    written = go_on(model, rows[:, : n + 1], rows.shape[1] - n - 1)
    return (written[:, -1] == rows[:, -1]).double().mean().item()


def changed(model: GPT, n: int, draws: Generator) -> dict[str, float]:
    """Return two shares of answers behind a right scratchpad whose place in the middle has been changed.

    "follows the scratchpad": the answer is that of the changed place and the swaps behind it. "follows the
    swaps": the answer is that of all swaps. No answer is both, since two places stay two places after a swap.
    """
    rows, middle = rows_of("scratchpad", n, N_TEST, draws), n // 2
    swaps, at = rows[:, :n], n + middle  # at: the column of the place after the first `middle` swaps
    moved = (rows[:, at] - CUP + torch.randint(1, 3, (len(rows),), generator=draws)) % 3
    begun = torch.cat((rows[:, :at], CUP + moved[:, None]), 1)
    answer = go_on(model, begun, rows.shape[1] - begun.shape[1])[:, -1]
    expected = CUP + places(swaps[:, middle:], moved)[:, -1]
    shares = {"follows the scratchpad": answer == expected, "follows the swaps": answer == rows[:, -1]}
    return {name: right.double().mean().item() for name, right in shares.items()}


# --- the study


def study(seed: int, steps: int | None = None) -> list[dict]:
    """Return a row for each kind and number of swaps: games, tokens, and the share of right answers."""
    rows = []
    for n in LENGTHS:
        for kind in KINDS if n == LONGEST else EVERYWHERE:
            model, own = small_gpt(N_VOCAB, 2 * LONGEST + 3, seed), n_steps(kind, n, steps or STEPS)

            def batch_of(draws: Generator, kind: str = kind, n: int = n) -> dict[str, Tensor]:
                games = rows_of(kind, n, BATCH, draws)
                return next_token_batch(games, (torch.arange(games.shape[1]) > n).expand_as(games))

            train(model, batch_of, own, seed)
            row = {"seed": seed, "kind": kind, "swaps": n, "games": own * BATCH}
            row |= {
                "tokens": row["games"] * n_tokens(kind, n),
                "right": accuracy(model, kind, n, stream(seed)),
            }
            if n == LONGEST and "scratchpad" in kind:
                row["changed"] = changed(model, n, stream(seed))
            rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Return the figures of all seeds as text: mean and range."""
    lengths = sorted({row["swaps"] for row in rows})
    lines = [
        f"right final answers (a guess: {1 / 3:.1%})",
        f"{'':24}" + "".join(f"{n:>3} swaps{'':18}" for n in lengths),
    ]
    for kind in KINDS:
        cells = [[row["right"] for row in of(rows, kind=kind, swaps=n)] for n in lengths]
        lines.append(f"  {kind:22}" + "".join(f"{mean_and_range(cell) if cell else '':27}" for cell in cells))
    lines.append(f"a changed place in the middle of {lengths[-1]}, and what the answer follows")
    for kind in KINDS:
        own = [row["changed"] for row in of(rows, kind=kind) if "changed" in row]
        if own:
            lines += [f"  {kind:22}{name:24}{mean_and_range(r[name] for r in own)}" for name in own[0]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    run_study("Scratchpad against direct answers: where is the ball?", study, table, argv)


if __name__ == "__main__":
    command.run(main)
