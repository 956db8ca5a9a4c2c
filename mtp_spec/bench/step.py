"""`bench step`: a model's shape at full width, against the bytes that a pass must read.

The model has the dense layers, as many MoE layers as the card holds, embedding, head and the MTP module, with random
weights. A pass is timed as a CUDA graph. Its lower bound is the bytes that it reads of weights (counting the distinct
experts its rows were routed to), cache and scales, over the rate at which a kernel reads in the same run; a copy, which
gave the bound earlier, is slower. Random routing is the worst case: neighbouring tokens of a text share experts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_spec.api import LM
from mtp_spec.backends import open_backend
from mtp_spec.bench import parsing
from mtp_spec.bench.common import Report, Row
from mtp_spec.bench.launches import launches
from mtp_spec.bench.options import JSON, SHAPE, Benchmark, Option, OptionGroup, Switch, complete
from mtp_spec.bench.passes import (
    Work,
    chain_tokens,
    draft_pass,
    fill,
    hit,
    layers_pass,
    pass_bytes,
    slice_of,
    verify_pass,
)
from mtp_spec.bench.synthetic import with_module
from mtp_spec.bench.timing import copy_rate, graph_time, kernel_times, read_rate
from mtp_spec.bench.whole.run import CONTEXTS, DEPTHS, LAW, WHOLE_ROWS, fitted, whole
from mtp_spec.bench.whole.run import PARTS as WHOLE_PARTS
from mtp_spec.cuda.memory import plan_memory
from mtp_spec.cuda.state import ROWS, State, stages_of
from mtp_spec.cuda.step import Step
from mtp_spec.errors import OptionError
from mtp_spec.model.config import ModelConfig, load_config
from mtp_spec.model.cuda.layers import Dense, Mixture
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.distributed.joining import join_ranks, local_device, open_rooms
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.speculation import Speculation
from mtp_spec.tree_shape import TreeShape

# the chain for timing sampling and acceptance, and its sampling parameters
CHAIN = 3
ACCEPTED = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature 0.8": SamplingParams(temperature=0.8),
    "temperature 0.8, top-p 0.95": SamplingParams(temperature=0.8, top_p=0.95),
    "with top-k, min-p and penalties": SamplingParams(
        temperature=0.8, top_k=50, top_p=0.95, min_p=0.02, repetition_penalty=1.1, presence_penalty=0.1
    ),
}
# shares of the time of a step
SLICE, WHOLE = "accept, share of this slice's step", "accept, share of a whole model's step"
TEXT = "text"
PARTS = ("passes", "layers", "launches", "accepting", TEXT)
# options of each way to run it, and their defaults
COMMON: dict[str, Any] = {"dtype": "fp8", "layers": None, "library": False, "device": "cuda"}
OF_SLICE = {**COMMON, "rows": [1, 2, 3, 4, 8, 16], "parts": list(PARTS), "acceptance": [0.8], "context": 1024}
OF_WHOLE = {
    **COMMON, "rows": WHOLE_ROWS, "parts": list(WHOLE_PARTS), "acceptance": LAW, "contexts": CONTEXTS, "depths": DEPTHS,
    "max_new_tokens": 96, "whole": True,
}  # fmt: skip
OF_FIT = {"acceptance": LAW, "depths": DEPTHS, "between_hosts": (10.0, 50.0), "fit": None}


def step(args: argparse.Namespace) -> Report:
    """Times a slice of a model at full width. Passes: decode, verify and draft against the bytes they must read.
    Layers: one of either kind and the head, and the whole model from these. Launches: what each costs in a MoE layer.
    Accepting: which share of a step sampling and acceptance take at the whole vocabulary. Text: whether speculation
    changes it. With --whole: all layers on the ranks that torchrun started; --fit predicts other numbers of ranks."""
    _complete(args)
    if args.fit:
        return fitted(args)
    if args.whole:
        return whole(args)
    if not torch.cuda.is_available():
        raise OptionError("bench step needs an NVIDIA GPU and this machine has none: torch finds no CUDA device")
    ranks = join_ranks("auto", "cuda")
    device = local_device("cuda", ranks)
    if not args.library:
        open_rooms(ranks, device)
    rate, copying = ranks.first((read_rate(), copy_rate()))
    torch.cuda.empty_cache()
    full = load_config(args.shape)
    named = full.num_nextn_predict_layers
    full = replace(with_module(full), fp8_block=(128, 128) if args.dtype == "fp8" else None)
    config = slice_of(full, args.context, args.layers, ranks)
    planned = plan_memory(DeviceModel(config, "meta", ranks=ranks), args.context + ROWS)
    before = torch.cuda.memory_allocated()
    model = DeviceModel(config, device, ranks=ranks)
    torch.manual_seed(0)
    fill(model)
    state = State(model, args.context + ROWS)
    rows, found, notes = measure(model, state, full, rate, args)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    facts = {
        "shape": args.shape.stem,
        "dtype": args.dtype,
        "read_TB_per_s": rate,
        "copy_TB_per_s": copying,
        "context": args.context,
        "dense layers": config.first_k_dense_replace,
        "moe layers": config.num_hidden_layers - config.first_k_dense_replace,
        "memory planned": planned.total,
        "memory at the peak": peak,
        "memory ratio": peak / planned.total,
        **found,
        "ranks": ranks.size,
        "exchange": "none" if ranks.size == 1 else "library" if ranks.rooms is None else "rooms",
    }
    if not named:
        notes.append(f"{args.shape.stem} names no MTP module: the draft's is one of the model's own layers")
    if TEXT in args.parts:
        facts["same text"] = _same_text(model, args.context)
        notes.append(f"texts with speculation that are those without: {facts['same text']}")
    title = (
        f"{args.shape.stem} at full width, {args.dtype}, {facts['dense layers']} dense and "
        f"{facts['moe layers']} MoE layers, context {args.context}; reads {rate:.2f} TB/s, copies {copying:.2f} TB/s"
    )
    failed = not all(facts.get("same text", {}).values())
    return Report(title, rows, facts, failed, silent=ranks.rank > 0, notes=notes)


BENCHMARK = Benchmark(
    name="step",
    help="decode, verify and draft passes of a slice at full width on a GPU",
    run=step,
    options=(
        JSON,
        SHAPE,
        Option("--rows", "rows to time (1,2,3,4,8,16; --whole: 1,2,4,8)", type=parsing.integers, metavar="M,..."),
        Option("--context", "committed tokens (1024)", type=parsing.count),
        Option(
            "--parts",
            f"what to measure (all): {', '.join(PARTS)}; --whole: {', '.join(WHOLE_PARTS)}",
            type=parsing.chosen(list(dict.fromkeys(PARTS + WHOLE_PARTS))),
            metavar="NAME,...",
        ),
        Option("--dtype", "of the weights: fp8 or bfloat16 (fp8)", choices=("fp8", "bfloat16")),
        Option(
            "--acceptance",
            "chances that a draft of depth 1, 2, ... is accepted, for the notes on chains (0.8) and --whole's replay "
            f"({','.join(map(str, LAW))})",
            type=parsing.chances,
            metavar="P,P,...",
        ),
        Option("--layers", "MoE layers (default: as many as fit; --whole: all)", type=parsing.count),
        Switch("--library", "ranks exchange through NCCL, not in one another's memory"),
        OptionGroup(
            "all layers on ranks",
            Switch("--whole", "all layers, each rank making its part; with --layers some, and the others extrapolated"),
            Option(
                "--contexts",
                "committed tokens (1024,8192,32768)",
                type=parsing.integers,
                metavar="N,...",
            ),
            Option("--depths", "chains to replay (1,2,3)", type=parsing.depths, metavar="K,..."),
            Option("--max-new-tokens", "tokens a text (96)", type=parsing.count, metavar="N"),
            Option(
                "--device",
                "cuda, or cpu: the kernels' references, to check the program (cuda)",
                choices=("cuda", "cpu"),
            ),
            Option(
                "--fit",
                "measure nothing: fit these documents of --whole, and predict 8 and 16 ranks on two hosts",
                nargs="+",
                type=Path,
                metavar="FILE",
            ),
            Option(
                "--between-hosts",
                "of --fit: microseconds and GB/s that the network is assumed to have (10,50)",
                type=parsing.pair,
                metavar="US,GB/s",
            ),
        ),
    ),
)


def _complete(args: argparse.Namespace) -> None:
    """Fills in the defaults of the way that --whole and --fit choose; refuses options without effect there."""
    own, why = OF_SLICE, "has an effect with --whole only, or with --fit"
    if args.fit:
        own, why = OF_FIT, "has no effect beside --fit, which measures nothing"
    elif args.whole:
        own, why = OF_WHOLE, "has no effect beside --whole"
    if args.device == "cpu" and own is OF_SLICE:
        raise OptionError("--device cpu goes with --whole: a slice is timed on a GPU")
    complete(args, own, [*OF_SLICE, *OF_WHOLE, *OF_FIT], why)
    for name in args.parts or ():
        if name not in own["parts"]:
            raise OptionError(
                f"--parts {name}: {'with' if args.whole else 'without'} --whole allowed are {', '.join(own['parts'])}"
            )


def measure(
    model: DeviceModel, state: State, full: ModelConfig, rate: float, args: argparse.Namespace
) -> tuple[list[Row], dict[str, Any], list[str]]:
    """Returns rows, facts and notes of the requested parts, except texts; the caches hold random numbers.

    Args:
        full: the whole model, of which `model` is a slice.
        rate: TB/s of reading.
    """
    rows, facts, notes, seconds = list[Row](), dict[str, Any](), list[str](), dict[str, float]()
    state.reset(SamplingParams(temperature=0.8, seed=0), [0])
    state.store.normal_()
    for part in [part for part in args.parts if part != TEXT]:
        start, context = time.perf_counter(), args.context
        if part == "passes":
            rows += [_pass(_verified(m), verify_pass(model, state, context, m), rate) for m in args.rows]
            rows.append(_pass("draft, 1 row", draft_pass(model, state, context), rate))
            facts["chains"], told = _chains(rows, args.acceptance)
            notes += told
            facts["kernels of one row"] = kernel_times(verify_pass(model, state, context, 1).run)
        elif part == "layers":
            rows += _layers(model, state, context, args.rows, rate)
            facts["extrapolated"] = _extrapolated(rows, full, args.rows)
        elif part == "launches":
            facts["launches"] = launches(model, state, context)
            notes += [f"a MoE layer at one row, {name}: {us:.2f} us" for name, us in facts["launches"].items()]
        else:
            accepting, layers = _accepting(model, state, full, context, rate)
            rows += [row for row in layers if row["pass"] not in {known["pass"] for known in rows}]
            facts["accepting"] = accepting
            notes += [_sentence(name, micro, full) for name, micro in accepting.items()]
        seconds[part] = time.perf_counter() - start
    return rows, {**facts, "seconds of parts": seconds}, notes


def _chains(rows: list[Row], chances: list[float]) -> tuple[dict[str, float], list[str]]:
    """Returns the expected speed-up over plain decoding of chains with given acceptance probabilities.

    It follows from the passes' times; the acceptance of the random weights plays no part.

    Args:
        chances: probability that a draft of depth 1, 2, ... is accepted if those before it are; the last one applies to
            deeper drafts too.
    """
    micro = {row["pass"]: row["us"] for row in rows}
    plain, draft, found, notes = micro.get(_verified(1)), micro["draft, 1 row"], dict[str, float](), list[str]()
    for depth in range(1, CHAIN + 2):
        step = micro.get(_verified(depth + 1))
        if plain is None or step is None:
            continue
        tokens = chain_tokens(chances, depth)
        found[f"chain of {depth}"] = tokens * plain / (step + depth * draft)
        notes.append(
            f"a chain of {depth} with {tokens:.2f} tokens a step would be {found[f'chain of {depth}']:.2f} times plain"
        )
    return found, notes


def _verified(rows: int) -> str:
    return f"decode and verify, {rows} rows"


def _accepting(
    model: DeviceModel, state: State, full: ModelConfig, context: int, rate: float
) -> tuple[dict[str, Row], list[Row]]:
    """Returns microseconds of a chain's step by part, and which share of it drawing, accepting and committing take: in
    this slice's step, and in one of the whole model, whose layers are timed too."""
    shape, out = TreeShape.of(Speculation(depth=CHAIN)), dict[str, Row]()
    layers = _layers(model, state, context, [CHAIN + 1], rate)
    (whole,) = _extrapolated(layers, full, [CHAIN + 1]).values()
    for name, params in ACCEPTED.items():
        step = Step(model, state, shape, stages_of(params), CHAIN + 1)
        state.reset(replace(params, seed=0), [0])
        state.store.normal_()
        state.blank()
        state.length.fill_(context)
        step()  # gives it logits and rows
        length = torch.full_like(state.length, context)

        def run(part: Callable[[], None], length: Tensor = length) -> None:
            part()
            state.length.copy_(length)  # accepting advances the length: start every repetition at the same place

        state.length.copy_(length)
        micro = {part: graph_time(partial(run, work)) for part, work in step.parts().items()}
        verifying = {SLICE: micro["verify"], WHOLE: 1e3 * whole}
        shares = {where: micro["accept"] / (micro["draft"] + us + micro["accept"]) for where, us in verifying.items()}
        out[name] = {**micro, **shares}
    return out, layers


def _sentence(name: str, micro: Row, full: ModelConfig) -> str:
    return (
        f"drawing, accepting, committing a chain of {CHAIN} at {full.vocab_size} tokens, {name}: "
        f"{micro['accept']:.0f} us, {micro[SLICE]:.1%} of this slice's step, {micro[WHOLE]:.2%} of a step of all "
        f"{full.num_hidden_layers} layers (extrapolated)"
    )


def _layers(model: DeviceModel, state: State, context: int, counts: list[int], rate: float) -> list[Row]:
    """Times layers of both kinds and the head separately; every layer once, so that none is read from the cache."""
    rows = []
    for m in counts:
        x = torch.randn(m, model.config.hidden_size, device=model.device).bfloat16()
        for name, kind in (("dense layer", Dense), ("MoE layer", Mixture)):
            work = layers_pass(model, state, context, m, kind)
            row = _pass(f"{name}, {m} rows", work, rate)
            for key in ("us", "floor us", "GB", "launches"):
                row[key] /= len(work.reads)
            rows.append(row)
        rows.append(_pass(f"head, {m} rows", Work(partial(model.logits, x), [model.lm_head], 0), rate))
    return rows


def _pass(name: str, work: Work, rate: float) -> Row:
    experts = hit(work)
    micro = graph_time(work.run)
    size = pass_bytes(work, experts)
    floor = size / rate / 1e6
    launches = sum(count for count, _ in kernel_times(work.run).values())
    return {
        "pass": name,
        "us": micro,
        "floor us": floor,
        "x floor": micro / floor,
        "GB": size / 1e9,
        "experts": sum(experts) / len(experts) if experts else 0.0,
        "launches": launches,
    }


def _extrapolated(rows: list[Row], full: ModelConfig, counts: list[int]) -> Row:
    """Returns the milliseconds of the whole model, extrapolated from its layers, as it fits on no single card."""
    by_name = {row["pass"]: row["us"] for row in rows}
    dense, every = full.first_k_dense_replace, full.num_hidden_layers
    out = {}
    for m in counts:
        layers = dense * by_name[f"dense layer, {m} rows"] + (every - dense) * by_name[f"MoE layer, {m} rows"]
        out[f"ms of {every} layers, {m} rows"] = (layers + by_name[f"head, {m} rows"]) / 1e3
    return out


def _same_text(model: DeviceModel, context: int) -> dict[str, bool]:
    """Whether speculation leaves the text unchanged, at these shapes."""
    lm = LM(open_backend(model, None, context), None, context)
    prompt = [(31 * i) % model.config.vocab_size for i in range(70)]
    texts = {}
    for name, speculation in (("plain", None), ("chain of 3", 3), ("tree", Speculation(branching=(3, 2, 1)))):
        out = lm.generate(prompt, max_new_tokens=24, temperature=0.8, seed=1, speculation=speculation)
        texts[name] = out.token_ids
    return {name: ids == texts["plain"] for name, ids in texts.items()}
