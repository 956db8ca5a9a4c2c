"""Texts beside vLLM: the same model and prompts, greedy, plain and with chains of drafts, one way after another.

vLLM reads the model as `mtp-spec export` and `cast --to bf16` write it: on a CPU it has no products of FP8 blocks.
Every way of vLLM is a process of its own, all ready before the first text is timed; a way that is not asked rests.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import track

import mtp_spec
from mtp_spec.api import LM
from mtp_spec.bench.common import Report, Row, average, bundled_prompts, question, spread
from mtp_spec.bench.peers.process import Peer
from mtp_spec.bench.turns import WARM_TOKENS, Generate, Written, in_turn, ours, shared_tokens
from mtp_spec.errors import OptionError
from mtp_spec.model.cast import cast_job
from mtp_spec.model.export import export_job
from mtp_spec.model.jobs import run_job
from mtp_spec.stats import GenerationStats

PAUSE = 0.05  # seconds between turns, so that the other's threads have gone to sleep
WARM_TEXTS = 2  # of each way: the first ones compile, and ours measures its steps
CACHE_GB = 1  # that vLLM keeps for latents, the least that it takes
PLAIN, THEIR_PLAIN = "mtp_spec plain", "vLLM plain"
OVER_PLAIN, OVER_MTP = "times vLLM plain", "times its best MTP"  # columns


def texts(args: argparse.Namespace) -> Report:
    """Times every way on the same prompts in turn."""
    prompts = bundled_prompts(args.prompts, seed=1)
    rows, facts, notes = list[Row](), dict[str, Any](), list[str]()
    source = args.model or Path(str(files("mtp_spec.configs") / "demo"))
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="mtp_spec.", dir=args.folder) as folder:
        exported, wide = Path(folder) / "exported", Path(folder) / "bf16"
        run_job(export_job(source), exported)
        run_job(cast_job(exported, "bf16"), wide)
        try:
            for threads in args.threads:
                torch.set_num_threads(threads)
                lm = mtp_spec.load(args.model)
                part, paces, peer = _compare(lm, wide, prompts, args, threads)
                rows += part
                facts[f"seconds per token, {threads} threads"], facts["vLLM"] = paces, peer
                notes.append(_note(part, threads, peer))
        finally:
            torch.set_num_threads(before)
    return Report(f"Greedy texts beside vLLM, median over {len(prompts)} prompts", rows, facts, notes=notes)


def _compare(
    lm: LM, wide: Path, prompts: list[Row], args: argparse.Namespace, threads: int
) -> tuple[list[Row], dict[str, list[float]], Row]:
    """Returns the table's rows, seconds per token of every text, and what vLLM says of itself."""
    asked = [question(lm, one["prompt"]) for one in prompts]
    longest = max(map(len, asked)) + args.max_new_tokens
    if longest > lm.max_context:
        raise OptionError(f"prompt and text need {longest} tokens, the model takes {lm.max_context}")
    ways = {PLAIN: ours(lm, None), **{f"mtp_spec chain {depth}": ours(lm, depth) for depth in args.depths},
            "mtp_spec auto": ours(lm, "auto")}  # fmt: skip
    written: dict[str, list[Written]] = {}
    steps: dict[str, list[Row]] = {}
    facts: Row = {}
    with ExitStack() as stack:
        for depth in (0, *args.depths):
            name = f"vLLM MTP {depth}" if depth else THEIR_PLAIN
            options = {"model": str(wide), "dtype": args.vllm_dtype, "depth": depth, "context": longest + max(
                args.depths) + 1, "eager": args.vllm_eager, "threads": threads}  # fmt: skip
            peer = stack.enter_context(Peer(args.vllm_python, "vllm_worker.py", options, _environment(threads)))
            facts, steps[name] = peer.facts, []
            ways[name] = _theirs(peer, steps[name])
        ways = {name: _rested(way) for name, way in ways.items()}
        options = {"temperature": 0.0, "seed": 0, "ignore_eos": True}
        for number in range(WARM_TEXTS):
            in_turn(ways, number, asked[number % len(asked)], {**options, "max_new_tokens": WARM_TOKENS * 4})
        for found in steps.values():
            found.clear()
        for number, ids in enumerate(track(asked, f"{threads} threads", transient=True)):
            found_texts = in_turn(ways, number, ids, {**options, "max_new_tokens": args.max_new_tokens})
            for name, text in found_texts.items():
                written.setdefault(name, []).append(text)
    paces = {name: [text.pace for text in found] for name, found in written.items()}
    return _rows(written, paces, steps, threads), paces, facts


def _environment(threads: int) -> dict[str, str]:
    """Returns vLLM's own switches: its threads, unbound as ours are, and the least memory for its cache."""
    return {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GB), "VLLM_MLA_DISABLE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip


def _rested(way: Generate) -> Generate:
    """Returns a way that begins when the one before has gone to sleep."""

    def generate(ids: list[int], options: dict[str, Any]) -> Written:
        time.sleep(PAUSE)
        return way(ids, options)

    return generate


def _theirs(peer: Peer, steps: list[Row]) -> Generate:
    """Returns vLLM's way; `steps` gets the steps and accepted drafts of every text."""

    def generate(ids: list[int], options: dict[str, Any]) -> Written:
        answer = peer.ask(ids=ids, tokens=options["max_new_tokens"])
        steps.append(answer)
        if len(answer["ids"]) != options["max_new_tokens"]:
            raise mtp_spec.MTPSpecError(f"vLLM wrote {len(answer['ids'])} of {options['max_new_tokens']} tokens")
        return Written(answer["ids"], answer["seconds"], GenerationStats())

    return generate


def _rows(
    written: dict[str, list[Written]], paces: dict[str, list[float]], steps: dict[str, list[Row]], threads: int
) -> list[Row]:
    theirs = [name for name in steps if name != THEIR_PLAIN]
    best = min(theirs, key=lambda name: median(paces[name]))
    rows = list[Row]()
    for name, found in written.items():
        plain, drafted = (
            spread([peer / own for peer, own in zip(paces[other], paces[name], strict=True)])
            for other in (THEIR_PLAIN, best)
        )
        rows.append({"threads": threads, "way": name, "tokens/s": 1 / median(paces[name]),
                     OVER_PLAIN: plain[0], "quartiles": f"{plain[1]:.2f}-{plain[2]:.2f}",
                     OVER_MTP: drafted[0], "its quartiles": f"{drafted[1]:.2f}-{drafted[2]:.2f}",
                     "tokens a step": _per_step(found, steps.get(name)),
                     "first tokens as mtp_spec": average([shared_tokens(text.ids, own.ids) for text, own in
                                                          zip(found, written[PLAIN], strict=True)])})  # fmt: skip
    return rows


def _per_step(texts: list[Written], steps: list[Row] | None) -> float:
    """Returns tokens that a step commits in the mean; plain decoding commits one."""
    if steps is None:
        return average([text.stats.tokens_per_step for text in texts])
    count = sum(text["steps"] for text in steps)
    return 1 + sum(text["accepted"] for text in steps) / count if count else 1.0


def _note(rows: list[Row], threads: int, peer: Row) -> str:
    """Says the two ratios that the comparison is for."""
    own = {row["way"]: row for row in rows if row["way"].startswith("mtp_spec")}
    best = max(own.values(), key=lambda row: row["tokens/s"])
    return (f"{threads} threads, vLLM {peer['vllm']} on torch {peer['torch']}: plain is "
            f"{own[PLAIN][OVER_PLAIN]:.2f} times vLLM's plain; our best ({best['way']}) is "
            f"{best[OVER_MTP]:.2f} times its best MTP")  # fmt: skip
