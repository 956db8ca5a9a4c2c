"""The interface of drafters: what proposes the children of a node, at what cost and with what chance.

A draft never changes the text under the coupled rule, and never its distribution under a lossless one, whoever proposed
it: a drafter can only be useful or useless. Under the distribution-exact rules a proposed token is a draft from a point
distribution. The MTP modules are the drafter "mtp": the backends run them (`cpu.draft`, `cuda.draft`), because their
proposals are passes of the model, whose cost is measured and whose chances are learned by the planner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Continuation:
    """A proposed chain of tokens.

    Attributes:
        tokens: the chain, the next token first.
        chances: for each token the estimated probability that it is accepted if those before it in the chain were; at
            least one, and the last one counts for all tokens after it.
        source: name of the drafter.
        resumes: the estimated probability that the token after one that was wrong is right again, each still at its
            place in the chain.
    """

    tokens: Sequence[int]
    chances: Sequence[float]
    source: str
    resumes: float = 0.0

    def chance(self, place: int) -> float:
        """Returns the chance of a token of the chain."""
        return self.chances[min(place, len(self.chances) - 1)]

    def rest(self) -> Continuation:
        """Returns the continuation after its first token, which must not be its last."""
        return Continuation(self.tokens[1:], self.chances[1:] or self.chances, self.source, self.resumes)


class Drafts(Protocol):
    """The proposals for one sequence. Called between steps, so it must be quick."""

    def commit(self, tokens: Sequence[int]) -> None:
        """Takes the tokens that were committed after the prompt, in order; first the one after the prefill."""
        ...

    def propose(self, path: Sequence[int], most: int) -> Sequence[Continuation]:
        """Returns continuations of the committed tokens and of the path, best first, none if there is nothing to say.

        Args:
            path: drafted tokens that would follow the committed ones; empty at the root.
            most: tokens of a continuation at most; further ones are cut off.
        """
        ...


class Drafter(Protocol):
    """Proposes drafts for sequences. One object serves all sequences that a `Speculation` with it generates. The lists
    of ids that it is called with are its own, to keep or to change.

    If ranks share a model, drafters must propose the same on all of them, and have the same `repr`.

    Attributes:
        name: in statistics, events and traces; its first word is neither "mtp" nor "target".
    """

    @property
    def name(self) -> str: ...

    def begin(self, prompt: Sequence[int]) -> Drafts:
        """Returns the proposals for a new sequence with this prompt."""
        ...
