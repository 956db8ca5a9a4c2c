"""A text that is JSON of a given schema: `pip install 'mtp-spec[grammar]' && python examples/json_mode.py`.

Tokens that would leave the grammar are removed from every row, of drafts too. The grammar holds the form, not the
truth: what the small bundled model puts into the fields is its own.
"""

from __future__ import annotations

import json
from typing import Any

import mtp_spec

schema: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 60},
        "animal": {"enum": ["fox", "owl", "bear"]},
        "pages": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["title", "animal", "pages"],
    "additionalProperties": False,
}
lm = mtp_spec.load()
chat = [{"role": "user", "content": "Write a book title about an animal"}]
title = {"type": "regex", "regex": r"(The|A) [A-Z][a-z]{2,12} [a-z]{3,9}"}
for response_format in ({"type": "json_schema", "schema": schema}, title):
    drafted = lm.chat(chat, response_format=response_format, seed=1)
    plain = lm.chat(chat, response_format=response_format, seed=1, speculation=None)
    assert drafted.token_ids == plain.token_ids
    print(drafted.text, f"[{drafted.stats.tokens_per_step:.2f} tokens per step]")
    if response_format is not title:
        assert set(json.loads(drafted.text)) == set(schema["required"])
