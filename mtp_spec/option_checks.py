"""Checks of option values; each message names the option, the given value and the allowed ones."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from numbers import Integral, Real

from mtp_spec.errors import OptionError

LARGEST = 1e30  # counts and logits can be multiplied by this in float32 without overflow
SHOWN = 200  # most characters of a value in a message: it may be a document given where a name is expected


def shown(value: object) -> str:
    """Returns a value as messages show it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 20]}... of {len(text)} characters"


def invalid(name: str, value: object, allowed: str) -> OptionError:
    """Returns the error for a value that an option cannot have."""
    return OptionError(f"{name}={shown(value)} is not possible: allowed is {allowed}")


def unknown_option(name: str, known: Sequence[str]) -> OptionError:
    """Returns the error for an unknown option name, with the closest known one."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return OptionError(f"unknown option {name!r}: {hint}known options are {', '.join(known)}")


def integer(name: str, value: object, low: int, high: int | None, allowed: str) -> int:
    """Returns an integer of any type, NumPy's included, as an int.

    Args:
        low: least value.
        high: largest value; None is no limit.
        allowed: the allowed values, for the message.

    Raises:
        OptionError: the value is not an integer (a bool is not) or is outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise invalid(name, value, allowed)
    number = int(value)
    if number < low or (high is not None and number > high):
        raise invalid(name, value, allowed)
    return number


def real(
    name: str,
    value: object,
    allowed: str,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
) -> float:
    """Returns a real number of any type as a float, at most `LARGEST` in size.

    Args:
        low: least value.
        high: largest value.
        above: the value must be larger than this.
        allowed: the allowed values, for the message.

    Raises:
        OptionError: the value is not a number (a bool is not), is NaN, or is outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise invalid(name, value, allowed)
    number = as_float(value)
    if not abs(number) <= LARGEST or not low <= number <= high or number <= above:
        raise invalid(name, value, allowed)
    return number


def as_float(value: Real) -> float:
    """Returns a number as a float, infinite if it is too large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
