"""`bench batch`: tokens per second of batches, plain and speculative."""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

from rich.progress import track

from mtp_spec.api import LM
from mtp_spec.bench import parsing
from mtp_spec.bench.common import Report, Row, bundled_prompts, question, spread
from mtp_spec.bench.options import ModelBenchmark, Option, Switch
from mtp_spec.bench.turns import noise
from mtp_spec.sampling.seeds import text_seeds

TURNS = "one by one, "
SEED = 0


def batch(lm: LM, args: argparse.Namespace) -> Report:
    """Lets texts start together, in batches of each size, plain and speculative by turns, and compares tokens a second.

    A batch ends with its longest text; tokens are counted until then.
    """
    ways: dict[str, Any] = {"plain": None, "auto": "auto"} | {f"chain {depth}": depth for depth in args.depths}
    if args.turns:
        ways |= {TURNS + "plain": None, TURNS + "auto": "auto"}
    rows, rated, wrong = list[Row](), dict[str, list[float]](), 0
    for size in args.sizes:
        _warm_up(lm, size, ways, args)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        steps: dict[str, list[float]] = {name: [] for name in ways}
        texts: dict[str, list[list[int]]] = {}
        for repeat in track(range(args.repeats), f"{size} texts", transient=True, disable=lm.model.ranks.rank > 0):
            prompts = _prompts(lm, size, repeat, args.adversarial)
            order = list(ways)
            for name in order[repeat % len(order) :] + order[: repeat % len(order)]:
                rate, per_step, texts[name] = _run(lm, prompts, name, ways[name], args)
                rates[name].append(rate)
                steps[name].append(per_step)
            wrong += sum(own != plain for name in ways for own, plain in zip(texts[name], texts["plain"], strict=True))
        for name in ways:
            quotients = [own / plain for own, plain in zip(rates[name], rates["plain"], strict=True)]
            median, low, high = spread(quotients)
            rows.append(
                {
                    "batch": size,
                    "way": name,
                    "tokens/s": spread(rates[name])[0],
                    "times plain": median,
                    "quartiles": f"{low:.2f}-{high:.2f}",
                    "tokens a step": spread(steps[name])[0],
                }
            )
            rated[f"{size} {name}"] = rates[name]
    gc.unfreeze()
    title = f"Texts side by side, median of {args.repeats} batches, temperature {args.temperature}"
    facts = {"tokens per second": rated, "texts unlike plain": wrong, "ranks": lm.model.ranks.size}
    return Report(title, rows, facts, failed=wrong > 0, silent=lm.model.ranks.rank > 0)


BENCHMARK = ModelBenchmark(
    name="batch",
    help="tokens a second of texts side by side, plain and auto",
    run=batch,
    side_by_side=lambda args: max(args.sizes),
    options=(
        Option("--sizes", "texts at once", type=parsing.integers, default=[1, 4, 16, 64], metavar="N,..."),
        Option("--repeats", "batches of each size (5)", type=parsing.count, default=5),
        Option("--depths", "chains too (none)", type=parsing.depths, default=[], metavar="K,..."),
        Switch("--turns", "also one text after another, plain and auto"),
        Switch("--adversarial", "prompts of random tokens; try it at temperature 2"),
        Option("--temperature", "of all texts (0.8)", type=float, default=0.8),
        Option("--max-new-tokens", "tokens a text (64)", type=int, default=64),
    ),
)


def _warm_up(lm: LM, size: int, ways: dict[str, Any], args: argparse.Namespace) -> None:
    """Lets the planner measure, a GPU capture everything that it captures at second use, and the garbage collector scan
    the imported modules: all of this happens once in a program, so it is not part of a batch's time."""
    for repeat in range(args.repeats) if lm.backend.captured else range(1):
        for name, way in ways.items():
            if size == 1 or not name.startswith(TURNS):
                for _ in range(2 if lm.backend.captured else 1):
                    _run(lm, _prompts(lm, size, repeat, args.adversarial), name, way, args)
    gc.collect()
    gc.freeze()


def _prompts(lm: LM, size: int, repeat: int, adversarial: bool) -> list[list[int]]:
    if adversarial:
        return [noise(lm, repeat * size + number) for number in range(size)]
    return [question(lm, item["prompt"]) for item in bundled_prompts(size, seed=repeat)]


def _run(
    lm: LM, prompts: list[list[int]], name: str, speculation: Any, args: argparse.Namespace
) -> tuple[float, float, list[list[int]]]:
    """Returns tokens per second, tokens per step and the texts."""
    options = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens, "speculation": speculation}
    seeds = text_seeds(SEED, len(prompts))
    lm.close()  # so that no batch finds an earlier batch's prompts in the cache
    start = time.perf_counter()
    if name.startswith(TURNS):
        out = [lm.generate(prompt, seed=seed, **options) for prompt, (seed,) in zip(prompts, seeds, strict=True)]
    else:
        out = lm.generate(prompts, seed=SEED, **options)
    took = time.perf_counter() - start
    steps = sum(text.stats.steps for text in out)
    tokens = sum(text.stats.new_tokens for text in out)
    return tokens / took, sum(text.stats.step_tokens for text in out) / max(1, steps), [text.token_ids for text in out]
