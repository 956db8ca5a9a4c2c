"""A warning where drafts keep failing."""

from __future__ import annotations

import warnings

from mtp_spec.sampling.params import SamplingParams
from mtp_spec.stats import GenerationStats

# a module trained with its model agrees far more often than this; DeepSeek reports 0.85 to 0.90 (2412.19437)
SUSPICIOUS = 0.3
# verify steps after which few tokens a step are no accident, and how few those are
STEPS, FEW = 200, 1.05
# above this, the model itself is so unsure that its MTP modules cannot be blamed
HOT = 1.2


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
