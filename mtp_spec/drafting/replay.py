"""Drafts that are accepted by a given law, to measure what speculation costs where nothing is trained to draft.

The MTP modules run as always, but what they propose is replaced: with the given probability by the token that the model
will write, which is known from plain decoding with the same seed, else by another. So a model of random weights takes
the steps of one whose drafts are accepted that often, at their true cost. The law is an assumption, not a measurement:
statistics name these drafts "replay".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mtp_spec.option_checks import integer, invalid, real

DRAWN = 8  # numbers drawn for a place, so that they do not depend on how deep a tree is
IDS = "a list of token ids"
PROBABILITIES = "probabilities from 0 to 1, at least one"


class Replay:
    """The drafter "replay", beside "mtp" in a chain: `Speculation(drafters=("mtp", Replay(...)))`.

    Args:
        tokens: what the model writes after the prompt with this seed, from plain decoding.
        acceptance: probability that the draft of depth 1, 2, ... is right if those before it are; the last one counts
            for all deeper ones.
        seed: of the draws, one for every place of the text and depth.

    Raises:
        OptionError: a value of the wrong kind or outside its range.
    """

    name = "replay"

    def __init__(self, tokens: Sequence[int], acceptance: Sequence[float], seed: int = 0) -> None:
        if isinstance(acceptance, (str, bytes)) or not isinstance(acceptance, Sequence) or not acceptance:
            raise invalid("acceptance", acceptance, PROBABILITIES)
        self.acceptance = tuple(real("acceptance", one, PROBABILITIES, low=0.0, high=1.0) for one in acceptance)
        if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Sequence):
            raise invalid("tokens", tokens, IDS)
        self.tokens = [integer("tokens entry", token, 0, None, IDS) for token in tokens]
        self.seed = integer("seed", seed, 0, 2**63 - 1, "an integer from 0 to 2**63 - 1")

    def __repr__(self) -> str:
        return f"Replay({len(self.tokens)} tokens, {self.acceptance}, seed={self.seed})"

    def table(self, depth: int, vocabulary: int) -> npt.NDArray[np.int64]:
        """Returns the drafts `[T + 1, depth]`: row t after t tokens of the text, -1 past its end.

        Args:
            vocabulary: number of tokens there are.
        """
        count = len(self.tokens)
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, 2], dtype=np.uint64)))
        draws = generator.random((count + 1, max(depth, DRAWN)))[:, :depth]
        right = draws < [self._chance(level) for level in range(depth)]
        text = np.array([*self.tokens, *[-1] * depth], dtype=np.int64)
        ahead = np.stack([text[level : level + count + 1] for level in range(depth)], axis=1)
        return np.where((ahead < 0) | right, ahead, (ahead + 1) % vocabulary)

    def _chance(self, level: int) -> float:
        return self.acceptance[min(level, len(self.acceptance) - 1)]
