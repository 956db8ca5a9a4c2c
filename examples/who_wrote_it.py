"""Streams an answer and shows who proposed each token: `python examples/who_wrote_it.py`.

Red tokens are the target's own, green ones were drafted by the MTP module, the brighter the deeper; blue ones were
found earlier in the text.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

import mtp_spec

console = Console()
stream = mtp_spec.load().stream(
    [{"role": "user", "content": "Explain how rain forms"}], temperature=0, max_new_tokens=80
)
for event in stream:
    if isinstance(event.source, int):
        shade = f"rgb(0,{min(255, 110 + 30 * event.source)},0)"
    else:
        shade = "red" if event.source == "target" else "blue"
    console.print(Text(event.text, style=shade), end="")
stats = stream.result.stats
console.print(f"\n{stats.tokens_per_step:.2f} tokens per step instead of 1")
