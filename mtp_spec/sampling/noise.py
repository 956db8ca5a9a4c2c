"""Counter-based Gumbel noise: a pure function of (seed, position, token).

The same triple gives the same number for every row, tree, batch or drafter, so a token drawn as
``argmax(logits + noise)`` does not depend on speculation.

Generator: Philox4x64-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), as NumPy computes
it. The key is (seed, 0), the counter (1 + token // 8, position, 0, 0); the four 64-bit words of a counter serve eight
tokens, 32 bits each, low half first. Logarithms are taken in float64 and rounded once, so that machines agree on the
float32 result. The CPU engine makes rows in half the time of NumPy (`kernels/cpu/sampling.h`).

Legend: V vocabulary.
"""

from __future__ import annotations

import sys
from collections import OrderedDict

import numpy as np
import numpy.typing as npt
import torch

from mtp_spec.errors import OptionError
from mtp_spec.kernels.cpu import engine

Float32Array = npt.NDArray[np.float32]

_LIMIT = 1 << 64
# the largest uniform is the largest float32 below 1, which keeps every value finite in single precision too
_MAX_UNIFORM = 1.0 - 2.0**-24
# a draft, its siblings and its verification use the same positions
_CACHED_ROWS = 32


def gumbel(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    """[V] float32 standard Gumbel noise of one absolute position.

    Raises:
        OptionError: seed or position outside 0 .. 2**64 - 1, or vocab_size below 1.
    """
    return torch.from_numpy(GumbelNoise(seed, vocab_size).row_array(position))


class GumbelNoise:
    """Noise rows of one request; the most recent rows are kept."""

    __slots__ = ("_engine", "_rows", "seed", "vocab_size")

    def __init__(self, seed: int, vocab_size: int) -> None:
        _check_range("seed", seed)
        if vocab_size < 1:
            raise OptionError(
                f"vocab_size={vocab_size!r} is not possible: give the number of rows of the output head (1 or more)"
            )
        self.seed = seed
        self.vocab_size = vocab_size
        self._rows: OrderedDict[int, Float32Array] = OrderedDict()
        self._engine = engine.usable()

    def row(self, position: int) -> torch.Tensor:
        """[V] float32, equal to ``gumbel(seed, position, vocab_size)``; shared storage, not to be written to."""
        return torch.from_numpy(self.row_array(position))

    def row_array(self, position: int) -> Float32Array:
        """The same row as a NumPy array."""
        row = self._rows.get(position)
        if row is None:
            _check_range("position", position)
            row = self._rows[position] = self._made(position)
            if len(self._rows) > _CACHED_ROWS:
                self._rows.popitem(last=False)
        return row

    def _made(self, position: int) -> Float32Array:
        if self._engine is None:
            return _to_gumbel(random_bits(self.seed, position, self.vocab_size))
        row = np.empty(self.vocab_size, dtype=np.float32)
        self._engine.noise(self.seed, position, self.vocab_size, row.ctypes.data)
        return row


def random_bits(seed: int, position: int, count: int) -> npt.NDArray[np.uint32]:
    """The first `count` 32-bit words of a position."""
    # NumPy adds one to the first counter word before it generates
    counter = np.array([0, position, 0, 0], dtype=np.uint64)
    words = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=counter).random_raw(-(-count // 2))
    if sys.byteorder == "big":
        words = (words << np.uint64(32)) | (words >> np.uint64(32))
    return words.view(np.uint32)[:count]


def _to_gumbel(words: npt.NDArray[np.uint32]) -> Float32Array:
    """-log(-log(1 - u)) with u = (word + 1/2) / 2**32; 1 - u is exact in float64."""
    uniform = words.astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-32
    np.minimum(uniform, _MAX_UNIFORM, out=uniform)
    np.subtract(1.0, uniform, out=uniform)
    np.log(uniform, out=uniform)
    np.negative(uniform, out=uniform)
    np.log(uniform, out=uniform)
    return np.negative(uniform, out=uniform).astype(np.float32)


def _check_range(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _LIMIT:
        raise OptionError(f"{name}={value!r} is not possible: give an integer from 0 to 2**64 - 1")
