"""Loss and acceptance over the steps, as a picture (the extra `mtp-spec[plots]`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

MOST_POINTS = 200


def picture(log: Sequence[dict[str, Any]]) -> bytes | None:
    """Returns a PNG of a training log, or None if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2)
    steps = [line for line in log if not line.get("held_out")]
    checks = [line for line in log if line.get("held_out")]
    size = max(1, len(steps) // MOST_POINTS)
    parts = [steps[first : first + size] for first in range(0, len(steps), size)]
    left.plot([part[-1]["step"] for part in parts], [sum(e["loss"] for e in part) / len(part) for part in parts],
              label="training")  # fmt: skip
    left.plot([line["step"] for line in checks], [line["loss"] for line in checks], "o--", label="held out")
    left.set(title="Loss", xlabel="step", ylabel="loss")
    for level in range(len(checks[0]["greedy"]) if checks else 0):
        (line,) = right.plot([one["step"] for one in checks], [one["greedy"][level] for one in checks],
                             label=f"depth {level + 1}")  # fmt: skip
        right.plot([one["step"] for one in checks], [one["overlap"][level] for one in checks], ":",
                   color=line.get_color())  # fmt: skip
    right.set(title="Held out, along the text: greedy match (dotted: 1 - TV)", xlabel="step", ylim=(0, 1))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=9)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, dpi=80)
    return out.getvalue()
