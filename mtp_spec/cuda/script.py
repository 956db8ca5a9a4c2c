"""Drafts that the host sends to a captured step: proposals of drafters other than the MTP modules.

The host knows a sequence up to the step before the one in flight, so it does not know where the next step begins. But
it knows what it expects: if the step in flight commits m tokens of the expected continuation, the next drafts are those
after the m-th. So it sends the continuation by position, and the captured step takes the tokens that follow the
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


def promised(given: Continuation | None, flying: float, depths: Sequence[int]) -> list[float]:
    """Returns for each of `depths`, in ascending order, the expected tokens of a step of so many drafts from a
    continuation.

    Args:
        flying: tokens that the step in flight is expected to commit; if they leave the continuation, no draft is right.
    """
    found, chance, tokens, first, place = list[float](), 1.0, 1.0, round(flying), 0
    for depth in depths:
        while given is not None and place < min(len(given.tokens), first + depth):
            chance *= given.chance(place)
            if place >= first:
                tokens += chance
            place += 1
        found.append(tokens)
    return found


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
