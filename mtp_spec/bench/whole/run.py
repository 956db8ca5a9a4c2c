"""`bench step --whole`: a whole published model on ranks, with random weights that each rank makes for itself."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mtp_spec.api import LM
from mtp_spec.bench.common import Report, Row, document, write
from mtp_spec.bench.launches import launches
from mtp_spec.bench.passes import fill
from mtp_spec.bench.synthetic import with_module
from mtp_spec.bench.whole import prediction, texts
from mtp_spec.bench.whole.clock import Clock
from mtp_spec.bench.whole.measured import EXTRAPOLATED, MEASURED, Passes, Whole
from mtp_spec.bench.whole.room import BESIDE, Asked, chosen, free_bytes
from mtp_spec.cuda.memory import OVERHEAD_BYTES, plan_memory
from mtp_spec.cuda.state import ROWS, State
from mtp_spec.errors import OptionError
from mtp_spec.model.config import load_config
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.distributed.group import Ranks
from mtp_spec.model.distributed.joining import join_ranks, local_device, open_rooms
from mtp_spec.sampling.params import SamplingParams

PASSES, LIMITS, EXCHANGES, TEXTS, PROMPTS = "passes", "limits", "exchanges", "texts", "prompts"
PARTS = (PASSES, LIMITS, EXCHANGES, TEXTS, PROMPTS)
# defaults
CONTEXTS, WHOLE_ROWS, DEPTHS = [1024, 8192, 32768], [1, 2, 4, 8], [1, 2, 3]
# depth 1 as DeepSeek-V3's report gives it (0.85 to 0.90); deeper ones fit the lengths that TensorRT-LLM publishes for
# R1 with 1, 2, 3 drafts: 1.92, 2.58, 2.82
LAW = [0.87, 0.72, 0.58]
SWEEP = (2**10, 2**12, 2**14, 2**16, 2**18, 2**20)  # bytes that a rank gives
IN_A_ROW = 20  # exchanges timed together
LIMITED = "What limits a pass: the time without each part (parts overlap, so they do not add up)"


def whole(args: argparse.Namespace) -> Report:
    """Returns the report of `bench step --whole`; arguments as `bench.step` declares them."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("bench step --whole needs NVIDIA GPUs and this machine has none: torch finds no CUDA device "
                          "(--device cpu runs the kernels' references, to check the program)")  # fmt: skip
    if args.max_new_tokens > texts.SPARE:
        raise OptionError(f"--max-new-tokens {args.max_new_tokens}: with --whole {texts.SPARE} or fewer")
    ranks = join_ranks("auto", args.device)
    with ranks.together():
        return _run(args, ranks)


def _run(args: argparse.Namespace, ranks: Ranks) -> Report:
    device = torch.device(local_device(args.device, ranks))
    clock, seconds = Clock(ranks, device), dict[str, float]()
    named = with_module(load_config(args.shape))
    most = max(args.contexts) + texts.SPARE
    named = replace(named, fp8_block=(128, 128) if args.dtype == "fp8" else None,
                    max_position_embeddings=max(most, named.max_position_embeddings))  # fmt: skip
    forms = _forms(DeviceModel(named, "meta", ranks=ranks), device) if PROMPTS in args.parts else []
    beside = BESIDE + OVERHEAD_BYTES if clock.on_gpu else 0
    asked = Asked(named, most + ROWS, texts.FORMS[forms[-1]] if forms else 0, beside)
    config = chosen(asked, args.layers, ranks, free_bytes(device, ranks))
    sliced = config != named
    kind = EXTRAPOLATED if sliced else MEASURED
    with _timed(seconds, "rates", ranks):
        if not args.library:
            open_rooms(ranks, str(device))
        rate, copying = clock.rates()
    clock.forget_peak()
    before = torch.cuda.memory_allocated() if clock.on_gpu else 0
    with _timed(seconds, "weights", ranks):
        model = DeviceModel(config, device, ranks=ranks)
        fill(model)
        clock.settle()
    found, memory = _Found(), list[Row]()

    def told(complete: bool) -> Report:
        """Returns the report so far, which is also written, so that an interrupted run leaves what it has measured."""
        facts = {
            "complete": complete, "shape": args.shape.stem, "config": named.to_hf_dict(), "dtype": args.dtype,
            "ranks": ranks.size, "hosts": ranks.size // int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size)),
            "exchange": "none" if ranks.size == 1 else prediction.LIBRARY if ranks.rooms is None else prediction.ROOMS,
            "read_TB_per_s": rate, "copy_TB_per_s": copying, "time": kind, "acceptance replayed": args.acceptance,
            "dense layers": config.first_k_dense_replace,
            "moe layers": config.num_hidden_layers - config.first_k_dense_replace,
            "us of an empty launch": clock.launch if clock.on_gpu else None,
            "exchange times": found.exchanges, "launches": found.launches, "limits": found.limits,
            "texts": found.texts, "first tokens": found.prompts, "memory": _memory(memory, ranks),
            "seconds of parts": seconds,
        }  # fmt: skip
        report = _report(args, facts, found.passes, asked.layers, ranks)
        if args.json is not None and ranks.rank == 0 and not complete:
            write(args.json, json.dumps(document(report, None, args)).encode())
        return report

    if EXCHANGES in args.parts and ranks.size > 1:
        with _timed(seconds, "exchanges", ranks):
            found.exchanges = _sweep(ranks, clock)
    for context in args.contexts if {PASSES, LIMITS} & {*args.parts} or (TEXTS in args.parts and sliced) else ():
        with _timed(seconds, f"passes, {context}", ranks), _watched(clock, model, context + ROWS, before) as watched:
            _passes(Passes(model, _state(model, context), context, named, clock, rate), args, found)
        memory.append(watched)
        told(False)
    if LIMITS in args.parts and clock.on_gpu:
        with _timed(seconds, "launches", ranks):
            found.launches = launches(model, _state(model, args.contexts[0]), args.contexts[0])
    for context in args.contexts if TEXTS in args.parts else ():
        room = context + texts.SPARE
        with _timed(seconds, f"texts, {context}", ranks), _watched(clock, model, room, before) as watched:
            found.texts += _texts(model, context, kind, args, found)
        memory.append(watched)
        told(False)
    for context in args.contexts if PROMPTS in args.parts else ():
        model.expanded, room = asked.expanded, context + texts.SPARE
        with _timed(seconds, f"prompts, {context}", ranks), _watched(clock, model, room, before) as watched:
            found.prompts += texts.first_tokens(model, context, forms, named.num_hidden_layers, clock.settle)
        memory.append(watched)
        told(False)
    return told(True)


class _Found:
    """Rows of all tables."""

    def __init__(self) -> None:
        self.passes, self.limits, self.texts = list[Row](), list[Row](), list[Row]()
        self.prompts, self.exchanges, self.launches = list[Row](), list[Row](), dict[str, float]()
        self.layer_ms = dict[tuple[int, int], float]()


def _passes(passes: Passes, args: argparse.Namespace, found: _Found) -> None:
    """Fills in the passes and limits of a context."""
    for one in passes.all(sorted({*args.rows, *(depth + 1 for depth in args.depths)})):
        if one.missing:
            found.layer_ms[passes.context, one.rows] = one.missing * passes.layer_ms(one)
        if PASSES in args.parts and _wanted(one, args):
            found.passes.append(passes.row(one))
        if LIMITS in args.parts and _wanted(one, args):
            found.limits.append(passes.limits(one))


def _wanted(one: Whole, args: argparse.Namespace) -> bool:
    return one.rows in args.rows or one.name == "draft, 1 row"


def _texts(model: DeviceModel, context: int, kind: str, args: argparse.Namespace, found: _Found) -> list[Row]:
    """Returns the texts of a context."""

    def missing(rows: int) -> float:
        return 0.0 if kind == MEASURED else model.ranks.first([found.layer_ms[context, rows]])[0]

    def written(lm: LM) -> list[Row]:
        return texts.texts(lm, context, args.max_new_tokens, args.depths, args.acceptance, missing, kind)

    return texts.with_lm(model, context, written)


def _state(model: DeviceModel, context: int) -> State:
    """Returns a state whose caches hold random numbers."""
    state = State(model, context + ROWS)
    state.reset(SamplingParams(temperature=0.8, seed=0), [0])
    state.store.normal_()
    return state


def _forms(model: DeviceModel, device: torch.device) -> list[str]:
    """Returns the forms in which prompts can be attended here."""
    return ["absorbed", *(["expanded"] if model.expanded_on(device) else [])]


def _sweep(ranks: Ranks, clock: Clock) -> list[Row]:
    """Times exchanges by themselves, through the rooms if there are any, and through the library."""
    found, rooms = list[Row](), ranks.rooms
    try:
        for through in [prediction.ROOMS] * (rooms is not None) + [prediction.LIBRARY]:
            ranks.rooms = rooms if through == prediction.ROOMS else None
            for size in SWEEP:
                x = torch.zeros(1, size // 4, dtype=torch.int32, device=clock.device)

                def run(x: Tensor = x) -> None:
                    for _ in range(IN_A_ROW):
                        ranks.gather_all(x)

                found.append({"through": through, "bytes": size, "us": clock.slowest(run) / IN_A_ROW})
    finally:
        ranks.rooms = rooms
    return found


@contextmanager
def _timed(seconds: dict[str, float], name: str, ranks: Ranks) -> Iterator[None]:
    """Keeps the seconds of a block, and tells them: a run takes minutes."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
    if ranks.rank == 0:
        print(f"{name}: {seconds[name]:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def _watched(clock: Clock, model: DeviceModel, room: int, before: int) -> Iterator[Row]:
    """Yields a line with the bytes planned for `room` slots, and afterwards the most that were allocated inside."""
    clock.forget_peak()
    told: Row = {"slots": room, "plan": plan_memory(model, room).total}
    yield told
    peak = clock.peak()
    told["peak"] = None if peak is None else peak - before


def _memory(told: list[Row], ranks: Ranks) -> list[Row]:
    """Returns for every rank the block of the run that came closest to its plan, or exceeded it most."""
    if not told:
        return []
    closest = max(told, key=lambda row: (row["peak"] or 0) / row["plan"])
    everyone = ranks.everyone([closest["slots"], closest["plan"], closest["peak"]])
    return [
        {"rank": rank, "slots": slots, "planned GB": plan / 1e9, "peak GB": None if peak is None else peak / 1e9,
         "peak / plan": None if peak is None else peak / plan}
        for rank, (slots, plan, peak) in enumerate(everyone)
    ]  # fmt: skip


def _report(args: argparse.Namespace, facts: dict[str, Any], rows: list[Row], layers: int, ranks: Ranks) -> Report:
    sliced = facts["time"] == EXTRAPOLATED
    held = f"{facts['moe layers']} of {layers} MoE" if sliced else f"all {facts['config']['num_hidden_layers']}"
    title = (
        f"{facts['shape']}, {facts['dtype']}, {held} layers; ranks: {ranks.size}, exchanges: {facts['exchange']}; "
        f"a rank reads {facts['read_TB_per_s']:.2f} TB/s"
    )
    law = "/".join(f"{chance:g}" for chance in args.acceptance)
    notes = [f"replay: drafts are right with these probabilities by depth, whatever the modules propose: {law}"]
    if sliced:
        notes.insert(0, f"EXTRAPOLATED: {held} layers ran; a missing one counts as one of these, timed by themselves")
    if args.device == "cpu":
        notes.insert(0, "the kernels' references on a CPU: these times say that the program runs, and nothing else")
    tables = {
        LIMITED: _limits(facts["limits"]),
        "Texts": facts["texts"], "First tokens": facts["first tokens"],
        "Exchanges by themselves": facts["exchange times"], "Memory of each rank": facts["memory"],
    }  # fmt: skip
    notes += [f"a MoE layer at one row, {name}: {us:.2f} us" for name, us in facts["launches"].items()]
    return Report(title, rows, facts, silent=ranks.rank > 0, notes=notes,
                  tables={name: lines for name, lines in tables.items() if lines})  # fmt: skip


def _limits(rows: list[Row]) -> list[Row]:
    """Returns the lines of the table of limits, without what only the document has."""
    return [{name: value for name, value in row.items() if not isinstance(value, list)} for row in rows]


def fitted(args: argparse.Namespace) -> Report:
    """Returns the report of `bench step --whole --fit FILE ...`."""
    documents = prediction.read_documents(args.fit)
    fit = prediction.Fit.of(documents)
    latency, between = args.between_hosts
    rows, paces, notes = prediction.predicted(documents, fit, args.acceptance, args.depths, latency, between)
    for through, cost in sorted(fit.costs.items()):
        rate = f"{1e-3 / cost.byte:.0f} GB/s" if cost.byte else "no cost"
        notes.append(f"an exchange through {through}: {cost.start:.2f} us, {cost.each:.2f} more for every other rank, "
                     f"its bytes at {rate}")  # fmt: skip
    notes.append(f"within passes exchanges cost {fit.factor:.2f} times what they take by themselves")
    notes.append(f"between hosts, ASSUMED and not measured: {latency:g} us more, {between:g} GB/s a GPU")
    if len({document["ranks"] for document in documents}) < 2:
        notes.append("one number of ranks was measured: what each further rank adds to an exchange is taken as nothing")
    if any(document["time"] == EXTRAPOLATED for document in documents):
        notes.append("some documents are of slices, extrapolated to all layers")
    facts = {"exchange factor": fit.factor, "paces": paces, "documents": [str(file) for file in args.fit],
             "costs": {through: [cost.start, cost.each, cost.byte] for through, cost in fit.costs.items()}}  # fmt: skip
    limits = {f"{file}, ranks: {document['ranks']}. {LIMITED}": _limits(document["limits"])
              for file, document in zip(args.fit, documents, strict=True)}  # fmt: skip
    return Report(f"{documents[0]['shape']}: passes as fitted, and PREDICTED for other ranks", rows, facts, notes=notes,
                  tables={"Tokens a second, by passes alone": paces, **limits})  # fmt: skip
