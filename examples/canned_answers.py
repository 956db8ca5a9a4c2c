"""A drafter of one's own proposes answers from a list: `python examples/canned_answers.py`.

A help desk often writes the same. Where the model is about to write one of these answers, all of it is checked in a few
passes; where it is not, nothing is lost but a row or two. The text is that of the model either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import mtp_spec
from mtp_spec.drafting import Continuation


class Canned:
    """Proposes the rest of the answers that agree with the text so far; serves any number of texts."""

    name = "canned"

    def __init__(self, answers: Sequence[Sequence[int]], written: Sequence[int] = ()) -> None:
        self.answers, self.written = answers, list(written)

    def begin(self, prompt: Sequence[int]) -> Canned:
        return Canned(self.answers)

    def commit(self, tokens: Sequence[int]) -> None:
        self.written += tokens

    def propose(self, path: Sequence[int], most: int) -> list[Continuation]:
        text = [*self.written, *path]
        chance = 0.9 if len(text) > 3 else 0.5  # the first tokens agree with many answers
        return [
            Continuation(answer[len(text) : len(text) + most], [chance, 0.95], self.name)
            for answer in self.answers
            if len(answer) > len(text) and list(answer[: len(text)]) == text
        ]


lm = mtp_spec.load()
question = [{"role": "user", "content": "Explain how rain forms"}]
plain = lm.chat(question, temperature=0, max_new_tokens=64, speculation=None)
# in use these come from a file; the first is what this model says, so the example can show both
answers = [plain.token_ids, lm.encode("Please restart the machine and try again.")]
for drafters in (("mtp",), (Canned(answers),), ("mtp", "text", Canned(answers))):
    speculation = mtp_spec.Speculation(depth=8, drafters=drafters)
    out = lm.chat(question, temperature=0, max_new_tokens=64, speculation=speculation)
    assert out.token_ids == plain.token_ids
    print(f"{out.stats.tokens_per_step:.2f} tokens per step, accepted: {out.stats.accepted_by_source}")
