"""Checks of the values in a Config: a wrong one is refused by an error that names the field."""

import math
from dataclasses import Field, fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, get_args


def check_values(config: Any, **choices: tuple) -> None:
    """Raise ValueError for a field of a Config, a dataclass, whose value is not one that it may have.

    choices: {field: its possible values}. Other fields are checked by their annotation, if it is one of these
    or one of them with `| None`, which allows None too:

        int                      a whole number of at least 1
        float                    a finite number above 0
        bool                     True or False
        tuple[int, ...]          whole numbers of at least 0
        int | tuple[int, ...]    one such number, or several

    The first two may also be 0 in the fields that the class names in MAY_BE_ZERO.
    """
    may_be_zero = getattr(config, "MAY_BE_ZERO", ())
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in choices:
            options = choices[field.name]
            expected = "" if value in options else " or ".join(map(str, options))
        else:
            expected = expectation(field, value, least=0 if field.name in may_be_zero else 1)
        if expected:
            raise ValueError(f"{field.name} {value!r}: expected {expected}")


def expectation(field: Field, value: Any, least: int) -> str:
    """Return in words which values a field may have, or "" if value is one of them.

    least: 1, or 0 if the field may be 0.
    """
    kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
    if value is None and NoneType in kinds:
        return ""
    if tuple[int, ...] in kinds:
        numbers = (value,) if int in kinds and not isinstance(value, tuple) else value
        right = isinstance(numbers, tuple) and all(is_whole(number) and number >= 0 for number in numbers)
        return "" if right else "whole numbers of at least 0"
    if int in kinds:
        if not is_whole(value):
            return f"a whole number of at least {least}"
        return "" if value >= least else f"at least {least}"
    if float in kinds:
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        right = is_number and (value > 0 or value == least == 0)
        return "" if right else f"a number {'above 0' if least else 'of at least 0'}"
    return "True or False" if set(kinds) <= {bool, NoneType} and not isinstance(value, bool) else ""


def is_whole(value: Any) -> bool:
    """Return whether value is a whole number; True and False, which are ints in Python, are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)
