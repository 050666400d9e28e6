"""Large numbers as people write them: 7B parameters, 1.4T tokens, 1e22 FLOPs."""

import argparse
import math

UNITS = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}


class NotAQuantity(ValueError, argparse.ArgumentTypeError):
    """The error of `quantity`: a ValueError for callers from Python, and an ArgumentTypeError for argparse,
    which prints the messages of that type only."""


def quantity(text: str) -> float:
    """Return the number written as 1e22, 7b, 1.4t, 300m or 20k; units are read in either case.

    Raises NotAQuantity, a ValueError, unless the text is a positive, finite number.
    """
    factors = {unit.lower(): size for unit, size in UNITS.items()}
    unit = text[-1:].lower()
    body, factor = (text[:-1], factors[unit]) if unit in factors else (text, 1.0)
    try:
        value = float(body) * factor
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise NotAQuantity(f"{text!r}: expected a positive number such as 1e22, 7b, 1.4t, 300m or 20k")
    return value


def short(value: float, digits: int = 3) -> str:
    """Return a number as a text of that many significant digits.

    From 1,000 on it has a unit, such as 1.4T for 1.4e12, and from 1e15 on an exponent, such as 5.76e23.
    """
    value = float(f"{value:.{digits}g}")  # rounded before the unit is chosen: 999.7 is 1k in three digits
    for unit, size in UNITS.items():
        if size <= value < 1e15:
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}".replace("e+", "e")
