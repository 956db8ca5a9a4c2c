"""The pictures of a document, by matplotlib (the extra `mtp-spec[plots]`)."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

from mtp_spec.bench.acceptance.cells import AUTO, COUPLED, PEERS, PLAIN
from mtp_spec.bench.common import Row
from mtp_spec.errors import OptionError

BLUE, AMBER, GREEN, RED, VIOLET, GREY = "#0969da", "#bf8700", "#1a7f37", "#cf222e", "#8250df", "#57606a"
COLOURS = (BLUE, AMBER, GREEN, RED, VIOLET, GREY)
PHASES = {"draft": AMBER, "verify": BLUE, "sample": GREEN, "step": BLUE, "other": "#d0d7de"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eaeef2",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "legend.fontsize": 9,
}
SIZE, ROW_INCHES = (7.0, 4.2), 0.24


def need_matplotlib(option: str) -> None:
    """Rejects an option, before anything is measured, if its plots cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OptionError(f"{option} draws with matplotlib: pip install 'mtp-spec[plots]'") from None


def draw(details: Mapping[str, Row]) -> dict[str, Any]:
    """Returns name -> matplotlib figure, for all figures that the cells have numbers for."""
    import matplotlib

    plots = {
        "acceptance": _acceptance,
        "speed": _speed,
        "histogram": _histogram,
        "cost": _cost,
        "planned": _planned,
        "batch": _batch,
    }
    with matplotlib.rc_context(STYLE):
        drawn = {name: plot(details) for name, plot in plots.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def svg(name: str, figure: Any) -> str:
    """Returns a figure as an element of an HTML page: without prologue, namespaces and outside references."""
    import matplotlib

    out = io.StringIO()
    # names of clip paths and markers are hashes: another salt keeps those of several figures apart
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :])


def png(figure: Any) -> bytes:
    """Returns a figure as a picture for a page such as a README."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="png", dpi=144)
    return out.getvalue()


def _figure(title: str, across: str, up: str, height: float = SIZE[1]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=across, ylabel=up)
    return figure, axes


def _series(details: Mapping[str, Row]) -> dict[str, list[Row]]:
    """Returns the drafting cells that differ in their shape only: what is common to them -> cells."""
    found: dict[str, list[Row]] = {}
    for cell in details.values():
        axes = cell["axes"]
        if axes["draft"] not in (PLAIN, *PEERS):
            found.setdefault(_label(axes), []).append(cell)
    return found


def _label(axes: Row) -> str:
    """Returns the label that distinguishes a cell from others with the same draft."""
    parts = [f"T {axes['temperature']:g}"] + ([axes["rule"]] if axes["rule"] != COUPLED else [])
    parts += [f"context {axes['context']}"] if axes["context"] is not None else []
    parts += [f"batch {axes['batch']}"] if axes["batch"] > 1 else []
    parts += [f"vocabulary {axes['draft_vocabulary']}"] if axes["draft_vocabulary"] is not None else []
    return ", ".join(parts)


def _acceptance(details: Mapping[str, Row]) -> Any:
    figure, axes = _figure("Drafts accepted at each depth: the deepest chain", "depth", "share accepted")
    deepest = 0
    for number, (name, cells) in enumerate(_series(details).items()):
        chains = [cell for cell in cells if cell["axes"]["draft"].startswith("chain")]
        if not chains:
            continue
        rates, colour = chains[-1]["accepted_per_depth"], COLOURS[number % len(COLOURS)]
        depths = range(1, len(rates["conditional"]) + 1)
        axes.plot(depths, rates["unconditional"], "o-", color=colour, label=name)
        axes.plot(depths, rates["conditional"], "o--", color=colour, alpha=0.5)
        deepest = max(deepest, len(depths))
    if not deepest:
        return None
    axes.set(ylim=(0, 1.03), xticks=range(1, deepest + 1))
    axes.set_xlabel("depth; dashed: given that the depth before was accepted")
    axes.legend()
    return figure


def _speed(details: Mapping[str, Row]) -> Any:
    figure, axes = _figure("Speed-up: wall-clock against own plain decoding", "", "times plain (median, quartiles)")
    series = {name: [cell for cell in cells if cell["times_plain"]] for name, cells in _series(details).items()}
    drafts = list(dict.fromkeys(cell["axes"]["draft"] for cells in series.values() for cell in cells))
    if not drafts:
        return None
    for number, (name, cells) in enumerate(series.items()):
        # shifted sideways, so that none hides another
        shift = 0.5 * ((number + 0.5) / len(series) - 0.5)
        places = [drafts.index(cell["axes"]["draft"]) + shift for cell in cells]
        middles = [cell["times_plain"]["median"] for cell in cells]
        quartiles = [cell["times_plain"]["quartiles"] for cell in cells]
        errors = [
            [abs(middle - ends[side]) for middle, ends in zip(middles, quartiles, strict=True)] for side in (0, 1)
        ]
        axes.errorbar(places, middles, errors, fmt="o", capsize=3, color=COLOURS[number % len(COLOURS)], label=name)
    axes.axhline(1.0, color=GREY, linestyle="--", linewidth=1)
    axes.set_xticks(range(len(drafts)), drafts, rotation=30, ha="right")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _histogram(details: Mapping[str, Row]) -> Any:
    figure, axes = _figure("Tokens committed in a step: the shape with most of them", "tokens", "share of steps")
    best = {name: max(cells, key=lambda cell: cell["tokens_per_step"]) for name, cells in _series(details).items()}
    if not best:
        return None
    wide = 0.8 / len(best)
    for number, (name, cell) in enumerate(best.items()):
        counts = {int(accepted) + 1: steps / cell["steps"] for accepted, steps in cell["histogram"].items()}
        places = [tokens + wide * (number - (len(best) - 1) / 2) for tokens in counts]
        label = f"{name}: {cell['axes']['draft']}, {cell['tokens_per_step']:.2f} a step"
        axes.bar(places, list(counts.values()), wide, color=COLOURS[number % len(COLOURS)], label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="x", visible=False)
    axes.legend()
    return figure


def _cost(details: Mapping[str, Row]) -> Any:
    cells = {name: cell["cost"]["ms_per_step"] for name, cell in details.items() if cell["axes"]["draft"] not in PEERS}
    figure, axes = _figure("Cost of a step", "milliseconds", "", 1.2 + ROW_INCHES * len(cells))
    names, left = list(cells), [0.0] * len(cells)
    for phase, colour in PHASES.items():
        widths = [parts.get(phase, 0.0) for parts in cells.values()]
        if any(widths):
            axes.barh(range(len(names)), widths, left=left, color=colour, label=phase)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend()
    return figure


def _planned(details: Mapping[str, Row]) -> Any:
    figure, axes = _figure("Tokens per step of a text: expected by the planner, and measured", "expected", "measured")
    most = 1.0
    for number, (name, cells) in enumerate(_series(details).items()):
        texts = [text for cell in cells if cell["axes"]["draft"] == AUTO for text in cell["texts"]]
        pairs = [
            (text["expected_tokens_per_step"], text["step_tokens"] / text["steps"])
            for text in texts
            if text["expected_tokens_per_step"] is not None
        ]
        if pairs:
            axes.scatter(*zip(*pairs, strict=True), s=18, color=COLOURS[number % len(COLOURS)], label=name)
            most = max(most, *map(max, pairs))
    if most == 1.0:
        return None
    axes.plot([1, most], [1, most], color=GREY, linestyle="--", linewidth=1)
    axes.legend()
    return figure


def _batch(details: Mapping[str, Row]) -> Any:
    """Returns a plot of throughput over batch size, one line for each other axis; None for a single batch size."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for cell in details.values():
        axes = cell["axes"]
        if axes["draft"] not in PEERS:
            name = f"{axes['draft']}, {_label({**axes, 'batch': 1})}"
            lines.setdefault(name, []).append((axes["batch"], cell["cost"]["tokens_per_second"]))
    batches = sorted({batch for line in lines.values() for batch, _ in line})
    if len(batches) < 2:
        return None
    figure, axes = _figure("Tokens per second of texts side by side", "texts", "tokens per second")
    for number, (name, line) in enumerate(lines.items()):
        style = ("o-", "s--", "^:")[number // len(COLOURS) % 3]
        axes.plot(*zip(*line, strict=True), style, color=COLOURS[number % len(COLOURS)], label=name)
    axes.set(xticks=batches, ylim=(0, None))
    axes.legend()
    return figure
