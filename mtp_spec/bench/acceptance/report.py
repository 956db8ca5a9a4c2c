"""The table, and the same numbers as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from mtp_spec.bench.acceptance.cells import COUPLED
from mtp_spec.bench.common import Row
from mtp_spec.speculation import MAX_DEPTH

# columns of words
WORDS = ("draft", "95 %", "by depth")
# columns that fold on a narrow screen
FOLDED, DRAFT_WIDTH = ("draft", "by depth"), 12
# columns that are omitted because the table's heading or its column "draft" shows them
IN_HEADING = ("T", "rule", "context", "batch", "draft_vocabulary")
# digits after the point, where not two
DIGITS = {"drafts": 1, "tok/s": 0}
# depths whose acceptance the table has room for
SHOWN_DEPTHS = 4
AXES = ("temperature", "draft", "rule", "context", "batch", "draft_vocabulary")
# of these the table shows only what the run varies
OPTIONAL_AXES = {"rule": COUPLED, "context": None, "batch": 1, "draft_vocabulary": None}
NUMBERS = (
    "tokens_per_step",
    "tokens_per_step_macro",
    "mean_acceptance_length",
    "draft_acceptance_rate",
    "steps_without_draft",
    "steps",
    "drafted",
    "accepted",
    "new_tokens",
    "prompt_tokens",
)
INTERVALS = ("tokens_per_step_interval", "tokens_per_step_macro_interval")
COSTS = ("step_ms_p50", "step_ms_p99", "first_token_ms_p50", "tokens_per_second")
KINDS = ("conditional", "unconditional")


def table_rows(details: Mapping[str, Row]) -> list[Row]:
    """Returns one row a cell; axes that do not vary and bounds that were not measured are left out."""
    cells = list(details.values())
    varied = [name for name, usual in OPTIONAL_AXES.items() if any(cell["axes"][name] != usual for cell in cells)]
    bounds = any("first_depth" in cell for cell in cells)
    return [_row(cell, varied, bounds) for cell in cells]


def screen(title: str, details: Mapping[str, Row]) -> Group:
    """Returns the rows as tables, one a group of cells, that fit into 80 columns unless rules or bounds are shown."""
    groups: dict[str, list[Row]] = {}
    for cell, row in zip(details.values(), table_rows(details), strict=True):
        groups.setdefault(_heading(cell["axes"]), []).append(row)
    return Group(title, *(part for heading, rows in groups.items() for part in ("", _table(heading, rows))))


def _heading(axes: Row) -> str:
    parts = [f"temperature {axes['temperature']:g}"]
    parts += [f"context {axes['context']}"] if axes["context"] is not None else []
    parts += [f"{axes['batch']} texts side by side"] if axes["batch"] > 1 else []
    parts += [f"draft vocabulary {axes['draft_vocabulary']}"] if axes["draft_vocabulary"] is not None else []
    return ", ".join(parts)


def _table(heading: str, rows: Sequence[Row]) -> Table:
    shown = Table(
        title=heading,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    names = [name for name in rows[0] if name not in IN_HEADING]
    for name in names:
        shown.add_column(
            name,
            justify="left" if name in WORDS else "right",
            no_wrap=name not in FOLDED,
            min_width=DRAFT_WIDTH if name == "draft" else None,
        )
    for row in rows:
        draft = row["draft"] if row.get("rule", COUPLED) == COUPLED else f"{row['draft']} {row['rule']}"
        shown.add_row(*(_shown(name, value) for name, value in {**row, "draft": draft}.items() if name in names))
    return shown


def _shown(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.{DIGITS.get(name, 2)}f}"
    return "-" if value is None else str(value)


def _row(cell: Row, varied: Sequence[str], bounds: bool) -> Row:
    axes, speed, parity = cell["axes"], cell["times_plain"], cell["parity"]
    low, high = cell["tokens_per_step_interval"]
    rates = [f"{rate:.2f}"[-4 if rate > 0.995 else -3 :] for rate in cell["accepted_per_depth"]["conditional"]]
    row: Row = {"T": axes["temperature"], "draft": axes["draft"], **{name: axes[name] for name in varied}}
    row |= {
        "tok/step": cell["tokens_per_step"],
        "95 %": f"{low:.2f}-{high:.2f}",
        "drafts": cell["drafted"] / max(1, cell["steps"]),
        "by depth": " ".join(rates[:SHOWN_DEPTHS]),
        **({"tok/s": cell["cost"]["tokens_per_second"]} if "batch" in varied else {}),
        "x plain": None if speed is None else speed["median"],
        "same": f"{parity['same']}/{parity['texts']}",
    }
    return row | (_bound(cell.get("first_depth")) if bounds else {})


def _bound(first: Row | None) -> Row:
    if first is None or first["bound"] is None:
        return {"bound": None, "of bound": None}
    return {"bound": first["bound"], "of bound": first["part"]}


def csv_text(details: Mapping[str, Row]) -> str:
    """Returns one line a cell; the columns are always the same, so that files can be joined."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for cell in details.values():
        writer.writerow(_flat(cell))
    return out.getvalue()


def _flat(cell: Row) -> dict[str, Any]:
    flat = {**cell["axes"], **{name: cell[name] for name in NUMBERS}, **{name: cell["cost"][name] for name in COSTS}}
    for name in INTERVALS:
        flat[f"{name}_low"], flat[f"{name}_high"] = cell[name]
    flat |= {"same_texts": cell["parity"]["same"], "texts": cell["parity"]["texts"]}
    for kind in KINDS:
        rates = enumerate(cell["accepted_per_depth"][kind], start=1)
        flat |= {f"accepted_{depth}_{kind}": rate for depth, rate in rates}
    if (speed := cell["times_plain"]) is not None:
        low, high = speed["interval"]
        flat |= {
            "times_plain_median": speed["median"],
            "times_plain": speed["ratio"],
            "times_plain_low": low,
            "times_plain_high": high,
        }
    return flat


CSV_COLUMNS = [
    *AXES,
    *NUMBERS,
    *(f"{name}_{end}" for name in INTERVALS for end in ("low", "high")),
    *(f"accepted_{depth}_{kind}" for kind in KINDS for depth in range(1, MAX_DEPTH + 1)),
    *COSTS,
    "times_plain_median",
    "times_plain",
    "times_plain_low",
    "times_plain_high",
    "same_texts",
    "texts",
]
