"""Multi-head latent attention over a latent cache: `attention` has the launches, `plan` their parameters.

Names used by other folders are exported here.
"""

from __future__ import annotations

from mtp_spec.kernels.mla.attention import absorb, attend, prepare, room_bytes, up
from mtp_spec.kernels.mla.cache import KEYS, Cache, Layout, cache_bytes, new_caches, whole_blocks
from mtp_spec.kernels.mla.plan import TILE, Head, Plan, chain, split_of
from mtp_spec.kernels.mla.reference import absorb_reference, attend_reference, prepare_reference, up_reference

__all__ = ["KEYS", "TILE", "Cache", "Head", "Layout", "Plan", "absorb", "absorb_reference", "attend",
           "attend_reference", "cache_bytes", "chain", "new_caches", "prepare", "prepare_reference", "room_bytes",
           "split_of", "up", "up_reference", "whole_blocks"]  # fmt: skip
