"""`bench plan`: what "auto" plans with on this machine and model, and (`grid`) how well it does."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mtp_spec.api import LM
from mtp_spec.bench import parsing
from mtp_spec.bench.common import Report, Row, bundled_prompts, question
from mtp_spec.bench.grid import TREES, grid
from mtp_spec.bench.options import ModelBenchmark, Option, Switch
from mtp_spec.cpu.backend import HostBackend
from mtp_spec.cuda.backend import DeviceBackend
from mtp_spec.errors import OptionError
from mtp_spec.model.host import HostModel
from mtp_spec.planning.confidence import RANKS
from mtp_spec.planning.costs import StepTimes
from mtp_spec.planning.node_planner import NodePlanner
from mtp_spec.planning.shape_planner import ShapeTable
from mtp_spec.planning.store import file_of, read, times_subject
from mtp_spec.progress import step_progress
from mtp_spec.stats import GenerationStats

KINDS = {"verify": "verify a chain", "tree": "verify a tree", "level": "draft a level", "extend": "take in tokens"}
# leads over the runner-up, in units of noise, and depths for which acceptance probabilities are shown
LEADS, DEPTHS = (0.5, 1.0, 2.0, 4.0), (1, 2, 3)
# default numbers of prompts, without and with --grid
TAUGHT, SEARCHED = 8, 32


def plan(lm: LM, args: argparse.Namespace) -> Report:
    """Shows what "auto" plans with: measured step times, and the chances of drafts after a few texts. With --grid it
    finds the best fixed plan instead, on one half of the prompts, and compares "auto" with it on the other."""
    if not lm.model.mtp:
        raise OptionError("bench plan: this checkpoint has no MTP module, so that nothing is drafted")
    return grid(lm, args) if args.grid else _known(lm, args)


def check_plan(args: argparse.Namespace) -> None:
    """Rejects options that would be ignored, and fills in the number of prompts."""
    given: dict[str, Any] = vars(args)
    alone = [name for name in ("depths", "trees", "halving", "adversarial") if given[name]]
    if alone and not args.grid:
        raise OptionError(f"bench plan: --{alone[0]} needs --grid")
    if args.prompts is None:
        args.prompts = SEARCHED if args.grid else TAUGHT
    if args.grid and args.prompts < 2:
        raise OptionError("--grid needs --prompts 2 or more: one half chooses the best plan, the other compares")


BENCHMARK = ModelBenchmark(
    name="plan",
    help='what "auto" plans with; --grid: the best fixed plan, and "auto" beside it',
    run=plan,
    check=check_plan,
    options=(
        Switch("--grid", 'search for the best fixed plan and compare "auto" with it'),
        Option(
            "--depths",
            "chains of the grid (1,2,3,4,5,6); with --depths or --trees, only what they name",
            type=parsing.depths,
            metavar="K,K,...",
        ),
        Option(
            "--trees",
            f"its trees, children by depth ({','.join('x'.join(map(str, tree)) for tree in TREES)})",
            type=parsing.trees,
            metavar="NxN,...",
        ),
        Switch("--halving", "drop the slower half of the plans again and again"),
        Option("--temperatures", "(0,0.8)", type=parsing.numbers, default=[0.0, 0.8], metavar="T,T,..."),
        Switch("--adversarial", "--grid: also random prompts at temperature 2"),
        Option(
            "--prompts",
            f"held-out prompts ({TAUGHT}; --grid: {SEARCHED}, one half chooses)",
            type=parsing.count,
            metavar="N",
        ),
        Option("--max-new-tokens", "tokens a text (96)", type=parsing.count, default=96),
    ),
)


def _known(lm: LM, args: argparse.Namespace) -> Report:
    if lm.speculation_for("auto") is None:
        raise OptionError(
            f'"auto" drafts nothing here: rows run one by one ({lm.model.dtype}, technique '
            f'"{lm.technique}"), so verifying costs what it saves; --grid shows it'
        )
    rows, notes, facts = list[Row](), list[str](), dict[str, Any]()
    for temperature in args.temperatures:
        stats = _write(lm, temperature, args)
        if isinstance(lm.backend, HostBackend):
            planner = lm.backend.planners.here()
            rows, learned = _times(planner.times), _learned(planner)
        else:
            assert isinstance(lm.backend, DeviceBackend)
            table = lm.backend.table()
            learned = {"chances": _device_chances(table)}
            rows += [{"T": temperature, **row} for row in _shapes(table)]
        learned["steps by depth drafted"] = {
            depth: sum(counts.values()) / stats.steps for depth, counts in stats.histogram_by_draft_length.items()
        }
        learned["tokens per step"] = stats.tokens_per_step
        facts[f"after {args.prompts} texts at temperature {temperature:g}"] = learned
        notes += [f"after {args.prompts} texts at temperature {temperature:g}:", *_lines(learned)]
    where = _kept(lm)
    silent = lm.model.ranks.rank > 0
    return Report('What "auto" plans with', rows, {"times": where, **facts}, silent=silent, notes=[where, *notes])


def _write(lm: LM, temperature: float, args: argparse.Namespace) -> GenerationStats:
    """Generates from the prompts with "auto", so that its planner learns from all of them."""
    total = GenerationStats()
    with step_progress(sys.stderr.isatty(), f"texts at {temperature:g}") as report:
        for number, item in enumerate(bundled_prompts(args.prompts, seed=1), start=1):
            stream = lm.stream(
                question(lm, item["prompt"]),
                temperature=temperature,
                seed=item["seed"],
                max_new_tokens=args.max_new_tokens,
            )
            total = total.merge(stream.rest().stats)
            if report is not None:
                report(number, args.prompts)
    return total


def _kept(lm: LM) -> str:
    """Returns where the times come from."""
    if not isinstance(lm.model, HostModel):
        return "times: measured when steps are captured and while they run, kept in memory only"
    subject = times_subject(lm.model, lm.technique)
    if read(subject) is not None:
        return f"times: of this machine and model, kept in {file_of(subject)}"
    return f"times: typical ones; the machine was too busy to measure ({file_of(subject)} is not there)"


def _times(times: StepTimes) -> list[Row]:
    """Returns one row for each measured pass; typical times have no milliseconds."""
    step, typical, rows = times.verify.seconds[0][0], times == StepTimes.typical(), list[Row]()
    for name, shown in KINDS.items():
        curve = getattr(times, name)
        for count, (near, far) in zip(curve.rows, curve.seconds, strict=True):
            milliseconds = ("-", "-") if typical else (1000 * near, 1000 * far)
            kind = "decode" if name == "verify" and count == 1 else shown
            rows.append(
                {
                    "pass": kind,
                    "rows": count,
                    f"ms at {curve.contexts[0]} tokens": milliseconds[0],
                    f"at {curve.contexts[1]}": milliseconds[1],
                    "in plain steps": near / step,
                }
            )
    return rows


def _learned(planner: NodePlanner) -> Row:
    confidence, speed, plain = planner.confidence, planner.speed, planner.speed.factor("plain")
    return {
        "chances": {depth: {lead: confidence.chance(lead, depth) for lead in LEADS} for depth in DEPTHS},
        "siblings": [confidence.share(rank) for rank in range(1, RANKS + 1)],
        "tokens in the time of a plain step": planner.rate,
        "ms of a plain step": 1000 * planner.times.verify.seconds[0][0] * plain,
        "factors beside plain": {kind: speed.factor(kind) / plain for kind in ("verify", "draft")},
    }


def _shapes(table: ShapeTable) -> list[Row]:
    rows = []
    for number, shape in enumerate(table.shapes):
        name = "plain" if not shape.parents else f"{'chain' if shape.is_chain else 'tree'} {shape.depth}"
        (tokens,), steps = table.chances.tokens(shape), table.relative(number)
        rows.append(
            {
                "step": name,
                "ms": 1000 * table.seconds(number),
                "in plain steps": steps,
                "tokens expected": tokens,
                "times plain": tokens / steps,
            }
        )
    return rows


def _device_chances(table: ShapeTable) -> dict[int, dict[str, float]]:
    """Returns the acceptance probability of the best child by depth, and of its siblings if shapes have any."""
    keys = sorted({key for shape in table.shapes for key in zip(shape.depths, shape.ranks, strict=True)})
    found: dict[int, dict[str, float]] = {}
    for depth, rank in keys:
        found.setdefault(depth, {})[f"rank {rank}"] = table.chances.chance(depth, rank)
    return found


def _lines(learned: Row) -> list[str]:
    """Returns what was learned as lines of text."""
    lines = []
    for depth, chances in learned["chances"].items():
        values = ", ".join(
            f"{chance:.2f} ({key if isinstance(key, str) else f'lead {key:g}'})" for key, chance in chances.items()
        )
        lines.append(
            f"  a draft at depth {depth}{' or more' if depth == DEPTHS[-1] and len(chances) > 1 else ''}"
            f" is accepted with chance {values}"
        )
    if "siblings" in learned:
        lines.append("  siblings, once the better ones failed: " + " ".join(f"{x:.2f}" for x in learned["siblings"]))
        lines.append(
            f"  {learned['tokens in the time of a plain step']:.2f} tokens in the time of a plain step, which "
            f"is {learned['ms of a plain step']:.1f} ms now; beside it, times against the table's: "
            + ", ".join(f"{kind} {x:.2f}" for kind, x in learned["factors beside plain"].items())
        )
    depths = ", ".join(f"{depth}: {share:.0%}" for depth, share in learned["steps by depth drafted"].items())
    return [*lines, f"  steps by depth drafted: {depths}; {learned['tokens per step']:.2f} tokens a step"]
