"""`mtp-spec convert`, `cast` and `export`: checkpoints from one form to another."""

from __future__ import annotations

import argparse
import shutil
import sys
from itertools import zip_longest
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from mtp_spec.errors import OptionError
from mtp_spec.progress import byte_progress
from mtp_spec.shapes import model_folder

if TYPE_CHECKING:
    from mtp_spec.model.checkpoint.jobs import Job

CONVERT_EXAMPLES = """examples:
  mtp-spec convert /models/DeepSeek-V3 /models/V3-mp16 --model-parallel 16
  mtp-spec convert /models/V3-mp16 /models/V3-again --to-hf
"""
CAST_EXAMPLES = """examples:
  mtp-spec cast /models/DeepSeek-V3 /models/DeepSeek-V3-bf16 --to bf16
  mtp-spec cast /models/mine-bf16 /models/mine --to fp8 --scale-fmt ue8m0
"""
EXPORT_EXAMPLES = """examples:
  mtp-spec export /models/V3-mp16 /models/V3-for-vllm
  mtp-spec export /models/mine /models/mine-for-lmdeploy
  mtp-spec export /models/Moonlight /models/Moonlight-MTP --mtp moonlight-head
"""
WORKERS = 2


def add_converting(commands: Any) -> None:
    """Adds the verbs `convert`, `cast` and `export`."""
    convert = _add(commands, "convert", "Hugging Face folder to DeepSeek's per-rank files, and back", CONVERT_EXAMPLES)
    convert.add_argument("--hf-ckpt-path", type=Path, metavar="PATH", help="SOURCE, as DeepSeek's program names it")
    convert.add_argument("--save-path", type=Path, metavar="PATH", help="TARGET, as DeepSeek's program names it")
    convert.add_argument("--model-parallel", type=int, metavar="N", help="ranks (1)")
    convert.add_argument("--n-experts", type=int, metavar="N", help="routed experts; config.json has them, checked")
    convert.add_argument("--to-hf", action="store_true", help="per-rank files to a Hugging Face folder")
    convert.add_argument("--config", type=Path, metavar="FILE", help="describes the model in place of config.json")
    cast = _add(commands, "cast", "FP8 checkpoint to bfloat16, or back", CAST_EXAMPLES)
    cast.add_argument("--input-fp8-hf-path", type=Path, metavar="PATH", help="SOURCE, with --to bf16")
    cast.add_argument("--output-bf16-hf-path", type=Path, metavar="PATH", help="TARGET, with --to bf16")
    cast.add_argument("--to", choices=("bf16", "fp8"), help="what the matrices become")
    cast.add_argument("--scale-fmt", choices=("ue8m0",), help="FP8 scales that are powers of two, as in V3.1")
    cast.add_argument("--device", default="cpu", help="where numbers are computed: cpu or cuda")
    export = _add(commands, "export", "a folder for vLLM, SGLang, LMDeploy and transformers", EXPORT_EXAMPLES)
    export.add_argument("--config", type=Path, metavar="FILE", help="describes the model in place of config.json")
    export.add_argument("--mtp", type=Path, metavar="FOLDER", help="MTP modules that take the place of SOURCE's own")


def _add(commands: Any, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text}. Tensors pass one by one; what stopped goes on when the same command is run again.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("source", nargs="?", type=Path, metavar="SOURCE", help="folder to read")
    verb.add_argument("target", nargs="?", type=Path, metavar="TARGET", help="folder to write; must not exist")
    verb.add_argument("--workers", type=int, default=WORKERS, metavar="N", help=f"threads, a tensor each ({WORKERS})")
    return verb


def run_convert(args: argparse.Namespace) -> None:
    """Converts a folder.

    Raises:
        OptionError, CheckpointError: raised before anything is written, or if the disk fails.
    """
    from mtp_spec.model.checkpoint.convert import hf_job, ranks_job

    source, target = _paths(args, "hf_ckpt_path", "save_path")
    if not args.to_hf:
        ranks = 1 if args.model_parallel is None else args.model_parallel
        return _run(ranks_job(source, ranks, n_experts=args.n_experts, config_file=args.config), target, args)
    for name in ("model_parallel", "n_experts"):
        if getattr(args, name) is not None:
            raise OptionError(f"--to-hf excludes --{name.replace('_', '-')}: the files say it")
    _run(hf_job(source, config_file=args.config), target, args)


def run_cast(args: argparse.Namespace) -> None:
    """Casts a folder; errors as `run_convert`."""
    from mtp_spec.load_checks import check_device
    from mtp_spec.model.checkpoint.cast import cast_job

    source, target = _paths(args, "input_fp8_hf_path", "output_bf16_hf_path")
    to = args.to
    if args.input_fp8_hf_path is not None or args.output_bf16_hf_path is not None:
        to = to or "bf16"
        if to != "bf16":
            raise OptionError("--input-fp8-hf-path and --output-bf16-hf-path mean --to bf16: give SOURCE and TARGET")
    if to is None:
        raise OptionError("--to is missing: bf16 or fp8")
    if args.scale_fmt and to != "fp8":
        raise OptionError(f"--scale-fmt {args.scale_fmt} belongs to --to fp8: bf16 has no scales")
    args.device = check_device(args.device)
    _run(cast_job(source, to, device=args.device, scale_fmt=args.scale_fmt), target, args)


def run_export(args: argparse.Namespace) -> None:
    """Writes a folder for other engines; errors as `run_convert`."""
    from mtp_spec.model.checkpoint.export import export_job

    source, target = _paths(args)
    _run(export_job(source, config_file=args.config, mtp=args.mtp), target, args)


def _paths(args: argparse.Namespace, *aliases: str) -> tuple[Path, Path]:
    found = []
    for name, alias in zip_longest(("source", "target"), aliases):
        names = [name] if alias is None else [name, alias]
        given = [path for path in (getattr(args, each) for each in names) if path is not None]
        if len(given) != 1:
            also = "" if alias is None else f", by place or as --{alias.replace('_', '-')}"
            raise OptionError(f"give {name.upper()} once{also}")
        found.append(given[0])
    if args.workers < 1:
        raise OptionError(f"--workers {args.workers}: 1 or more")
    return model_folder(found[0]), found[1]


def _run(job: Job, target: Path, args: argparse.Namespace) -> None:
    from mtp_spec.model.checkpoint.jobs import run_job

    size, files = job.bytes, len({output.file for output in job.outputs})
    existing = next(folder for folder in target.absolute().parents if folder.exists())
    print(
        f"{target}: {size / 1e9:.2f} GB in {files} files ({shutil.disk_usage(existing).free / 1e9:.0f} GB free), at "
        f"most {job.memory(args.workers) / 1e9:.2f} GB of tensors in memory",
        file=sys.stderr,
    )
    begin = perf_counter()
    try:
        with byte_progress(sys.stderr.isatty(), args.command) as report:
            run_job(job, target, workers=args.workers, progress=report)
    except KeyboardInterrupt:
        print("stopped: run the same command again, and it goes on", file=sys.stderr)
        raise
    seconds = perf_counter() - begin
    print(
        f"written in {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s; checksums.json holds a sum for each tensor",
        file=sys.stderr,
    )
