"""The line under an answer: speed, tokens per step, acceptance by depth, time of a step, seed; as wide as fits."""

from __future__ import annotations

from mtp_spec.stats import GenerationStats

SEPARATOR = " · "
# acceptance rates of the shallowest drafts where the line is short
SHORT_DEPTHS = 3


def status_line(stats: GenerationStats, seed: int, width: int | None = None) -> str:
    """Returns the line, shortened to `width` columns where given: first in its words, then by its last parts."""
    parts = [_speed(stats), *_steps(stats), (f"seed {seed}", f"seed {seed}")]
    for form in (0, 1):
        line = SEPARATOR.join(part[form] for part in parts)
        if width is None or len(line) <= width:
            return line
    assert width is not None
    while len(parts) > 1 and len(line) > width:
        parts.pop()
        line = SEPARATOR.join(part[1] for part in parts)
    return line[:width]


def speed(stats: GenerationStats) -> float:
    """Returns tokens a second after the prompt was read; 0 before there are any."""
    seconds = stats.total_seconds - stats.phase_seconds.get("prefill", 0.0)
    return (stats.new_tokens - 1) / seconds if seconds > 0 and stats.new_tokens > 1 else 0.0


def _speed(stats: GenerationStats) -> tuple[str, str]:
    rate = f"{speed(stats):.0f} tok/s"
    return rate, rate


def _steps(stats: GenerationStats) -> list[tuple[str, str]]:
    if not stats.steps:
        return []
    parts = []
    if stats.drafted:
        rates = [f"{100 * rate:.0f}" for rate in stats.accepted_per_depth["conditional"]]
        each = f"{stats.tokens_per_step:.2f}"
        parts += [(f"{each} tokens/step", f"{each}/step"),
                  (f"accepted {'/'.join(rates)} %", f"{'/'.join(rates[:SHORT_DEPTHS])} %")]  # fmt: skip
    else:
        parts.append(("no drafts", "no drafts"))
    names = [name for name in ("step", "draft", "verify") if stats.phase_seconds.get(name)]
    times = [f"{1000 * stats.phase_seconds[name] / stats.steps:.1f}" for name in names]
    if times:
        long = ", ".join(f"{name} {time}" for name, time in zip(names, times, strict=True))
        parts.append((f"{long} ms", f"{'+'.join(times)} ms"))
    return parts


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
