"""Which drafted tokens are accepted: one file a rule, one interface (`rules.base`).

"coupled", the default, keeps the text what plain decoding would have written. "rejection", "hybrid", "block" and
"traversal" keep its distribution and accept a little more often; the text then depends on the seed and on the tree.
"typical" and "relaxed" change the distribution and run only when they are named.
"""

from __future__ import annotations

from mtp_spec.rules.base import Choices, Rule, Verdict
from mtp_spec.rules.block import Block
from mtp_spec.rules.hybrid import Hybrid
from mtp_spec.rules.lossy import Relaxed, Typical
from mtp_spec.rules.rejection import Rejection
from mtp_spec.rules.traversal import Traversal

# the coupled rule draws no random numbers of its own and walks while it draws: see `mtp_spec.accept`
RULES: dict[str, Rule] = {
    "rejection": Rejection(),
    "hybrid": Hybrid(),
    "block": Block(),
    "traversal": Traversal(),
    "typical": Typical(),
    "relaxed": Relaxed(),
}

__all__ = ["RULES", "Block", "Choices", "Hybrid", "Rejection", "Relaxed", "Rule", "Traversal", "Typical", "Verdict"]
