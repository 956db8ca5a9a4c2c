"""The documentation: its Python runs, its commands parse, its links lead somewhere, its pictures show the results."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shlex
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mtp_spec
from mtp_spec import acceptance as rules
from mtp_spec import speculation
from mtp_spec.cli.main import build_parser
from places import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS) for page in DOCS.rglob("*.md"))
LOAD = mtp_spec.load


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def bundled(lm: mtp_spec.LM, *args: Any, **kwargs: Any) -> mtp_spec.LM:
    """Stands for `load`: checkpoints and GPUs of the pages are not here, the arguments must fit all the same."""
    inspect.signature(LOAD).bind(*args, **kwargs)
    return lm


@pytest.fixture(scope="module")
def lm() -> mtp_spec.LM:
    return LOAD()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=str)
def test_python_runs(page: Path, lm: mtp_spec.LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtp_spec, "load", partial(bundled, lm))
    monkeypatch.setattr(speculation, "ACCEPTANCE_RULES", speculation.ACCEPTANCE_RULES)
    before = dict(rules.RULES)  # a page adds one
    space: dict[str, object] = {}
    try:
        for block in blocks(page, "python"):
            exec(compile(block, str(page), "exec"), space)
    finally:
        rules.RULES.clear()
        rules.RULES.update(before)


def commands() -> list[str]:
    texts = [block for page in PAGES for block in blocks(page, "console")]
    texts += re.findall(r"`(mtp-spec [^`]*)`", "\n".join((DOCS / page).read_text() for page in PAGES))
    lines = [line for text in texts for line in re.split(r"\n| && | \| ", text) if line.startswith("mtp-spec ")]
    return sorted({line for line in lines if not re.search(r"NAME|\bPATH|RULE\b", line)})


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str) -> None:
    words = shlex.split(command)[1:]
    if words != ["bench"]:  # named in a sentence
        build_parser().parse_args(words)


def anchors(page: Path) -> set[str]:
    """Returns the names of a page's headings, as MkDocs makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", re.sub(r"\]\([^)]*\)", "", heading)).lower().split() for heading in headings)
    return {re.sub("-+", "-", "-".join(one)) for one in words}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    text = (DOCS / page).read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
        file = (DOCS / page).parent / target if target else DOCS / page
        assert anchor in anchors(file), f"{target}#{anchor}"
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (DOCS / page).parent.joinpath(target).exists(), target
    for file in re.findall(r'--8<-- "([^":]+)', text):
        assert (ROOT / file).is_file(), file


def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_show_the_results() -> None:
    for name, picture in pictures().from_results().items():
        drawn = (DOCS / "images" / f"{name}.svg").read_text()
        assert picture.svg() == drawn, f"docs/images/{name}.svg is old: python docs/pictures.py --results"


def test_what_is_said_of_shapes_is_what_was_measured() -> None:
    document = json.loads((DOCS / "results" / "acceptance_cpu.json").read_text())
    cells = document["details"]
    text = " ".join((DOCS / "howto" / "trees.md").read_text().split())
    steps = {name: f"{cell['tokens_per_step']:.2f}" for name, cell in cells.items()}
    speed = {name: f"{cell['times_plain']['median']:.2f}" for name, cell in cells.items()}
    for sentence in (
        f"a chain of 5 wrote {steps['chain 5 at 0.0']} tokens a step",
        f"the tree 2,1,1 wrote {steps['tree 2,1,1 at 0.8']} tokens a step where the chain of 3 wrote "
        f"{steps['chain 3 at 0.8']}",
        f"wrote {steps['tree 3,2,1 at 0.8']} tokens a step at temperature 0.8, but ran at "
        f"{speed['tree 3,2,1 at 0.8']} times plain decoding on two CPU cores, the chain of 3 at "
        f"{speed['chain 3 at 0.8']}",
    ):
        assert sentence in text, sentence
    assert f"({document['set']['questions']} held-out prompts," in (DOCS / "guide.md").read_text()


def test_the_cost_of_rows_is_that_of_the_results() -> None:
    document = json.loads((DOCS / "results" / "step_h100.json").read_text())
    rows = [row for row in document["rows"] if row["pass"].startswith("decode and verify")]
    text = (DOCS / "howto" / "checkpoints.md").read_text()
    for row in rows:
        count, ratio = row["pass"].split(", ")[1].split()[0], row["us"] / rows[0]["us"]
        numbers = f"{row['us'] / 1000:.2f} | {ratio:.2f} | {row['experts']:.1f} | {row['x floor']:.2f}"
        assert f"| {count} | {numbers} |" in text
    whole = [f"{ms:.1f}" for ms in document["extrapolated"].values()]
    flat = " ".join(text.split())
    assert f"would take {whole[0]} ms for one row, {whole[1]} ms for two and {whole[2]} ms for four" in flat
    micro = [f"{parts['accept']:.0f} us" for parts in document["accepting"].values()]
    assert f"takes {micro[0]} at temperature 0, {micro[1]} at 0.8, {micro[2]} with top-p and {micro[3]} with" in flat
    guide = " ".join((DOCS / "guide.md").read_text().split())
    one, four, draft = (next(row["us"] for row in document["rows"] if row["pass"].endswith(name)) / 1000
                        for name in ("verify, 1 rows", "verify, 4 rows", "draft, 1 row"))  # fmt: skip
    assert f"over four rows takes {four / one:.2f} times as long" in guide
    assert f"takes {draft:.2f} ms, where a pass over one row takes {one:.2f} ms" in guide


def test_a_runs_pictures_can_be_drawn(lm: mtp_spec.LM, monkeypatch: pytest.MonkeyPatch) -> None:
    if lm.technique == "single":  # scored rows round otherwise than generated ones, in float32 by next to nothing
        lm = LOAD(dtype="float32")
    monkeypatch.setattr(mtp_spec, "load", partial(bundled, lm))
    for name, picture in pictures().from_model().items():
        assert picture.svg().startswith("<svg"), name
