"""`/stats`: a table of drafting statistics."""

from __future__ import annotations

from rich.table import Table

from mtp_spec.chat.status import speed
from mtp_spec.stats import GenerationStats
from mtp_spec.tree import MODULES


def statistics(last: GenerationStats | None, totals: GenerationStats) -> Table:
    """Returns a table of the statistics of the last answer, if there is one, and of the whole chat."""
    caption = (
        "Depth: drafts accepted there, of all (of those whose parent was). N a step: steps with N accepted. s: seconds."
    )
    table = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("")
    columns = ([("last answer", last)] if last is not None else []) + [("whole chat", totals)]
    for name, _ in columns:
        table.add_column(name, justify="right")
    rows = [_rows(stats) for _, stats in columns]
    for name in rows[-1]:
        table.add_row(name, *(row.get(name, "") for row in rows))
    return table


def _rows(stats: GenerationStats) -> dict[str, str]:
    rows = {
        "prompt tokens": str(stats.prompt_tokens),
        "not read again": str(stats.reused_tokens),
        "new tokens": str(stats.new_tokens),
        "tokens/s": f"{speed(stats):.1f}",
        "steps": str(stats.steps),
        "tokens/step": f"{stats.tokens_per_step:.2f}",
        "drafted": str(stats.drafted),
        "accepted": str(stats.accepted),
    }
    if stats.dropped:
        rows["dropped (NaN)"] = str(stats.dropped)
    rates = stats.accepted_per_depth
    for depth, (given, overall) in enumerate(zip(rates["conditional"], rates["unconditional"], strict=True), start=1):
        rows[f"depth {depth}"] = f"{overall:.0%} ({given:.0%})"
    if len(stats.accepted_by_rank) > 1:
        for rank in sorted(stats.accepted_by_rank):
            rows[f"sibling {rank + 1}"] = str(stats.accepted_by_rank[rank])
    if set(stats.drafted_by_source) - {MODULES}:
        for source, tokens in stats.accepted_by_source.items():
            rows[f"from {source}"] = str(tokens)
    for accepted in sorted(stats.histogram):
        rows[f"{accepted} a step"] = str(stats.histogram[accepted])
    for phase, seconds in stats.seconds.items():
        if seconds:
            rows[f"s {phase}"] = f"{seconds:.2f}"
    return rows
