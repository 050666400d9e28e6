"""FunSearch: how parents are drawn, what restarts, and that a search is what its seed makes it."""

import math
import random

import pytest

from evaluation import funsearch
from evaluation.cap_sets import PRIORITIES, size
from evaluation.expressions import Tree
from evaluation.funsearch import Island, Program, draw, restart, scored, search

ZERO = Tree("number", "{value}", (Tree("value", "0"),))


def island(*programs: tuple[str, int]) -> Island:
    new = Island()
    for text, score in programs:
        new.add(Program(text, (score,), ZERO))
    return new


def test_a_cluster_is_drawn_by_the_softmax_of_its_score():
    drawn = draw([0.0, 1.0, 2.0], 30_000, random.Random(0))
    total = sum(math.exp(x) for x in range(3))
    for i in range(3):
        assert drawn.count(i) / 30_000 == pytest.approx(math.exp(i) / total, abs=0.01)
    assert draw([1e6, 0.0], 5, random.Random(0)) == [0] * 5  # large scores do not overflow


def test_parents_are_good_and_short_and_the_better_one_is_last():
    generator = random.Random(0)
    # At a temperature of 0.1 a point more is e^10 times as likely.
    pairs = [island(("bad", 4), ("a long one", 5), ("good", 5)).parents(generator) for _ in range(2000)]
    texts = [program.text for pair in pairs for program in pair]
    assert texts.count("bad") < 5
    # Lengths 4 and 10: the longer one is e^-(6 / 10) times as likely.
    assert texts.count("good") / len(texts) == pytest.approx(1 / (1 + math.exp(-0.6)), abs=0.03)
    mixed = island(("bad", 1), ("good", 1 + 0.01))
    assert all(a.scores <= b.scores for a, b in (mixed.parents(generator) for _ in range(50)))


def test_the_worse_half_of_the_islands_restarts_from_the_best_of_the_better_half():
    islands = [island(("0", 1), (f"best of {i}", i)) for i in range(2, 8)]
    restart(islands, random.Random(0))
    assert [x.n_programs for x in islands] == [1, 1, 1, 2, 2, 2]
    founders = {x.best().text for x in islands[:3]}
    assert founders <= {"best of 5", "best of 6", "best of 7"}


def test_a_program_is_scored_on_every_input_and_what_has_no_value_is_not():
    program = scored("sum(x[i] == 2 for i in range(n)) == 2", (3, 4, 5))
    assert program.scores == (8, 16, 40)
    assert scored("x", (3,)) is None and scored("x[0] +", (3,)) is None and scored("1" * 300, (3,)) is None


@pytest.mark.parametrize("method", ["random", "mutation", "islands"])
def test_a_search_counts_its_evaluations_and_is_the_same_for_the_same_seed(method, monkeypatch):
    monkeypatch.setattr(funsearch, "RESET", 60)
    result, again = (search(method, 3, 150, seed=1) for _ in range(2))
    assert result == again and result != search(method, 3, 150, seed=2)
    assert result.n_evaluations == 150
    assert [score for _, score in result.curve] == sorted({score for _, score in result.curve})
    assert result.best.scores[-1] == result.curve[-1][1] == size(result.best.text, 3) >= 8


def test_children_of_an_island_that_restarts_within_a_batch_join_the_new_island(monkeypatch):
    seen = []

    def counted(islands, generator):
        restart(islands, generator)
        seen.append((islands, sum(island.n_programs for island in islands)))

    monkeypatch.setattr(funsearch, "RESET", 60)
    monkeypatch.setattr(funsearch, "restart", counted)
    search("islands", 3, 80, seed=0)
    ((islands, n_after_restart),) = seen
    assert sum(island.n_programs for island in islands) == n_after_restart + 20


def test_expressions_at_random_find_forty_points_in_five_dimensions():
    assert search("random", 5, 800, seed=0).best.scores[-1] >= 40


def test_a_model_proposes_texts_and_learns_from_children_that_are_better_than_their_parents(monkeypatch):
    trained = []
    monkeypatch.setattr(funsearch, "fit", lambda model, rows, steps, lr=0: trained.append((rows(), steps)))
    model = funsearch.Model(seed=0, steps=7)
    assert len(trained[0][0]) == 32 and trained[0][1] == 7
    read, written = trained[0][0][0]
    assert read.count(model.vocabulary.ids["v"]) == 3 and written[-1] == 0

    old, better = Program("x[0]", (4,)), Program("x[1]", (5,))
    for child in (Program("n", (5,)), Program("x[1] + 0", (5,)), Program("x[0] + 1", (4,))):
        model.learn([old, better], child)  # only the first, which is shorter and as good
    assert [model.vocabulary.decode(row[1]) for row in model.improved] == ["n <end>"]
    model.train()
    assert sum(row == model.improved[0] for row in trained[1][0]) == 16

    proposals = model([[old, better]] * 3, random.Random(0))
    assert len(proposals) == 3 and all(isinstance(text, str) for text in proposals)


def test_what_a_model_writes_is_searched_among(monkeypatch):
    class Fixed(funsearch.Model):
        def __init__(self, seed):
            self.texts, self.learned, self.n_trained = random.Random(seed), [], 0

        def __call__(self, parents, generator):
            drawn = [str(PRIORITIES.draw(self.texts, 5)) for _ in parents]
            return ["sum( x [", *drawn[1:]]

        def learn(self, parents, child):
            self.learned.append(child)

        def train(self):
            self.n_trained += 1

    made = []
    monkeypatch.setitem(funsearch.METHODS, "model", (4, lambda seed: made.append(Fixed(seed)) or made[0]))
    result = search("model", 3, 120, seed=0, batch=20, learn_every=50)
    assert result.n_invalid >= 1 and result.best.tree is None
    assert len(made[0].learned) == 119 and made[0].n_trained == 2


def test_the_command_prints_the_course_of_each_search(capsys):
    funsearch.main(["--n", "3", "--evaluations", "60"])
    printed = capsys.readouterr().out
    assert printed.count(" points after 60 evaluations") == 3 and "the best known is 9" in printed
