"""`bench same-text` and `bench rows`: count how often the two exactness guarantees hold."""

from __future__ import annotations

import argparse
import hashlib
import json
from typing import Any

from rich.progress import track

from mtp_spec.api import LM
from mtp_spec.bench.common import Report, Row, bundled_prompts, question
from mtp_spec.bench.options import ModelBenchmark, Option, Switch, text_options
from mtp_spec.speculation import DRAFTERS, MAX_DEPTH, TEXT, Speculation

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "0.8": {"temperature": 0.8},
    "0.8, top-p 0.95, presence": {"temperature": 0.8, "top_p": 0.95, "presence_penalty": 0.5},
    "1.2, min-p 0.05": {"temperature": 1.2, "min_p": 0.05},
    "1.2, top-k 40, penalties": {"temperature": 1.2, "top_k": 40, "repetition_penalty": 1.1},
}
TREES = ((3, 2, 1), (2, 2, 2, 1), (4, 1, 1))
SHAPES: dict[str, Speculation] = {
    **{f"chain {depth}": Speculation(depth=depth) for depth in range(1, MAX_DEPTH + 1)},
    **{f"tree {','.join(map(str, tree))}": Speculation(branching=tree) for tree in TREES},
    "adaptive": Speculation(depth=MAX_DEPTH, adaptive=True),
    "text": Speculation(drafters=(TEXT,)),
    "adaptive, text": Speculation(depth=MAX_DEPTH, adaptive=True, drafters=DRAFTERS),
    "budget 12 of 3,3,3": Speculation(branching=(3, 3, 3), budget=12),
}


DIGEST_TEXTS = 100


def same_text(lm: LM, args: argparse.Namespace) -> Report:
    """Counts texts that equal plain decoding's, ids and text, for every shape and way of sampling.

    Each prompt is generated plainly in one way of sampling and with `--shapes` shapes, taken in turn, so that all
    combinations are covered over the prompts; `--all` takes every shape for every prompt. `--digest` writes 100 texts
    and prints one number made of them, which is the same on every processor that the CPU engine runs on.
    """
    if args.digest:
        return _digest(lm, args)
    names, ways = list(SHAPES), list(SAMPLING)
    equal, total = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    by_way = {way: [0, 0] for way in ways}
    wrong: list[Row] = []
    for number, item in enumerate(track(bundled_prompts(args.prompts), "prompts", transient=True)):
        ids, way = question(lm, item["prompt"]), ways[number % len(ways)]
        options = {**SAMPLING[way], "seed": number, "max_new_tokens": args.max_new_tokens}
        plain = lm.generate(ids, speculation=None, **options)
        turn = number // len(ways) * args.shapes
        chosen = names if args.all else [names[(turn + i) % len(names)] for i in range(args.shapes)]
        for name in chosen:
            drafted = lm.generate(ids, speculation=SHAPES[name], **options)
            same = drafted.token_ids == plain.token_ids and drafted.text == plain.text
            equal[name] += same
            total[name] += 1
            by_way[way][0] += same
            by_way[way][1] += 1
            if not same:
                wrong.append({"prompt": item["prompt"], "shape": name, "sampling": way})
    rows = [{"shape": n, "equal": equal[n], "texts": total[n]} for n in names if total[n]]
    sums = (sum(equal.values()), sum(total.values()))
    rows.append({"shape": "all", "equal": sums[0], "texts": sums[1]})
    facts = {"by_sampling": {w: {"equal": a, "texts": b} for w, (a, b) in by_way.items()}, "wrong": wrong}
    title = f"Texts equal to plain decoding: {sums[0]} of {sums[1]} over {args.prompts} prompts"
    return Report(title, rows, facts, failed=bool(wrong))


BENCHMARK = ModelBenchmark(
    name="same-text",
    help="texts equal to plain decoding, any shape and sampling",
    run=same_text,
    options=(
        *text_options(200, 40),
        Option("--shapes", "shapes tried a prompt (3)", type=int, default=3),
        Switch("--all", "every shape for every prompt"),
        Switch("--digest", "print one number made of 100 texts instead, to compare"),
    ),
)


def _digest(lm: LM, args: argparse.Namespace) -> Report:
    number = texts_digest(lm, DIGEST_TEXTS, args.max_new_tokens)
    rows: list[Row] = [
        {"texts": DIGEST_TEXTS, "tokens a text": args.max_new_tokens, "runs on": lm.model.runs_on, "digest": number}
    ]
    return Report("Digest of texts, held-out prompts in six ways of sampling", rows, {"digest": number})


def texts_digest(lm: LM, count: int, max_new_tokens: int) -> str:
    """Returns the first 16 digits of the SHA-256 of the ids of `count` texts."""
    hashed = hashlib.sha256()
    for number, item in enumerate(track(bundled_prompts(count), "texts", transient=True)):
        options = SAMPLING[list(SAMPLING)[number % len(SAMPLING)]]
        out = lm.generate(
            question(lm, item["prompt"]), speculation=None, seed=number, max_new_tokens=max_new_tokens, **options
        )
        hashed.update(json.dumps(out.token_ids).encode())
    return hashed.hexdigest()[:16]
