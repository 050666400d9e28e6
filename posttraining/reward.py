"""A reward model: it gives each answer a number, and learns from which of two answers people prefer.

    p(y_c preferred to y_r | x) = sigmoid(r(x, y_c) - r(x, y_r))            (Bradley and Terry 1952)
    loss = -log sigmoid(r_c - r_r - margin) + a (r_c + r_r)^2

y_c is the chosen answer to the prompt x, y_r the rejected one, r_c and r_r are their scores. r is a decoder
whose head is replaced by one row of weights, `score`, on the hidden state of the text's last token (Stiennon
et al. 2020; InstructGPT, Ouyang et al. 2022). Which token that is follows from lengths or a mask, and never
from comparing with a padding id: the token that ends a text is often the one that pads.

Only differences of r have a meaning: with a = 0, a constant added to all scores of a prompt does not change
the loss, so scores may drift. A small a keeps them near 0 (Eisenstein et al. 2023). The saved model is
calibrated: its scores of held-out answers have mean 0 and standard deviation 1, so that PPO's coefficient of
the KL, which is in units of the reward, means the same for every reward model.

    python train.py --model reward                                         a Markov chain with an exact reward
    python train.py --model reward --init-from runs/sft/model --data pairs.jsonl      see data/preferences.py
    python -m posttraining.reward runs/reward/model --prompt "2+2?" 4 5                score two answers

Shapes: B prompts, K answers of each, N texts, T tokens of a text (a prompt and an answer), D model width.
"""

import argparse
import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import preferences
from data.rows import Dataset, Row, in_order, stack
from data.tokenizer import get_tokenizer
from formats import command, reward_models
from formats.config_values import check_values
from formats.safetensors_dir import assign, build
from gpt import GPT
from gpt import Config as DecoderConfig
from kernels.backend import readable
from posttraining.frontier import Chain
from posttraining.preference_runs import load_preferences, save_tokenizer, start_model  # noqa: F401
from posttraining.reference import trimmed

MODEL = "gpt"
DATA = "chain"
STEPS = 600
LEARNING_RATE = 0.25
TOKEN_LOSS = ""  # no token is predicted
N_CALIBRATION = 256  # held-out rows


@dataclass(frozen=True)
class Config:
    """The settings of the objective."""

    margin: float = 0.0  # by which the score of a chosen answer should be larger
    centering: float = 0.0  # a; 0.01 keeps the mean of scores near 0

    MAY_BE_ZERO = ("margin", "centering")

    def __post_init__(self):
        check_values(self)


class RewardModel(nn.Module):
    """A decoder with one number as its output."""

    def __init__(self, decoder: nn.Module, pad_token_id: int | None = None, bias: float = 0.0):
        """Replace the head of a decoder with a method `hidden`, such as gpt.GPT.

        pad_token_id is only written to config.json, for transformers. bias is added to all scores.
        """
        super().__init__()
        # As with tied embeddings, the decoder's own weights then have none of a head.
        decoder.lm_head = None
        decoder.config = replace(decoder.config, tie_embeddings=True)
        self.decoder, self.config = decoder, decoder.config
        D = decoder.config.d_model
        self.score = nn.Linear(D, 1, bias=False)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(D + 1))  # Stiennon et al. 2020
        self.pad_token_id, self.bias = pad_token_id, bias

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return the score of each text, float32 (...).

        tokens (..., T), int64, such as (B, K, T) for K answers of each prompt. lengths: how many tokens of
        each row are text, (...), with padding on the right; or a mask (..., T), True at the tokens that are
        text, with padding on either side. Raises ValueError for a text without tokens or of more than T; on a
        GPU, where the check would wait for it, such a text has a wrong score.
        """
        tokens, shape = tokens.reshape(-1, tokens.shape[-1]), tokens.shape[:-1]
        if lengths.shape == (*shape, tokens.shape[-1]):
            tokens, lengths = align(tokens, lengths.reshape(tokens.shape).bool())
        if readable(lengths) and not ((lengths >= 1) & (lengths <= tokens.shape[1])).all():
            raise ValueError(f"lengths {lengths.tolist()}: expected 1 to {tokens.shape[1]} for each text")
        last = lengths.reshape(-1).to(tokens.device) - 1
        hidden = self.decoder.hidden(tokens)  # (N, T, D)
        hidden = hidden[torch.arange(len(tokens), device=tokens.device), last]  # (N, D)
        return (self.score(hidden).float() + self.bias).view(shape)

    def flops_per_token(self, seq_len: int) -> int:
        """Return the FLOPs of training on one token: the decoder's without 6 V D, those of its head."""
        return self.decoder.flops_per_token(seq_len) - 6 * self.config.vocab_size * self.config.d_model

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "RewardModel":
        """Load a LlamaForSequenceClassification with one label, or a GPT-2, Mistral, Qwen2 or Qwen3 like it.

        Raises ValueError for what is missing, damaged or not implemented, which the message names.
        """
        saved = reward_models.read(directory)
        config = {**saved.fields, "kernels": kernels}
        weights = {f"decoder.{name}": w for name, w in saved.weights.items() if name != reward_models.SCORE}
        weights[reward_models.SCORE] = saved.weights[reward_models.SCORE]

        def make() -> RewardModel:
            return cls(GPT(DecoderConfig(**config)), saved.pad_token_id, saved.bias)

        model = build(make, saved.fields, weights, directory)
        assign(model, weights, directory)
        return model.float()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model as `from_pretrained` reads it. Raises ValueError for a decoder not of gpt.py."""
        if type(self.decoder) is not GPT:
            kind = type(self.decoder).__name__
            raise ValueError(f"a reward model on {kind} cannot be saved; expected a decoder of gpt.py")
        weights = {name.removeprefix("decoder."): w for name, w in self.state_dict().items()}
        reward_models.save(self.config, weights, directory, self.pad_token_id, self.bias)


Model = RewardModel  # the name by which formats.open_model finds it


def align(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens (N, T) with those of the mask (N, T) first, in their order, and the mask's sums (N,).

    So the position of a token in the text does not depend on the padding.
    """
    order = (~mask).long().argsort(dim=1, stable=True)
    return tokens.gather(1, order), mask.sum(1)


# --- losses


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, centering: float = 0.0
) -> Tensor:
    """Return -log sigmoid(chosen - rejected - margin) + centering (chosen + rejected)^2 of each pair.

    chosen, rejected: scores of any shape, which is that of the result.
    """
    return -F.logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected).square()


def ranking_loss(scores: Tensor, ranks: Tensor, margin: float = 0.0, centering: float = 0.0) -> Tensor:
    """Return the loss of each prompt, (B,): the mean of `bradley_terry_loss` over its pairs of unequal rank.

    scores (B, K): of K answers, each of which passes through the model once for all its pairs. ranks (B, K):
    1 for the best. InstructGPT has all pairs of a prompt in one batch, since as separate examples they
    overfit (section 3.5).
    """
    better = ranks[:, :, None] < ranks[:, None, :]  # (B, K, K): the first is preferred to the second
    losses = bradley_terry_loss(scores[:, :, None], scores[:, None, :], margin, centering)
    return (losses * better).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)


@torch.no_grad()
def calibrated(model: RewardModel, scores: Tensor) -> RewardModel:
    """Return a reward model that gives (r - mean) / std where `model` gives r, and shares its decoder.

    scores: the model's own scores of some answers, whose mean and standard deviation these are. If all are
    equal, std is 1.
    """
    mean, std = scores.mean().item(), scores.std().item()
    std = std if std > 0 else 1.0
    new = copy.copy(model)
    new._modules = dict(model._modules) | {"score": copy.deepcopy(model.score)}
    new.score.weight /= std
    new.bias = (model.bias - mean) / std
    return new


# --- what train.py looks up by name, see engine/contract.py


def settings(config: Any) -> Config:
    """Return the task's Config; --set changes its fields."""
    return Config()


def load_data(args: argparse.Namespace, config: Any) -> Dataset:
    """Return the pairs that --data names. Raises ValueError for single answers, and for an adapter."""
    if args.adapter or args.base:
        raise ValueError(
            f"--adapter {args.adapter or 'lora'}: its format has no place for the head of a reward model; "
            "leave it out, or train less by --train last:2"
        )
    dataset = load_preferences(args, config, "reward")
    if dataset.train.rows[0].label is not None:
        raise ValueError(f"--data {args.data}: labels of single answers; a reward model needs pairs")
    return dataset


def make_batch(rows: list[Row], config: Config, generator: torch.Generator, tokenizer: Any = None) -> dict:
    """Return B pairs: "tokens" (B, 2, T), prompt and answer, the chosen one first, and "lengths" (B, 2)."""
    # The mask is True at the answer, whose last token is the last of the text.
    batch = trimmed(stack(rows))
    positions = torch.arange(1, batch["mask"].shape[-1] + 1)
    return {"tokens": batch["tokens"], "lengths": (batch["mask"] * positions).amax(-1)}


def wrap(model: nn.Module, config: Config) -> RewardModel:
    """Return a reward model on the decoder, with the task's Config as its attribute `objective`."""
    wrapped = RewardModel(model)
    wrapped.objective = config
    return wrapped


def loss(model: RewardModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean loss of B pairs, and metrics.

    "accuracy", the share in which the chosen answer has the larger score (equal ones count half); "margin",
    the mean difference; "score", the mean score of all answers; "shorter_accuracy", the accuracy of always
    preferring the shorter answer.
    """
    config, scores = model.objective, model(batch["tokens"], batch["lengths"])
    losses = bradley_terry_loss(scores[:, 0], scores[:, 1], config.margin, config.centering)
    with torch.no_grad():
        margin = scores[:, 0] - scores[:, 1]
        longer = (batch["lengths"][:, 1] - batch["lengths"][:, 0]).float()
        metrics = {
            "accuracy": ((margin.sign() + 1) / 2).mean(),
            "margin": margin.mean(),
            "score": scores.mean(),
            "shorter_accuracy": ((longer.sign() + 1) / 2).mean(),
        }
    return losses.mean(), metrics


def flops_per_token(model: RewardModel, config: Config, seq_len: int) -> int:
    """Return the FLOPs of training on one token of --seq-len, twice a model's: a row has two sequences."""
    return 2 * model.flops_per_token(seq_len)


@torch.no_grad()
def scores_of(model: RewardModel, dataset: Dataset, n: int) -> Tensor:
    """Return the scores (n, 2) of the first n held-out pairs."""
    rows = [dataset.val[i] for i in range(min(n, len(dataset.val)))]
    device, found = model.score.weight.device, []
    for some in in_order(rows, 32):
        batch = make_batch(some, None, None)
        found.append(model(batch["tokens"].to(device), batch["lengths"].to(device)).cpu())
    return torch.cat(found)


def save(model: RewardModel, dataset: Dataset, directory: Path) -> None:
    """Write the model, calibrated on held-out answers; training goes on with the scores as they are."""
    calibrated(model, scores_of(model, dataset, N_CALIBRATION)).save_pretrained(directory)


@torch.no_grad()
def show(model: RewardModel, dataset: Dataset, out: Path) -> str:
    """Return how the scores compare with the exact reward of the chain, or the scores of held-out pairs."""
    # The chain has no tokenizer.
    tokenizer = dataset.tokenizer
    if tokenizer is None:
        scores = scores_of(model, dataset, len(dataset.val)).flatten()
        sequences = torch.tensor([answer for e in dataset.val.rows for answer in map(list, e.answers)])
        exact = Chain().reward(sequences)
        r = torch.corrcoef(torch.stack([scores.double(), exact]))[0, 1].item()
        slope = r * (scores.std() / exact.std()).item()
        return f"correlation with the exact reward {r:.4f}, slope {slope:.3f} (1 is exact)\n{dataset.guess}"

    # Three held-out pairs in words.
    lines, scores = [], scores_of(model, dataset, 3).tolist()
    for (chosen, rejected), example in zip(scores, dataset.val.rows, strict=False):
        texts = [tokenizer.decode(ids.tolist()).strip() for ids in (example.prompt, *example.answers)]
        lines.append(f"{texts[0]}\n{chosen:+.2f} chosen:   {texts[1]}\n{rejected:+.2f} rejected: {texts[2]}")
    return "\n\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Score answers to a prompt by a reward model.")
    parser.add_argument("directory", type=command.path, help="a model, such as runs/reward/model")
    parser.add_argument("--prompt", required=True, help="a question of the user")
    parser.add_argument("answers", nargs="+", help="answers to it")
    args = parser.parse_args(argv)
    model, tokenizer = RewardModel.from_pretrained(args.directory).eval(), get_tokenizer(str(args.directory))
    preference = preferences.Preference([{"role": "user", "content": args.prompt}], tuple(args.answers))
    rows = preferences.PreferenceRows([preferences.as_example(preference, tokenizer)])
    if rows.length > model.config.max_seq_len:
        raise ValueError(f"{rows.length} tokens: this model reads at most {model.config.max_seq_len}")
    batch = make_batch([rows[0]], None, None)
    with torch.no_grad():
        scores = model(batch["tokens"], batch["lengths"])[0].tolist()
    for score, answer in sorted(zip(scores, args.answers, strict=True), reverse=True):
        print(f"{score:+.3f}  {answer}")


if __name__ == "__main__":
    command.run(main)
