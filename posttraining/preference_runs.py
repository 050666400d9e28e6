"""Common parts of the tasks that learn from preferences or from a reward: dpo, reward, online_dpo and ppo.

They start from a model that answers already, --init-from. By default model and data are of a Markov chain, on
which the best possible result is known (posttraining/frontier.py). dpo and reward read the file of
preferences in --data.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data import preferences
from data.rows import Dataset
from data.tokenizer import get_tokenizer
from engine.settings import refuse_balance_losses
from formats.atomic import replace_file
from posttraining import chain_preferences, frontier, instruct


def start_model(args: argparse.Namespace) -> str | None:
    """Return the directory of a model that computes the chain. It is called where --init-from is left out.

    Raises ValueError where --data is anything but the chain.
    """
    if args.data != "chain":
        raise ValueError(
            f"--data {args.data}: needs --init-from DIR, a model that is trained to answer already"
        )
    return frontier.reference_model(args.cache)


def check_chain(args: argparse.Namespace, config: Any) -> None:
    """Raise ValueError for a model, with this config, that has other tokens than the chain."""
    n = frontier.Chain().begin + 1
    if config.vocab_size != n:
        found = f"the model in {args.init_from or args.base} has {config.vocab_size}"
        raise ValueError(f"--data chain: needs a model of {n} tokens, {found}; name a file by --data")


def load_preferences(args: argparse.Namespace, config: Any, task: str) -> Dataset:
    """Return the preferences that --data names, for a task of that name.

    Raises ValueError for a model that writes no text, for --document-mask, and for a mixture with balance
    losses.
    """
    if "eos_token_id" not in [field.name for field in fields(config)]:
        raise ValueError(f"--task {task}: an encoder writes no answers; expected a decoder, as gpt")
    refuse_balance_losses(config)
    if args.document_mask:
        raise ValueError(f"--document-mask: --task {task} has one answer in a row; leave it out")
    if args.data == "chain":
        check_chain(args, config)
        return chain_preferences.dataset(frontier.Chain())
    options = {"val": args.val, "bad_text": args.bad_text}
    return preferences.prepare(args.data, get_tokenizer(args.tokenizer), args.seq_len, **options)


@torch.no_grad()
def show(model: nn.Module, dataset: Dataset, out: Path) -> str:
    """Return where the model is under the exact frontier of the chain, or with text its answers to held-out
    prompts.

    Beside these are the chosen answers of the data, and the model's answers at the run's first evaluation,
    which before.json keeps.
    """
    if dataset.tokenizer is None:
        of_reward = model.objective.method in ("dpo", "robust")  # which minimise at the optimum for beta
        return chain_preferences.placed(model, model.objective.scale if of_reward else None)
    tokenizer = dataset.tokenizer
    examples = [dataset.val.rows[i] for i in range(min(3, len(dataset.val)))]
    after = instruct.answers(model, tokenizer, [example.prompt.tolist() for example in examples], 60)
    path = out / "before.json"
    if not path.exists():
        with replace_file(path) as new:
            new.write_text(json.dumps(after), encoding="utf-8")
    before = json.loads(path.read_text(encoding="utf-8"))
    shown = []
    for (prompt, given, label), *both in zip(examples, before, after, strict=True):
        first = "bad:      " if label is False else "chosen:   "
        texts = [tokenizer.decode(prompt.tolist()), tokenizer.decode(given[0].tolist()), *both]
        labels = ("", first, "before:   ", "after:    ")
        shown.append("\n".join(label + text.strip() for label, text in zip(labels, texts, strict=True)))
    return "\n\n".join(shown)


def save_tokenizer(dataset: Dataset, directory: Path) -> None:
    """Write the tokenizer and the template of conversations; the chain has neither."""
    if dataset.tokenizer is not None:
        instruct.save_tokenizer(dataset, directory)
