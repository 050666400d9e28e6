"""The frontier: how much reward a policy can have at a given distance from its reference, computed exactly.

Every method that learns from a reward R trades two things, and the best trade is known in closed form:

    max over pi  E[R] - beta KL(pi || ref)        pi*(y) = ref(y) exp(R(y) / beta) / Z

For a language model Z is a sum over all texts. Here the reference is a Markov chain with the transition
probabilities P(a | s), and R is a sum of the rewards r(a) of the tokens a. So Z is summed token by token from
the last one back, and the value V_t depends only on the token s before:

    V_t(s) = beta log sum_a P(a | s) exp((r(a) + V_{t+1}(a)) / beta),       V_{T+1} = 0
    pi*_t(a | s) = P(a | s) exp((r(a) + V_{t+1}(a) - V_t(s)) / beta)

For each beta this gives a point (KL, reward), and together these points are the frontier: no policy is above
it. So a trained policy has a score: the percentage of the possible gain that it reaches at its own KL.

    python -m posttraining.frontier                              the table of the frontier
    python -m posttraining.frontier runs/ppo/model --out f.png   and where models are under it, as a picture

A sequence has eight tokens, each one of four states; models have a fifth symbol, BEGIN, in front of them.
`reference_model` is a small GPT that computes the chain. The recursion is that of control with a KL cost
(Todorov 2006); best-of-n against KL is in Stiennon et al. 2020, appendix G.3.

Shapes: B sequences, T tokens of the chain, S states.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor, nn

from formats import command
from formats.atomic import damage, replace_directory, replace_file, write_checksums
from formats.figures import load_pyplot
from formats.open_model import open_model
from gpt import GPT, Config

BETAS = (math.inf, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125)  # of the table
NS = (1, 2, 4, 8, 16, 64)  # samples of best-of-n, of the table
WIDTH = Config(2, 4, 64, 128, qk_norm=True, tie_embeddings=False)  # of the model that computes the chain


@dataclass(frozen=True)
class Chain:
    """A Markov chain of S states and T steps. The first state is uniform; then P(j | i) is proportional to
    1 / (1 + ((j - i) mod S)).

    The reward is 1 for each token that is the last state.
    """

    S: int = 4
    T: int = 8

    @property
    def begin(self) -> int:
        """Return the token that every sequence begins with; it is not counted among the T."""
        return self.S

    @property
    def probs(self) -> Tensor:
        """Return P(j | i), float64 (S + 1, S): a row for each state and one for BEGIN."""
        distance = (torch.arange(self.S) - torch.arange(self.S)[:, None]) % self.S  # (S, S)
        weight = 1 / (1 + distance.double())
        rows = torch.cat([weight, torch.ones(1, self.S, dtype=torch.float64)])
        return rows / rows.sum(dim=1, keepdim=True)

    @property
    def rewards(self) -> Tensor:
        """Return the reward of each token, float64 (S,)."""
        return (torch.arange(self.S) == self.S - 1).double()

    def reward(self, tokens: Tensor) -> Tensor:
        """Return the rewards, float64 (B,), of sequences of states (B, T)."""
        return (tokens == self.S - 1).sum(dim=-1).double()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return n sequences of states, int64 (n, T), drawn from the chain."""
        tokens = torch.full((n, 1), self.begin)
        for _ in range(self.T):
            new = torch.multinomial(self.probs[tokens[:, -1]], 1, generator=generator)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens[:, 1:]


def optimum(beta: float, chain: Chain = Chain()) -> tuple[float, float]:
    """Return (reward, KL in nats) of the best policy for reward - beta KL; beta inf gives the reference."""
    if not beta > 0:
        raise ValueError(f"beta {beta}: expected a number above 0")
    # Backward: the policy of each step, (S + 1, S), from the values of the states that follow.
    log_p, policies, values = chain.probs.log(), [], torch.zeros(chain.S, dtype=torch.float64)
    for _ in range(chain.T):
        exponents = log_p + (chain.rewards + values) / beta  # (S + 1, S)
        policies.append(exponents.log_softmax(dim=1))
        values = torch.zeros_like(values) if math.isinf(beta) else beta * exponents[:-1].logsumexp(dim=1)

    # Forward: the distribution over the last token, from BEGIN on.
    at = torch.zeros(chain.S + 1, dtype=torch.float64)
    at[chain.begin] = 1.0
    reward = kl = 0.0
    for policy in reversed(policies):
        joint = at[:, None] * policy.exp()  # (S + 1, S)
        reward += (joint * chain.rewards).sum().item()
        kl += (joint * (policy - log_p)).sum().item()
        at = torch.cat([joint.sum(dim=0), torch.zeros(1, dtype=torch.float64)])
    return reward, max(kl, 0.0)  # rounding may put a KL of 0 below 0


def reward_at(kl: float, chain: Chain = Chain()) -> float:
    """Return the most reward that a policy at this KL (nats, at least 0) can have, by bisection over beta."""
    low, high = 0.02, 1e6  # the KL falls as beta grows
    if kl >= optimum(low, chain)[1]:
        return optimum(low, chain)[0]
    for _ in range(100):
        beta = math.sqrt(low * high)
        low, high = (beta, high) if optimum(beta, chain)[1] > kl else (low, beta)
    return optimum(low, chain)[0]


def share_of_gain(reward: float, kl: float, chain: Chain = Chain()) -> float:
    """Return the gain over the reference, divided by the largest gain that is possible at this KL.

    Where nothing can be gained, up to rounding, it is NaN.
    """
    start = optimum(math.inf, chain)[0]
    possible = reward_at(kl, chain) - start
    return (reward - start) / possible if possible > 1e-4 else math.nan


def best_of_n(n: int, chain: Chain = Chain()) -> tuple[float, float]:
    """Return (reward, KL) of drawing n sequences and keeping the one of the highest reward.

    Given its reward, the sequence that is kept is distributed as in the reference. So the KL is that of the
    two distributions of the reward: F(r)^n - F(r - 1)^n against F(r) - F(r - 1).
    """
    # joint[i, r]: probability that the last token is i and r of the tokens so far have a reward.
    joint = torch.zeros(chain.S + 1, chain.T + 1, dtype=torch.float64)
    joint[chain.begin, 0] = 1.0
    for _ in range(chain.T):
        moved = chain.probs.T @ joint  # (S, T + 1)
        moved[-1] = moved[-1].roll(1)  # the last state adds 1; nothing is yet at T, so nothing wraps around
        joint = torch.cat([moved, torch.zeros(1, chain.T + 1, dtype=torch.float64)])
    below = torch.cat(
        [torch.zeros(1, dtype=torch.float64), joint.sum(dim=0).cumsum(dim=0)]
    )  # F(-1), F(0) ...
    before, after = below.diff(), (below**n).diff()
    reward = (after * torch.arange(chain.T + 1)).sum().item()
    return reward, torch.special.xlogy(after, after / before).sum().item()


class Value(NamedTuple):
    """The exact reward of a policy of the chain, and its distance to the chain."""

    reward: float
    kl: float  # to the chain, nats
    outside: float  # the probability that the model writes anything but T states


def value_of(model: nn.Module, chain: Chain = Chain()) -> tuple[float, float]:
    """Return the (reward, KL) of `exact_value`."""
    return exact_value(model, chain)[:2]


@torch.no_grad()
def exact_value(model: nn.Module, chain: Chain = Chain()) -> Value:
    """Return the exact value of a decoder's policy, summed over all S^T sequences.

    The policy is the softmax of the model's logits over the S states alone; the probability of other tokens
    is `outside`. Raises ValueError for a model that is no decoder, for one with a smaller vocabulary, and for
    one that mostly writes outside.
    """
    if not hasattr(model, "new_cache"):
        raise ValueError(f"a {type(model).__name__} has no policy of the chain; expected a decoder, as gpt")
    if model.config.vocab_size <= chain.S:
        raise ValueError(
            f"vocabulary of {model.config.vocab_size}: a model of the chain has {chain.S + 1} tokens"
        )
    device = next(model.parameters()).device
    log_p, rewards = chain.probs.log().to(device), chain.rewards.to(device)
    cache = model.new_cache([1], chain.T)
    last = torch.full((1,), chain.begin, device=device)  # token of each prefix
    reached = torch.ones(1, dtype=torch.float64, device=device)  # probability of each prefix
    inside = reached  # and by the model's own softmax
    reward = kl = 0.0
    for t in range(chain.T):
        # The policy after each of the S^t prefixes, (S^t, S).
        logits = model.logits(model.hidden(last[:, None], cache=cache)[:, -1]).double()
        policy = logits.log_softmax(dim=1)[:, : chain.S]
        inside = (inside[:, None] * policy.exp()).flatten()
        policy = policy.log_softmax(dim=1)
        joint = reached[:, None] * policy.exp()
        reward += (joint * rewards).sum().item()
        kl += (joint * (policy - log_p[last])).sum().item()

        # Every prefix branches into S longer ones, and its row of the cache with it; after the last token
        # nothing would read these rows, three quarters of all.
        if t + 1 == chain.T:
            break
        last = torch.arange(chain.S, device=device).repeat(len(last))
        reached = joint.flatten()
        cache.lengths = [n for n in cache.lengths for _ in range(chain.S)]
        for stored in (cache.keys, cache.values):
            stored[:] = [rows.repeat_interleave(chain.S, dim=0) for rows in stored]

    outside = max(0.0, 1 - inside.sum().item())
    if outside > 0.5:
        raise ValueError(
            f"a model that writes other tokens than the {chain.S} states, in {outside:.1%} of its sequences, "
            "has no policy of the chain"
        )
    return Value(reward, kl, outside)


@torch.no_grad()
def build_model(chain: Chain = Chain()) -> GPT:
    """Return a small GPT whose softmax is the chain, up to rounding: nothing has to be trained.

    Its blocks add nothing at first, since their last matrices are 0 (and learn, since their gradients
    are not 0). So the hidden state H is the normalised embedding of the last token, and the head W is the
    solution of H W^T = log P of least norm. BEGIN has the logit -30, so that it is never drawn.
    """
    config = {"vocab_size": chain.S + 1, "max_seq_len": chain.T + 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(replace(WIDTH, **config))
    model.model.embed_tokens.weight.mul_(50)  # to a standard deviation of 1, so that a step changes little
    for block in model.model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    H = model.hidden(torch.arange(chain.S + 1)[:, None])[:, 0].double()  # (S + 1, D)
    logits = torch.cat([chain.probs.log(), torch.full((chain.S + 1, 1), -30.0).double()], dim=1)
    model.lm_head.weight.copy_((torch.linalg.pinv(H) @ logits).T)
    return model.eval()


def reference_model(cache: str | Path) -> str:
    """Return the directory below cache of the model that computes the chain, made at the first call.

    Processes that call it at the same time wait for one of them.
    """
    directory = Path(cache) / "chain"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_suffix(".lock")):
        if damage(directory) is not None:
            with replace_directory(directory) as new:
                build_model().save_pretrained(new)
                write_checksums(new)
    return str(directory)


# --- the table and the figure


def table() -> str:
    """Return the frontier at BETAS and best-of-n at NS, as text."""
    lines = [f"{'beta':>8} {'reward':>9} {'KL (nats)':>9}"]
    lines += [f"{beta:8g} {reward:9.6f} {kl:9.6f}" for beta in BETAS for reward, kl in [optimum(beta)]]
    lines += ["", f"{'best of':>8} {'reward':>9} {'KL (nats)':>9}"]
    return "\n".join(lines + [f"{n:8} {r:9.6f} {kl:9.6f}" for n in NS for r, kl in [best_of_n(n)]])


def draw(path: Path, points: Sequence[tuple[str, float, float]] = ()) -> None:
    """Draw the frontier, best-of-n and points (name, reward, KL), one colour for each name, to a picture."""
    pyplot = load_pyplot()
    betas = [0.1 * 1.05**i for i in range(100)] + [20.0, 50.0, 1e6]
    rewards, kls = zip(*sorted(map(optimum, betas)), strict=True)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(kls, rewards, color="black", label="frontier: the exact optimum")
    best = [best_of_n(n) for n in range(1, 65)]
    axes.plot(
        [kl for _, kl in best], [r for r, _ in best], "--", color="grey", label="best of 1 ... 64, exact"
    )
    for i, name in enumerate(dict.fromkeys(name for name, _, _ in points)):
        own = [(kl, reward) for other, reward, kl in points if other == name]
        marker = "osD^vPX*<>"[i % 10]
        axes.plot(*zip(*own, strict=True), marker, color=f"C{i}", ms=6, alpha=0.8, label=name)
    axes.set(xlabel="KL(policy || reference), nats", ylabel="reward", title="Reward and distance: the chain")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with replace_file(path) as new:
        figure.savefig(new, format=path.suffix.removeprefix(".") or "png", dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Print the exact frontier, and where models are under it.")
    parser.add_argument("models", nargs="*", type=command.filled, help="directories, such as runs/ppo/model")
    parser.add_argument("--out", type=command.path, metavar="FILE", help="draw it, as .png, .svg or .pdf")
    args = parser.parse_args(argv)
    if args.out is not None and args.out.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--out {args.out}: expected a name that ends in .png, .svg or .pdf")
    print(table())
    points = []
    for directory in args.models:
        reward, kl = value_of(open_model(directory).eval())
        points.append((directory, reward, kl))
        print(f"{directory}: reward {reward:.4f} at KL {kl:.4f}, {share_of_gain(reward, kl):.1%} of its gain")
    if args.out is not None:
        draw(args.out, points)
        print(f"figure: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    command.run(main)
