"""Multi-head latent attention over a latent cache: `attention` has the launches, `plan` their parameters; `prompt` has
those of the rows of long prompts.

Names used by other folders are exported here.
"""

from __future__ import annotations

from mtp_spec.kernels.mla.attention import absorb, attend, prepare, room_bytes, up
from mtp_spec.kernels.mla.cache import KEYS, Cache, Layout, cache_bytes, new_caches, whole_blocks
from mtp_spec.kernels.mla.plan import TILE, Head, Plan, chain, split_of
from mtp_spec.kernels.mla.prompt import (
    EXPANDED_ROWS,
    EXPANDED_TOKENS,
    Span,
    Spans,
    attend_prompt,
    attend_prompt_reference,
    long_rows,
    prompt_bytes,
)
from mtp_spec.kernels.mla.reference import absorb_reference, attend_reference, prepare_reference, up_reference

__all__ = ["EXPANDED_ROWS", "EXPANDED_TOKENS", "KEYS", "TILE", "Cache", "Head", "Layout", "Plan", "Span", "Spans",
           "absorb",
           "absorb_reference", "attend", "attend_prompt", "attend_prompt_reference", "attend_reference", "cache_bytes",
           "chain", "long_rows", "new_caches", "prepare", "prepare_reference", "prompt_bytes",
           "room_bytes", "split_of", "up", "up_reference", "whole_blocks"]  # fmt: skip
