"""language/word2vec.py: its steps are the equations', its optimum the mutual information, and it learns."""

import math

import numpy as np
import pytest
import torch
from conftest import run_command
from torch import Generator

from formats import word_vectors
from language import word2vec
from language.huffman import huffman
from language.noise import Noise
from language.ppmi import pair_counts
from language.windows import Batch, batches, centres_of
from language.word2vec import Config, Terms, Vectors, loss, train, update
from language.word_corpus import WordCorpus, encode

V, D, W, K = 7, 5, 2, 3  # words, width, window, negatives
LR = 0.1


def a_corpus(n: int = 400, seed: int = 0, n_documents: int = 5) -> WordCorpus:
    """Return a text of V words in which each depends on the one before it."""
    generator = np.random.default_rng(seed)
    chain = generator.dirichlet(np.ones(V), V)
    words = [0]
    for _ in range(n - 1):
        words.append(int(generator.choice(V, p=0.5 * chain[words[-1]] + 0.5 / V)))
    texts = np.array_split(np.array([f"w{i}" for i in words]), n_documents)
    return encode([text.tolist() for text in texts], 1)


CORPUS = a_corpus()
TREE = word2vec.tree_of(CORPUS)
KINDS = [("cbow", False), ("skip_gram", False), ("cbow", True), ("skip_gram", True)]
EACH = pytest.mark.parametrize(("architecture", "hierarchical"), KINDS)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def a_batch(hierarchical: bool) -> Batch:
    """Return the one batch of an epoch, in float64."""
    noise = Noise(torch.from_numpy(CORPUS.counts), 0.75)
    ids, documents = torch.from_numpy(CORPUS.ids), torch.from_numpy(CORPUS.documents)
    length, generator = 1 if hierarchical else 16, Generator().manual_seed(3)
    return next(batches(ids, documents, noise, W, length, generator, torch.float64))


def some_vectors(n_output: int) -> Vectors:
    generator = Generator().manual_seed(4)
    return Vectors(*(torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (V, n_output)))


def terms_of(architecture: str, hierarchical: bool, batch: Batch) -> Terms:
    tree = word2vec.Tree(TREE.nodes, TREE.zeros.double(), TREE.inside.double())
    kind = getattr(word2vec, architecture + "_tree" * hierarchical)
    return kind(batch, tree if hierarchical else K)


def expected_step(batch: Batch, v, u, architecture: str, hierarchical: bool, undivided: bool):
    """Return v and u after the step, and the loss before it: word by word, from the header's equations."""
    new_v, new_u, nats = v.copy(), u.copy(), 0.0
    code = huffman(CORPUS.counts)
    spans, drawn = batch.spans.numpy(), batch.drawn.numpy()
    L = batch.mask.shape[1]
    for block in range(len(spans)):
        for i in range(L):
            centre = spans[block, W + i]
            context = [spans[block, j] for j in range(L + 2 * W) if batch.mask[block, i, j]]
            if not context:
                continue
            # What predicts (words, of whose v it is the mean), and what is predicted.
            if architecture == "cbow":
                pairs = [(context, centre)]
            elif hierarchical:
                pairs = [([word], centre) for word in context]
            else:
                pairs = [([centre], word) for word in context]
            for predicting, predicted in pairs:
                h = v[predicting].mean(0)
                if hierarchical:
                    n = code.lengths[predicted]
                    decisions = [
                        (code.nodes[predicted, j], 1 - code.bits[predicted, j], 1.0) for j in range(n)
                    ]
                else:
                    decisions = [(predicted, 1, 1.0)] + [(word, 0, K / len(drawn)) for word in drawn[:, i]]
                gradient = np.zeros(D)
                for row, label, weight in decisions:
                    p = sigmoid(u[row] @ h)
                    nats -= weight * math.log(p if label else 1 - p)
                    gradient += weight * (p - label) * u[row]
                    new_u[row] -= LR * weight * (p - label) * h
                for word in predicting:
                    new_v[word] -= LR * gradient / (1 if undivided else len(predicting))
    return new_v, new_u, nats


@EACH
@pytest.mark.parametrize("undivided", [False, True])
def test_a_step_is_that_of_the_equations(architecture, hierarchical, undivided):
    if undivided and architecture == "skip_gram":
        pytest.skip("only a mean is divided")
    batch = a_batch(hierarchical)
    vectors = some_vectors(V - hierarchical)
    before = [w.numpy().copy() for w in vectors]
    v, u, nats = expected_step(batch, *before, architecture, hierarchical, undivided)
    terms = terms_of(architecture, hierarchical, batch)
    assert loss(vectors, terms).item() == pytest.approx(nats, rel=1e-12)
    update(vectors, terms, LR, undivided)
    # Sums of 400 terms in another order: 1e-12 of numbers around 10.
    np.testing.assert_allclose(vectors.input.numpy(), v, rtol=0, atol=1e-11)
    np.testing.assert_allclose(vectors.output.numpy(), u, rtol=0, atol=1e-11)
    assert np.abs(v - before[0]).max() > 0.1


@EACH
def test_a_step_goes_down_the_gradient_of_its_loss(architecture, hierarchical):
    batch, (v, u) = a_batch(hierarchical), some_vectors(V - hierarchical)
    terms = terms_of(architecture, hierarchical, batch)
    v.requires_grad_(), u.requires_grad_()
    loss(Vectors(v, u), terms).backward()
    moved = Vectors(v.detach().clone(), u.detach().clone())
    update(moved, terms, LR)
    torch.testing.assert_close(moved.input, v.detach() - LR * v.grad, rtol=0, atol=1e-11)
    torch.testing.assert_close(moved.output, u.detach() - LR * u.grad, rtol=0, atol=1e-11)


def test_the_undivided_step_is_longer_by_the_number_of_words_in_the_window():
    # One window of four words, all different: their steps are four times those of the gradient.
    span = torch.arange(5)[None]
    batch = Batch(span, torch.tensor([[[1.0, 1, 0, 1, 1]]]).double(), torch.tensor([[5]]))
    steps = []
    for undivided in (False, True):
        vectors = some_vectors(V)
        before = vectors.input.clone()
        update(vectors, word2vec.cbow(batch, K), LR, undivided)
        steps.append(vectors.input - before)
    torch.testing.assert_close(steps[1], 4 * steps[0], rtol=1e-9, atol=0)
    assert steps[0][[0, 1, 3, 4]].abs().min() > 0 and not steps[0][[2, 5, 6]].any()


@EACH
def test_the_loss_at_the_start_is_that_of_fair_coins(architecture, hierarchical):
    batch = a_batch(hierarchical)
    terms = terms_of(architecture, hierarchical, batch)
    vectors = Vectors(some_vectors(V).input, torch.zeros(V, D, dtype=torch.float64))
    nats = loss(vectors, terms) / terms.n.sum()
    if hierarchical:  # ln 2 for each bit of the codes that are predicted
        lengths = torch.from_numpy(huffman(CORPUS.counts).lengths).double()
        weight = terms.n.sum(1)
        centres = centres_of(batch)[:, 0]
        expected = math.log(2) * (weight * lengths[centres]).sum() / weight.sum()
    else:
        expected = (1 + K) * math.log(2)
    assert nats.item() == pytest.approx(float(expected), rel=1e-12)


def test_the_probabilities_of_a_tree_sum_to_one():
    v, u = some_vectors(V - 1)
    for word in range(V):
        scores = u[TREE.nodes] @ v[word]  # (V, P)
        signs = 2 * TREE.zeros - 1
        log_p = (torch.nn.functional.logsigmoid(signs * scores) * TREE.inside).sum(1)
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)


def expected_terms(window: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the expectations (V, V) of the pairs n(w, c), and of the negatives k n(w) P(c)."""
    w, c, n = pair_counts(CORPUS, window)
    pairs = np.zeros((V, V))
    pairs[w, c] = n
    p = CORPUS.counts**0.75
    return pairs, k * pairs.sum(1, keepdims=True) * (p / p.sum())


def test_drawn_windows_and_negatives_have_the_expectation_of_the_exact_objective():
    ids, documents = torch.from_numpy(CORPUS.ids), torch.from_numpy(CORPUS.documents)
    noise = Noise(torch.from_numpy(CORPUS.counts), 0.75)
    found = []
    for seed in range(300):
        generator = Generator().manual_seed(seed)
        (batch,) = batches(ids, documents, noise, W, 16, generator, torch.float64)
        terms = word2vec.skip_gram(batch, K)
        pairs = terms.read[:, :, None] * V + terms.predicted[:, None]
        others = terms.read.T[:, :, None] * V + terms.drawn.T[:, None]  # (I, N, N)
        weight = (terms.n.T[:, :, None] * (K / len(terms.drawn))).expand(others.shape)
        parts = ((pairs, terms.positive), (others, weight))
        found.append([np.bincount(c.flatten(), n.flatten(), V * V).reshape(V, V) for c, n in parts])
    found = np.array(found)  # (seeds, 2, V, V)
    error = found.std(0) / math.sqrt(len(found))
    z = (found.mean(0) - np.array(expected_terms(W, K))) / error.clip(1e-9)
    # 98 cells: a normal variable is beyond 4.5 once in 150,000 draws.
    assert np.abs(z).max() < 4.5
    assert 0.7 < z.std() < 1.3


def test_the_optimum_is_the_mutual_information_less_log_k():
    # Levy and Goldberg 2014: the exact objective as one batch, in float64, until the gradient is gone.
    pairs, negatives = expected_terms(W, K)
    assert (pairs > 0).all()
    p = CORPUS.counts**0.75
    expected = np.log(pairs / (pairs.sum(1, keepdims=True) * p / p.sum())) - math.log(K)
    scale = pairs.sum(1).mean()
    positive, total = (torch.from_numpy(x / scale)[None] for x in (pairs, pairs + negatives))
    every = torch.arange(V)[None]
    terms = Terms(every, None, every, positive, total, positive.sum(-1))
    generator = Generator().manual_seed(0)
    vectors = Vectors(
        *(torch.randn(V, 4 * V, generator=generator, dtype=torch.float64) / 2 for _ in range(2))
    )
    for _ in range(3000):
        update(vectors, terms, 0.5)
    np.testing.assert_allclose((vectors.input @ vectors.output.T).numpy(), expected, rtol=0, atol=1e-8)


def test_training_with_draws_comes_close_to_the_mutual_information():
    corpus = a_corpus(12_000, n_documents=3)
    settings = {"window": W, "negatives": K, "d_model": V, "subsample": 0}
    config = Config("skip_gram", **settings, lr=0.05, batch_size=32, epochs=12)
    vectors = train(corpus, config)
    w, c, n = pair_counts(corpus, W)
    p = corpus.counts**0.75
    pairs = np.zeros((V, V))
    pairs[w, c] = n
    expected = np.log(pairs / (pairs.sum(1, keepdims=True) * p / p.sum())) - math.log(K)
    found = (vectors.input @ vectors.output.T).numpy()
    # A cell has about 1,000 pairs, and twelve times draws of its negatives.
    assert expected.std() > 0.2
    assert np.abs(found - expected).max() < 0.12


@pytest.fixture
def text(tmp_path):
    """Return a file in which the words of a kind occur in the same places."""
    generator = np.random.default_rng(0)
    kinds = [["red", "blue", "green"], ["cat", "dog", "bird"], ["runs", "sleeps", "eats"]]
    lines = [" ".join(kind[generator.integers(3)] for kind in kinds) for _ in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    return tmp_path / "text.txt"


SMALL = ["--window", "2", "--d-model", "8", "--epochs", "4", "--batch-size", "32", "--subsample", "0"]


def test_the_command_learns_which_words_stand_in_the_same_places(text, tmp_path):
    out = tmp_path / "out"
    ended = run_command("-m", "language.word2vec", "--data", str(text), *SMALL, "--out", str(out))
    assert ended.code == 0, ended.err
    words, vectors = word_vectors.read(out / "vectors.bin")
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    kinds = [["red", "blue", "green"], ["cat", "dog", "bird"], ["runs", "sleeps", "eats"]]
    for kind in kinds:
        for word in kind:
            nearest = np.argsort(-(unit @ unit[words.index(word)]))[1:3]
            assert {words[i] for i in nearest} == {*kind} - {word}


def test_a_run_goes_on_where_it_was_interrupted_to_the_bit(text, tmp_path, monkeypatch):
    command = ["-m", "language.word2vec", "--data", str(text), *SMALL]
    assert run_command(*command, "--out", str(tmp_path / "whole")).code == 0
    write = word2vec.write_tensors

    def die_after_two(path, tensors, metadata):
        write(path, tensors, metadata)
        if metadata["epochs"] == "2":
            raise KeyboardInterrupt

    monkeypatch.setattr(word2vec, "write_tensors", die_after_two)
    with pytest.raises(KeyboardInterrupt):
        word2vec.main([*command[2:], "--out", str(tmp_path / "cut")])
    monkeypatch.undo()
    assert run_command(*command, "--out", str(tmp_path / "cut"), "--resume").code == 0
    both = [(tmp_path / name / "vectors.bin").read_bytes() for name in ("whole", "cut")]
    assert both[0] == both[1]
    other = run_command(*command, "--seed", "1", "--out", str(tmp_path / "cut"), "--resume")
    assert other.code == 2 and "another seed; resume with the same flags" in other.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--window", "0"], "window 0: expected at least 1"),
        (["--lr", "nan"], "lr nan"),
        (["--lr", "0"], "lr 0.0"),
        (["--seed", "-1"], "--seed -1: expected a number from 0"),
        (["--subsample", "1e-12"], "subsample 1e-12: keeps no word"),
        (["--subsample", "-1"], "subsample -1.0"),
        (["--architecture", "skip_gram", "--undivided"], "leave it out for skip_gram"),
        (["--phrases", "-1"], "phrases -1"),
        (["--min-count", "9999"], "occur at least 9999 times"),
        (["--resume"], "no such file"),
        (["--lr", "1e6"], "the vectors are not finite; take a smaller lr"),
    ],
)
def test_bad_flags_end_in_one_line(flags, message, text, tmp_path):
    ended = run_command(
        "-m", "language.word2vec", "--data", str(text), *SMALL, "--out", str(tmp_path), *flags
    )
    assert ended.code == 2 and message in ended.err and "Traceback" not in ended.err
