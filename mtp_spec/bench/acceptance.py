"""`bench acceptance`: tokens per step on held-out chats, through the real caches."""

from __future__ import annotations

import argparse
from typing import Any

from rich.progress import track

from mtp_spec.api import LM
from mtp_spec.bench.common import Report, Row, bundled_prompts, interval, question
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
    """Reports committed tokens per verify step, with the 95 % interval over prompts, and acceptance by depth."""
    prompts = bundled_prompts(args.prompts)
    rows: list[Row] = []
    details: dict[str, Any] = {}
    for temperature in args.temperatures:
        for name, speculation in (rule_shapes(args.rules) if args.rules else shapes(args.depths)).items():
            each: list[GenerationStats] = []
            for item in track(prompts, f"{name} at {temperature}", transient=True):
                out = lm.generate(question(lm, item["prompt"]), temperature=temperature, seed=item["seed"],
                                  max_new_tokens=args.max_new_tokens, speculation=speculation)  # fmt: skip
                each.append(out.stats)
            total = _sum(each)
            low, high = interval([s.step_tokens for s in each], [s.steps for s in each])
            first = [f"{rate:.2f}" for rate in total.accepted_per_depth["conditional"][:4]]
            rows.append({"T": temperature, "draft": name, "tokens/step": total.tokens_per_step,
                         "95 %": f"{low:.2f}-{high:.2f}", "drafted": total.drafted / max(1, total.steps),
                         "accepted by depth": " ".join(first)})  # fmt: skip
            kinds = sorted({item["category"] for item in prompts})
            by_kind = {k: _sum([s for s, i in zip(each, prompts, strict=True) if i["category"] == k]) for k in kinds}
            details[f"{name} at {temperature}"] = {
                **total.to_json(),
                "tokens_per_step_by_category": {k: s.tokens_per_step for k, s in by_kind.items()},
            }
    title = f"Tokens per step, {args.prompts} held-out prompts, up to {args.max_new_tokens} tokens"
    return Report(title, rows, {"details": details})


def _sum(parts: list[GenerationStats]) -> GenerationStats:
    total = GenerationStats()
    for part in parts:
        total = total.merge(part)
    return total
