r"""word2vec: vectors of words, learned from which words stand near each other.

Every word w has two vectors: v_w, with which it predicts, and u_w, with which it is predicted. They learn to
distinguish a pair of a word w and a word c near it from pairs of w and a drawn word n, a *negative*. The loss
of a pair is (Mikolov et al. 2013b, 1310.4546, equation 4)

    skip-gram    -log s(u_c . v_w) - sum over k drawn n of log s(-u_n . v_w)          s: the sigmoid
    CBOW         the same with c the word in the middle, and for v_w the mean of the v of the words around it

This is *negative sampling*. Negatives are drawn from P(n) ~ count(n)^0.75. *Hierarchical softmax* predicts c
by the bits of its Huffman code instead (huffman.py), with a vector u_j for each inner node j of the tree:

    -sum over the nodes j on the way to c of log s(+-u_j . v_w)         + for bit 0, - for bit 1

How far the window of a word reaches is drawn from 1 to `window`, so that near words count more. Before that,
some occurrences of frequent words are removed (windows.py).

The optimum is known. Let n(w, c) be the number of pairs of w and c, n(w) its sum over all c, and P(c) the
distribution of negatives. If D is large enough, each dot product is at its own minimum of the expected loss
(Levy and Goldberg 2014, section 3):

    u_c . v_w = log(n(w, c) / (n(w) P(c))) - log k          the pointwise mutual information, less log k

**One step.** The dot products of a single pair are too small for a processor to compute them fast. Here a
step has N *blocks* of L neighbouring words, from random places of the text. The *span* of a block is the
block and `window` more words on either side. One matrix product gives the dot products of all words of a
block with all words of its span, and a mask keeps those of the windows. Negatives are shared: the i-th words
of all blocks share N drawn words, of which each counts k / N per pair, so that the expected gradient stays as
it is. (Words of one block do not share them: their windows are nearly the same, so that a drawn word would
learn from about one window instead of N.) The four kinds, `skip_gram`, `cbow`, `skip_gram_tree` and
`cbow_tree`, differ in what predicts and what is predicted.

The gradient of CBOW is that of a mean: each of the n words of a window gets 1 / n of the error. The authors'
code and gensim do not divide by n (gensim's issue 1873; Irsoy et al. 2020, 2012.15332), so their step for v
is n times the gradient. `undivided` makes their step.

    python -m language.word2vec                         on Python's library; prints neighbours and analogies
    python -m language.analogies runs/word2vec/vectors.bin --near encode

Shapes: V words, D width, N blocks, L words of a block, S = L + 2 window words of its span, P bits of a code,
I predictions in a block, J decisions of each.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from data.rows import seed_of
from formats import command, word_vectors
from formats.progress import progress_bar
from formats.safetensors_dir import read_tensors, write_tensors
from language.analogies import PAIRS, all_questions, neighbours, table
from language.huffman import huffman
from language.noise import Noise
from language.windows import Batch, batches, centres_of, keep_probability, means
from language.word_corpus import WordCorpus, read_corpus

BLOCK = 16  # L, words
ARCHITECTURES = ("cbow", "skip_gram")
CBOW_RATE = 0.15  # for the gradient of the mean, which is smaller than that of the authors' code
SHOWN = ("encode", "json", "width", "thread")  # words whose neighbours are printed


@dataclass(frozen=True)
class Config:
    architecture: str = "cbow"  # or skip_gram
    hierarchical: bool = False  # hierarchical softmax instead of negative sampling
    d_model: int = 100
    window: int = 5  # words on either side, at most
    negatives: int = 5  # k, for each pair
    noise_power: float = 0.75  # negatives are drawn from count ** noise_power
    subsample: float = 1e-3  # t, a share of the text; 0 keeps every word
    undivided: bool = False  # CBOW with the gradient of the authors' code
    epochs: int = 15
    lr: float = CBOW_RATE  # falls linearly to 1e-4 of it
    batch_size: int = 256  # words of a step

    def __post_init__(self):
        """Raise ValueError naming a field that is out of its range."""
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture {self.architecture!r}: expected one of {', '.join(ARCHITECTURES)}"
            )
        for name in ("d_model", "window", "negatives", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if not 0 < self.lr < math.inf or not 0 <= self.subsample < math.inf:
            raise ValueError(f"lr {self.lr}, subsample {self.subsample}: expected finite positive numbers")
        if self.undivided and self.architecture != "cbow":
            raise ValueError("undivided is about the mean of CBOW; leave it out for skip_gram")


class Vectors(NamedTuple):
    """All parameters: 2 V D with negative sampling, (2 V - 1) D with a tree."""

    input: Tensor  # (V, D): v, what is saved and compared
    output: Tensor  # (V, D): u of each word; or (V - 1, D): of each inner node


class Tree(NamedTuple):
    """The Huffman codes of all words, padded to P bits, as floating-point numbers."""

    nodes: Tensor  # int64 (V, P)
    zeros: Tensor  # (V, P): 1 where the bit is 0, else 0
    inside: Tensor  # (V, P): 1 within the code, 0 behind its end


class Terms(NamedTuple):
    """The terms of a loss: in each block I predictions, which make J binary decisions each.

    A prediction is a vector x, one v or a mean of several. It decides for 1 with probability s(u . x).
    """

    read: Tensor  # int64 (N, R): the words whose v are read
    mix: Tensor | None  # (N, I, R): the weights of these v in each x; None: I = R, and each v is an x
    predicted: Tensor  # int64 (N, J): the words, or inner nodes, of whose u each decision is made
    positive: Tensor  # (N, I, J): how often -log s(u . x) counts
    total: Tensor  # (N, I, J): how often -log s(u . x) counts, and -log s(-u . x), together
    n: Tensor  # (N, I): how many words each prediction predicts: those of a window, or 1, or none
    drawn: Tensor | None = None  # int64 (N, I): negatives; column i is for the i-th predictions of all blocks
    k: int = 0  # negatives for each of n

    def split(self, n_blocks: int) -> Iterator["Terms"]:
        """Yield the terms of the first n_blocks blocks, of the next n_blocks, and so on."""
        for i in range(0, len(self.read), n_blocks):
            yield Terms(*(part[i : i + n_blocks] if torch.is_tensor(part) else part for part in self))


# --- what predicts, and what is predicted


def skip_gram(batch: Batch, k: int) -> Terms:
    """Return the terms of skip-gram: each word of a block predicts each of its window, with k negatives."""
    pairs = batch.mask.sum(-1)  # (N, L)
    return Terms(centres_of(batch), None, batch.spans, batch.mask, batch.mask, pairs, batch.drawn, k)


def cbow(batch: Batch, k: int) -> Terms:
    """Return the terms of CBOW: the mean of a window predicts the word in its middle, with k negatives."""
    mean, filled = means(batch.mask)  # (N, L, S), (N, L, 1); filled: 1 where a window holds a word
    own = torch.eye(filled.shape[1], dtype=mean.dtype) * filled  # (N, L, L)
    return Terms(batch.spans, mean, centres_of(batch), own, own, filled[:, :, 0], batch.drawn, k)


def skip_gram_tree(batch: Batch, tree: Tree) -> Terms:
    """Return the terms of skip-gram for blocks of one word: the words of its window predict its code.

    In the header the word predicts its window; the authors' code turns that round, as here. The pairs of a
    whole text have the same expectation, since both words of a pair draw how far their windows reach alike.
    """
    code = centres_of(batch)[:, 0]  # (N,)
    window = batch.mask.mT  # (N, S, 1)
    zeros, inside = tree.zeros[code][:, None], tree.inside[code][:, None]  # (N, 1, P)
    return Terms(batch.spans, None, tree.nodes[code], window * zeros, window * inside, window[:, :, 0])


def cbow_tree(batch: Batch, tree: Tree) -> Terms:
    """Return the terms of CBOW for blocks of one word: the mean of its window predicts its code."""
    code = centres_of(batch)[:, 0]
    mean, filled = means(batch.mask)  # (N, 1, S), (N, 1, 1)
    zeros, inside = tree.zeros[code][:, None], tree.inside[code][:, None]
    return Terms(batch.spans, mean, tree.nodes[code], filled * zeros, filled * inside, filled[:, :, 0])


# --- a step


def update(vectors: Vectors, terms: Terms, lr: float, undivided: bool = False) -> None:
    """Make one step of gradient descent in place, on `loss`, the sum of the terms.

    A word that occurs several times in the step gets the sum of its gradients, all at the vectors before the
    step. undivided: each word of a mean gets the whole gradient of the mean, as in the authors' code.
    """
    # Predictions x (N, I, D), predicted y (N, J, D), and -lr times the derivative of the loss by the scores.
    read, y = F.embedding(terms.read, vectors.input), F.embedding(terms.predicted, vectors.output)
    x = read if terms.mix is None else terms.mix @ read
    scores = x @ y.mT
    error = torch.addcmul(terms.positive, terms.total, scores.sigmoid(), value=-1).mul_(lr)
    dx, dy = error @ y, error.mT @ x

    # The same with negatives. The i-th predictions of all blocks share theirs, so i is the first index.
    if terms.drawn is not None:
        drawn, weight = terms.drawn.T, terms.n.T * (terms.k / len(terms.drawn))  # (I, N)
        others, z = x.transpose(0, 1), F.embedding(drawn, vectors.output)  # (I, N, D)
        drawn_scores = others @ z.mT  # (I, N, N)
        error = drawn_scores.sigmoid().mul_(weight[:, :, None]).mul_(-lr)
        dx += (error @ z).transpose(0, 1)
        vectors.output.index_add_(0, drawn.flatten(), (error.mT @ others).flatten(0, 1))
    vectors.output.index_add_(0, terms.predicted.flatten(), dy.flatten(0, 1))

    # Each word of a mean gets the gradient of the mean times its weight.
    if terms.mix is not None:
        dx = ((terms.mix > 0).to(dx.dtype) if undivided else terms.mix).mT @ dx
    vectors.input.index_add_(0, terms.read.flatten(), dx.flatten(0, 1))


def loss(vectors: Vectors, terms: Terms) -> Tensor:
    """Return the sum of the terms in nats: -log s(score) or -log s(-score), as often as each counts."""
    # -log s(-z) = softplus(z), and -log s(z) = softplus(z) - z.
    x = vectors.input[terms.read]
    x = x if terms.mix is None else terms.mix @ x
    scores = x @ vectors.output[terms.predicted].mT
    nats = (terms.total * F.softplus(scores) - terms.positive * scores).sum()
    if terms.drawn is not None:
        scores = x.transpose(0, 1) @ vectors.output[terms.drawn.T].mT
        nats = nats + (terms.n.T[:, :, None] * (terms.k / len(terms.drawn)) * F.softplus(scores)).sum()
    return nats


# --- training


def new_vectors(n_words: int, config: Config, generator: Generator) -> Vectors:
    """Return v, uniform within 0.5 / D of 0, and u, which is 0."""
    v = (torch.rand(n_words, config.d_model, generator=generator) - 0.5) / config.d_model
    return Vectors(v, torch.zeros(n_words - config.hierarchical, config.d_model))


def tree_of(corpus: WordCorpus) -> Tree:
    """Return the Huffman codes of a corpus' words."""
    code = huffman(corpus.counts)
    inside = torch.arange(code.nodes.shape[1]) < torch.from_numpy(code.lengths)[:, None]
    zeros = torch.from_numpy(code.bits == 0) & inside
    return Tree(torch.from_numpy(code.nodes), zeros.float(), inside.float())


def terms_by(config: Config, corpus: WordCorpus) -> Callable[[Batch], Terms]:
    """Return the function of a batch that returns its terms, of the four kinds the one that config names."""
    is_skip_gram = config.architecture == "skip_gram"
    if config.hierarchical:
        tree, kind = tree_of(corpus), skip_gram_tree if is_skip_gram else cbow_tree
        return lambda batch: kind(batch, tree)
    kind = skip_gram if is_skip_gram else cbow
    return lambda batch: kind(batch, config.negatives)


def train(
    corpus: WordCorpus,
    config: Config,
    seed: int = 0,
    *,
    vectors: Vectors | None = None,
    first: int = 0,
    watch: Callable[[int, float, Vectors], None] = lambda *_: None,
) -> Vectors:
    """Return vectors learned from a corpus.

    vectors: trained in place from epoch `first` on, instead of new ones. watch is called after each epoch,
    with the number of epochs that have ended, the mean loss of a pair in this one, and the vectors. All
    draws are a function of (seed, epoch), so a resumed run computes what an uninterrupted one does. Raises
    ValueError if subsampling leaves no word, and if the vectors are not finite any more.
    """
    counts, ids = torch.from_numpy(corpus.counts), torch.from_numpy(corpus.ids)
    documents, noise = torch.from_numpy(corpus.documents), Noise(counts, config.noise_power)
    keep = torch.ones(len(counts))
    if config.subsample:
        keep = keep_probability(counts, config.subsample).float()
    terms_of, length = terms_by(config, corpus), 1 if config.hierarchical else BLOCK
    if vectors is None:
        vectors = new_vectors(len(counts), config, Generator().manual_seed(seed))

    bar = progress_bar(
        total=config.epochs * len(ids), initial=first * len(ids), desc="words", unit_scale=True
    )
    for epoch in range(first, config.epochs):
        # Remove some occurrences of frequent words, others in each epoch.
        generator = Generator().manual_seed(seed_of(seed, epoch))
        kept = (torch.rand(len(ids), generator=generator) < keep[ids]).nonzero()[:, 0]
        if not len(kept):
            raise ValueError(
                f"subsample {config.subsample:g}: keeps no word; expected more, or 0 to keep all"
            )
        nats, n, done = torch.zeros(()), 0, 0
        for batch in batches(ids[kept], documents[kept], noise, config.window, length, generator):
            steps = list(terms_of(batch).split(max(1, config.batch_size // length)))
            # The loss that is reported is a sample: that of the first step of each batch, before the step.
            nats += loss(vectors, steps[0])
            n += steps[0].n.sum()
            for part in steps:
                # The rate falls linearly with the words read.
                share = done / len(kept)
                lr = config.lr * max(1 - (epoch + share) / config.epochs, 1e-4)
                update(vectors, part, lr, config.undivided)
                done += len(part.read) * length
            bar.update(int((epoch + done / len(kept)) * len(ids)) - bar.n)
        if not all(w.isfinite().all() for w in vectors):
            raise ValueError(f"epoch {epoch}: the vectors are not finite; take a smaller lr or batch_size")
        watch(epoch + 1, float(nats / max(n, 1)), vectors)
    bar.close()
    return vectors


# --- the command


def settings(args) -> Config:
    """Return the Config of the flags. Without --lr the learning rate depends on the kind of training."""
    lr = args.lr
    if lr is None:
        lr = 0.025 if args.architecture == "skip_gram" else 0.05 if args.undivided else CBOW_RATE
    given = {name: getattr(args, name) for name in asdict(Config()) if hasattr(args, name)}
    return Config(**given | {"lr": lr})


def fingerprint(corpus: WordCorpus, config: Config, seed: int) -> dict[str, str]:
    """Return the config, the seed and a hash of the text, which must be those of the checkpoint to resume."""
    text = zlib.crc32(corpus.ids, zlib.crc32(" ".join(corpus.words).encode()))
    return {"config": json.dumps(asdict(config)), "seed": str(seed), "text": f"{text:08x}"}


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    config = settings(args)
    if not 0 <= args.seed < 1 << 63:
        raise ValueError(f"--seed {args.seed}: expected a number from 0 to 2^63 - 1")
    corpus = read_corpus(args.data, args.min_count, args.phrases, print)
    print(f"{len(corpus):,} words, {len(corpus.words):,} different ones", flush=True)
    checkpoint, same = args.out / "checkpoint.safetensors", fingerprint(corpus, config, args.seed)

    # With --resume, begin after the last epoch that has ended.
    vectors, first = None, 0
    if args.resume:
        tensors, found = read_tensors(checkpoint)
        if differing := [name for name in same if found.get(name) != same[name]]:
            raise ValueError(f"{checkpoint}: another {' and '.join(differing)}; resume with the same flags")
        vectors, first = Vectors(tensors["input"], tensors["output"]), int(found["epochs"])

    def watch(epochs: int, nats: float, vectors: Vectors) -> None:
        write_tensors(checkpoint, vectors._asdict(), same | {"epochs": str(epochs)})
        print(f"epoch {epochs:3} of {config.epochs}  {nats:.4f} nats per pair", flush=True)

    vectors = train(corpus, config, args.seed, vectors=vectors, first=first, watch=watch)
    file = args.out / "vectors.bin"
    word_vectors.write(file, corpus.words, vectors.input.numpy())
    for word in [word for word in SHOWN if word in corpus.words] or corpus.words[:3]:
        print(f"{word:12} {' '.join(neighbours(corpus.words, vectors.input, word, 6))}")
    print(table(corpus.words, vectors.input, {name: all_questions(pairs) for name, pairs in PAIRS.items()}))
    print(f"saved to     {file}")


def parser() -> command.Parser:
    """Return the parser of the flags."""
    found = command.Parser(description="word2vec: vectors of words, learned from their neighbours.")
    add, default = found.add_argument, Config()
    add(
        "--data",
        default="stdlib",
        help="file, folder, glob, URL or stdlib, Python's source (default %(default)s)",
    )
    add("--architecture", default=default.architecture, choices=ARCHITECTURES, help="(default %(default)s)")
    add("--hierarchical", action="store_true", help="hierarchical softmax instead of negative sampling")
    add(
        "--undivided", action="store_true", help="CBOW with the authors' gradient instead of that of the mean"
    )
    for name, kind, text in (
        ("d_model", int, "numbers in a vector"),
        ("window", int, "words on either side, at most"),
        ("negatives", int, "drawn words for each pair"),
        ("subsample", float, "share of the text above which a word loses occurrences; 0 keeps all"),
        ("epochs", int, "passes over the text"),
        ("batch_size", int, "words of a step"),
    ):
        flag = "--" + name.replace("_", "-")
        add(flag, type=kind, default=getattr(default, name), help=f"{text} (default %(default)s)")
    add(
        "--lr", type=float, help="learning rate (default: 0.025 for skip-gram, 0.15 for CBOW, 0.05 undivided)"
    )
    add(
        "--min-count",
        type=int,
        default=5,
        help="fewest occurrences of a word in the vocabulary (default %(default)s)",
    )
    add("--phrases", type=int, default=0, help="passes that join pairs to phrases (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of all draws (default %(default)s)")
    add("--resume", action="store_true", help="continue after the last epoch that has ended")
    out = "folder of vectors.bin and the checkpoint (default %(default)s)"
    add("--out", type=command.path, default=Path("runs/word2vec"), help=out)
    return found


if __name__ == "__main__":
    command.run(main)
