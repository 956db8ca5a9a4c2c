"""The proposals of all drafters beside the MTP modules for one sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from operator import index

from mtp_spec.drafting.base import Continuation, Drafter, Drafts
from mtp_spec.errors import MTPSpecError
from mtp_spec.option_checks import shown

MOST = 1024  # continuations that a drafter proposes at once


class Proposals:
    """Asks several drafters. Each gets lists of its own, so that it may keep and change them.

    Args:
        vocabulary: number of tokens there are.

    Raises:
        MTPSpecError: `begin` of a drafter returned what cannot be asked.
    """

    def __init__(self, drafters: Sequence[Drafter], prompt: Sequence[int], vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._drafts: list[tuple[str, Drafts]] = [(one.name, one.begin(list(prompt))) for one in drafters]
        for name, drafts in self._drafts:
            if not all(callable(getattr(drafts, method, None)) for method in ("commit", "propose")):
                raise MTPSpecError(
                    f"drafter {name!r} began with {shown(drafts)}: return an object with commit(tokens) and "
                    "propose(path, most), such as the drafter itself"
                )

    def commit(self, tokens: Sequence[int]) -> None:
        """Takes the tokens of a step."""
        for _, drafts in self._drafts:
            drafts.commit(list(tokens))

    def propose(self, path: Sequence[int], most: int) -> list[Continuation]:
        """Returns continuations of the committed tokens and a path, at most `most` tokens each, likeliest first; they
        differ in their first tokens.

        Raises:
            MTPSpecError: a drafter proposed what is no continuation, or has no token or no chance, or more than `MOST`.
        """
        best = dict[int, Continuation]()
        for name, drafts in self._drafts if most > 0 else ():
            found = drafts.propose(list(path), most)
            if not isinstance(found, Iterable):
                raise _not_continuations(name, found)
            for number, given in enumerate(islice(found, MOST + 1)):
                if number == MOST:
                    raise MTPSpecError(f"drafter {name!r} proposed more than {MOST} continuations at once")
                one = self._checked(name, given, most)
                if not one.tokens:
                    continue
                before = best.get(one.tokens[0])
                if before is None or one.chances[0] > before.chances[0]:
                    best[one.tokens[0]] = one
        return sorted(best.values(), key=_likelihood) if len(best) > 1 else list(best.values())

    def _checked(self, name: str, given: Continuation, most: int) -> Continuation:
        """Returns a continuation with lists of numbers, whatever sequences the drafter gave."""
        try:
            tokens, chances = list(map(index, given.tokens[:most])), list(map(float, given.chances[:most]))
            resumes = float(given.resumes)
        except Exception as error:  # arrays have exceptions of their own for what they cannot do
            raise _not_continuations(name, given) from error
        if not tokens:
            return Continuation((), (), name)
        if min(tokens) < 0 or max(tokens) >= self._vocabulary:
            raise MTPSpecError(
                f"drafter {name!r} proposed {shown(tokens)}: ids are integers from 0 to {self._vocabulary - 1}"
            )
        if not chances or not all(0.0 <= chance <= 1.0 for chance in (*chances, resumes)):  # NaN is not
            raise MTPSpecError(
                f"drafter {name!r} proposed the chances {shown(chances)}, resumes={resumes}: at least one chance, each "
                "from 0 to 1"
            )
        return Continuation(tokens, chances, name, resumes)


def _not_continuations(name: str, given: object) -> MTPSpecError:
    return MTPSpecError(
        f"drafter {name!r} proposed {shown(given)}: propose returns a list of mtp_spec.drafting.Continuation, whose "
        "tokens are integers and whose chances are numbers; an empty one if there is nothing to propose"
    )


def _likelihood(one: Continuation) -> float:
    return -one.chances[0]
