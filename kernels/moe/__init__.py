"""Mixture of experts: `layer` has the launches, `operands` their inputs and outputs.

Names used by other folders are exported here.
"""

from __future__ import annotations

from mtp_spec.kernels.moe.grouping import group
from mtp_spec.kernels.moe.layer import Launch, default_launch, down, experts, gate_up, moe
from mtp_spec.kernels.moe.many import most_bytes
from mtp_spec.kernels.moe.operands import Experts, Groups, Routing
from mtp_spec.kernels.moe.reference import experts_reference, gate_reference, group_reference, moe_reference
from mtp_spec.kernels.moe.router import STRETCH, gate, route

__all__ = ["STRETCH", "Experts", "Groups", "Launch", "Routing", "default_launch", "down", "experts",
           "experts_reference", "gate", "gate_reference", "gate_up", "group", "group_reference", "moe", "moe_reference",
           "most_bytes", "route"]  # fmt: skip
