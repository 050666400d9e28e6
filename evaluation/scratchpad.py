"""Scratchpad: does it help to write down the steps in between? A task where it must, and its controls.

    AB BC BC AC ?   A -> B -> C -> B -> B   = B        three cups, a ball under A; where is it after n swaps?

Each of the three swaps is equally likely, so without one of them every place of the ball is equally likely,
too, and a guess is right in 1/3 of the games: there is no approximate answer. A model of fixed depth that
answers at once has to combine all swaps in a few layers. One that writes the ball's place after each swap (a
scratchpad, Nye et al. 2021, 2112.00114) makes one easy step at a time. Functions that depend on every input
are possible for a transformer but hard to find by gradients (Hahn and Rofin 2024, 2402.09963).

Model, rate and batch are the same everywhere; only what stands between question and answer differs:

    direct                    ? = B          equal examples: as many games as the others
    direct, equal tokens      ? = B          more games, until as many tokens are read as with a scratchpad
    scratchpad                ? B C B B = B       (in training; in the test the model writes it)
    filler                    ? . . . . = B       as many tokens without content: is it only more computation?
    wrong scratchpads         ? A A B C = B       the places of another game, and the right answer

The loss is over all that follows the question, the figure is the final answer alone. In a last test the model
goes on from the first half of a right scratchpad, whose last place has been changed: does its answer follow
what is written, or the swaps?

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

SWAPS = ((0, 1), (1, 2), (0, 2))  # token i: the cups that swap i exchanges
CUP, QUESTION, FILLER, EQUALS = 3, 6, 7, 8  # tokens: cups are CUP, CUP + 1, CUP + 2
N_VOCAB = 9
LENGTHS = (2, 4, 8, 12)  # swaps
LONGEST = LENGTHS[-1]
STEPS, BATCH = 300, 64
N_TEST = 512  # games
KINDS = ("direct", "direct, equal tokens", "scratchpad", "filler", "wrong scratchpads")
EVERYWHERE = KINDS[:3]  # the other two are trained on the longest games only

# PLACE[i, c]: where the ball is after swap i, if it was under cup c.
PLACE = torch.tensor([[{a: b, b: a}.get(cup, cup) for cup in range(3)] for a, b in SWAPS])


# --- games


def places(swaps: Tensor, start: Tensor | int = 0) -> Tensor:
    """Return the place of the ball, int64 (B, n), after each of the swaps (B, n). start: the place before."""
    found, now = [], torch.zeros(len(swaps), dtype=torch.long) + start
    for i in range(swaps.shape[1]):
        now = PLACE[swaps[:, i], now]
        found.append(now)
    return torch.stack(found, 1)


def between(kind: str, swaps: Tensor, draws: Generator) -> Tensor:
    """Return the tokens (B, 0 or n) that stand between question and answer in training."""
    if kind.startswith("direct"):
        return swaps[:, :0]
    if kind == "filler":
        return torch.full_like(swaps, FILLER)
    if kind == "wrong scratchpads":
        swaps = torch.randint(len(SWAPS), swaps.shape, generator=draws)
    return CUP + places(swaps)


def rows_of(kind: str, n: int, n_games: int, draws: Generator) -> Tensor:
    """Return games of n swaps as rows of tokens, int64 (n_games, T): swaps ? ... = answer."""
    swaps = torch.randint(len(SWAPS), (n_games, n), generator=draws)
    answer = CUP + places(swaps)[:, -1:]
    question, equals = torch.full_like(answer, QUESTION), torch.full_like(answer, EQUALS)
    return torch.cat((swaps, question, between(kind, swaps, draws), equals, answer), 1)


def n_tokens(kind: str, n: int) -> int:
    """Return the tokens of a game of n swaps."""
    return n + 3 + (0 if kind.startswith("direct") else n)


def n_steps(kind: str, n: int, steps: int) -> int:
    """Return the steps of a run: more for direct answers at equal tokens, since their games are shorter."""
    if kind != "direct, equal tokens":
        return steps
    return math.ceil(steps * n_tokens("scratchpad", n) / n_tokens("direct", n))


# --- measures


def go_on(model: GPT, begun: Tensor, n_new: int) -> Tensor:
    """Return the likeliest n_new tokens (B, n_new) behind the tokens begun (B, T), one after another."""
    return torch.tensor(model.generate(begun.tolist(), n_new, temperature=0))


def accuracy(model: GPT, kind: str, n: int, draws: Generator) -> float:
    """Return the share of right final answers. The model writes everything behind the question itself."""
    rows = rows_of(kind, n, N_TEST, draws)
    written = go_on(model, rows[:, : n + 1], rows.shape[1] - n - 1)
    return (written[:, -1] == rows[:, -1]).double().mean().item()


def changed(model: GPT, n: int, draws: Generator) -> dict[str, float]:
    """Return what the model answers after the place in the middle of a right scratchpad was changed.

    follows the scratchpad: the answer is right for a ball that was where the scratchpad says, and wrong for
    the swaps. follows the swaps: the answer is the right one all the same.
    """
    rows, middle = rows_of("scratchpad", n, N_TEST, draws), n // 2
    swaps, at = rows[:, :n], n + middle  # the column of the place after swap `middle`
    moved = (rows[:, at] - CUP + torch.randint(1, 3, (len(rows),), generator=draws)) % 3
    begun = torch.cat((rows[:, :at], CUP + moved[:, None]), 1)
    answer = go_on(model, begun, rows.shape[1] - begun.shape[1])[:, -1]
    expected = CUP + places(swaps[:, middle:], moved)[:, -1]
    shares = {"follows the scratchpad": answer == expected, "follows the swaps": answer == rows[:, -1]}
    return {name: right.double().mean().item() for name, right in shares.items()}


# --- the study


def study(seed: int, steps: int | None = None) -> list[dict]:
    """Return a row for each kind and number of swaps: steps, tokens, and the share of right answers."""
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
    """Return the figures as lines: mean, and range of the seeds."""
    lengths = sorted({row["swaps"] for row in rows})
    lines = [
        f"right final answers (a guess: {1 / 3:.1%})",
        f"{'':24}" + "".join(f"{n:>3} swaps{'':16}" for n in lengths),
    ]
    for kind in KINDS:
        cells = [[row["right"] for row in of(rows, kind=kind, swaps=n)] for n in lengths]
        lines.append(f"  {kind:22}" + "".join(f"{mean_and_range(cell) if cell else '':25}" for cell in cells))
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
