"""`bench files`: checkpoints of DeepSeek-V3's shapes on this machine's disk, against the disk and the memory plan.

A synthetic FP8 checkpoint (`mtp_spec.bench.synthetic`) is written, converted to per-rank files and back, cast to
bfloat16 and back, and loaded; tensors are compared by their checksums after each round trip. Every stage runs in a
process of its own, whose memory counts from the start of the stage, and reads files that were dropped from the page
cache. The disk holds at most three times the checkpoint: files that a stage has replaced are deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib.resources import files
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import mtp_spec
from mtp_spec.api import LM
from mtp_spec.backends import open_backend
from mtp_spec.bench import parsing
from mtp_spec.bench.common import Report, Row
from mtp_spec.bench.disk import forget, read_rate, write_rate
from mtp_spec.bench.options import JSON, Benchmark, Option, Switch
from mtp_spec.bench.synthetic import fitted, outputs, synthetic_job, with_module
from mtp_spec.cuda.memory import plan_memory
from mtp_spec.errors import MTPSpecError, OptionError
from mtp_spec.load_checks import check_device
from mtp_spec.memory import model_bytes, read_ahead_bytes
from mtp_spec.model.checkpoint.cast import cast_job
from mtp_spec.model.checkpoint.convert import hf_job, ranks_job
from mtp_spec.model.checkpoint.folder import open_checkpoint
from mtp_spec.model.checkpoint.jobs import Job, run_job
from mtp_spec.model.checkpoint.writer import CHECKSUMS
from mtp_spec.model.config import ModelConfig, load_config
from mtp_spec.model.cuda.checkpoint import load_device_model
from mtp_spec.model.cuda.model import DeviceModel

STAGES = ("convert", "cast", "load")
WORKERS = 2  # as in the commands
READERS = (1, 4, 8)
WRITTEN_BYTES = 2 * 10**9  # for measuring the disk's write rate
READ_BYTES = 6 * 10**9  # and its read rate
SHARD_BYTES = 10**9
ROOM_BYTES = 10**9  # in addition to the files: headers, journals, other programs' files
CONTEXT = 2048
PROMPT = 24
# memory of a process other than tensors: headers of all files, the allocator's leftovers, code that is loaded late
PROCESS_BYTES = 400 * 2**20
Work = Callable[..., Row]


def files_bench(args: argparse.Namespace) -> Report:
    """Measures convert, cast and load of a synthetic FP8 checkpoint with DeepSeek-V3's names and shapes."""
    if not hasattr(os, "posix_fadvise") or not Path("/proc/self/status").exists():
        raise OptionError("bench files needs Linux: it tells the system to forget files, and reads /proc")
    args.device = check_device(args.device)
    if args.as_stored and args.device != "cpu":
        raise OptionError(f"--as-stored is for a CPU: on {args.device} FP8 weights stay as they are")
    config = _config(args)
    size = sum(output.bytes for output in outputs(config))
    folder: Path = args.folder
    if folder.exists():
        raise OptionError(f"--folder {folder} exists: give a new one, it is deleted at the end")
    folder.mkdir(parents=True)
    try:
        return _measured(folder, config, size, args)
    finally:
        if not args.keep:
            shutil.rmtree(folder)


BENCHMARK = Benchmark(
    name="files",
    help="convert, cast and load of a large FP8 checkpoint against the disk",
    run=files_bench,
    options=(
        JSON,
        Option("--folder", "where to work: a new folder, deleted at the end", type=Path, required=True),
        Switch("--keep", "do not delete it"),
        Option("--gigabytes", "of the checkpoint, at most (20)", type=float, default=20.0, metavar="N"),
        Option("--layers", "of the model, one dense (2)", type=parsing.count, default=2, metavar="N"),
        Option("--model-parallel", "ranks to convert to (4)", type=parsing.count, default=4, metavar="N"),
        Option("--stages", ", ".join(STAGES), type=parsing.chosen(STAGES), default=list(STAGES), metavar="NAME,..."),
        Option("--config", "another model's shape than DeepSeek-V3's", type=Path, metavar="FILE"),
        Option("--device", "where to load: cpu or cuda", default="cpu"),
        Switch(
            "--as-stored",
            "on a CPU, keep FP8 weights as they are, as a GPU does, and write the texts by the "
            "kernels' references, slowly",
        ),
        Option("--max-new-tokens", "of the texts after loading (8)", type=parsing.count, default=8),
    ),
)


def _config(args: argparse.Namespace) -> ModelConfig:
    file = args.config or Path(str(files("mtp_spec.configs") / "config_671B.json"))
    return fitted(with_module(load_config(file)), args.gigabytes, args.layers, args.model_parallel)


def _measured(folder: Path, config: ModelConfig, size: int, args: argparse.Namespace) -> Report:
    _check_room(folder, size * (2 if "convert" in args.stages else 1))
    rows, wrong = list[Row](), list[str]()
    writes = write_rate(folder, min(WRITTEN_BYTES, size))
    whole = folder / "made"
    _note(rows, _row("make", _alone(_make, whole, config), writes))
    some = _first(_weights(whole), READ_BYTES)
    reads = {str(readers): read_rate(some, readers) for readers in READERS}
    sums = _sums(whole)

    def stage(name: str, target: str, work: Work, *options: Any) -> None:
        """Runs a stage on `whole` and continues with its result."""
        nonlocal whole
        forget(_weights(whole))
        _note(rows, _row(name, _alone(work, whole, folder / target, *options), writes))
        shutil.rmtree(whole)
        whole = folder / target

    if "convert" in args.stages:
        stage(f"convert to {args.model_parallel} ranks", "ranks", _to_ranks, args.model_parallel)
        stage("convert back", "back", _to_hf)
        wrong += _differing(sums, _sums(whole), "convert")
    if "cast" in args.stages:
        free = shutil.disk_usage(folder).free
        if free < 2 * size + ROOM_BYTES:
            _note(rows, _blank(f"cast not run: needs {2 * size / 1e9:.0f} GB more, {free / 1e9:.0f} are free"))
        else:
            stage("cast to bf16", "bf16", _cast, "bf16")
            stage("cast to fp8", "fp8", _cast, "fp8")
            wrong += _differing(sums, _sums(whole), "cast")
    facts: dict[str, Any] = {}
    shards = _weights(whole)
    if "load" in args.stages:
        forget(shards)
        facts = _alone(_load, whole, args.device, args.max_new_tokens, args.as_stored)
        best = max(READERS, key=lambda readers: reads[str(readers)])
        reads["after"] = read_rate(_first(shards, READ_BYTES), best)
        for row in _load_rows(facts, max(reads.values())):
            _note(rows, row)
        wrong += facts.get("wrong", [])
    wrong += [f"{row['stage']}: memory" for row in rows if row["peak GB"] != "-" and not _within(row)]
    title = (
        f"{size / 1e9:.1f} GB in {len(shards)} files: {config.num_hidden_layers} layers and the MTP module, "
        f"{config.n_routed_experts} experts of width {config.moe_intermediate_size}; disk reads "
        f"{max(reads.values()) / 1e9:.2f} and writes {writes / 1e9:.2f} GB/s"
    )
    disk = {
        "read bytes per second, by threads": reads,
        "written bytes per second": writes,
        "cold": "posix_fadvise(DONTNEED) on every file; what a virtual machine's host keeps stays",
    }
    return Report(
        title,
        rows,
        {"bytes": size, "config": config.to_hf_dict(), "disk": disk, "load": facts, "wrong": wrong},
        failed=bool(wrong),
    )


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + ROOM_BYTES:
        raise OptionError(
            f"--folder {folder}: {(size + ROOM_BYTES) / 1e9:.0f} GB are needed there, {free / 1e9:.0f} "
            "are free; give another, or fewer --gigabytes"
        )


# stages, each in a process of its own


def _make(target: Path, config: ModelConfig) -> Row:
    return _run(synthetic_job(config, min(SHARD_BYTES, sum(output.bytes for output in outputs(config)) // 4)), target)


def _to_ranks(source: Path, target: Path, ranks: int) -> Row:
    return _run(ranks_job(source, ranks), target)


def _to_hf(source: Path, target: Path) -> Row:
    return _run(hf_job(source, shard_bytes=SHARD_BYTES), target)


def _cast(source: Path, target: Path, to: str) -> Row:
    return _run(cast_job(source, to), target)


def _run(job: Job, target: Path) -> Row:
    begin = perf_counter()
    run_job(job, target, workers=WORKERS)
    return {"seconds": perf_counter() - begin, "bytes": job.bytes, "planned": job.memory(WORKERS)}


def _load(folder: Path, device: str, tokens: int, as_stored: bool) -> Row:
    """Returns the time and memory of loading, and whether texts with and without drafts agree."""
    checkpoint = open_checkpoint(folder)
    size = sum(info.bytes for info in checkpoint.tensors.values())
    context = min(CONTEXT, checkpoint.config.max_position_embeddings)
    if device != "cpu":
        torch.empty(1, device=device)  # starts the driver outside the measurement
    read = list[float]()
    begin = perf_counter()
    try:

        def told(done: int, total: int) -> None:
            read.append(perf_counter() - begin)

        if as_stored:
            lm = LM(open_backend(load_device_model(checkpoint, device, told), None, context), None, context)
        else:
            lm = mtp_spec.load(folder, device=device, max_context=context, measure=False, progress=told)
    except mtp_spec.CheckpointError:
        raise
    except MTPSpecError as error:
        return {"refused": str(error)}
    facts: Row = {"seconds": read[-1], "seconds of load": perf_counter() - begin, "bytes": size}
    facts |= {"host after load": _memory("VmHWM"), "dtype": str(lm.model.dtype).removeprefix("torch.")}
    ids = [(31 * i) % lm.config.vocab_size for i in range(PROMPT)]
    begin = perf_counter()
    texts = [
        lm.generate(ids, max_new_tokens=tokens, temperature=0.8, seed=0, speculation=way).token_ids for way in (None, 1)
    ]
    wrong = [] if texts[0] == texts[1] and len(texts[0]) == tokens else ["load: texts differ"]
    facts |= {"seconds for texts": perf_counter() - begin, "texts": texts}
    wrong += [] if lm.score(ids).logits.isfinite().all() else ["load: a logit is not finite"]
    if isinstance(lm.model, DeviceModel):
        planned = plan_memory(lm.model, context).total
        peak = None if as_stored else torch.cuda.max_memory_allocated()
        ahead = read_ahead_bytes(checkpoint) if as_stored else 0
        return {**facts, "wrong": wrong, "device peak": peak, "planned": planned + ahead}
    planned = model_bytes(checkpoint.config, lm.model.dtype) + read_ahead_bytes(checkpoint)  # for loading by torch
    return {**facts, "wrong": wrong, "device peak": None, "planned": planned}


def _alone(work: Work, *args: Any) -> Row:
    """Returns what `work` returns in a fresh process, and the memory that it took there at most."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_watched, work, args).result()


def _watched(work: Work, args: Iterable[Any]) -> Row:
    with suppress(OSError):  # the system may not allow resetting the peak: then earlier memory counts too
        Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    done = work(*args)
    return {**done, "host peak": _memory("VmHWM") - before, "host before": before}


def _memory(name: str) -> int:
    """Returns a number of bytes in this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# the report


def _note(rows: list[Row], row: Row) -> None:
    """Adds a row and prints it, as the whole benchmark takes minutes."""
    rows.append(row)
    print(
        ", ".join(
            f"{name} {value:.3f}" if isinstance(value, float) else str(value)
            for name, value in row.items()
            if value != "-"
        ),
        file=sys.stderr,
        flush=True,
    )


def _row(name: str, done: Row, rate: float) -> Row:
    return {
        "stage": name,
        "GB": done["bytes"] / 1e9,
        "seconds": done["seconds"],
        "GB/s": done["bytes"] / done["seconds"] / 1e9,
        "of the disk's rate": done["bytes"] / done["seconds"] / rate,
        "planned GB": done["planned"] / 1e9,
        "peak GB": done["host peak"] / 1e9,
    }


def _blank(name: str, seconds: float | str = "-") -> Row:
    """Returns a row without bytes."""
    return {
        "stage": name,
        "GB": "-",
        "seconds": seconds,
        "GB/s": "-",
        "of the disk's rate": "-",
        "planned GB": "-",
        "peak GB": "-",
    }


def _load_rows(facts: Row, rate: float) -> list[Row]:
    if "refused" in facts:
        return [_blank(f"load refused: {facts['refused']}")]
    row = _row("load: read", facts, rate)
    if facts["device peak"] is not None:
        row["peak GB"] = facts["device peak"] / 1e9
    return [
        row,
        _blank("load, with the tests of a machine", facts["seconds of load"]),
        _blank("two texts, plain and with drafts", facts["seconds for texts"]),
    ]


def _within(row: Row) -> bool:
    """Whether a stage took no more memory than was planned."""
    return bool(row["peak GB"] * 1e9 <= row["planned GB"] * 1e9 + PROCESS_BYTES)


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _first(shards: list[Path], size: int) -> list[Path]:
    """Returns the first files that together have `size` bytes."""
    ends = accumulate(file.stat().st_size for file in shards)
    return [file for file, end in zip(shards, ends, strict=True) if end - file.stat().st_size < size]


def _sums(folder: Path) -> dict[str, str]:
    """Returns the checksum of every tensor."""
    by_file = json.loads((folder / CHECKSUMS).read_text())["files"]
    return {name: value for tensors in by_file.values() for name, value in tensors.items()}


def _differing(before: dict[str, str], after: dict[str, str], what: str) -> list[str]:
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return [f"{what}: {len(names)} tensors came back changed, {names[0]} first"] if names else []
