"""The proposals of all drafters beside the MTP modules for one sequence."""

from __future__ import annotations

from collections.abc import Sequence

from mtp_spec.drafting.base import Continuation, Drafter, Drafts
from mtp_spec.errors import MTPSpecError


class Proposals:
    """Asks several drafters.

    Args:
        vocabulary: number of tokens there are.
    """

    def __init__(self, drafters: Sequence[Drafter], prompt: Sequence[int], vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._drafts: list[tuple[str, Drafts]] = [(one.name, one.begin(prompt)) for one in drafters]

    def commit(self, tokens: Sequence[int]) -> None:
        """Takes the tokens of a step."""
        for _, drafts in self._drafts:
            drafts.commit(tokens)

    def propose(self, path: Sequence[int], most: int) -> list[Continuation]:
        """Returns continuations of the committed tokens and a path, at most `most` tokens each, likeliest first; they
        differ in their first tokens.

        Raises:
            MTPSpecError: a drafter proposed what is no token or has no chance.
        """
        best = dict[int, Continuation]()
        for name, drafts in self._drafts if most > 0 else ():
            for one in drafts.propose(path, most):
                tokens = list(map(int, one.tokens[:most]))
                if not tokens:
                    continue
                self._check(name, tokens, one.chances)
                found = best.get(tokens[0])
                if found is None or one.chances[0] > found.chances[0]:
                    best[tokens[0]] = Continuation(tokens, one.chances, name)
        return sorted(best.values(), key=_likelihood) if len(best) > 1 else list(best.values())

    def _check(self, name: str, tokens: Sequence[int], chances: Sequence[float]) -> None:
        if min(tokens) < 0 or max(tokens) >= self._vocabulary:
            raise MTPSpecError(f"drafter {name!r} proposed {tokens}: ids are integers from 0 to {self._vocabulary - 1}")
        if not len(chances) or not all(0.0 <= chance <= 1.0 for chance in chances):  # NaN is not
            raise MTPSpecError(f"drafter {name!r} proposed the chances {list(chances)}: at least one, each from 0 to 1")


def _likelihood(one: Continuation) -> float:
    return -one.chances[0]
