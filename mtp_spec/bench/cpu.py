"""`bench cpu`: passes of the CPU engine against the memory that they read.

A pass of few rows is as fast as the machine can read its weights. The bytes that it reads are counted, expert by
expert, and the rate of plain reading is measured in the same run, in turn with the passes.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import mtp_spec
from mtp_spec.api import LM
from mtp_spec.bench import parsing
from mtp_spec.bench.common import Report, Row
from mtp_spec.bench.options import JSON, MODEL, Benchmark, Option
from mtp_spec.bench.synthetic import outputs, synthetic_job, with_module
from mtp_spec.errors import OptionError
from mtp_spec.host_memory import free_memory
from mtp_spec.kernels.cpu.engine import library, why_not
from mtp_spec.model.attention import plan_rows
from mtp_spec.model.checkpoint.jobs import run_job
from mtp_spec.model.config import load_config
from mtp_spec.model.cpu.model import CPUModel

READ_BYTES = 2**28  # read repeatedly to measure the rate: larger than processor caches
SHARD_BYTES = 2**31
ROOM_BYTES = 2 * 10**9  # in addition to a written model: caches, libraries, the buffer above
# scale of the context's latents: small, so that the routers depend on the rows' own tokens, not on the common context
QUIET = 0.001


def cpu(args: argparse.Namespace) -> Report:
    """Times passes of 1 to 16 rows, in turn, and a draft level; says what they read and how fast the memory is.

    Ids are random, so that rows choose experts independently: the worst case for reading them once; the experts that
    were read are shown. With --shape a model of a published shape is written with random weights first, and deleted at
    the end.
    """
    if args.shape is None:
        return _measure(args, args.model)
    if (why := why_not()) is not None:
        raise OptionError(f"bench cpu: models do not run on the CPU engine here: {why}")
    config = with_module(load_config(args.shape))
    check_room("--shape: the model", sum(output.bytes for output in outputs(config)), args.folder)
    folder = Path(tempfile.mkdtemp(prefix="mtp_spec.", dir=args.folder))
    try:
        run_job(synthetic_job(config, SHARD_BYTES), folder / "model")
        return _measure(args, folder / "model")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


BENCHMARK = Benchmark(
    name="cpu",
    help="passes of the CPU engine against the memory's rate",
    run=cpu,
    options=(
        MODEL,
        JSON,
        Option(
            "--shape",
            "a published model or a config.json, with random weights",
            type=parsing.shape_file,
            metavar="NAME",
        ),
        Option("--folder", "where --shape writes them (the temporary folder)", type=Path, metavar="FOLDER"),
        Option("--rows", "rows to time", type=parsing.integers, default=[1, 2, 3, 4, 8, 16], metavar="M,..."),
        Option("--context", "committed tokens (256)", type=parsing.count, default=256),
        Option("--repeats", "rounds (15)", type=parsing.count, default=15),
        Option("--acceptance", "of each draft, for the notes (0.8)", type=parsing.chance, default=0.8, metavar="P"),
    ),
)


def check_room(what: str, size: float, folder: Path | None, remedy: str = "another --folder") -> None:
    """Rejects files that would not fit on the folder's disk, or in memory when they are read.

    Args:
        what: the files, for the error.
        size: their bytes; ROOM_BYTES more are needed.
        folder: an existing folder; None is the temporary one.
        remedy: further advice, for the error.

    Raises:
        OptionError: they do not fit, or there is no such folder.
    """
    folder = folder or Path(tempfile.gettempdir())
    if not folder.is_dir():
        raise OptionError(f"--folder {folder} is no folder")
    need = size + ROOM_BYTES
    for where, room in (("the disk of --folder", shutil.disk_usage(folder).free), ("memory", free_memory())):
        if room is not None and room < need:
            raise OptionError(f"{what} needs {need / 1e9:.1f} GB, {where} has {room / 1e9:.1f} left; give {remedy}")


def _measure(args: argparse.Namespace, source: Path | None) -> Report:
    begin = time.perf_counter()
    lm = mtp_spec.load(source, max_context=None if source is None else args.context + 64, measure=False)
    loaded = time.perf_counter() - begin
    model = lm.model
    if not isinstance(model, CPUModel):
        raise OptionError("bench cpu: models do not run on the CPU engine here, see mtp-spec inspect")
    passes = _passes(lm, model, args)
    for run in passes.values():  # experts that were never read are still in the file
        run()
    taken: dict[str, list[float]] = {name: [] for name in passes}
    rates, hits = list[float](), dict[str, list[int]]()
    buffer = torch.ones(READ_BYTES, dtype=torch.uint8)
    for _ in range(args.repeats):
        rates.append(_read_rate(buffer))
        for name, run in passes.items():
            model.hits = ctypes.c_int64(0)
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
            hits.setdefault(name, []).append(model.hits.value)
    model.hits = None
    rate, one = median(rates), median(taken["1 row"])
    rows = list[Row]()
    for name in passes:
        size = pass_bytes(model, name, median(hits[name]))
        seconds = median(taken[name])
        rows.append(
            {
                "pass": name,
                "ms": 1e3 * seconds,
                "times one row": seconds / one,
                "experts a layer": median(hits[name]) / _routed_layers(model, name),
                "GB read": size / 1e9,
                "of the memory's rate": size / seconds / rate,
            }
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    facts = {
        "read rate GB/s": rate / 1e9,
        "load seconds": loaded,
        "peak GB": peak / 1e9,
        "shape": None if args.shape is None else args.shape.stem,
        "runs on": model.runs_on,
        "context": args.context,
    }
    notes = [
        f"the memory is read at {rate / 1e9:.1f} GB/s by {torch.get_num_threads()} threads; loaded in "
        f"{loaded:.1f} s; peak memory, mapped files included, {peak / 1e9:.1f} GB"
    ]
    if "draft level" in taken:
        for depth in (1, 2, 3):
            step = median(taken[f"{depth + 1} rows"]) if f"{depth + 1} rows" in taken else None
            if step is not None:
                cost = (step + depth * median(taken["draft level"])) / one
                tokens = sum(args.acceptance**level for level in range(depth + 1))
                notes.append(
                    f"a chain of {depth} whose drafts are each accepted at {args.acceptance:.0%}: "
                    f"{tokens / cost:.2f} times plain"
                )
    return Report("Passes of the CPU engine", rows, facts, notes=notes)


def _passes(lm: LM, model: CPUModel, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    context, vocab = args.context, model.config.vocab_size
    cache = model.new_cache(context + max(args.rows))
    for slots in cache.slots:
        slots.normal_(std=QUIET, generator=generator)
    cache.length = context

    def ids(count: int) -> list[int]:
        drawn: list[int] = torch.randint(vocab, (count,), generator=generator).tolist()
        return drawn

    def verify(rows: int) -> Callable[[], object]:
        return lambda: model.logits(model.rows(ids(rows), cache, range(-1, rows - 1)))

    found = {f"{count} row{'s' * (count > 1)}": verify(count) for count in args.rows}
    if model.mtp:
        drafts = model.new_mtp_cache(context + 1)
        drafts.slots[0].normal_(std=QUIET, generator=generator)
        drafts.length = context
        hidden = torch.randn(1, model.config.hidden_size, generator=generator)
        table = model.table(context + 2)
        found["draft level"] = lambda: model.draft_logits(
            model.mtp_rows(0, ids(1), hidden, drafts, plan_rows(table, context, [-1], 1))
        )
    return found


def pass_bytes(model: CPUModel, name: str, hits: float) -> float:
    """Returns the bytes of weights that a pass reads, given the experts that it read."""
    config, weights = model.config, {**model.checkpoint_slots(), **model.scales()}
    draft = name == "draft level"
    total = 0.0
    for weight, tensor in weights.items():
        own = weight.startswith("model.layers.") and (int(weight.split(".")[2]) >= config.num_hidden_layers) == draft
        if ".mlp.experts." not in weight and own:
            total += tensor.nbytes
    expert = [tensor.nbytes for weight, tensor in weights.items() if ".mlp.experts.0." in weight]
    layers = sum(1 for n in weights if n.endswith(".experts.0.down_proj.weight"))
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    # drafts read the head in FP8
    return total + hits * sum(expert) / max(1, layers) + (head.numel() if draft else head.nbytes)


def _routed_layers(model: CPUModel, name: str) -> int:
    """Returns the number of layers with experts in a pass."""
    first = model.config.num_hidden_layers
    routers = [int(n.split(".")[2]) for n in model.checkpoint_slots() if n.endswith("mlp.gate.weight")]
    return max(1, sum((layer >= first) == (name == "draft level") for layer in routers))


def _read_rate(buffer: Tensor) -> float:
    """Returns the bytes per second of plain reading by as many threads as compute."""
    parts = buffer.chunk(torch.get_num_threads())

    def read(part: Tensor) -> None:
        library().finite(ctypes.c_void_p(part.data_ptr()), ctypes.c_int64(part.numel()))

    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(read, parts))
        start = time.perf_counter()
        list(pool.map(read, parts))
        return len(buffer) / (time.perf_counter() - start)
