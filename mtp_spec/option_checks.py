"""Checks of a caller's values, with one message each: the option, what was given and what is allowed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from numbers import Integral, Real

from mtp_spec.errors import OptionError

LARGEST = 1e30  # what counts and logits may be multiplied with in float32


def invalid(name: str, value: object, allowed: str) -> OptionError:
    """Returns the error for a value that an option cannot have."""
    return OptionError(f"{name}={value!r} is not possible: allowed is {allowed}")


def unknown_option(name: str, known: Sequence[str]) -> OptionError:
    """Returns the error for a name that no option has, with the nearest that one has."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return OptionError(f"unknown option {name!r}: {hint}known options are {', '.join(known)}")


def integer(name: str, value: object, low: int, high: int | None, allowed: str) -> int:
    """Returns an integer of any kind, also NumPy's, as an int.

    Args:
        low, high: the least and the most that is possible; `high` None is no limit.
        allowed: says so in the message.

    Raises:
        OptionError: something else, a bool too, or outside the range.
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
    """Returns a real number of any kind as a float, at most `LARGEST` in size.

    Args:
        low, high: the least and the most that is possible.
        above: it must be larger than this.
        allowed: says so in the message.

    Raises:
        OptionError: something else, a bool too, NaN, or outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise invalid(name, value, allowed)
    number = as_float(value)
    if not abs(number) <= LARGEST or not low <= number <= high or number <= above:
        raise invalid(name, value, allowed)
    return number


def as_float(value: Real) -> float:
    """Returns a number as a float, infinite where it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
