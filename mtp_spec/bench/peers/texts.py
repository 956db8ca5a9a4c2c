"""Texts compared with vLLM: the same model and prompts, greedy, plain and with chains of drafts, in turn.

vLLM reads the model as written by `mtp-spec export` and `cast --to bf16`: on a CPU it has no products of FP8 blocks.
Every way of vLLM is a process of its own; all are ready before the first text is timed, and idle between requests.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.progress import track

import mtp_spec
from mtp_spec.api import LM
from mtp_spec.bench.common import Report, Row, average, bundled_prompts, question, spread
from mtp_spec.bench.peers.process import Peer
from mtp_spec.bench.turns import shared_tokens
from mtp_spec.errors import OptionError
from mtp_spec.model.checkpoint.cast import cast_job
from mtp_spec.model.checkpoint.export import export_job
from mtp_spec.model.checkpoint.jobs import run_job
from mtp_spec.shapes import model_folder

PAUSE = 0.05  # seconds between turns, so that the other's threads are asleep
WARM_TEXTS, WARM_TOKENS = 2, 32  # for each way: the first ones compile, and ours measures its steps
CACHE_GB = 1  # vLLM's cache for latents, the least that it accepts
PLAIN, THEIR_PLAIN = "mtp_spec plain", "vLLM plain"
SAME = 10  # least common prefix with ours, averaged over prompts: rounding diverges later, another model immediately
OVER_PLAIN, OVER_MTP = "times vLLM plain", "times its best MTP"  # columns


class Timed(NamedTuple):
    """A text: its ids, wall-clock and processor seconds, prompt included, and tokens per step."""

    ids: list[int]
    seconds: float
    cpu: float
    per_step: float


# prompt ids and a number of tokens -> the text
Way = Callable[[list[int], int], Timed]


def texts(args: argparse.Namespace) -> Report:
    """Times every way on the same prompts in turn."""
    prompts = bundled_prompts(args.prompts, seed=1)
    rows, facts, notes = list[Row](), dict[str, Any](), list[str]()
    source = model_folder(args.model)
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="mtp_spec.", dir=args.folder) as folder:
        exported, wide = Path(folder) / "exported", Path(folder) / "bf16"
        run_job(export_job(source), exported)
        run_job(cast_job(exported, "bf16"), wide)
        try:
            for threads in args.threads:
                torch.set_num_threads(threads)
                lm = mtp_spec.load(args.model)
                written, facts["vLLM"] = _compare(lm, wide, prompts, args, threads)
                for what, place in (("seconds", 1), ("seconds of the processor", 2)):
                    facts[f"{what} a text, {threads} threads"] = {
                        name: [text[place] for text in found] for name, found in written.items()
                    }
                part = table(written, threads)
                check_same(part)
                rows += part
                notes.append(note(part, threads, facts["vLLM"]))
        finally:
            torch.set_num_threads(before)
    return Report(f"Greedy texts beside vLLM, median over {len(prompts)} prompts", rows, facts, notes=notes)


def _compare(
    lm: LM, wide: Path, prompts: list[Row], args: argparse.Namespace, threads: int
) -> tuple[dict[str, list[Timed]], Row]:
    """Returns every way's texts, and the facts that vLLM reports."""
    asked = [question(lm, one["prompt"]) for one in prompts]
    longest = max(map(len, asked)) + args.max_new_tokens
    if longest > lm.max_context:
        raise OptionError(f"prompt and text need {longest} tokens, the model takes {lm.max_context}")
    ways = {
        PLAIN: _ours(lm, None),
        **{f"mtp_spec chain {depth}": _ours(lm, depth) for depth in args.depths},
        "mtp_spec auto": _ours(lm, "auto"),
    }
    options = {
        "model": str(wide),
        "dtype": args.vllm_dtype,
        "eager": args.vllm_eager,
        "context": longest + max(args.depths) + 1,
    }
    peers = list[Peer]()
    with ExitStack() as stack:
        for depth in (0, *args.depths):
            peer = Peer(args.vllm_python, "vllm_worker.py", {**options, "depth": depth}, _environment(args, threads))
            peers.append(stack.enter_context(peer))
            ways[f"vLLM MTP {depth}" if depth else THEIR_PLAIN] = _theirs(peer)
        facts = [peer.facts for peer in peers]  # waits until all are ready
        for number in range(WARM_TEXTS):
            _in_turn(ways, number, asked[number % len(asked)], WARM_TOKENS)
        texts: dict[str, list[Timed]] = {name: [] for name in ways}
        for number, ids in enumerate(track(asked, f"{threads} threads", transient=True)):
            for name, text in _in_turn(ways, number, ids, args.max_new_tokens).items():
                texts[name].append(text)
    return texts, facts[0]


def _in_turn(ways: dict[str, Way], number: int, ids: list[int], tokens: int) -> dict[str, Timed]:
    """Returns each way's text; the first way changes with `number`."""
    names, first, found = list(ways), number % len(ways), {}
    for name in names[first:] + names[:first]:
        time.sleep(PAUSE)
        found[name] = ways[name](ids, tokens)
        if len(found[name].ids) != tokens:
            raise mtp_spec.MTPSpecError(f"{name} wrote {len(found[name].ids)} of {tokens} tokens")
    return found


def _environment(args: argparse.Namespace, threads: int) -> dict[str, str]:
    """Returns vLLM's environment variables: threads, unbound like ours, and the least memory for its cache."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GB),
        "VLLM_MLA_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(map(str, args.vllm_preload)),
    }


def _ours(lm: LM, speculation: Any) -> Way:
    def write(ids: list[int], tokens: int) -> Timed:
        start, used = time.perf_counter(), time.process_time()
        out = lm.generate(ids, speculation=speculation, temperature=0.0, seed=0, ignore_eos=True, max_new_tokens=tokens)
        seconds, used = time.perf_counter() - start, time.process_time() - used
        return Timed(out.token_ids, seconds, used, out.stats.tokens_per_step)

    return write


def _theirs(peer: Peer) -> Way:
    def write(ids: list[int], tokens: int) -> Timed:
        text = peer.ask(ids=ids, tokens=tokens)
        per_step = 1 + text["accepted"] / text["steps"] if text["steps"] else 1.0
        return Timed(text["ids"], text["seconds"], text["cpu"], per_step)

    return write


def table(texts: dict[str, list[Timed]], threads: int) -> list[Row]:
    """Returns the rows: medians, over prompts, of the ratio to vLLM's plain and to its fastest way with drafts.

    Processor time is the measure that a shared machine disturbs least: a thread that waits for its turn uses none.
    """
    drafting = [name for name in texts if name.startswith("vLLM") and name != THEIR_PLAIN]
    best = min(drafting, key=lambda name: median(text.seconds for text in texts[name]))
    rows = list[Row]()
    for name, found in texts.items():
        over = {
            other: [peer.seconds / own.seconds for peer, own in zip(texts[other], found, strict=True)]
            for other in (THEIR_PLAIN, best)
        }
        used = {
            other: [peer.cpu / own.cpu for peer, own in zip(texts[other], found, strict=True)]
            for other in (THEIR_PLAIN, best)
        }
        rows.append(
            {
                "threads": threads,
                "way": name,
                "tokens/s": 1 / median(text.seconds / len(text.ids) for text in found),
                OVER_PLAIN: median(over[THEIR_PLAIN]),
                "quartiles": _quartiles(over[THEIR_PLAIN]),
                "by CPU time": median(used[THEIR_PLAIN]),
                OVER_MTP: median(over[best]),
                "its quartiles": _quartiles(over[best]),
                "its CPU time": median(used[best]),
                "tokens a step": average([text.per_step for text in found]),
                "first as ours": average(
                    [shared_tokens(text.ids, own.ids) for text, own in zip(found, texts[PLAIN], strict=True)]
                ),
            }
        )
    return rows


def check_same(rows: list[Row]) -> None:
    """Rejects a peer whose plain text is not this model's: its times and acceptance would mean nothing."""
    shared = next(row["first as ours"] for row in rows if row["way"] == THEIR_PLAIN)
    if shared < SAME:
        raise mtp_spec.MTPSpecError(
            f"vLLM's greedy text has its first {shared:.1f} tokens in common with ours in the "
            "mean: it computes another model, and its times mean nothing"
        )


def _quartiles(values: list[float]) -> str:
    _, low, high = spread(values)
    return f"{low:.2f}-{high:.2f}"


def note(rows: list[Row], threads: int, peer: Row) -> str:
    """Returns a note with the two main ratios of the comparison."""
    own = {row["way"]: row for row in rows if row["way"].startswith("mtp_spec")}
    best = max(own.values(), key=lambda row: row[OVER_MTP])
    return (
        f"{threads} threads, vLLM {peer['vllm']} on torch {peer['torch']}: our plain is "
        f"{own[PLAIN][OVER_PLAIN]:.2f} times vLLM's plain; our best ({best['way']}) is {best[OVER_MTP]:.2f} times "
        "its best MTP"
    )
