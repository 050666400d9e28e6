"""FunSearch: a search for programs, whose proposals come from the best programs so far.

    repeat   an island   one of ten populations of programs, drawn at random
             parents     two of its programs, better ones more often
             child       a new program that is made from the parents
             score       the child is run; it joins the island
    and every 2,000 evaluations the worse half of the islands restarts: each of them begins again with one
    program, the best one of an island of the better half

(Romera-Paredes et al. 2023, doi 10.1038/s41586-023-06924-6; there islands restart every four hours.) The
programs of an island with the same scores on all inputs are a cluster. A cluster is drawn by softmax of its
score / temperature, with a temperature that falls as the island grows, and in it a program by softmax of
minus its length, so that short programs are preferred.

In the paper a language model of billions of parameters makes the child. Here it is made in four ways, which
are compared at equal evaluations:

    random      no search: an expression of the grammar
    mutation    genetic programming with one island: a part of a parent changed (expressions.py)
    islands     the same with ten islands
    model       ten islands, and a small GPT as proposer. It learns from drawn examples to make a child as
                mutation does, then, again and again, from the children that were better than their parents

The programs are priorities for cap sets (cap_sets.py). An evaluation is the scoring of a new program.
Proposals that are no expression, and those that were made before, are counted apart and are no evaluations.

    python -m evaluation.funsearch                        n = 5, 3,000 evaluations: a minute
    python -m evaluation.funsearch --methods model        the trained proposer: two minutes
    python -m results.funsearch                           10,000 evaluations of n = 5 and 6, three seeds
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from evaluation.cap_sets import BEST_KNOWN, PRIORITIES, size
from evaluation.expressions import HOLE, Tree, parse
from evaluation.small_models import Row, Vocabulary, answers, fit, small_gpt
from formats import command
from formats.progress import progress_bar

N_ISLANDS, N_PARENTS = 10, 2
RESET = 2000  # evaluations between two restarts of islands
DEPTH = 6  # of a drawn expression
TEMPERATURE, PERIOD = 0.1, 30_000  # the temperature falls from 0.1 to 0 with the programs of an island
LONGEST_PROGRAM, LONGEST_ROW = 50, 150  # tokens of a child that the model writes; of parents and child


class Program(NamedTuple):
    """A program that has been scored."""

    text: str
    scores: tuple[int, ...]  # one for each input; the last one is the score that the search increases
    tree: Tree | None = None  # None for one that the model has written


@dataclass
class Island:
    """A population of programs, which become parents with each other only, in clusters of equal scores."""

    clusters: dict[tuple[int, ...], list[Program]] = field(default_factory=dict)
    n_programs: int = 0

    def add(self, program: Program) -> None:
        self.clusters.setdefault(program.scores, []).append(program)
        self.n_programs += 1

    def best(self) -> Program:
        """Return the first of the programs with the highest score."""
        return self.clusters[max(self.clusters, key=lambda scores: scores[-1])][0]

    def parents(self, generator: random.Random) -> list[Program]:
        """Return two programs, the better one last. They may be the same one."""
        temperature = TEMPERATURE * (1 - (self.n_programs % PERIOD) / PERIOD)
        groups = list(self.clusters.values())
        chosen = draw([group[0].scores[-1] / temperature for group in groups], N_PARENTS, generator)
        found = []
        for group in (groups[i] for i in chosen):
            lengths = [len(program.text) for program in group]
            shortest, longest = min(lengths), max(lengths)
            (i,) = draw([(shortest - n) / (longest + 1e-6) for n in lengths], 1, generator)
            found.append(group[i])
        return sorted(found, key=lambda program: program.scores[-1])


def draw(logits: Sequence[float], n: int, generator: random.Random) -> list[int]:
    """Return n positions, drawn with replacement by the softmax of logits."""
    largest = max(logits)
    return generator.choices(range(len(logits)), [math.exp(x - largest) for x in logits], k=n)


# --- proposals

# A proposer returns a child for each pair of parents: a tree, or a text if a model wrote it.
Proposer = Callable[[list[list[Program]], random.Random], list[Tree | str]]


def at_random(parents: list[list[Program]], generator: random.Random) -> list[Tree | str]:
    """Return a random expression for each pair of parents, which is not used."""
    return [PRIORITIES.draw(generator, generator.randint(3, DEPTH)) for _ in parents]


def mutated(parents: list[list[Program]], generator: random.Random) -> list[Tree | str]:
    """Return the better parent of each pair with a part changed, which may come from the other parent."""
    return [PRIORITIES.change(better.tree, other.tree, generator) for other, better in parents]


class Model:
    """A small GPT that reads two parents, the better one last, and writes a child."""

    def __init__(self, seed: int, steps: int = 600):
        rules = [text for texts in PRIORITIES.rules.values() for text in texts]
        self.vocabulary = Vocabulary(["v", *(part for rule in rules for part in HOLE.split(rule)[::2])])
        self.model = small_gpt(self.vocabulary, LONGEST_ROW, seed, layers=2, width=72)
        self.draws, self.generator = torch.Generator().manual_seed(seed), random.Random(f"{seed} model")
        self.improved: list[Row] = []
        fit(self.model, lambda: [self.example() for _ in range(32)], steps)

    def prompt(self, parents: Sequence[str]) -> list[int]:
        """Return the tokens of `v <parent> v <better parent> v`."""
        return self.vocabulary.encode("v " + " v ".join(parents) + " v")

    def row(self, parents: Sequence[str], child: str) -> Row:
        return self.prompt(parents), [*self.vocabulary.encode(child), Vocabulary.end]

    def example(self) -> Row:
        """Return a training row: two random expressions as parents, the second with a part changed as child.

        None of them is scored.
        """
        while True:
            a, b = (PRIORITIES.draw(self.generator, self.generator.randint(3, DEPTH)) for _ in range(2))
            row = self.row((str(a), str(b)), str(PRIORITIES.change(b, a, self.generator)))
            if sum(map(len, row)) <= LONGEST_ROW and len(row[1]) <= LONGEST_PROGRAM:
                return row

    def __call__(self, parents: list[list[Program]], generator: random.Random) -> list[Tree | str]:
        prompts = [self.prompt([program.text for program in pair]) for pair in parents]
        prompts = [prompt[-(LONGEST_ROW - LONGEST_PROGRAM) :] for prompt in prompts]
        found = answers(self.model, prompts, 1, LONGEST_PROGRAM, self.draws)
        return [self.vocabulary.decode(answer.tokens) for (answer,) in found]

    def learn(self, parents: list[Program], child: Program) -> None:
        """Keep a child that is better than both parents, or as good and shorter than the better one."""
        better = parents[-1]
        if (child.scores[-1], -len(child.text)) > (better.scores[-1], -len(better.text)):
            row = self.row([program.text for program in parents], child.text)
            if sum(map(len, row)) <= LONGEST_ROW:
                self.improved.append(row)

    def train(self, steps: int = 40) -> None:
        """Train on kept children and as many drawn examples; do nothing if no child was kept."""
        if self.improved:

            def rows() -> list[Row]:
                kept = self.generator.choices(self.improved[-1000:], k=16)
                return kept + [self.example() for _ in range(16)]

            fit(self.model, rows, steps, lr=1e-3)


# --- the search


@dataclass
class Result:
    """The course of a search."""

    curve: list[tuple[int, int]]  # (evaluations, score) whenever the best score rises
    best: Program
    n_evaluations: int
    n_invalid: int = 0
    n_repeated: int = 0


def scored(child: Tree | str, inputs: Sequence[int]) -> Program | None:
    """Return a child with its scores, None if it is no expression of the language or has no value."""
    text = str(child)
    try:
        tree = parse(text)
        return Program(text, tuple(size(tree, n) for n in inputs), child if isinstance(child, Tree) else None)
    except ValueError:
        return None


def search(
    method: str, n: int, n_evaluations: int, seed: int, batch: int = 50, learn_every: int = 1000
) -> Result:
    """Return the result of a search for a cap set of dimension n; method: one of METHODS.

    A program's scores are the sizes for the dimensions n - 2 to n. Parents are drawn for `batch` children at
    a time, and a Model learns after every `learn_every` evaluations. A search that repeats itself ends early,
    after 20 n_evaluations proposals.
    """
    generator, inputs = random.Random(f"{seed} {method}"), range(max(1, n - 2), n + 1)
    n_islands, make_proposer = METHODS[method]
    propose = make_proposer(seed)
    first = Tree("number", "{value}", (Tree("value", "0"),))
    start = scored(first, inputs)
    islands = [Island() for _ in range(n_islands)]
    for island in islands:
        island.add(start)

    seen, result, n_proposals = {start.text}, Result([(1, start.scores[-1])], start, 1), 0
    bar = progress_bar(total=n_evaluations, desc=f"{method}, n = {n}", leave=False)
    while result.n_evaluations < n_evaluations and n_proposals < 20 * n_evaluations:
        # Propose children, and score those that are new.
        chosen = [generator.randrange(n_islands) for _ in range(batch)]
        parents = [islands[i].parents(generator) for i in chosen]
        for i, pair, child in zip(chosen, parents, propose(parents, generator), strict=True):
            n_proposals += 1
            if str(child) in seen or result.n_evaluations == n_evaluations:
                result.n_repeated += str(child) in seen
                continue
            seen.add(str(child))
            program = scored(child, inputs)
            if program is None:
                result.n_invalid += 1
                continue
            result.n_evaluations += 1
            bar.update()
            islands[i].add(program)  # by number: the island may have restarted since its parents were drawn
            if program.scores[-1] > result.best.scores[-1]:
                result.best = program
                result.curve.append((result.n_evaluations, program.scores[-1]))

            # Now and then a Model learns from what was scored, and islands restart.
            if isinstance(propose, Model):
                propose.learn(pair, program)
                if result.n_evaluations % learn_every == 0:
                    propose.train()
            if result.n_evaluations % RESET == 0 and n_islands > 1:
                restart(islands, generator)
    bar.close()
    return result


def restart(islands: list[Island], generator: random.Random) -> None:
    """Replace each island of the worse half by a new one, in place in the list.

    A new island has one program, the best one of an island of the better half.
    """
    order = list(range(len(islands)))
    generator.shuffle(order)  # islands with equal scores are in random order
    order.sort(key=lambda i: islands[i].best().scores[-1])
    worse, better = order[: len(order) // 2], order[len(order) // 2 :]
    for i in worse:
        founder = islands[generator.choice(better)].best()
        islands[i] = Island()
        islands[i].add(founder)


# The number of islands of each method, and a function that makes its proposer from a seed.
METHODS: dict[str, tuple[int, Callable[[int], Proposer]]] = {
    "random": (1, lambda seed: at_random),
    "mutation": (1, lambda seed: mutated),
    "islands": (N_ISLANDS, lambda seed: mutated),
    "model": (N_ISLANDS, Model),
}


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Search for a cap set by each method.")
    add = parser.add_argument
    add("--n", type=int, default=5, choices=range(3, 9), help="dimension (default 5)")
    add("--evaluations", type=int, default=3000, help="programs that are scored (default 3000)")
    add("--seed", type=int, default=0, help="start of the random draws (default 0)")
    without_model = [method for method in METHODS if method != "model"]
    add("--methods", nargs="+", choices=METHODS, default=without_model, metavar="METHOD",
        help=f"how children are proposed: {', '.join(METHODS)} (default: all but the model)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.evaluations < 1:
        parser.error(f"--evaluations {args.evaluations}: expected at least 1")
    print(f"cap sets of n = {args.n}: equal priorities give {2**args.n}, the best known is", end="")
    print(f" {BEST_KNOWN[args.n]}")
    for method in args.methods:
        result = search(method, args.n, args.evaluations, args.seed)
        print(f"\n{method}: {result.best.scores[-1]} points after {result.n_evaluations} evaluations", end="")
        print(f"; {result.n_invalid} invalid, {result.n_repeated} repeated proposals")
        print("  " + ", ".join(f"{score} after {at}" for at, score in result.curve))
        print(f"  {result.best.text}")


if __name__ == "__main__":
    command.run(main)
