"""The options of `mtp-spec bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import mtp_spec
from mtp_spec.bench.acceptance import acceptance
from mtp_spec.bench.cache import cache
from mtp_spec.bench.common import publish
from mtp_spec.bench.exactness import same_text
from mtp_spec.bench.kernels import WHAT, kernels
from mtp_spec.bench.products import SHAPES
from mtp_spec.bench.rows import rows
from mtp_spec.bench.speed import speed
from mtp_spec.bench.step import step
from mtp_spec.loading import CACHE_DTYPES
from mtp_spec.options import ACCEPTANCE_RULES, MAX_DEPTH


def add_bench(commands: Any) -> None:
    """Adds the verb `bench` with one subcommand for each benchmark."""
    bench = commands.add_parser("bench", help="measure: same text, bitwise rows, acceptance, speed")
    kinds = bench.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    one = _add(kinds, "same-text", same_text, "texts equal to plain decoding, any shape and sampling", 200, 40)
    one.add_argument("--shapes", type=int, default=3, help="shapes tried a prompt (3)")
    one.add_argument("--all", action="store_true", help="every shape for every prompt")
    two = _add(kinds, "rows", rows, "bitwise equality of verified and decoded rows", None, None)
    two.add_argument("--threads", type=_integers, default=[1, 2, 3], metavar="N,N,...", help="numbers of threads")
    three = _add(kinds, "acceptance", acceptance, "tokens per step on held-out chats", 60, 128)
    either = three.add_mutually_exclusive_group()
    either.add_argument("--rules", type=_rules, metavar="RULE,...", help="compare acceptance rules on fixed shapes: "
                        "all, or some of " + ", ".join(ACCEPTANCE_RULES))  # fmt: skip
    four = _add(kinds, "speed", speed, "wall-clock against plain decoding, and against transformers", 12, 96)
    four.add_argument("--transformers", action="store_true", help="also time transformers' generate, plain and use_mtp")
    four.add_argument("--loads", type=_count, default=3, help="fresh processes that load the model (3)")
    four.add_argument("--adversarial", action="store_true", help="prompts of random tokens; try it at temperature 2")
    _add(kinds, "cache", cache, "what a latent cache in FP8 costs in accuracy", 20, 64)
    five = kinds.add_parser("kernels", help="FP8 products on a GPU, against the copy rate", description=kernels.__doc__)
    five.set_defaults(run=kernels)
    five.add_argument("--json", type=Path, metavar="FILE", help="write one JSON document")
    five.add_argument("--rows", type=_integers, default=[1, 4, 8, 16, 64], metavar="M,M,...", help="rows to measure")
    five.add_argument("--what", type=_kernels, default=list(WHAT), metavar="NAME,...", help=", ".join(WHAT))
    five.add_argument("--shapes", type=_shapes, default=list(SHAPES), metavar="NxK,...", help="products to time")
    five.add_argument("--quick", action="store_true", help="without torch's and cuBLAS's products beside")
    five.add_argument("--tune", action="store_true", help="search for launches of products and experts first")
    five.add_argument("--write", type=Path, metavar="FOLDER", help="put what --tune found there: kernels/tuned")
    six = kinds.add_parser("step", help="decode, verify and draft passes of a full-width DeepSeek-V3 slice on a GPU",
                           description=step.__doc__)  # fmt: skip
    six.set_defaults(run=step)
    six.add_argument("--json", type=Path, metavar="FILE", help="write one JSON document")
    six.add_argument("--rows", type=_integers, default=[1, 2, 4, 8, 16], metavar="M,M,...", help="rows to measure")
    six.add_argument("--context", type=_count, default=1024, help="committed tokens (1024)")
    six.add_argument("--layers", type=_count, help="MoE layers (default: as many as fit)")
    for kind, holder, depths in ((three, either, [1, 2, 3, 4, 5]), (four, four, [2, 3, 4, 5])):
        holder.add_argument("--depths", type=_depths, default=depths, metavar="K,K,...", help="chains to measure")
        kind.add_argument("--temperatures", type=_numbers, default=[0.0, 0.8], metavar="T,T,...")


def _add(
    kinds: Any, name: str, run: Any, text: str, prompts: int | None, tokens: int | None
) -> argparse.ArgumentParser:
    kind: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=run.__doc__)
    kind.set_defaults(run=run)
    kind.add_argument("--model", type=Path, metavar="PATH", help="checkpoint folder (default: the bundled model)")
    kind.add_argument("--device", default="cpu", help="cpu or cuda")
    kind.add_argument("--dtype", help="float32, bfloat16 or float16")
    add_load_options(kind)
    kind.add_argument("--json", type=Path, metavar="FILE", help="write one JSON document")
    if prompts is not None:
        kind.add_argument("--prompts", type=int, default=prompts, help=f"held-out prompts ({prompts})")
        kind.add_argument("--max-new-tokens", type=int, default=tokens, help=f"tokens a text ({tokens})")
    return kind


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `load` that decide what lies in memory."""
    parser.add_argument("--draft-vocabulary", type=lambda text: int(text) if text.isdigit() else text, metavar="N|FILE",
                        help="draft only the first N tokens, or those in a file of ids; the text stays the same")
    parser.add_argument("--cache-dtype", help=f"of the latent cache on the FP8 kernels: {' or '.join(CACHE_DTYPES)}")


def run_bench(args: argparse.Namespace) -> None:
    """Loads the model if there is one, runs the benchmark, prints and writes its report."""
    if args.run in (kernels, step):
        return publish(args.run(args), None, args)
    lm = mtp_spec.load(args.model, device=args.device, dtype=args.dtype, draft_vocabulary=args.draft_vocabulary,
                       cache_dtype=args.cache_dtype)  # fmt: skip
    publish(args.run(lm, args), lm, args)


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _kernels(text: str) -> list[str]:
    return _some_of(WHAT, text)


def _shapes(text: str) -> list[str]:
    return _some_of(SHAPES, text)


def _some_of(allowed: tuple[str, ...], text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in allowed:
            raise argparse.ArgumentTypeError(f"{name!r}: allowed are {', '.join(allowed)}")
    return names


def _rules(text: str) -> list[str]:
    names = list(ACCEPTANCE_RULES) if text == "all" else text.split(",")
    for name in names:
        if name not in ACCEPTANCE_RULES:
            raise argparse.ArgumentTypeError(f"{name!r}: allowed are all, {', '.join(ACCEPTANCE_RULES)}")
    return names


def _count(text: str) -> int:
    return _integers(text)[0]


def _integers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of 1 or more")
    return values


def _depths(text: str) -> list[int]:
    values = _integers(text)
    if max(values) > MAX_DEPTH:
        raise argparse.ArgumentTypeError(f"{text!r}: a chain has at most {MAX_DEPTH} drafts")
    return values
