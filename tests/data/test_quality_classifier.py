"""The classifier of quality: features, loss and optimum are what the equations say."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import run_command

from data import quality_classifier as quality
from data.near_duplicates import n_grams

F = 1 << 10


def texts_of(kind: str, n: int, seed: int) -> list[str]:
    """Return n texts of 5 to 40 words; four of five words are common to both kinds."""
    generator = random.Random(seed)
    shared, own = [f"w{chr(97 + i)}" for i in range(20)], [f"{kind}{chr(97 + i)}" for i in range(10)]
    return [
        " ".join(generator.choice(own if generator.random() < 0.2 else shared) for _ in range(length))
        for length in generator.choices(range(5, 41), k=n)
    ]


def sides(n: int = 60) -> tuple[list[str], np.ndarray]:
    return texts_of("good", n, 0) + texts_of("bad", n, 1), np.repeat([1.0, 0.0], n)


def dense(x: quality.Features) -> np.ndarray:
    """Return the features as a matrix (n, F)."""
    found = np.zeros((len(x.starts), F))
    ends = [*x.starts[1:], len(x.hashes)]
    for i, (start, end) in enumerate(zip(x.starts, ends, strict=True)):
        found[i, x.hashes[start:end]] = x.values[start:end]
    return found


def test_features_are_counts_of_words_and_pairs_with_norm_1():
    (row,) = dense(quality.features(["Red, red fish. Blue"], n_words=3, n_features=F))
    red, fish = (n_grams([word], 1)[0] % F for word in ("red", "fish"))
    pairs = n_grams(["red", "red", "fish"], 2) % F
    expected = np.zeros(F)
    for place in (red, red, fish, *pairs):
        expected[int(place)] += 1
    assert np.allclose(row, expected / np.linalg.norm(expected), atol=1e-15)
    empty = quality.features(["", "red", "!"], n_features=F)
    assert len(empty.starts) == 3 and dense(empty)[[0, 2]].sum() == 0


def test_the_gradient_is_that_of_the_loss():
    texts, labels = sides(5)
    x, generator = quality.features(texts, n_features=F), np.random.default_rng(0)
    classifier = quality.Classifier(generator.normal(size=F), 0.3)
    loss, by_weights, by_bias = quality.loss_and_gradient(classifier, x, labels, 0.1)
    p = 1 / (1 + np.exp(-(dense(x) @ classifier.weights + 0.3)))
    likelihood = np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    assert loss == pytest.approx(-likelihood + 0.05 * classifier.weights @ classifier.weights, abs=1e-12)
    for place in (int(x.hashes[0]), int(x.hashes[-1])):
        step, losses = 1e-6, []
        for sign in (1, -1):
            moved = classifier.weights.copy()
            moved[place] += sign * step
            losses.append(quality.loss_and_gradient(quality.Classifier(moved, 0.3), x, labels, 0.1)[0])
        assert by_weights[place] == pytest.approx((losses[0] - losses[1]) / (2 * step), abs=1e-8)
    assert by_bias == pytest.approx(np.mean(p - labels), abs=1e-14)


def test_the_fit_is_the_optimum_that_scikit_learn_finds():
    texts, labels = sides()
    x, decay = quality.features(texts, n_features=F), 1e-2
    found = quality.fit(x, labels, decay, n_features=F)
    # The loss is convex, so it is lowest where the gradient is 0.
    _, by_weights, by_bias = quality.loss_and_gradient(found, x, labels, decay)
    assert np.abs(by_weights).max() < 1e-6 and abs(by_bias) < 1e-6
    linear_model = pytest.importorskip("sklearn.linear_model")
    theirs = linear_model.LogisticRegression(C=1 / (decay * len(labels)), tol=1e-10, max_iter=10_000)
    theirs.fit(dense(x), labels)
    assert np.abs(found.weights - theirs.coef_[0]).max() < 1e-3 * np.abs(theirs.coef_).max()
    assert found.bias == pytest.approx(theirs.intercept_[0], abs=1e-3)
    assert np.abs(found.scores(texts) - theirs.predict_proba(dense(x))[:, 1]).max() < 1e-4


def test_the_command_learns_saves_and_names_the_words_that_weigh_most(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, seed in (("good", 0), ("bad", 1)):
        lines = [json.dumps({"text": text}) + "\n" for text in texts_of(kind, 60, seed)]
        Path(f"{kind}.jsonl").write_text("".join(lines))
    flags = [
        "-m",
        "data.quality_classifier",
        "--good",
        "good.jsonl",
        "--other",
        "bad.jsonl",
        "--out",
        "model",
    ]
    ended = run_command(*flags)
    assert ended.code == 0, ended.err
    for_good, against = (line.split(maxsplit=3)[3] for line in ended.out.splitlines()[2:4])
    assert "good" in for_good and "bad" not in for_good and "bad" in against and "good" not in against
    loaded = quality.Classifier.load(Path("model"))
    new = [np.mean(loaded.scores(texts_of(kind, 40, 9))) for kind in ("good", "bad")]
    assert new[0] > 0.6 and new[1] < 0.4
    first = Path("model/model.safetensors").read_bytes()
    assert run_command(*flags).code == 0 and Path("model/model.safetensors").read_bytes() == first


def test_a_damaged_classifier_is_refused_by_name(tmp_path):
    quality.Classifier(np.ones(F)).save(tmp_path / "model")
    whole = (tmp_path / "model" / "model.safetensors").read_bytes()
    for damaged in (whole[:1000], b""):
        (tmp_path / "model" / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model: damaged .*make it again"):
            quality.Classifier.load(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(whole)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"kind": quality.KIND}))
    with pytest.raises(ValueError, match=r"model: damaged .'n_words'"):
        quality.Classifier.load(tmp_path / "model")


def test_mistakes_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("few.jsonl").write_text('{"text": "a"}\n')

    def refused(*more: str) -> str:
        flags = ["--good", "few.jsonl", "--other", "few.jsonl", "--out", "model", *more]
        ended = run_command("-m", "data.quality_classifier", *flags)
        assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1
        return ended.err

    assert "--good: 1 documents; expected at least 20" in refused()
    assert "--words 0: expected at least 1" in refused("--words", "0")
    for value in ("0.0", "nan", "inf"):
        expected = f"--weight-decay {value}: expected a finite number above 0"
        assert expected in refused("--weight-decay", value)
    with pytest.raises(ValueError, match="no classifier of quality"):
        quality.Classifier.load(tmp_path)
    # A folder of something else is not replaced.
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("mine")
    assert "--out notes: holds something else" in refused("--out", "notes")
    assert "--out few.jsonl: holds something else" in refused("--out", "few.jsonl")
    assert Path("notes/a.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="documents of one kind"):
        quality.fit(quality.features(["a", "b"], n_features=F), np.ones(2), n_features=F)
