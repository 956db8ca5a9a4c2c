"""How often the MTP modules predict the model's own tokens: `mtp-spec inspect --agreement`."""

from __future__ import annotations

from mtp_spec.api import LM
from mtp_spec.speculation import Speculation
from mtp_spec.stats import GenerationStats

PROMPTS = ("Once upon a time, there was", "The most important thing about rivers is", "First, take a large bowl and")
DEPTH, TOKENS = 4, 48


def agreement(lm: LM) -> list[float]:
    """Returns how often a draft of depth d is the model's greedy token, if the drafts before it were; entry d - 1.

    Raises:
        OptionError: the model has no MTP module.
    """
    total, vocabulary = GenerationStats(), lm.config.vocab_size
    for number, text in enumerate(PROMPTS):
        ids = [(31 * i + number) % vocabulary for i in range(8)] if lm.tokenizer is None else lm.encode(text)
        room = lm.max_context - len(ids)
        out = lm.generate(ids, max_new_tokens=min(TOKENS, room), temperature=0.0, speculation=Speculation(depth=DEPTH))
        total = total.merge(out.stats)
    return total.accepted_per_depth["conditional"]
