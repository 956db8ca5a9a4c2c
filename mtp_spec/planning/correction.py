"""A slowly adapting correction from times measured earlier to current ones."""

from __future__ import annotations

from math import exp, log

# seconds: the finest resolution of any clock
LEAST = 1e-9


class Correction:
    """The factor from expected times to current ones.

    Args:
        first: the initial logarithm of the factor.
    """

    def __init__(self, first: float = 0.0) -> None:
        self._log = first

    @property
    def factor(self) -> float:
        """The factor by which expected times are multiplied."""
        return exp(self._log)

    def follow(self, surprise: float, weight: float) -> None:
        """Moves the logarithm by a fraction of a `surprise`."""
        self._log += weight * surprise

    def fade(self, part: float) -> None:
        """Moves the logarithm towards 0 by a fraction of itself."""
        self._log *= 1.0 - part


def surprise(measured: float, expected: float, most: float) -> float:
    """Returns the log-ratio of measured to expected time, clipped to `most` so that an outlier has little effect."""
    return max(-most, min(most, log(max(measured, LEAST) / expected)))
