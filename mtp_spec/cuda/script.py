"""Drafts that the host sends to a captured step: proposals of drafters other than the MTP modules.

The host knows a sequence up to the step before the one in flight, so it does not know where the next step begins. But
it knows what it expects: if the step in flight commits m tokens of the expected continuation, the next drafts are those
after the m-th. So it sends the continuation by position, and the captured step takes the tokens that follow the
position at which it finds itself. If the sequence has left the continuation meanwhile, the drafts are wrong, which
costs their rows and nothing else, unless as many tokens took the place of others: then they are right again. The host
never waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtp_spec.cuda.constants import Constants
from mtp_spec.cuda.state import MOST, Mail
from mtp_spec.drafting import Continuation
from mtp_spec.speculation import LONGEST_CHAIN, TEXT

# tokens of a continuation that are of use: a step in flight and the next one may commit MOST each
LONGEST = 2 * MOST + LONGEST_CHAIN
RING = 128
NOTHING = -1


class Script:
    """Sends the proposals for a group.

    Args:
        most: sequences of the group.
    """

    def __init__(self, most: int, device: torch.device) -> None:
        self._mail = Mail(most * RING, device)

    def send(self, script: Tensor, expected: Sequence[tuple[int, Continuation | None]]) -> list[str]:
        """Sends the drafts of a step that is about to be launched; returns for each sequence whose they are.

        Args:
            script: `[B, RING]` int64, of the state.
            expected: for each sequence the number of tokens that the host knows, and what is expected after them.
        """
        rings = [ring_of(known, () if given is None else given.tokens) for known, given in expected]
        self._mail.send(script[: len(rings)], np.stack(rings))
        return [TEXT if given is None else given.source for _, given in expected]


def ring_of(known: int, tokens: Sequence[int]) -> npt.NDArray[np.int64]:
    """Returns the expected tokens `[RING]`, each at its position modulo `RING`; -1 where there are none.

    Args:
        known: number of tokens that the host knows.
        tokens: the expected continuation.
    """
    ring = np.full(RING, NOTHING, dtype=np.int64)
    some = tokens[:LONGEST]
    ring[(known + np.arange(len(some))) % RING] = some
    return ring


def promised(given: Continuation | None, flying: float, depths: Sequence[int], follows: int = 0) -> list[float]:
    """Returns for each of `depths` the expected tokens of a step of so many drafts from a continuation.

    If the step in flight leaves the continuation, they are right only if it resumes: drafts are sent by position.

    Args:
        flying: tokens that the step in flight is expected to commit.
        depths: numbers of drafts.
        follows: how many drafts of the step in flight are the continuation's, which then says what it will commit.
    """
    if given is None:
        return [1.0] * len(depths)
    count, needed = len(given.tokens), follows + 1 if follows else round(flying)
    reached = list(accumulate(map(given.chance, range(min(count, needed))), mul, initial=1.0))
    stays = reached[needed] if needed <= count else 0.0
    first = round(sum(reached[:needed])) if follows else needed
    chance, sums = stays + (1.0 - stays) * given.resumes, [1.0]  # with the first 0, 1, 2, ... drafts
    for place in range(first, min(count, first + max(depths))):
        chance *= given.chance(place)
        sums.append(sums[-1] + chance)
    return [sums[min(depth, len(sums) - 1)] for depth in depths]


def expected(script: Tensor, length: Tensor, constants: Constants, depth: int) -> Tensor:
    """Returns the drafts `[B, depth]` int64 after the roots at positions `length` `[B]`; -1 where there are none.

    Args:
        script: `[B, RING]`, by position modulo RING.
    """
    places = length[:, None].long() + constants.places(range(1, depth + 1))
    return script.gather(1, places % RING)


def scripted(script: Tensor, length: Tensor, constants: Constants, depth: int) -> Tensor:
    """Returns the drafts `[B, depth]` int64 that replace the modules' after the roots at positions `length` `[B]`; -1
    where there are none.

    Args:
        script: `[B, S, MAX_DEPTH]`, by position.
    """
    sequence = constants.places(range(len(length)))
    return script[sequence, length.long() % script.shape[1]][:, :depth]


def replaced(found: Tensor, given: Tensor) -> Tensor:
    """Returns the drafts that are given, and those found where there are none."""
    return torch.where(given >= 0, given, found)
