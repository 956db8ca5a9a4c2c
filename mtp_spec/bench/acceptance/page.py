"""A document as one self-contained HTML page with embedded pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mtp_spec.bench.acceptance.plots import svg
from mtp_spec.bench.acceptance.report import table_rows
from mtp_spec.bench.common import Row

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #24292f; background: #fff; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #eaeef2; white-space: nowrap; }
th { color: #57606a; font-weight: 600; border-bottom: 2px solid #d0d7de; }
th.word, td.word { text-align: left; }
tr.first td { border-top: 2px solid #d0d7de; }
code { background: #f6f8fa; padding: .1rem .3rem; border-radius: 4px; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content auto; gap: .2rem 1rem; } dt { color: #57606a; } dd { margin: 0; }
figure { margin: 1.2rem 0; } svg { max-width: 100%; height: auto; }
"""
FACTS = ("command", "date", "processor", "gpu", "threads", "system", "python", "torch", "mtp_spec")
NOTES = """<p>tok/step: tokens committed by verify steps over verify steps; plain decoding has 1. 95 %: bootstrap over
questions. by depth: drafts accepted among steps that accepted the depth before. x plain: seconds a token of this
library's own plain decoding, in as large a batch, over those of the way, timed in turn on the same prompts; the median
over texts or batches. same: texts equal to plain decoding's, of the smallest batch.</p>"""
SPLITS = {"by_category": "kind of question", "by_context": "tokens of the prompt"}
TITLE = "Speculative decoding: tokens per step, acceptance, speed-up"
HEAD = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{TITLE}</title><style>{CSS}</style></head><body><h1>{TITLE}</h1>"""


def page(document: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """Returns the page of a document and its figures."""
    known, details = document["set"], document["details"]
    model = ", ".join(f"{name} {value}" for name, value in document["model"].items())
    facts = {"questions": f"{known['questions']} of {known['name']} ({known['kind']})", "model": model}
    facts |= {name: str(document[name]) for name in FACTS if document[name] is not None}
    notes = [f"Not measured: {name}: {why}" for part in ("left_out", "absent") for name, why in document[part].items()]
    if document["too_long"]:
        notes.append(f"Left out, longer than the model's context: {len(document['too_long'])} turns a cell")
    return "\n".join(
        [
            HEAD,
            _facts(facts),
            _table(table_rows(details)),
            NOTES,
            *(f"<p>{escape(note)}</p>" for note in notes),
            *(f"<figure>{svg(name, figure)}</figure>" for name, figure in figures.items()),
            *(part for split, words in SPLITS.items() for part in _categories(details, split, words)),
            "</body></html>",
            "",
        ]
    )


def _facts(facts: Mapping[str, str]) -> str:
    def shown(name: str, value: str) -> str:
        return f"<code>{escape(value)}</code>" if name == "command" else escape(value)

    lines = "".join(f"<dt>{name}</dt><dd>{shown(name, value)}</dd>" for name, value in facts.items())
    return f"<dl>{lines}</dl>"


def _table(rows: Sequence[Row]) -> str:
    words = [name for name in rows[0] if any(isinstance(row[name], str) for row in rows)]
    head = "".join(f"<th{_word(name in words)}>{escape(name)}</th>" for name in rows[0])
    body = ""
    for row in rows:
        cells = (f"<td{_word(name in words)}>{_shown(name, value)}</td>" for name, value in row.items())
        body += f"<tr{_first(row)}>{''.join(cells)}</tr>\n"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _categories(details: Mapping[str, Row], split: str, words: str) -> list[str]:
    """Returns tokens per step by category or context, if there are several."""
    kinds = list(dict.fromkeys(kind for cell in details.values() for kind in cell[split]))
    if len(kinds) < 2:
        return []
    rows = []
    for name, cell in details.items():
        parts = {kind: cell[split].get(kind, {}).get("tokens_per_step") for kind in kinds}
        rows.append({"cell": name, **parts})
    return [f"<h2>Tokens per step by {words}</h2>", _table(rows)]


def _first(row: Row) -> str:
    return ' class="first"' if row.get("draft") == "plain" else ""


def _word(is_word: bool) -> str:
    return ' class="word"' if is_word else ""


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}" if name == "T" else f"{value:.2f}"
    return escape(str(value))
