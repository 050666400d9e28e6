"""`--set FIELD=VALUE`: other values for fields of the Config of model, task or adapter."""

import ast
from argparse import Namespace
from dataclasses import fields, replace
from typing import Any

from engine.contract import Concept

# Fields that --set refuses, because other flags decide them.
DECIDED = ("vocab_size", "max_seq_len", "eos_token_id", "pad_token_id", "kernels")
BALANCE_LOSSES = ("aux_loss_coef", "z_loss_coef", "sequence_loss_coef")  # of moe.py


def field_names(config: Any) -> list[str]:
    """Return the names of the fields of a Config, a dataclass."""
    return [field.name for field in fields(config)]


def value_of(text: str) -> Any:
    """Return the VALUE of FIELD=VALUE: a number, a tuple, True, False or None, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def check_set(concept: Concept, config: Any, changes: list[str]) -> None:
    """Raise ValueError for a FIELD of --set that neither model nor task nor adapter has."""
    settings = concept.task.settings(config)
    known = dict.fromkeys([*field_names(config), *field_names(settings)])
    if concept.adapter is not None:
        known |= dict.fromkeys(field_names(next(iter(concept.adapter.ADAPTERS.values()))))
    for change in changes:
        name, equals, _ = change.partition("=")
        if name in DECIDED:
            raise ValueError(f"--set {change}: --tokenizer, --seq-len and --kernels decide this")
        if not equals or name not in known:
            raise ValueError(f"--set {change}: expected FIELD=VALUE with a field of {', '.join(known)}")


def refuse_balance_losses(config: Any) -> None:
    """Raise ValueError for a mixture of experts with balance losses, which the task does not compute."""
    own = [name for name in BALANCE_LOSSES if getattr(config, name, 0)]
    if own:
        zeros = " ".join(f"{name}=0" for name in own)
        raise ValueError(f"a mixture's balance losses are no part of this task's loss; add --set {zeros}")


def adapter_fields(concept: Concept, config: Any, args: Namespace, start: Any = None) -> Any:
    """Return the adapter's Config with the values of --set. A field that the task has too is the task's.

    config: the model's. start: the Config with the values that --set does not name, by default that of
    --adapter.
    """
    adapters, settings = concept.adapter.ADAPTERS, concept.task.settings(config)
    start = start or adapters[args.adapter or next(iter(adapters))]
    of_task = set() if settings is config else set(field_names(settings))
    return with_fields(start, args.set, set(field_names(start)) - of_task)


def with_fields(config: Any, changes: list[str], known: set[str] | None = None) -> Any:
    """Return the config with the values of --set for its fields, or for those of its fields in `known`.

    Raises ValueError for a value of another type, or one that the config refuses.
    """
    values = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in (field_names(config) if known is None else known):
            continue
        value = value_of(text)
        now = getattr(config, name)
        if isinstance(now, str) and value is not None and not isinstance(value, str):
            value = text  # such as a folder that is called 2024
        expected = float | int if isinstance(now, float) else type(now)
        if now is not None and value is not None and not isinstance(value, expected):
            raise ValueError(f"--set {change}: expected a value such as {now!r}")
        values[name] = value
    try:
        return replace(config, **values) if values else config
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"--set {' '.join(changes)}: {error}") from None


def task_settings(concept: Concept, config: Any, changes: list[str]) -> Any:
    """Return the task's own Config with the values of --set, or the model's Config if the task has none.

    A field that the model has too is the model's.
    """
    settings = concept.task.settings(config)
    known = {name for name in field_names(settings) if name not in field_names(config)}
    return settings if settings is config else with_fields(settings, changes, known)
