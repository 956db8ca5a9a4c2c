"""Counter-based Gumbel noise: a pure function of (seed, position, token).

The same triple gives the same number whichever row, tree, batch or drafter asks for it, so a token drawn as
``argmax(logits + noise)`` does not depend on how the text was speculated (DESIGN contract 1).

Generator: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). The key is the
64-bit seed, the counter is (token // 4, position low word, position high word, 0) and the token takes word
``token % 4``. Logarithms are taken in float64 and rounded once, so that machines agree on the float32 result.

Legend: V vocabulary, P positions of a block, Q = ceil(V / 4) counters of a position.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt
import torch

from mtp_spec.errors import OptionError

UInt64Array = npt.NDArray[np.uint64]
Float32Array = npt.NDArray[np.float32]

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD_MASK = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)
_LIMIT = 1 << 64

# the largest uniform is the largest float32 below 1, which keeps every value finite in single precision too
_MAX_UNIFORM = 1.0 - 2.0**-24

_BLOCK_POSITIONS = 8
_CACHED_BLOCKS = 4
# counters worked on at a time: six uint64 buffers of this length stay in the second-level cache
_CHUNK = 8192


def philox4x32(counter: UInt64Array, key: tuple[int, int]) -> UInt64Array:
    """The four output words of Philox4x32-10 for each counter.

    Args:
        counter: [4, N] uint64 holding 32-bit words; left untouched.
        key: two 32-bit words.
    """
    c0, c1, c2, c3 = (np.array(word, dtype=np.uint64) for word in counter)
    high, low = np.empty_like(c0), np.empty_like(c0)
    for round_number in range(_ROUNDS):
        k0, k1 = (np.uint64((word + round_number * weyl) & 0xFFFFFFFF) for word, weyl in zip(key, _WEYL, strict=True))
        np.multiply(c0, _MULTIPLIERS[0], out=low)
        np.multiply(c2, _MULTIPLIERS[1], out=high)
        np.right_shift(high, _WORD_BITS, out=c0)
        np.bitwise_xor(c0, c1, out=c0)
        np.bitwise_xor(c0, k0, out=c0)
        np.right_shift(low, _WORD_BITS, out=c2)
        np.bitwise_xor(c2, c3, out=c2)
        np.bitwise_xor(c2, k1, out=c2)
        np.bitwise_and(high, _WORD_MASK, out=c1)
        np.bitwise_and(low, _WORD_MASK, out=c3)
    return np.stack((c0, c1, c2, c3))


def gumbel(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    """[V] float32 standard Gumbel noise of one absolute position.

    Raises:
        OptionError: seed or position outside 0 .. 2**64 - 1, or vocab_size below 1.
    """
    _check_range("seed", seed)
    _check_range("position", position)
    if vocab_size < 1:
        raise OptionError(f"vocab_size={vocab_size!r}: give the number of rows of the output head (1 or more)")
    return torch.from_numpy(_gumbel_rows(seed, range(position, position + 1), vocab_size)[0])


class GumbelNoise:
    """Noise rows of one request, computed in blocks of positions; the most recent 32 rows are kept."""

    __slots__ = ("_blocks", "seed", "vocab_size")

    def __init__(self, seed: int, vocab_size: int) -> None:
        _check_range("seed", seed)
        if vocab_size < 1:
            raise OptionError(
                f"vocab_size={vocab_size!r} is not possible: give the number of rows of the output head (1 or more)"
            )
        self.seed = seed
        self.vocab_size = vocab_size
        self._blocks: OrderedDict[int, Float32Array] = OrderedDict()

    def row(self, position: int) -> torch.Tensor:
        """[V] float32, equal to ``gumbel(seed, position, vocab_size)``; shared storage, not to be written to."""
        return torch.from_numpy(self.row_array(position))

    def row_array(self, position: int) -> Float32Array:
        """The same row as a NumPy array."""
        block_number, offset = divmod(position, _BLOCK_POSITIONS)
        block = self._blocks.get(block_number)
        if block is None:
            block = self._compute(position, block_number)
        return block[offset]

    def _compute(self, position: int, block_number: int) -> Float32Array:
        _check_range("position", position)
        start = block_number * _BLOCK_POSITIONS
        block = _gumbel_rows(self.seed, range(start, start + _BLOCK_POSITIONS), self.vocab_size)
        self._blocks[block_number] = block
        if len(self._blocks) > _CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return block


def _gumbel_rows(seed: int, positions: range, vocab_size: int) -> Float32Array:
    """[P, V] float32 noise of consecutive positions."""
    counters = -(-vocab_size // 4)
    words = np.empty((len(positions) * counters, 4), dtype=np.float32)
    key = (seed & 0xFFFFFFFF, seed >> 32)
    token_word = np.tile(np.arange(counters, dtype=np.uint64), len(positions))
    position_word = np.repeat(np.array(positions, dtype=np.uint64), counters)
    for start in range(0, len(words), _CHUNK):
        part = slice(start, start + _CHUNK)
        position = position_word[part]
        counter = np.zeros((4, len(position)), dtype=np.uint64)
        counter[0] = token_word[part]
        counter[1] = position & _WORD_MASK
        counter[2] = position >> _WORD_BITS
        words[part] = _to_gumbel(philox4x32(counter, key)).T
    return words.reshape(len(positions), counters * 4)[:, :vocab_size]


def _to_gumbel(words: UInt64Array) -> npt.NDArray[np.float64]:
    """-log(-log(1 - u)) with u = (word + 1/2) / 2**32; 1 - u is exact in float64."""
    uniform = words.astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-32
    np.minimum(uniform, _MAX_UNIFORM, out=uniform)
    np.subtract(1.0, uniform, out=uniform)
    np.log(uniform, out=uniform)
    np.negative(uniform, out=uniform)
    np.log(uniform, out=uniform)
    return np.negative(uniform, out=uniform)


def _check_range(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _LIMIT:
        raise OptionError(f"{name}={value!r} is not possible: give an integer from 0 to 2**64 - 1")
