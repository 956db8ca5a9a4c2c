"""Which drafted tokens are accepted: one file a rule, one interface (`rules.base`).

"coupled", the default, keeps the text what plain decoding would have written. "rejection", "hybrid", "block" and
"traversal" keep its distribution and accept a little more often; the text then depends on the seed and on the tree.
"typical" and "relaxed" change the distribution and run only when they are named.
"""

from __future__ import annotations

from mtp_spec.acceptance.base import Choices, Rule, Verdict
from mtp_spec.acceptance.block import Block
from mtp_spec.acceptance.hybrid import Hybrid
from mtp_spec.acceptance.lossy import Relaxed, Typical
from mtp_spec.acceptance.rejection import Rejection
from mtp_spec.acceptance.traversal import Traversal

# the coupled rule draws no random numbers of its own and walks while it draws: see `mtp_spec.acceptance.accept`
RULES: dict[str, Rule] = {
    "rejection": Rejection(),
    "hybrid": Hybrid(),
    "block": Block(),
    "traversal": Traversal(),
    "typical": Typical(),
    "relaxed": Relaxed(),
}

__all__ = ["RULES", "Block", "Choices", "Hybrid", "Rejection", "Relaxed", "Rule", "Traversal", "Typical", "Verdict"]
