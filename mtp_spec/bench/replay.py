"""`bench replay`: what speculation costs and would bring if drafts were accepted by a given law.

Random weights have the cost of trained ones but drafts that are never right. Here the MTP modules run, and their drafts
are replaced by tokens that are right with given probabilities (`drafting.Replay`): steps, passes, cache moves and the
host's work are those of a text with that acceptance. The acceptance itself is an input, not a result.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

import mtp_spec
from mtp_spec.api import LM
from mtp_spec.backends import open_backend
from mtp_spec.bench import parsing
from mtp_spec.bench.common import Report, Row, spread
from mtp_spec.bench.options import JSON as JSON_OPTION
from mtp_spec.bench.options import LOADED, Benchmark, Option
from mtp_spec.bench.passes import fill, slice_of
from mtp_spec.bench.synthetic import with_module
from mtp_spec.bench.turns import WARM_TOKENS, Written, check_kept, ours
from mtp_spec.cuda.kinds import PLANNED_DEPTH
from mtp_spec.drafting import Replay
from mtp_spec.errors import OptionError
from mtp_spec.model.config import load_config
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.distributed.joining import join_ranks
from mtp_spec.speculation import Speculation
from mtp_spec.tree import MODULES

PLAIN, AUTO = "plain", "auto"


def bench_replay(args: argparse.Namespace) -> Report:
    """Times texts whose drafts are accepted with given probabilities, in turn with plain decoding. The MTP modules run
    as always; only their tokens are replaced. With --shape: random weights in the shape of a published model, on a
    GPU."""
    lm = _random(args) if args.shape is not None else _loaded(args)
    shapes: dict[str, dict[str, Any]] = {f"chain {depth}": {"depth": depth} for depth in args.depths}
    shapes[AUTO] = {"depth": PLANNED_DEPTH, "adaptive": True}
    check_kept(lm, len(shapes))
    texts: dict[str, list[Written]] = {PLAIN: [], **{name: [] for name in shapes}}
    options = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens, "ignore_eos": True}
    for number in range(args.prompts):
        ids = torch.randint(lm.config.vocab_size, (args.context,), generator=torch.Generator().manual_seed(number))
        prompt, own = ids.tolist(), {**options, "seed": number}
        plain = ours(lm, None)
        tokens = plain(prompt, own).ids
        law = Replay(tokens, args.acceptance, seed=number)
        ways = {name: ours(lm, Speculation(**shape, drafters=(MODULES, law))) for name, shape in shapes.items()}
        for way in ways.values() if number == 0 else ():  # compiled, captured and measured once
            way(prompt, {**own, "max_new_tokens": WARM_TOKENS})
        for name, way in {PLAIN: plain, **ways}.items():
            texts[name].append(way(prompt, own))
            if texts[name][-1].ids != tokens:
                raise mtp_spec.MTPSpecError(f"{name} changed the text of prompt {number}: plain decoding wrote another")
    rows = [_row(name, own, texts[PLAIN]) for name, own in texts.items()]
    facts = {"acceptance replayed": args.acceptance, "config": lm.config.model_type}
    law_text = "/".join(f"{chance:g}" for chance in args.acceptance)
    note = f"replay: drafts are right with the given probabilities ({law_text} by depth), whatever the modules propose"
    title = (
        f"Texts with replayed acceptance, {args.prompts} prompts of {args.context} tokens, {args.max_new_tokens} new"
    )
    return Report(title, rows, facts, silent=lm.model.ranks.rank > 0, notes=[note])


BENCHMARK = Benchmark(
    name="replay",
    help="wall-clock of speculation at a given acceptance, with random weights too",
    run=bench_replay,
    options=(
        *LOADED,
        JSON_OPTION,
        Option("--shape", "random weights of this published model, on a GPU", type=parsing.shape_file, metavar="NAME"),
        Option("--layers", "of --shape: MoE layers (default: as many as fit)", type=parsing.count),
        Option(
            "--acceptance",
            "probability that a draft of depth 1, 2, ... is right if those before it are (0.8)",
            type=parsing.chances,
            default=[0.8],
            metavar="P,P,...",
        ),
        Option("--depths", "chains to time (1,2,3)", type=parsing.depths, default=[1, 2, 3], metavar="K,K,..."),
        Option("--prompts", "random prompts (3)", type=parsing.count, default=3),
        Option("--context", "tokens of a prompt (64)", type=parsing.count, default=64),
        Option("--max-new-tokens", "tokens a text (96)", type=parsing.count, default=96),
        Option("--temperature", "(0.8)", type=float, default=0.8),
    ),
)


def _loaded(args: argparse.Namespace) -> LM:
    lm = mtp_spec.load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        weights=args.weights,
        cache_dtype=args.cache_dtype,
        max_context=args.max_context,
    )
    if not lm.model.mtp:
        raise OptionError("bench replay replaces what MTP modules draft, and this checkpoint has none")
    return lm


def _random(args: argparse.Namespace) -> LM:
    """Returns a slice of a published shape with random weights."""
    if not torch.cuda.is_available():
        raise OptionError("--shape needs an NVIDIA GPU and this machine has none: torch finds no CUDA device")
    if args.dtype not in (None, "bfloat16", "fp8"):
        raise OptionError(f"--dtype {args.dtype}: with --shape give fp8 or bfloat16")
    ranks, context = join_ranks("auto", "cuda"), args.context + args.max_new_tokens + 1
    full = with_module(load_config(args.shape))
    full = replace(full, fp8_block=None if args.dtype == "bfloat16" else full.fp8_block)
    model = DeviceModel(slice_of(full, context, args.layers, ranks), "cuda", ranks=ranks)
    torch.manual_seed(0)
    fill(model)
    return LM(open_backend(model, None, context), None, context)


def _row(name: str, own: list[Written], plain: list[Written]) -> Row:
    ratios = [other.pace / text.pace for text, other in zip(own, plain, strict=True)]
    steps, tokens = sum(text.stats.steps for text in own), sum(text.stats.step_tokens for text in own)
    rates = own[0].stats
    for text in own[1:]:
        rates = rates.merge(text.stats)
    return {
        "way": name if name == PLAIN else f"{name}, replay",
        "tokens/step": tokens / steps,
        "accepted by depth": " ".join(f"{rate:.2f}" for rate in rates.accepted_per_depth["conditional"]) or "-",
        "ms/step": 1e3 * sum(text.seconds for text in own) / steps,
        "tokens/s": 1 / spread([text.pace for text in own])[0],
        "times plain": spread(ratios)[0],
    }
