"""`bench speed`: wall-clock of plain and speculative generation, in turn in one run."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.progress import track

from mtp_spec.api import LM
from mtp_spec.bench import parsing
from mtp_spec.bench.common import Report, Row, average, bundled_prompts, question, spread
from mtp_spec.bench.options import ModelBenchmark, Option, Switch, text_options
from mtp_spec.bench.peer import transformers_ways
from mtp_spec.bench.phases import step_phases
from mtp_spec.bench.turns import Generate, Written, in_turn, noise, ours, shared_tokens, warm_up

LOAD = """
import json, resource, sys, time
start = time.perf_counter()
import mtp_spec
imported = time.perf_counter()
lm = mtp_spec.load(sys.argv[1] if len(sys.argv) > 1 else None)
loaded = time.perf_counter()
lm.generate([0, 2, 400], max_new_tokens=32, seed=0)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"import_s": imported - start, "load_s": loaded - imported, "peak_mb": peak / 1024}))
"""


def speed(lm: LM, args: argparse.Namespace) -> Report:
    """Times every way to generate on the same prompts, in turn, and reports medians of ratios against plain."""
    speculations = {"plain": None, **{f"chain {depth}": depth for depth in args.depths}, "auto": "auto"}
    ways, absent = {name: ours(lm, speculation) for name, speculation in speculations.items()}, dict[str, str]()
    with tempfile.TemporaryDirectory() as folder:
        if args.transformers:
            theirs, absent = transformers_ways(lm, Path(folder), args)
            ways |= theirs
        rows, facts = [], dict[str, Any](absent)
        for temperature in args.temperatures:
            part, facts[f"at temperature {temperature}"] = _compare(lm, ways, temperature, args)
            if lm.backend.captured:
                parts = _parts(lm, speculations, temperature)
                facts[f"microseconds of a step at {temperature}"] = parts
                for row in part:
                    row |= _shares([parts.get(row["way"], {})])
            rows += part
    for name, reason in absent.items():
        rows.append({**dict.fromkeys(rows[0], "-"), "way": f"{name}: {reason}"})
    if lm.model.device.type == "cpu":
        facts["load"] = _load(args)
    return Report(f"Wall-clock against plain decoding, median over {args.prompts} prompts", rows, facts)


BENCHMARK = ModelBenchmark(
    name="speed",
    help="wall-clock against plain decoding, and against transformers",
    run=speed,
    options=(
        *text_options(12, 96),
        Switch("--transformers", "also time transformers' generate, plain and use_mtp"),
        Option("--loads", "fresh processes that load the model (3)", type=parsing.count, default=3),
        Switch("--adversarial", "prompts of random tokens; try it at temperature 2"),
        Option("--depths", "chains to time", type=parsing.depths, default=[2, 3, 4, 5], metavar="K,K,..."),
        Option("--temperatures", "(0,0.8)", type=parsing.numbers, default=[0.0, 0.8], metavar="T,T,..."),
    ),
)


def _parts(lm: LM, speculations: dict[str, Any], temperature: float) -> dict[str, dict[str, float]]:
    """Returns the microseconds of the parts of captured steps, which generation runs as one graph."""
    prompt, parts = question(lm, bundled_prompts(1, seed=1)[0]["prompt"]), {}
    for name, speculation in speculations.items():
        options = {"speculation": speculation, "temperature": temperature, "seed": 0, "max_new_tokens": 64}
        found = step_phases(lm, prompt, options)
        parts[name] = {"draft": found["draft"], "verify": found["verify"], "sample": found["accept"]}
        parts[name]["total"] = sum(found.values())
    return parts


def _compare(
    lm: LM, ways: dict[str, Generate], temperature: float, args: argparse.Namespace
) -> tuple[list[Row], dict[str, Any]]:
    """Returns the table's rows, and the seconds per token of every text."""
    prompts = bundled_prompts(args.prompts, seed=1)
    texts: dict[str, list[Written]] = {name: [] for name in ways}
    agree: dict[str, list[float]] = {name: [] for name in ways}
    greedy = {n: w for n, w in ways.items() if temperature == 0 or not n.startswith("transformers")}
    options = {"temperature": temperature, "seed": 0, "max_new_tokens": args.max_new_tokens}
    asked = [noise(lm, i) if args.adversarial else question(lm, one["prompt"]) for i, one in enumerate(prompts)]
    warm_up(lm, greedy, asked, options)
    for number, item in enumerate(track(prompts, f"temperature {temperature}", transient=True)):
        found = in_turn(greedy, number, asked[number], {**options, "seed": item["seed"]})
        for name, text in found.items():
            texts[name].append(text)
            agree[name].append(shared_tokens(text.ids, found["plain"].ids))
    rows: list[Row] = []
    for name in greedy:
        ratios = [plain.pace / own.pace for plain, own in zip(texts["plain"], texts[name], strict=True)]
        median, low, high = spread(ratios)
        rows.append(
            {
                "T": temperature,
                "way": name,
                "times plain": median,
                "quartiles": f"{low:.2f}-{high:.2f}",
                "tokens/s": 1 / spread([text.pace for text in texts[name]])[0],
                "first tokens as plain": average(agree[name]),
                **_shares([text.stats.seconds for text in texts[name]]),
            }
        )
    return rows, {"seconds per token": {name: [text.pace for text in found] for name, found in texts.items() if found}}


def _shares(phases: list[dict[str, float]]) -> Row:
    """Returns the share of the time by phase, as text."""
    total = sum(p.get("total", 0.0) for p in phases)
    names = ("draft", "verify", "sample")
    return {name: f"{sum(p.get(name, 0.0) for p in phases) / total:.0%}" if total else "-" for name in names}


def _load(args: argparse.Namespace) -> dict[str, float]:
    """Returns medians over fresh processes: seconds to import and to load, and peak memory after a text."""
    model = [] if args.model is None else [str(args.model)]
    runs = []
    for _ in range(args.loads):
        done = subprocess.run([sys.executable, "-c", LOAD, *model], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {key: spread([run[key] for run in runs])[0] for key in runs[0]}
