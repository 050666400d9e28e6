"""Generate and verify: a model that is seldom right writes many programs, of which execution selects some.

    sample     k programs from the model
    filter     keep the programs that give the outputs of all examples in the question
    cluster    run these on generated inputs; programs with the same outputs are one cluster
    submit     one program from each of the n largest clusters

n@k is the share of problems that are solved by one of n programs submitted from k samples; pass@k is the
share of problems with a right program among k samples, which no selection can exceed.

This is AlphaCode's selection (Li et al. 2022, arXiv:2203.07814, sections 4.5 and 4.6). Clusters help if wrong
programs disagree with each other more than right ones do. A question here is a list of examples, and a
program is an expression of x:

    [3 1 2] -> [2 1 3] ;  [5 0] -> [0 5] ;  [7 7 1 4] -> [4 1 7 7] ;            x[::-1]

The model is a small GPT (small_models.py) that learns from such functions and is tested on others
(functions_to_find.py). Expressions are safe to run in this process, for the reasons in expressions.py. A
program is right if it gives the outputs of the examples, and those of 20 hidden inputs.

If answers cannot be executed, a verifier can be trained (Cobbe et al. 2021, arXiv:2110.14168, section 4.2): a
copy of the model learns to predict whether a sample is right, and the samples with the highest predictions
are submitted.

    python -m evaluation.generate_and_verify             one seed, small: three minutes on two cores
    python -m results.generate_and_verify                three seeds, with all controls

Shapes: B programs, T tokens, V vocabulary.
"""

import ast
import copy
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from evaluation.expressions import LISTS, parse
from evaluation.functions_to_find import (
    N_EXAMPLES,
    VOCABULARY,
    Problem,
    draw_examples,
    draw_input,
    draw_problems,
    draw_programs,
    output,
    question,
    solves,
)
from evaluation.generation import pass_at_k
from evaluation.small_models import Answer, Row, answers, fit, make_batch, small_gpt
from formats import command
from formats.progress import progress_bar
from gpt import GPT

N_GENERATED = 20  # inputs for clustering
SUBMISSIONS = 10  # programs that a rule of selection submits for a problem
MOST_VERIFIED = 100  # with more samples than this the verifiers, which are slow, are left out
LONGEST_PROGRAM, MAX_SEQ_LEN = 40, 160  # tokens


# --- the model


def draw_row(programs: list[tuple[str, ast.expr]], generator: random.Random) -> Row:
    """Return the tokens of a question about one of the programs, and those of the program.

    programs: (text, syntax tree) of each.
    """
    while True:
        text, tree = generator.choice(programs)
        examples = draw_examples(tree, N_EXAMPLES, generator)
        if examples is not None:
            row = question(examples), [*VOCABULARY.encode(text), VOCABULARY.end]
            if len(row[0]) + len(row[1]) < MAX_SEQ_LEN and len(row[1]) <= LONGEST_PROGRAM:
                return row


def train_writer(programs: dict[str, ast.expr], steps: int, seed: int, layers: int = 3) -> GPT:
    """Return a new model, trained to write the program behind its examples.

    programs: {text: syntax tree}, those to learn from.
    """
    generator, pairs = random.Random(f"{seed} writer"), list(programs.items())
    model = small_gpt(VOCABULARY, MAX_SEQ_LEN, seed, layers=layers, width=96)
    fit(model, lambda: [draw_row(pairs, generator) for _ in range(32)], steps)
    return model


def train_verifier(
    writer: GPT,
    rows: list[tuple[Row, bool]],
    steps: int,
    seed: int,
    shuffled: bool = False,
    lr: float = 1e-3,
) -> GPT:
    """Return a copy of the writer, trained to write "yes" behind a right program and "no" behind a wrong one.

    rows: the tokens of a question and of a program, and whether the program is right. Right and wrong ones
    are drawn equally often. shuffled: permute the labels among the rows, as a control. Raises ValueError if
    all labels are equal.
    """
    generator = random.Random(f"{seed} verifier")
    labels = [right for _, right in rows]
    if shuffled:
        generator.shuffle(labels)
    parts = [[row for (row, _), label in zip(rows, labels, strict=True) if label == side] for side in (0, 1)]
    if not all(parts):
        raise ValueError("verifier: expected right and wrong programs to learn from; add --steps")
    words = [VOCABULARY.encode("no"), VOCABULARY.encode("yes")]

    def draw_rows() -> list[Row]:
        return [(judged(*generator.choice(parts[i % 2])), words[i % 2]) for i in range(32)]

    model = copy.deepcopy(writer)
    fit(model, draw_rows, steps, lr)
    return model


def judged(read: list[int], program: Sequence[int]) -> list[int]:
    """Return the tokens that a verifier reads: a question, a program, and a question mark."""
    return [*read, *(token for token in program if token != VOCABULARY.end), *VOCABULARY.encode("?")]


@torch.no_grad()
def verify(verifier: GPT, read: list[int], programs: Sequence[tuple[int, ...]]) -> list[float]:
    """Return for each program log p("yes") - log p("no") by a verifier, the log-odds that it is right.

    read: the tokens of the question.
    """
    rows = [(judged(read, program), [VOCABULARY.end]) for program in programs]
    tokens = make_batch(rows)["tokens"]  # (B, T)
    last = torch.tensor([len(row) - 1 for row, _ in rows])
    logits = verifier.logits(verifier.hidden(tokens)[torch.arange(len(rows)), last])  # (B, V)
    yes, no = (VOCABULARY.encode(word)[0] for word in ("yes", "no"))
    return (logits[:, yes] - logits[:, no]).tolist()


# --- selection


class Candidate(NamedTuple):
    """A program that was sampled, and the results of its execution."""

    text: str
    count: int  # the number of samples that are this program
    log_p: float  # by the model
    passes: bool  # whether it gives the outputs of the examples
    values: str  # its outputs for the generated inputs, with | in between
    right: bool  # whether it gives the hidden outputs, too; no rule of selection may read this
    odds: dict[str, float] = {}  # {name of a verifier: log-odds that the program is right}

    @property
    def runs(self) -> bool:
        """Return whether the program has a value for at least one generated input."""
        return any(value not in ("", "None") for value in self.values.split("|"))


def candidates(
    problem: Problem, samples: Sequence[Answer], generated: Sequence[list[int]], verifiers: dict[str, GPT]
) -> list[Candidate]:
    """Return the different programs among samples, in the order of their first appearance, executed on the
    problem and on the generated inputs, and judged by the verifiers."""
    counts, log_p = Counter(sample.tokens for sample in samples), {s.tokens: s.log_p for s in samples}
    read, programs = question(problem.examples), list(counts)
    odds = {name: verify(model, read, programs) for name, model in verifiers.items()}
    found = []
    for i, tokens in enumerate(programs):
        text = VOCABULARY.decode(tokens)
        passes, values, right = executed(text, problem, generated)
        own = {name: of_all[i] for name, of_all in odds.items()}
        found.append(Candidate(text, counts[tokens], log_p[tokens], passes, values, right, own))
    return found


def executed(text: str, problem: Problem, generated: Sequence[list[int]]) -> tuple[bool, str, bool]:
    """Return `passes`, `values` and `right` of Candidate for the text of a program.

    A text that is no expression has no values.
    """
    try:
        tree = parse(text)
    except ValueError:
        return False, "", False
    passes = solves(tree, problem.examples)
    values = "|".join(str(output(tree, x)) for x in generated)
    return passes, values, passes and solves(tree, problem.hidden)


def in_random_order(found: list[Candidate], generator: random.Random) -> list[Candidate]:
    """Return the candidates in a random order: that of draws without replacement, with probabilities in
    proportion to their counts, by the keys u^(1 / count) of Efraimidis and Spirakis (2006)."""
    return sorted(found, key=lambda c: -(generator.random() ** (1 / c.count)))


def by_clusters(found: list[Candidate]) -> list[Candidate]:
    """Return the likeliest program of each cluster, that of the cluster with most samples first.

    A cluster has the programs with the same values for the generated inputs.
    """
    clusters: dict[str, list[Candidate]] = {}
    for c in found:
        clusters.setdefault(c.values, []).append(c)
    ordered = sorted(clusters.values(), key=lambda cluster: -sum(c.count for c in cluster))
    return [max(cluster, key=lambda c: c.log_p) for cluster in ordered]


def likeliest(found: list[Candidate], _: Any = None) -> list[Candidate]:
    """Return the candidates, the one with the largest log p by the model first."""
    return sorted(found, key=lambda c: -c.log_p)


def passing(found: list[Candidate]) -> list[Candidate]:
    """Return the candidates that give the outputs of the examples: AlphaCode's filter."""
    return [c for c in found if c.passes]


Rule = Callable[[list[Candidate], random.Random], list[Candidate]]
# {name: the function that returns candidates in the order in which they are submitted}. Without the filter
# the clusters leave out programs that fail on every input, which would be one large cluster.
RULES: dict[str, Rule] = {
    "random": in_random_order,
    "likeliest": likeliest,
    "cluster": lambda found, _: by_clusters([c for c in found if c.runs]),
    "filter, random": lambda found, generator: in_random_order(passing(found), generator),
    "filter, likeliest": lambda found, _: likeliest(passing(found)),
    "filter, cluster": lambda found, _: by_clusters(passing(found)),
    "verifier": lambda found, _: sorted(found, key=lambda c: -c.odds.get("verifier", 0.0)),
    "verifier, shuffled labels": lambda found, _: sorted(found, key=lambda c: -c.odds.get("shuffled", 0.0)),
}


def first_right(found: list[Candidate], rule: str, generator: random.Random) -> int | None:
    """Return the rank, from 1, of the first right program among the SUBMISSIONS of a rule, else None."""
    submitted = RULES[rule](found, generator)[:SUBMISSIONS]
    return next((i for i, c in enumerate(submitted, 1) if c.right), None)


def measure(
    problem: Problem, samples: Sequence[Answer], ks: Sequence[int], seed: int, verifiers: dict[str, GPT]
) -> dict[str, Any]:
    """Return the figures of one problem: of its first k samples for each of ks, and of all of them.

    The ks increase, and the last is the number of samples.
    """
    generator = random.Random(f"{seed} {problem.program}")
    generated = [draw_input(generator) for _ in range(N_GENERATED)]

    # The rank of each rule's first right submission.
    ranks = {}
    for k in ks:
        judges = verifiers if k <= MOST_VERIFIED else {}
        found = candidates(problem, samples[:k], generated, judges)
        used = [rule for rule in RULES if judges or "verifier" not in rule]
        ranks[k] = {rule: first_right(found, rule, generator) for rule in used}

    # The last k is the number of samples, so `found` has the candidates of all of them.
    n_right, n_passing = (sum(c.count for c in found if getattr(c, name)) for name in ("right", "passes"))
    n = len(samples)
    pass_at = {k: pass_at_k(n, n_right, k) for k in ks}
    return {"program": problem.program, "samples": n, "right": n_right, "passing": n_passing} | {
        "ranks": ranks, "pass_at": pass_at}  # fmt: skip


def samples_of_grammar(n: int, generator: random.Random) -> list[Answer]:
    """Return n random expressions of the grammar, as a control without a model. All have log p 0."""
    texts = [str(LISTS.draw(generator, generator.randint(2, 5))) for _ in range(n)]
    return [Answer(tuple(VOCABULARY.encode(text)), 0.0) for text in texts]


def labelled_samples(
    writer: GPT, programs: dict[str, ast.expr], n_problems: int, n: int, seed: int
) -> list[tuple[Row, bool]]:
    """Return what a verifier learns from: the tokens of a question and of a program, and whether the program
    is right. The programs are the different ones among n samples of the writer for each training problem."""
    generator, draws, pairs = random.Random(f"{seed} labelled"), torch.Generator().manual_seed(seed), []
    problems = draw_problems(programs, n_problems, generator)
    for first in range(0, len(problems), 32):
        part = problems[first : first + 32]
        reads = [question(problem.examples) for problem in part]
        written = answers(writer, reads, n, LONGEST_PROGRAM, draws)
        for problem, read, found in zip(part, reads, written, strict=True):
            for tokens in dict.fromkeys(answer.tokens for answer in found):
                _, _, right = executed(VOCABULARY.decode(tokens), problem, ())
                pairs.append(((read, list(tokens)), right))
    return pairs


# --- the study


def study(
    seed: int, steps: int, verifier_steps: int, n_problems: int, ks: Sequence[int], n_programs: int = 8000
) -> dict[str, Any]:
    """Return the figures of each test problem, for samples of the model and for those of the grammar.

    steps, verifier_steps: updates of the model, and of each verifier (0: without verifiers); ks: numbers of
    samples, in ascending order; n_programs: programs to learn from and of the test together.
    """
    generator = random.Random(f"{seed} study")
    training, test = draw_programs(n_programs, generator)
    writer = train_writer(training, steps, seed)
    verifiers = {}
    if verifier_steps:
        labelled = labelled_samples(writer, training, 5 * n_problems, 20, seed)
        for name in ("verifier", "shuffled"):
            verifiers[name] = train_verifier(writer, labelled, verifier_steps, seed, name == "shuffled")

    rows, without_model = [], []
    draws = torch.Generator().manual_seed(seed)
    for problem in progress_bar(draw_problems(test, n_problems, generator), "problems", leave=False):
        (samples,) = answers(writer, [question(problem.examples)], max(ks), LONGEST_PROGRAM, draws)
        rows.append(measure(problem, samples, ks, seed, verifiers))
        without_model.append(measure(problem, samples_of_grammar(max(ks), generator), ks, seed, {}))
    return {"seed": seed, "model": rows, "grammar": without_model}


def share_solved(rows: Sequence[dict], rule: str, k: int, n: int) -> float:
    """Return n@k: the share of problems that a rule solves by one of n submissions from k samples."""
    ranks = [row["ranks"][k].get(rule) for row in rows]
    return sum(rank is not None and rank <= n for rank in ranks) / len(ranks)


def table(result: dict[str, Any], ks: Sequence[int]) -> str:
    """Return pass@k, and n@k of each rule, as text."""
    lines = [f"{'':28}" + "".join(f"{f'k = {k}':>14}" for k in ks)]
    for source in ("model", "grammar"):
        rows = result[source]
        passes = [sum(row["pass_at"][k] for row in rows) / len(rows) for k in ks]
        lines.append(f"{source + ': pass@k':28}" + "".join(f"{x:14.1%}" for x in passes))
        for rule in RULES:
            if all(rule in row["ranks"][ks[0]] for row in rows):
                values = [[share_solved(rows, rule, k, n) for n in (1, SUBMISSIONS)] for k in ks]
                cells = "".join(f"{a:7.0%}/{b:6.0%}" if rule in rows[0]["ranks"][k] else f"{'-':>14}"
                                for k, (a, b) in zip(ks, values, strict=True))  # fmt: skip
                lines.append(f"  {rule:26}" + cells)
        removed = 1 - sum(row["passing"] for row in rows) / sum(row["samples"] for row in rows)
        wrong = sum(row["passing"] - row["right"] for row in rows) / max(1, sum(r["passing"] for r in rows))
        lines.append(
            f"  the filter removes {removed:.1%} of the samples; of those left {wrong:.1%} are wrong"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Let a small model find functions, and select among its programs.")
    add = parser.add_argument
    add("--steps", type=int, default=800, help="updates of the model (default 800)")
    add("--verifier-steps", type=int, default=100, help="updates of each verifier; 0: none (default 100)")
    add("--problems", type=int, default=30, help="functions to find (default 30)")
    add("--samples", type=int, default=200, help="programs per problem (default 200)")
    add("--seed", type=int, default=0, help="start of the random draws (default 0)")
    args = parser.parse_args(argv)
    for name in ("steps", "problems", "samples"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.verifier_steps < 0:
        parser.error(f"--verifier-steps {args.verifier_steps}: expected at least 0")
    ks = [k for k in (1, 10, 100, 1000) if k < args.samples] + [args.samples]
    print("solved with 1 submission / with 10, of k samples")
    print(table(study(args.seed, args.steps, args.verifier_steps, args.problems, ks), ks))


if __name__ == "__main__":
    command.run(main)
