"""Speculation changes how fast a text arrives, never the text: `python examples/same_text.py`."""

from __future__ import annotations

import sys

import mtp_spec

lm = mtp_spec.load(sys.argv[1] if len(sys.argv) > 1 else None)
chat = [{"role": "user", "content": "Tell me a story about a fox"}]
plain = lm.chat(chat, temperature=0.8, seed=3, max_new_tokens=60, speculation=None)
print(plain.text)
for speculation in (1, 4, mtp_spec.Speculation(branching=(3, 2, 1)), "auto"):
    drafted = lm.chat(chat, temperature=0.8, seed=3, max_new_tokens=60, speculation=speculation)
    assert drafted.token_ids == plain.token_ids
    print(f"same text in {drafted.stats.steps} steps instead of {plain.stats.steps}: {speculation}")
