"""What a text leaves for the next one that begins with the same tokens, as the next turn of a chat does.

Reusing caches must not change a bit of what follows. Where rows do not depend on their neighbours, any common prefix
can be reused. Elsewhere only what a fresh prefill would compute in the very same passes: whole chunks of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mtp_spec.model.cache import LatentCache


@dataclass(frozen=True, slots=True)
class Prefix:
    """Caches of a text.

    Attributes:
        tokens: all ids of the text, prompt included.
        prompt: how many of them were the prompt.
        cache: the main model's; its length may be less than the tokens.
        mtp_caches: of the modules, in step with it.
        drafted: slots of these that belong to this text; fewer than their length where it did not draft.
        threads: torch's number of threads that computed them.
    """

    tokens: list[int]
    prompt: int
    cache: LatentCache
    mtp_caches: list[LatentCache]
    drafted: int
    threads: int

    def shared(self, prompt: Sequence[int], drafting: bool, chunk: int) -> int:
        """Returns how many of a prompt's tokens need not be read again.

        Args:
            drafting: whether the modules' caches are needed too.
            chunk: 1 where rows do not depend on their neighbours, else the tokens of a prefill's pass.
        """
        modules = len(self.mtp_caches) if drafting else 0
        left = Left(self.tokens, self.cache.length, self.drafted, len(self.mtp_caches))
        held = left.shared(prompt, drafting)
        if chunk > 1:
            held = min(held, self.prompt - modules)
        return max(0, held) // chunk * chunk


@dataclass(frozen=True, slots=True)
class Left:
    """What a text has left in caches, wherever they are.

    Attributes:
        tokens: all ids of the text, prompt included.
        held: slots of it in the main model's cache.  drafted: slots of it in the caches of all `modules`.
    """

    tokens: list[int]
    held: int
    drafted: int
    modules: int

    def shared(self, prompt: Sequence[int], drafting: bool) -> int:
        """Returns how many of a prompt's tokens need not be read again, in modules' caches either if it drafts."""
        # the last token's row is needed for the first draw; row i of module m also read token i + m + 1
        found = min(common(self.tokens, prompt) - (self.modules if drafting else 0), len(prompt) - 1, self.held)
        return max(0, min(found, self.drafted) if drafting else found)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the length of the longest common beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
