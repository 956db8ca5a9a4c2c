"""Whether the MTP modules guess what the model writes: a check on demand, and a warning where drafts keep failing."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from mtp_spec.sampling.params import SamplingParams
from mtp_spec.speculation import Speculation
from mtp_spec.stats import GenerationStats

if TYPE_CHECKING:
    from mtp_spec.api import LM

PROMPTS = ("Once upon a time, there was", "The most important thing about rivers is", "First, take a large bowl and")
DEPTH, TOKENS = 4, 48
# a module trained with its model agrees far more often than this; DeepSeek reports 0.85 to 0.90 (2412.19437)
SUSPICIOUS = 0.3
# verify steps after which few tokens a step are no accident, and how few those are
STEPS, FEW = 200, 1.05
# above this, the model itself is so unsure that its MTP modules cannot be blamed
HOT = 1.2


def agreement(lm: LM) -> list[float]:
    """Returns how often a draft of depth d is what the model writes greedily, if those before it were; entry d - 1.

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


class Watch:
    """Warns once for a model if its texts commit hardly more than a token a step although drafts were asked for.

    Args:
        pays: whether drafts would be fast here at all.
    """

    def __init__(self, pays: bool) -> None:
        self._pays, self._seen, self._warned = pays, GenerationStats(), False

    def ended(self, stats: GenerationStats, params: SamplingParams) -> None:
        """Takes the statistics of a text that was to be drafted for."""
        self._seen = self._seen.merge(stats)
        if self._seen.steps < STEPS:
            return
        rate = self._seen.tokens_per_step
        if rate < FEW and not self._warned:
            self._warned = True
            warnings.warn(f"{rate:.2f} tokens a step in {self._seen.steps} steps: {self._cause(params)}", stacklevel=4)
        self._seen = GenerationStats()

    def _cause(self, params: SamplingParams) -> str:
        first = self._seen.accepted_per_depth["unconditional"][:1]
        if not self._pays:
            return "rows run one by one on this machine, so drafts do not pay; see lm.technique"
        if first and first[0] > SUSPICIOUS:
            return f"{first[0]:.0%} of first drafts were accepted, but drafting costs more here than it brings"
        if params.temperature > HOT:
            return f"at temperature {params.temperature:g} the model draws what no draft can guess; nothing is wrong"
        return (
            "drafts are hardly ever accepted; either the prompts are noise to this model, or its MTP modules do not "
            "belong to it or were damaged: `mtp-spec inspect --agreement` tells"
        )
