"""Drafts that the host sends to a captured step: proposals of drafters other than the MTP modules.

The host knows a sequence up to the step before the one in flight, so it does not know where the next step begins. But
it knows what it expects: if the step in flight commits m tokens of the expected continuation, the next drafts are those
after the m-th. So it sends the continuation by position, and the captured step takes the drafts that belong to the
position at which it finds itself. If the sequence has left the continuation meanwhile, the drafts are wrong, which
costs their rows and nothing else. The host never waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtp_spec.cuda.constants import Constants
from mtp_spec.cuda.state import MOST, Mail
from mtp_spec.drafting import Continuation
from mtp_spec.speculation import MAX_DEPTH, TEXT

# roots for which drafts are sent: as many as a step in flight and the next one may commit; and the ring's size
ROOTS, RING = 2 * MOST, 32
# tokens of a continuation that are of use
LONGEST = ROOTS + MAX_DEPTH
NOTHING = -1


class Script:
    """Sends the proposals for a group.

    Args:
        most: sequences of the group.
    """

    def __init__(self, most: int, device: torch.device) -> None:
        self._mail = Mail(most * RING * MAX_DEPTH, device)

    def send(self, script: Tensor, expected: Sequence[tuple[int, Continuation | None]]) -> list[str]:
        """Sends the drafts of a step that is about to be launched; returns for each sequence whose they are.

        Args:
            script: `[B, RING, MAX_DEPTH]` int64, of the state.
            expected: for each sequence the number of tokens that the host knows, and what is expected after them.
        """
        rings = [ring_of(known, () if given is None else given.tokens) for known, given in expected]
        self._mail.send(script.flatten(0, 1)[: len(rings) * RING], np.concatenate(rings))
        return [TEXT if given is None else given.source for _, given in expected]


def ring_of(known: int, tokens: Sequence[int]) -> npt.NDArray[np.int64]:
    """Returns the drafts `[RING, MAX_DEPTH]` after every root, at its position modulo `RING`; -1 where there are none.

    Args:
        known: number of tokens that the host knows.
        tokens: the expected continuation.
    """
    ring = np.full((RING, MAX_DEPTH), NOTHING, dtype=np.int64)
    for ahead in range(min(ROOTS, len(tokens))):
        drafts = tokens[ahead : ahead + MAX_DEPTH]
        ring[(known - 1 + ahead) % RING, : len(drafts)] = drafts
    return ring


def promised(given: Continuation | None, flying: float, depth: int) -> float:
    """Returns the expected tokens of a step of `depth` drafts from a continuation.

    Args:
        flying: tokens that the step in flight is expected to commit; if they leave the continuation, no draft is right.
    """
    if given is None:
        return 1.0
    chance, tokens, first = 1.0, 1.0, round(flying)
    for place in range(min(len(given.tokens), first + depth)):
        chance *= given.chance(place)
        if place >= first:
            tokens += chance
    return tokens


def scripted(script: Tensor, length: Tensor, constants: Constants, depth: int) -> Tensor:
    """Returns the drafts `[B, depth]` int64 after the roots at positions `length` `[B]`; -1 where there are none.

    Args:
        script: `[B, S, MAX_DEPTH]`, by position modulo S.
    """
    sequence = constants.places(range(len(length)))
    return script[sequence, length.long() % script.shape[1]][:, :depth]


def replaced(found: Tensor, given: Tensor) -> Tensor:
    """Returns the drafts that are given, and those found where there are none."""
    return torch.where(given >= 0, given, found)
