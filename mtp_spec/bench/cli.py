"""The options of `mtp-spec bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import mtp_spec
from mtp_spec.bench import parsing
from mtp_spec.bench.acceptance.command import acceptance, add_options
from mtp_spec.bench.acceptance.comparing import add_compare
from mtp_spec.bench.cache import cache
from mtp_spec.bench.common import publish
from mtp_spec.bench.cpu import SHAPES as CPU_SHAPES
from mtp_spec.bench.cpu import cpu
from mtp_spec.bench.exactness import same_text
from mtp_spec.bench.files import STAGES, files_bench
from mtp_spec.bench.grid import TREES
from mtp_spec.bench.kernels import WHAT, kernels
from mtp_spec.bench.peers.command import add_cpu_peers, cpu_peers
from mtp_spec.bench.plan import SEARCHED, TAUGHT, check_plan, plan
from mtp_spec.bench.products import SHAPES
from mtp_spec.bench.rows import rows
from mtp_spec.bench.side_by_side import batch
from mtp_spec.bench.speed import speed
from mtp_spec.bench.step import PARTS, step
from mtp_spec.bench.train import train
from mtp_spec.load_checks import CACHE_DTYPES


def add_bench(commands: Any) -> None:
    """Adds the verb `bench` with one subcommand for each benchmark."""
    bench = commands.add_parser("bench", help="measure: same text, bitwise rows, acceptance, speed")
    kinds = bench.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    one = _add(kinds, "same-text", same_text, "texts equal to plain decoding, any shape and sampling", 200, 40)
    one.add_argument("--shapes", type=int, default=3, help="shapes tried a prompt (3)")
    one.add_argument("--all", action="store_true", help="every shape for every prompt")
    one.add_argument("--digest", action="store_true", help="print one number made of 100 texts instead, to compare")
    two = _add(kinds, "rows", rows, "bitwise equality of verified and decoded rows", None, None)
    two.add_argument("--threads", type=parsing.integers, default=[1, 2, 3], metavar="N,...", help="numbers of threads")
    three = kinds.add_parser("acceptance", help="tokens per step, acceptance and speed-up over shapes, rules, contexts",
                             description=acceptance.__doc__)  # fmt: skip
    three.set_defaults(run=acceptance, whole=True)
    _add_model(three)
    add_options(three)
    add_compare(kinds)
    four = _add(kinds, "speed", speed, "wall-clock against plain decoding, and against transformers", 12, 96)
    four.add_argument("--transformers", action="store_true", help="also time transformers' generate, plain and use_mtp")
    four.add_argument("--loads", type=parsing.count, default=3, help="fresh processes that load the model (3)")
    four.add_argument("--adversarial", action="store_true", help="prompts of random tokens; try it at temperature 2")
    _add_plan(kinds)
    _add(kinds, "cache", cache, "what a latent cache in FP8 costs in accuracy", 20, 64)
    eight = _add(kinds, "batch", batch, "tokens a second of texts side by side, plain and auto", None, None)
    eight.add_argument("--sizes", type=parsing.integers, default=[1, 4, 16, 64], metavar="N,...", help="texts at once")
    eight.add_argument("--repeats", type=parsing.count, default=5, help="batches of each size (5)")
    eight.add_argument("--depths", type=parsing.depths, default=[], metavar="K,...", help="chains too (none)")
    eight.add_argument("--turns", action="store_true", help="also one text after another, plain and auto")
    eight.add_argument("--adversarial", action="store_true", help="prompts of random tokens; try it at temperature 2")
    eight.add_argument("--temperature", type=float, default=0.8)
    eight.add_argument("--max-new-tokens", type=int, default=64, help="tokens a text (64)")
    five = kinds.add_parser("kernels", help="FP8 products on a GPU, against the copy rate", description=kernels.__doc__)
    five.set_defaults(run=kernels)
    five.add_argument("--json", type=Path, metavar="FILE", help="write one JSON document")
    five.add_argument("--rows", type=parsing.integers, default=[1, 4, 8, 16, 64], metavar="M,...", help="rows to time")
    five.add_argument("--what", type=parsing.chosen(WHAT), default=list(WHAT), metavar="NAME,...", help=", ".join(WHAT))
    five.add_argument("--shapes", type=parsing.products, default=list(SHAPES), metavar="NxK,...",
                      help="products to time (DeepSeek-V3's)")  # fmt: skip
    five.add_argument("--quick", action="store_true", help="without torch's and cuBLAS's products beside")
    five.add_argument("--tune", action="store_true", help="search for launches of products and experts first")
    five.add_argument("--write", type=Path, metavar="FOLDER", help="put what --tune found there: kernels/tuned")
    six = kinds.add_parser("step", help="decode, verify and draft passes of a slice at full width on a GPU",
                           description=step.__doc__)  # fmt: skip
    six.set_defaults(run=step)
    six.add_argument("--json", type=Path, metavar="FILE", help="write one JSON document")
    six.add_argument("--shape", type=parsing.shape_file, default="671B", metavar="NAME",
                     help="a published model or a config.json (671B)")  # fmt: skip
    six.add_argument("--rows", type=parsing.integers, default=[1, 2, 4, 8, 16], metavar="M,...", help="rows to time")
    six.add_argument("--context", type=parsing.count, default=1024, help="committed tokens (1024)")
    six.add_argument("--parts", type=parsing.chosen(PARTS), default=list(PARTS), metavar="NAME,...",
                     help="what to measure (all): " + ", ".join(PARTS))  # fmt: skip
    six.add_argument("--layers", type=parsing.count, help="MoE layers (default: as many as fit)")
    six.add_argument("--library", action="store_true", help="ranks exchange through NCCL, not in one another's memory")
    _add_cpu(kinds)
    add_cpu_peers(kinds)
    _add_files(kinds)
    _add_train(kinds)
    four.add_argument("--depths", type=parsing.depths, default=[2, 3, 4, 5], metavar="K,K,...", help="chains to time")
    four.add_argument("--temperatures", type=parsing.numbers, default=[0.0, 0.8], metavar="T,T,...")


def _add_plan(kinds: Any) -> None:
    text = 'what "auto" plans with; --grid: the best fixed plan, and "auto" beside it'
    kind = _add(kinds, "plan", plan, text, None, None)
    kind.set_defaults(check=check_plan)
    kind.add_argument("--grid", action="store_true", help='search for the best fixed plan and compare "auto" with it')
    kind.add_argument("--depths", type=parsing.depths, metavar="K,K,...", help="chains of the grid (1,2,3,4,5,6); with "
                      "--depths or --trees, only what they name")  # fmt: skip
    kind.add_argument("--trees", type=parsing.trees, metavar="NxN,...", help="its trees, children by depth ("
                      + ",".join("x".join(map(str, tree)) for tree in TREES) + ")")  # fmt: skip
    kind.add_argument("--halving", action="store_true", help="drop the slower half of the plans again and again")
    kind.add_argument("--temperatures", type=parsing.numbers, default=[0.0, 0.8], metavar="T,T,...", help="(0,0.8)")
    kind.add_argument("--adversarial", action="store_true", help="--grid: also random prompts at temperature 2")
    kind.add_argument("--prompts", type=parsing.count, metavar="N",
                      help=f"held-out prompts ({TAUGHT}; --grid: {SEARCHED}, one half chooses)")  # fmt: skip
    kind.add_argument("--max-new-tokens", type=parsing.count, default=96, help="tokens a text (96)")


def _add_cpu(kinds: Any) -> None:
    ten = kinds.add_parser("cpu", help="passes of the CPU engine against the memory's rate", description=cpu.__doc__)
    ten.set_defaults(run=cpu)
    ten.add_argument("--model", type=Path, help="checkpoint folder (default: the bundled model)")
    ten.add_argument("--json", type=Path, metavar="FILE", help="write one JSON document")
    ten.add_argument("--shape", choices=sorted(CPU_SHAPES), help="a published shape, with random weights")
    ten.add_argument("--folder", type=Path, metavar="FOLDER", help="where --shape writes them (the temporary folder)")
    ten.add_argument("--rows", type=parsing.integers, default=[1, 2, 3, 4, 8, 16], metavar="M,...", help="rows to time")
    ten.add_argument("--context", type=parsing.count, default=256, help="committed tokens (256)")
    ten.add_argument("--repeats", type=parsing.count, default=15, help="rounds (15)")
    ten.add_argument("--acceptance", type=float, default=0.8, metavar="P", help="of each draft, for the notes (0.8)")


def _add_files(kinds: Any) -> None:
    nine = kinds.add_parser("files", help="convert, cast and load of a large FP8 checkpoint against the disk",
                            description=files_bench.__doc__)  # fmt: skip
    nine.set_defaults(run=files_bench)
    nine.add_argument("--json", type=Path, metavar="FILE", help="write one JSON document")
    nine.add_argument("--folder", type=Path, required=True, help="where to work: a new folder, deleted at the end")
    nine.add_argument("--keep", action="store_true", help="do not delete it")
    nine.add_argument("--gigabytes", type=float, default=20.0, metavar="N", help="of the checkpoint, at most (20)")
    nine.add_argument("--layers", type=parsing.count, default=2, metavar="N", help="of the model, one dense (2)")
    nine.add_argument("--model-parallel", type=parsing.count, default=4, metavar="N", help="ranks to convert to (4)")
    nine.add_argument("--stages", type=parsing.chosen(STAGES), default=list(STAGES), metavar="NAME,...",
                      help=", ".join(STAGES))  # fmt: skip
    nine.add_argument("--config", type=Path, metavar="FILE", help="another model's shape than DeepSeek-V3's")
    nine.add_argument("--device", default="cpu", help="where to load: cpu or cuda")
    nine.add_argument("--as-stored", action="store_true", help="on a CPU, keep FP8 weights as they are, as a GPU does, "
                      "and write the texts by the kernels' references, slowly")  # fmt: skip
    nine.add_argument("--max-new-tokens", type=parsing.count, default=8, help="of the texts after loading (8)")


def _add_train(kinds: Any) -> None:
    text = "a training step of the MTP module, the main model frozen"
    kind = kinds.add_parser("train", help=text, description=train.__doc__)
    kind.set_defaults(run=train)
    kind.add_argument("--model", type=Path, metavar="PATH", help="checkpoint folder (default: the bundled model)")
    kind.add_argument("--json", type=Path, metavar="FILE", help="write one JSON document")
    kind.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    kind.add_argument("--batch", type=parsing.count, default=2, metavar="N", help="rows a step (2)")
    kind.add_argument("--context", type=parsing.count, default=128, metavar="N", help="tokens a row (128)")
    kind.add_argument("--depths", type=parsing.count, default=4, metavar="N", help="the module is reused to (4)")
    kind.add_argument("--repeats", type=parsing.count, default=7, help="steps that are timed (7)")
    kind.add_argument("--compile", action="store_true", help="compile the loss, as the trainer does")


def _add(
    kinds: Any, name: str, run: Any, text: str, prompts: int | None, tokens: int | None
) -> argparse.ArgumentParser:
    kind: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=run.__doc__)
    kind.set_defaults(run=run)
    _add_model(kind)
    _add_draft_vocabulary(kind)
    kind.add_argument("--json", type=Path, metavar="FILE", help="write one JSON document")
    if prompts is not None:
        kind.add_argument("--prompts", type=int, default=prompts, help=f"held-out prompts ({prompts})")
        kind.add_argument("--max-new-tokens", type=int, default=tokens, help=f"tokens a text ({tokens})")
    return kind


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="PATH", help="checkpoint folder (default: the bundled model)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16")
    add_weights(parser)
    _add_cache(parser)


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `load` that decide what lies in memory."""
    _add_draft_vocabulary(parser)
    add_weights(parser)
    _add_cache(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds `load`'s option of how weights are kept."""
    parser.add_argument("--weights", metavar="KIND", help="fp8: make a bfloat16 folder FP8 while it loads")


def _add_draft_vocabulary(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draft-vocabulary",
        type=parsing.vocabulary,
        metavar="N|FILE",
        help="draft only the first N tokens, or those in a file of ids; the text stays the same",
    )


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache-dtype", help=f"of the latent cache on a GPU: {' or '.join(CACHE_DTYPES)}")
    parser.add_argument("--max-context", type=parsing.count, metavar="N",
                        help="most tokens of prompt and text (default: the model's own limit)")  # fmt: skip


def run_bench(args: argparse.Namespace) -> None:
    """Loads the model if there is one, runs the benchmark, prints and writes its report."""
    if getattr(args, "whole", False):  # it does all of this itself
        return args.run(args)
    if args.run in (cpu, cpu_peers, kernels, step, files_bench, train):
        return publish(args.run(args), None, args)
    if "check" in args:  # before anything is loaded
        args.check(args)
    side_by_side = max(args.sizes) if args.run is batch else 1
    lm = mtp_spec.load(args.model, device=args.device, dtype=args.dtype, weights=args.weights,
                       draft_vocabulary=args.draft_vocabulary, cache_dtype=args.cache_dtype,
                       max_context=args.max_context, max_batch=side_by_side)  # fmt: skip
    publish(args.run(lm, args), lm, args)
