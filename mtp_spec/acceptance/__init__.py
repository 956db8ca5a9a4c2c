"""Acceptance rules: one file for each, one interface (`acceptance.base`).

"coupled", the default, gives exactly the text of plain decoding. "rejection", "hybrid", "block" and "traversal" keep
the distribution of the text and accept a little more often; the text then depends on the seed and on the tree.
"typical" and "relaxed" change the distribution and are used only on request.
"""

from __future__ import annotations

from mtp_spec.acceptance.base import Choices, Rule, Verdict
from mtp_spec.acceptance.block import Block
from mtp_spec.acceptance.hybrid import Hybrid
from mtp_spec.acceptance.lossy import Relaxed, Typical
from mtp_spec.acceptance.rejection import Rejection
from mtp_spec.acceptance.traversal import Traversal

# the coupled rule is not here: it has no random numbers of its own, see `mtp_spec.acceptance.accept`
RULES: dict[str, Rule] = {
    "rejection": Rejection(),
    "hybrid": Hybrid(),
    "block": Block(),
    "traversal": Traversal(),
    "typical": Typical(),
    "relaxed": Relaxed(),
}

__all__ = ["RULES", "Block", "Choices", "Hybrid", "Rejection", "Relaxed", "Rule", "Traversal", "Typical", "Verdict"]
