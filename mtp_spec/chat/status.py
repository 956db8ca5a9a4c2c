"""The line under an answer: speed, tokens per step, acceptance by depth, time of a step, seed; as wide as fits."""

from __future__ import annotations

from mtp_spec.stats import GenerationStats

SEPARATOR = " · "
# number of depths with acceptance rates if the line is short
SHORT_DEPTHS = 3


def status_line(stats: GenerationStats, seed: int, width: int | None = None) -> str:
    """Returns the line, shortened or without its last parts to fit `width` columns if given."""
    parts = [_speed(stats), *_steps(stats), (f"seed {seed}", f"seed {seed}")]
    shown = [long for long, _ in parts]
    # shortened from the right as far as needed, then cut
    for index in reversed(range(len(parts))):
        if width is not None and len(SEPARATOR.join(shown)) > width:
            shown[index] = parts[index][1]
    while width is not None and len(SEPARATOR.join(shown)) > width and len(shown) > 1:
        shown.pop()
    return SEPARATOR.join(shown)[:width]


def speed(stats: GenerationStats) -> float:
    """Returns tokens per second after the prefill; 0 before there are any."""
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
        parts += [
            (f"{each} tokens/step", f"{each}/step"),
            (f"accepted {'/'.join(rates)} %", f"{'/'.join(rates[:SHORT_DEPTHS])} %"),
        ]
    else:
        parts.append(("no drafts", "no drafts"))
    if stats.dropped:
        parts.append((f"{counted(stats.dropped, 'draft')} dropped (NaN)", f"{stats.dropped} NaN"))
    names = [name for name in ("step", "draft", "verify") if stats.phase_seconds.get(name)]
    times = [f"{1000 * stats.phase_seconds[name] / stats.steps:.1f}" for name in names]
    if times:
        long = ", ".join(f"{name} {time}" for name, time in zip(names, times, strict=True))
        parts.append((f"{long} ms", f"{'+'.join(times)} ms"))
    return parts


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
