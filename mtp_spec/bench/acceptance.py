"""`bench acceptance`: tokens per step on held-out chats, through the real caches."""

from __future__ import annotations

import argparse
from collections import deque
from typing import Any

from rich.progress import track

from mtp_spec.api import LM
from mtp_spec.bench.bound import FirstDepth
from mtp_spec.bench.common import Report, Row, bundled_prompts, interval, question
from mtp_spec.engine import Decoder
from mtp_spec.options import MAX_DEPTH, Speculation
from mtp_spec.rules import RULES
from mtp_spec.stats import GenerationStats

TREES = ((2, 1, 1), (3, 2, 1), (2, 2, 2, 1))
RULE_SHAPES = ((1,), (1, 1, 1), (2,), (2, 2, 1))


def shapes(depths: list[int]) -> dict[str, Speculation]:
    """Returns what is measured: chains, three trees, and chains whose depth follows the drafts' confidence."""
    chains = {f"chain {depth}": Speculation(depth=depth) for depth in depths}
    trees = {f"tree {','.join(map(str, tree))}": Speculation(branching=tree) for tree in TREES}
    return {**chains, **trees, f"adaptive {MAX_DEPTH}": Speculation(depth=MAX_DEPTH, adaptive=True)}


def rule_shapes(names: list[str]) -> dict[str, Speculation]:
    """Returns the shapes on which rules are compared, for each rule those that it judges."""
    out = {}
    for branching in RULE_SHAPES:
        for name in names:
            if max(branching) == 1 or name not in RULES or not RULES[name].chains_only:
                out[f"{name} {','.join(map(str, branching))}"] = Speculation(branching=branching, acceptance=name)
    return out


def acceptance(lm: LM, args: argparse.Namespace) -> Report:
    """Reports committed tokens per verify step, with the 95 % interval over prompts, and acceptance by depth.

    Rules are compared on fixed shapes. For lossless ones the table also says how often a draft of the first depth could
    be accepted at most (`bench.bound`), and which part of that was; for the coupled rule the part is that of its noise
    drawn again at every step.
    """
    prompts = bundled_prompts(args.prompts)
    kinds = [item["category"] for item in prompts]
    rows: list[Row] = []
    details: dict[str, Any] = {}
    for temperature in args.temperatures:
        for name, speculation in (rule_shapes(args.rules) if args.rules else shapes(args.depths)).items():
            each, firsts = list[GenerationStats](), list[FirstDepth]()
            for item in track(prompts, f"{name} at {temperature}", transient=True):
                stream = lm.stream(question(lm, item["prompt"]), temperature=temperature, seed=item["seed"],
                                   max_new_tokens=args.max_new_tokens, speculation=speculation)  # fmt: skip
                if args.rules and _has_bound(speculation) and isinstance(stream.decoder, Decoder):
                    firsts.append(FirstDepth(stream.decoder, speculation.acceptance, speculation.branching[0]))
                deque(stream, maxlen=0)
                each.append(stream.result.stats)
            row, more = {"T": temperature, "draft": name, **_row(each)}, _details(each, kinds)
            if args.rules:
                more["first_depth"] = _first_depth(firsts)
                row |= _columns(more["first_depth"])
            rows.append(row)
            details[f"{name} at {temperature}"] = more
    title = f"Tokens per step, {args.prompts} held-out prompts, up to {args.max_new_tokens} tokens"
    return Report(title, rows, {"details": details})


def _has_bound(speculation: Speculation) -> bool:
    return speculation.acceptance not in RULES or RULES[speculation.acceptance].lossless


def _row(each: list[GenerationStats]) -> Row:
    total = _sum(each)
    low, high = interval([s.step_tokens for s in each], [s.steps for s in each])
    first = [f"{rate:.2f}" for rate in total.accepted_per_depth["conditional"][:4]]
    return {"tokens/step": total.tokens_per_step, "95 %": f"{low:.2f}-{high:.2f}",
            "drafted": total.drafted / max(1, total.steps), "accepted by depth": " ".join(first)}  # fmt: skip


def _details(each: list[GenerationStats], kinds: list[str]) -> Row:
    by_kind = {kind: [s for s, own in zip(each, kinds, strict=True) if own == kind] for kind in sorted(set(kinds))}
    shares = {kind: _sum(parts).tokens_per_step for kind, parts in by_kind.items()}
    return {**_sum(each).to_json(), "tokens_per_step_by_category": shares}


def _first_depth(firsts: list[FirstDepth]) -> Row:
    """Returns how often the first depth could be accepted at most, and which part of that was, with its interval."""
    bounds = [first.bound for first in firsts]
    if not sum(bounds):
        return {"bound": None, "part": None, "interval": None}
    got = [first.redrawn if first.rule == "coupled" else first.accepted for first in firsts]
    nodes = sum(first.nodes for first in firsts)
    return {"bound": sum(bounds) / nodes, "part": sum(got) / sum(bounds), "interval": interval(got, bounds),
            "nodes": nodes, "accepted": sum(first.accepted for first in firsts) / nodes}  # fmt: skip


def _columns(first: Row) -> Row:
    if first["bound"] is None:
        return {"bound": "-", "of bound": "-"}
    low, high = first["interval"]
    return {"bound": first["bound"], "of bound": f"{first['part']:.3f} ({low:.2f}-{high:.2f})"}


def _sum(parts: list[GenerationStats]) -> GenerationStats:
    total = GenerationStats()
    for part in parts:
        total = total.merge(part)
    return total
