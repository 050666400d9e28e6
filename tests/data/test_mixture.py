"""Mixing: how often each document is read is exact, and follows from weights, sizes and budget."""

import numpy as np
import pytest

from data import mixture

SIZES = np.array([10, 20, 30, 40, 7, 8, 9])
SOURCE_OF = np.array([0, 0, 0, 0, 1, 1, 1])  # "web" has 100 bytes, "wiki" 24
NAMES = ["web", "wiki"]


def drawn(weights: dict, budget: int, seed: int = 0) -> mixture.Drawn:
    return mixture.draw(SOURCE_OF, SIZES, NAMES, weights, budget, seed)


def test_whole_epochs_read_every_document_equally_often():
    found = drawn({"web": 100 / 172, "wiki": 72 / 172}, 172)
    assert np.bincount(found.order).tolist() == [1, 1, 1, 1, 3, 3, 3]
    assert {name: row["epochs"] for name, row in found.sources.items()} == {"web": 1.0, "wiki": 3.0}
    assert found.sources["wiki"] | {"weight": 0} == {
        "weight": 0, "size": 24, "bytes": 72, "documents": 9, "epochs": 3.0
    }  # fmt: skip


@pytest.mark.parametrize("budget", [1, 50, 99, 100, 101, 250, 1000])
def test_a_part_of_an_epoch_reads_documents_once_more_until_the_budget_is_reached(budget):
    for seed in range(5):
        found = drawn({"web": 0.5, "wiki": 0.5}, budget, seed)
        times = np.bincount(found.order, minlength=7)
        for number, (name, longest) in enumerate((("web", 40), ("wiki", 9))):
            report, of_it = found.sources[name], times[number == SOURCE_OF]
            assert budget / 2 <= report["bytes"] < budget / 2 + longest
            assert of_it.max() - of_it.min() <= 1  # no document is two epochs behind another
            assert report["bytes"] == (of_it * SIZES[number == SOURCE_OF]).sum()
            assert report["epochs"] == report["bytes"] / report["size"]
            assert report["documents"] == of_it.sum()


def test_the_order_is_a_function_of_the_seed_and_mixes_the_sources():
    weights = {"web": 0.5, "wiki": 0.5}
    assert np.array_equal(drawn(weights, 500).order, drawn(weights, 500).order)
    assert not np.array_equal(drawn(weights, 500).order, drawn(weights, 500, seed=1).order)
    sources = SOURCE_OF[drawn(weights, 5000).order]
    assert 0.2 < (sources[1:] != sources[:-1]).mean() < 0.8  # not one source behind the other


def test_a_source_of_weight_0_is_left_out_and_an_empty_one_with_a_weight_is_refused():
    assert set(drawn({"web": 1.0, "wiki": 0.0}, 50).order) <= {0, 1, 2, 3}
    with pytest.raises(ValueError, match="no document of it is left"):
        mixture.draw(np.zeros(7, int), SIZES, NAMES, {"web": 0.5, "wiki": 0.5}, 50, 0)


def test_temperature_moves_weights_from_the_shares_to_equal_ones():
    sizes = {"a": 100, "b": 400, "none": 0}
    assert mixture.by_temperature(sizes, 1.0) == {"a": 0.2, "b": 0.8, "none": 0.0}
    assert mixture.by_temperature(sizes, 0.0) == {"a": 0.5, "b": 0.5, "none": 0.0}
    assert mixture.by_temperature(sizes, 0.5)["b"] == pytest.approx(2 / 3, abs=1e-15)  # 20 / (10 + 20)


def test_weights_are_read_and_wrong_ones_refused():
    assert mixture.parse_weights(["wiki=1", "web=3"], NAMES) == {"web": 0.75, "wiki": 0.25}
    for words, problem in (
        (["web=1"], "no weight for wiki"),
        (["web=1", "books=1"], "'books': expected one of web, wiki"),
        (["web=1", "web=1"], "is there twice"),
        (["web=1", "wiki=-1"], "from 0 on"),
        (["web=1", "wiki=much"], "'much' is no number"),
        (["web=0", "wiki=0"], "all weights are 0"),
    ):
        with pytest.raises(ValueError, match=problem):
            mixture.parse_weights(words, NAMES)
