"""In-context learning beside its exact optimum: every sequence is drawn from a Markov chain of its own.

    P[a] ~ Dirichlet(1, ..., 1) for each symbol a;     x_0 uniform,  x_{t+1} ~ P[x_t]

P[a] is the distribution of the symbol that follows a. No chain comes twice, so the weights cannot hold
anything about it: where the model predicts better than chance, it has learned from the earlier symbols of the
sequence. The best possible prediction has a closed form. Let n(a, b) be how many times b has followed a so
far. By Bayes' rule the distribution of the next symbol is

    p(b | x_0 ... x_t) = (n(a, b) + 1) / (sum_b' n(a, b') + V),    a = x_t                (the optimum)

Three other predictors use less of the sequence: nothing (uniform), how often each symbol occurred (unigram,
with one added to each count), and the symbol behind the last earlier occurrence of a (one match). Uniform and
one match are optimal for what they use, and unigram is nearly so. The loss of a model is in expectation the
optimum plus KL(Bayes || model).

While models train, they pass from one of these predictors to the next (Edelman et al. 2024, 2402.11004). The
optimum needs an induction head, which attends to the symbols behind earlier occurrences of the current one
(Olsson et al. 2022, 2209.11895). Such a head needs two layers, so a model of one layer, the control, should
fail. Two more controls change only what the trained model reads: the earlier symbols in another order, and
chains of another prior, Dirichlet(alpha, ..., alpha).

    python -m evaluation.in_context                      one seed, two minutes on a core
    python -m results.prompting_studies in_context       three seeds, and the picture

Shapes: B sequences, T predictions of each, V symbols, D model width, H heads.
"""

import statistics

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from evaluation.small_runs import mean_and_range, next_token_batch, of, run_study, small_gpt, stream, train
from formats import command
from gpt import GPT, Attention, rotate

V, T = 3, 100
STEPS, BATCH = 400, 32
N_TEST = 512  # sequences
DEPTHS = (1, 2)  # layers
PRIORS = (0.3, 1.0, 3.0)  # alpha of the chains that a trained model is tested on; it learns with 1
EVERY = 20  # steps between two points of a curve


# --- chains


def draw_chains(n: int, generator: Generator, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return n sequences, int64 (n, T + 1), and the true distributions, float64 (n, T, V), of all symbols but
    the first. Each sequence has a chain of its own, with rows from Dirichlet(alpha, ..., alpha)."""
    # Draws from Gamma(alpha) divided by their sum are a draw from Dirichlet(alpha, ..., alpha). torch's
    # sampler of Gamma takes no generator, so the global one is seeded from ours, and then restored.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 31, (), generator=generator)))
        gammas = torch.distributions.Gamma(alpha, 1.0).sample((n, V, V)).double()
    chains = gammas / gammas.sum(-1, keepdim=True)  # (n, V, V)

    symbols = torch.empty(n, T + 1, dtype=torch.long)
    symbols[:, 0] = torch.randint(V, (n,), generator=generator)
    rows = torch.arange(n)
    for t in range(T):
        drawn = torch.multinomial(chains[rows, symbols[:, t]], 1, generator=generator)
        symbols[:, t + 1] = drawn[:, 0]
    return symbols, chains[rows[:, None], symbols[:, :-1]]


def reordered(symbols: Tensor, generator: Generator) -> Tensor:
    """Return sequences (B, T + 1) whose symbols are in a random order, but for the two last of each.

    So the last prediction has the same current symbol, the same target and the same counts of symbols.
    """
    keys = torch.rand(symbols.shape[0], symbols.shape[1] - 2, generator=generator)
    return torch.cat((symbols[:, :-2].gather(1, keys.argsort(1)), symbols[:, -2:]), 1)


# --- predictors: each takes sequences (B, T + 1), returns p, float64 (B, T, V), of all but the first symbol


def uniform(symbols: Tensor) -> Tensor:
    """Return 1 / V for every symbol."""
    return torch.full((*symbols[:, 1:].shape, V), 1 / V, dtype=torch.double)


def unigram(symbols: Tensor) -> Tensor:
    """Return how often each symbol occurred so far, plus one, divided by the sum over the symbols."""
    counts = F.one_hot(symbols[:, :-1], V).double().cumsum(1)  # (B, T, V)
    return (counts + 1) / (counts + 1).sum(-1, keepdim=True)


def one_match(symbols: Tensor) -> Tensor:
    """Return the optimum for one who reads only what followed the last earlier occurrence of the current
    symbol: (1 + 1) / (1 + V) for that symbol, 1 / (1 + V) for the others; 1 / V if there is none."""
    B, T = symbols.shape[0], symbols.shape[1] - 1
    counts, last = torch.ones(B, T, V, dtype=torch.double), torch.full((B, V), -1)  # last follower, by symbol
    rows = torch.arange(B)
    for t in range(T):
        follower = last[rows, symbols[:, t]]
        found = follower >= 0
        counts[rows[found], t, follower[found]] += 1
        last[rows, symbols[:, t]] = symbols[:, t + 1]
    return counts / counts.sum(-1, keepdim=True)


def bayes(symbols: Tensor, alpha: float = 1.0) -> Tensor:
    """Return the optimum for one who reads all symbols so far, with the prior Dirichlet(alpha, ..., alpha):
    (n(a, b) + alpha) / (sum_b' n(a, b') + alpha V)."""
    one_hot = F.one_hot(symbols, V).double()
    pairs = one_hot[:, :-1, :, None] * one_hot[:, 1:, None, :]  # (B, T, V, V): 1 at (a, b) if b follows a
    before = pairs.cumsum(1) - pairs  # n(a, b) of all earlier pairs, without the one that is predicted
    counts = (before * one_hot[:, :-1, :, None]).sum(2) + alpha  # (B, T, V): row a of n, a the current symbol
    return counts / counts.sum(-1, keepdim=True)


PREDICTORS = {"uniform": uniform, "unigram": unigram, "one match": one_match, "Bayes": bayes}


# --- measures


def nats(predicted: Tensor, true: Tensor) -> Tensor:
    """Return the expected loss (T,) at each position, -sum_b P(b) log p(b), a mean over the sequences.

    predicted: p (B, T, V); true: P (B, T, V), the distribution from which the symbol is drawn.
    """
    return -(true * predicted.log()).sum(-1).mean(0)


@torch.no_grad()
def predict(model: GPT, symbols: Tensor) -> Tensor:
    """Return the model's p, float64 (B, T, V), of all symbols but the first."""
    return model(symbols[:, :-1]).double().softmax(-1)


def attention_of(layer: Attention, x: Tensor, rotation: tuple) -> Tensor:
    """Return the attention weights (B, H, T, T) of a layer of gpt.py with QK-norm, for its input x (B, T, D).

    rotation: the cosines and sines of the positions, as `gpt.rotate` takes them.
    """
    B, T, _ = x.shape
    q, k = (norm(product(x).view(B, T, -1, layer.d_head)) for norm, product in
            ((layer.q_norm, layer.q_proj), (layer.k_norm, layer.k_proj)))  # fmt: skip
    q, k = rotate(q, *rotation), rotate(k, *rotation)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / layer.d_head**0.5
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


@torch.no_grad()
def induction(model: GPT, symbols: Tensor) -> tuple[float, float]:
    """Return how much of its attention a head of the last layer has on followers, and the share of followers
    among the symbols that it can attend to.

    A follower is an earlier symbol right behind an occurrence of the current one. Of the heads, that with the
    most attention on followers is taken. Both shares are means over the second half of the positions.
    """
    # The input of the layer, from which its attention weights follow.
    inputs = []
    layer = model.model.layers[-1].self_attn
    hook = layer.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments))
    model(symbols[:, :-1])
    hook.remove()
    weights = attention_of(layer, *inputs[0][:2])  # (B, H, T, T)

    # followers[b, t, s]: symbol s of sequence b, earlier than t, stands behind an occurrence of symbol t.
    current = symbols[:, :-1]
    followers = torch.zeros(len(symbols), T, T, dtype=torch.bool)
    followers[:, :, 1:] = current[:, :, None] == current[:, None, :-1]
    followers = followers.tril() & ~torch.eye(T, dtype=torch.bool)
    half = slice(T // 2, T)
    share = (weights * followers[:, None]).sum(-1)[:, :, half].mean((0, 2)).max().item()
    n_visible = torch.arange(1, T + 1)
    return share, (followers.sum(-1) / n_visible)[:, half].mean().item()


# --- the study


def measure(model: GPT, seed: int) -> dict:
    """Return the figures of a trained model, and those of the predictors, on the same test sequences."""
    symbols, true = draw_chains(N_TEST, stream(seed))
    by_position = {name: nats(p(symbols), true) for name, p in PREDICTORS.items()}
    found = predict(model, symbols)
    by_position["model"] = nats(found, true)
    # The mean KL(predictor || model) is smallest for the predictor that the model is closest to.
    kl = {
        name: (p(symbols) * (p(symbols) / found).log()).sum(-1).mean().item()
        for name, p in PREDICTORS.items()
    }

    # The last prediction, behind the same symbols and behind those in another order.
    shuffled = reordered(symbols, stream(seed))
    last = {"in order": nats(found[:, -1:], true[:, -1:]).item()}
    last["reordered"] = nats(predict(model, shuffled)[:, -1:], true[:, -1:]).item()
    last["unigram"] = by_position["unigram"][-1].item()

    # Chains of other priors, for which a model that applies the prior of its training is Bayes with alpha 1.
    priors = {}
    for alpha in PRIORS:
        others, truth = draw_chains(N_TEST, stream(seed), alpha)
        answers = {"model": predict(model, others), "Bayes, alpha 1": bayes(others)}
        answers["Bayes, this alpha"] = bayes(others, alpha)
        priors[str(alpha)] = {name: nats(p, truth).mean().item() for name, p in answers.items()}
    share, of_all = induction(model, symbols)
    return {
        "by_position": {name: values.tolist() for name, values in by_position.items()},
        "kl": kl, "last": last, "priors": priors, "attention": {"on followers": share, "followers": of_all},
    }  # fmt: skip


def study(seed: int, steps: int | None = None) -> list[dict]:
    """Return a row for each depth: the loss along training, and the figures of the trained model."""
    rows = []
    symbols, true = draw_chains(N_TEST, stream(seed))
    for n_layers in DEPTHS:
        model, curve = small_gpt(V, T, seed, n_layers=n_layers), []

        def watch(step: int, model: GPT = model, curve: list = curve) -> None:
            if step % EVERY == 0 or step == (steps or STEPS):
                curve.append((step, nats(predict(model, symbols), true).mean().item()))

        def batch_of(draws: Generator) -> dict[str, Tensor]:
            return next_token_batch(draw_chains(BATCH, draws)[0])

        train(model, batch_of, steps or STEPS, seed, watch=watch)
        rows.append({"seed": seed, "layers": n_layers, "curve": curve} | measure(model, seed))
    return rows


def table(rows: list[dict]) -> str:
    """Return the figures of all seeds as text: mean and range."""

    def loss(name: str, curves: list[list[float]]) -> str:
        means = mean_and_range([statistics.mean(curve) for curve in curves], ".4f")
        at = "  ".join(f"{statistics.mean(curve[i] for curve in curves):.3f}" for i in (0, 9, T - 1))
        return f"  {name:22} {means:30} {at}"

    def figures(dicts: list[dict[str, float]]) -> str:
        return "  ".join(f"{name} {mean_and_range([d[name] for d in dicts], '.3f')}" for name in dicts[0])

    # The loss of every predictor, and of the models.
    models = {f"GPT, {n} layer{'s' * (n > 1)}": of(rows, layers=n) for n in DEPTHS}
    lines = [f"nats per symbol: all positions, and positions 1, 10 and {T}"]
    for name in PREDICTORS:
        lines.append(loss(name, [row["by_position"][name] for row in of(rows, layers=DEPTHS[0])]))
    lines += [loss(name, [row["by_position"]["model"] for row in own]) for name, own in models.items()]

    # The other figures of each model.
    for name, own in models.items():
        share, followers = (mean_and_range(r["attention"][k] for r in own) for k in own[0]["attention"])
        lines += [name, f"  KL from the predictors  {figures([row['kl'] for row in own])}"]
        lines.append(f"  last symbol             {figures([row['last'] for row in own])}")
        lines.append(f"  attention on followers  {share}; followers are {followers} of what it sees")
        for alpha in own[0]["priors"]:
            lines.append(f"  chains of alpha {alpha:<7} {figures([row['priors'][alpha] for row in own])}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    run_study("In-context learning of Markov chains, beside the optimum.", study, table, argv)


if __name__ == "__main__":
    command.run(main)
