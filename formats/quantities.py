"""Large numbers as people write them: 7B parameters, 1.4T tokens, 1e22 FLOPs."""

import argparse
import math

UNITS = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}


class NotAQuantity(ValueError, argparse.ArgumentTypeError):
    """Raised by `quantity`. It is a ValueError for callers from Python, and an ArgumentTypeError because
    argparse prints the message of that type alone."""


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
    """Return the number with a unit from 1000 on, such as 1.4T for 1.4e12; from 1e15 on as 5.76e23."""
    for unit, size in UNITS.items():
        if 0.9995 * size <= value < 999.5e12:
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}".replace("e+", "e")
