"""`mtp-spec inspect`: a folder's contents and integrity, or an estimate from a configuration alone."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mtp_spec.bench.options import LOAD, add_options
from mtp_spec.cli.inspection_table import show_checkpoint
from mtp_spec.errors import MTPSpecError, OptionError
from mtp_spec.shapes import named_shape, published

EXAMPLES = """examples:
  mtp-spec inspect /models/DeepSeek-V3
  mtp-spec inspect --agreement
  mtp-spec inspect configs/config_671B.json --model-parallel 16 --card H100
  mtp-spec inspect GLM-4.7-Flash --card H100
"""


def add_inspect(commands: Any) -> None:
    """Adds the verb."""
    inspect = commands.add_parser(
        "inspect",
        help="what a checkpoint holds: shape, sizes, MTP modules, memory; or what a configuration alone would need",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument(
        "path",
        nargs="?",
        type=Path,
        help="checkpoint folder (default: the bundled model), a configuration file, or the name of "
        "one of the library's own: " + ", ".join(published()),
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON document")
    inspect.add_argument(
        "--agreement", action="store_true", help="load it and measure how often drafts of each depth are what it writes"
    )
    inspect.add_argument("--device", metavar="DEVICE", help="where --agreement runs: cpu or cuda (cpu)")
    inspect.add_argument("--checksums", action="store_true", help="read everything and compare with checksums.json")
    add_options(inspect, LOAD)
    alone = inspect.add_argument_group("of a configuration file")
    alone.add_argument("--model-parallel", type=int, metavar="N", help="ranks (1)")
    alone.add_argument("--card", metavar="NAME", help="estimate the speed on H100 or H200")
    alone.add_argument("--copy-rate", type=float, metavar="TB/S", help="the same on a card that copies so fast")


def run_inspect(args: argparse.Namespace) -> None:
    """Prints the requested facts.

    Raises:
        OptionError: an option does not fit the kind of path.
        MTPSpecError: a tensor differs from its checksum.
    """
    args.path = args.path and named_shape(args.path)
    if args.device is not None and not args.agreement:
        raise OptionError(f"--device {args.device} belongs to --agreement: nothing else runs the model")
    for_file = [name for name in ("model_parallel", "card", "copy_rate") if getattr(args, name) is not None]
    if args.path is None or not args.path.is_file():
        if for_file:
            option = for_file[0].replace("_", "-")
            raise OptionError(f"--{option} belongs to a configuration file: give the folder's config.json")
        if args.checksums:
            return _check(args)
        if args.agreement:
            return _agree(args)
        return show_checkpoint(
            args.path,
            as_json=args.json,
            drafts=args.draft_vocabulary,
            cache_dtype=args.cache_dtype,
            max_context=args.max_context,
            weights=args.weights,
        )
    if args.checksums or args.agreement or _loads(args):
        raise OptionError(
            "--checksums, --agreement, --draft-vocabulary, --weights, --cache-dtype and --max-context belong to a "
            "checkpoint folder, not to a file"
        )
    from mtp_spec.cli.estimate import card_rate, show_estimate

    ranks = 1 if args.model_parallel is None else args.model_parallel
    show_estimate(args.path, ranks, card_rate(args.card, args.copy_rate), args.json)


def _loads(args: argparse.Namespace) -> bool:
    return any(value is not None for value in (args.draft_vocabulary, args.weights, args.cache_dtype, args.max_context))


def _agree(args: argparse.Namespace) -> None:
    import mtp_spec
    from mtp_spec.analysis.watch import SUSPICIOUS
    from mtp_spec.cli.agreement import agreement

    lm = mtp_spec.load(
        args.path,
        device=args.device or "cpu",
        weights=args.weights,
        draft_vocabulary=args.draft_vocabulary,
        cache_dtype=args.cache_dtype,
        max_context=args.max_context,
        progress=True,
    )
    rates = agreement(lm)
    if lm.model.ranks.rank:
        return
    if args.json:
        print(json.dumps({"agreement": rates}))
    else:
        listed = ", ".join(f"{rate:.2f} at depth {depth}" for depth, rate in enumerate(rates, start=1))
        print(f"drafts that are what the model writes, where those before them were: {listed}")
    if rates[0] < SUSPICIOUS:
        raise MTPSpecError(
            f"the first draft is right in {rates[0]:.0%} of steps, under {SUSPICIOUS:.0%}: the MTP modules' weights "
            "belong to another model, were damaged on the way here, or were never trained"
        )


def _check(args: argparse.Namespace) -> None:
    from mtp_spec.model.checkpoint.writer import wrong_checksums
    from mtp_spec.model.files.tensors import listing

    if args.path is None or args.json or _loads(args):
        raise OptionError("--checksums takes a folder that cast or convert wrote, and no other option")
    wrong = wrong_checksums(args.path)
    if wrong:
        raise MTPSpecError(f"{len(wrong)} tensors differ from checksums.json: {listing(wrong)}; convert or cast again")
    print("every tensor agrees with its checksum", file=sys.stderr)
