"""Warns if drafts keep failing."""

from __future__ import annotations

import warnings

from mtp_spec.sampling.params import SamplingParams
from mtp_spec.stats import GenerationStats
from mtp_spec.tree import MODULES

# a module trained with its model agrees far more often than this; DeepSeek reports 0.85 to 0.90 (2412.19437)
SUSPICIOUS = 0.3
# least steps before acceptance is judged, and least steps with drafts among them: "auto" does not draft where drafting
# costs more than it gains, which is not a fault
STEPS, EVIDENCE = 200, 12
# too few tokens per step with drafts: none of a dozen drafts was accepted, or at most nine of two hundred
FEW = 1.05
# above this temperature low acceptance is expected, and no sign of bad MTP modules
HOT = 1.2


class Watch:
    """Warns once for a model if its drafts are hardly ever accepted.

    Args:
        pays: whether drafting can pay on this machine.
    """

    def __init__(self, pays: bool) -> None:
        self._pays, self._seen, self._warned = pays, GenerationStats(), False

    def ended(self, stats: GenerationStats, params: SamplingParams) -> None:
        """Takes the statistics of a finished sequence with speculation."""
        self._seen = self._seen.merge(stats)
        steps = self._seen.steps_by_source[MODULES] - self._seen.overtaken
        if self._seen.steps < STEPS or steps < EVIDENCE:
            return
        accepted = sum(self._seen.accepted_at(MODULES).values())
        if 1 + accepted / steps < FEW and not self._warned:
            self._warned = True
            warnings.warn(f"{accepted} drafted tokens accepted in {steps} steps: {self._cause(params)}", stacklevel=4)
        self._seen = GenerationStats()

    def _cause(self, params: SamplingParams) -> str:
        if not self._pays:
            return "rows run one by one on this machine, so drafts do not pay; see lm.technique"
        if params.temperature > HOT:
            return f"at temperature {params.temperature:g} the model draws what no draft can guess; nothing is wrong"
        return (
            "drafts are hardly ever right; either the prompts are noise to this model, or its MTP modules do not "
            "belong to it or were damaged: `mtp-spec inspect --agreement` tells"
        )
