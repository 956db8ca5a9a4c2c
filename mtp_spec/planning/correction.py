"""How times of now differ from those measured before, followed slowly."""

from __future__ import annotations

from math import exp, log

# seconds: no clock tells less
LEAST = 1e-9


class Correction:
    """A factor from expected times to those of now.

    Args:
        first: its logarithm at first.
    """

    def __init__(self, first: float = 0.0) -> None:
        self._log = first

    @property
    def factor(self) -> float:
        """What expected times are to be multiplied by."""
        return exp(self._log)

    def follow(self, surprise: float, weight: float) -> None:
        """Takes a part of a `surprise`."""
        self._log += weight * surprise

    def fade(self, part: float) -> None:
        """Forgets a part."""
        self._log *= 1.0 - part


def surprise(measured: float, expected: float, most: float) -> float:
    """Returns the logarithm of a time over the expected one, `most` at most: a neighbour's burst is no news."""
    return max(-most, min(most, log(max(measured, LEAST) / expected)))
