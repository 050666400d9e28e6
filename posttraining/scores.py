"""Scores: from `--set reward=...` to one number for each completion.

    reward=chain                   the reward of posttraining/frontier.py
    reward=exact                   1 where the completion is the answer in the data, else 0
    reward=my_rewards.py:polite    any Python function (prompts, completions) -> scores, of lists of texts
    reward=runs/reward/model       a reward model

A function gets the texts without their end token, and returns one number for each. A score that is not finite
(None counts as NaN) means that the completion cannot be judged: it is left out of the update and counted.
"""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.tokenizer import get_tokenizer
from engine.log import Failed
from posttraining.frontier import Chain


class Completions(NamedTuple):
    """The token ids of what is scored, row by row; functions of texts get them decoded."""

    prompts: list[list[int]]
    completions: list[list[int]]  # with the end token where one was drawn
    answers: list[list[int]]  # of the data, for the same prompts


Scorer = Callable[[Completions], Sequence[float | None]]


def find(reward: str, tokenizer: Any, stop: int | None) -> Scorer:
    """Return the function that a reward names. Raises ValueError where there is none of that name.

    tokenizer: makes texts of token ids; None for the chain. stop: the end token, which is in no text.
    """

    def texts(rows: list[list[int]]) -> list[str]:
        return [tokenizer.decode([token for token in row if token != stop]).strip() for row in rows]

    if (reward == "chain") != (tokenizer is None):
        raise ValueError(f"--set reward={reward}: --data chain and reward=chain belong together")
    if reward == "chain":
        return lambda rows: Chain().reward(torch.tensor(rows.completions)).tolist()
    if reward == "exact":
        return lambda rows: [
            float(a == b) for a, b in zip(texts(rows.completions), texts(rows.answers), strict=True)
        ]
    if Path(reward).is_dir():
        check_tokenizer(reward, tokenizer)
        model = open_reward_model(reward)
        return lambda rows: model([p + c for p, c in zip(rows.prompts, rows.completions, strict=True)])
    function = find_function(reward)
    return lambda rows: function(texts(rows.prompts), texts(rows.completions))


def find_function(reward: str) -> Callable:
    """Return the function that FILE.py:NAME or MODULE:NAME names; ValueError where there is none."""
    source, _, name = reward.rpartition(":")
    expected = "expected chain, exact, FILE.py:FUNCTION, MODULE:FUNCTION or the directory of a reward model"
    if not source or not name:
        raise ValueError(f"--set reward={reward}: {expected}")
    try:
        if source.endswith(".py"):
            # A name that no other module has, under which dataclasses look for the types of their fields.
            spec = importlib.util.spec_from_file_location(f"reward:{Path(source).stem}", source)
            sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except Exception as error:
        raise ValueError(f"--set reward={reward}: cannot import {source} ({describe(error)})") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--set reward={reward}: {source} has no function {name}")
    return function


def check_tokenizer(directory: str, tokenizer: Any) -> None:
    """Raise ValueError if the reward model in directory was saved with another tokenizer than the policy's.

    The token ids of completions would mean other texts to it.
    """
    saved = (Path(directory) / "tokenizer.json").exists()
    if saved and get_tokenizer(directory).fingerprint != tokenizer.fingerprint:
        expected = "expected a reward model with the same one"
        raise ValueError(f"--set reward={directory}: another tokenizer than the policy's; {expected}")


def open_reward_model(directory: str) -> Callable[[list[list[int]]], list[float]]:
    """Return a function from rows of token ids to the scores of the reward model in directory."""
    RewardModel = importlib.import_module("posttraining.reward").RewardModel
    model = RewardModel.from_pretrained(directory).eval().requires_grad_(False)

    @torch.no_grad()
    def score(rows: list[list[int]]) -> list[float]:
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        return model(tokens, lengths).tolist()

    return score


def score(scorer: Scorer, rows: Completions) -> Tensor:
    """Return the scores of completions, float32 (B,), NaN for those that cannot be judged.

    Raises Failed, in one line, where the function raises or returns anything but one number for each.
    """
    try:
        found = list(scorer(rows))
    except Exception as error:
        raise Failed(f"the reward function failed: {describe(error)}") from error
    n = len(rows.completions)
    if len(found) != n:
        raise Failed(f"the reward function returned {len(found)} scores for {n} completions")
    try:
        numbers = [math.nan if value is None else float(value) for value in found]
    except (TypeError, ValueError) as error:
        raise Failed(f"the reward function returned no numbers: {describe(error)}") from error
    scores = torch.tensor(numbers, dtype=torch.float32)
    return torch.where(scores.isfinite(), scores, torch.nan)


def describe(error: Exception) -> str:
    """Return the kind of an error and its message, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
