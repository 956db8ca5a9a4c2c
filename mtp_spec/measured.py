"""Measurements kept from run to run in the user's cache directory, and the planners that start from them.

A file holds what it was measured on and with. It counts only for the same; anything else, an unreadable file included,
is measured again and replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import mtp_spec
from mtp_spec.model.device import DeviceModel
from mtp_spec.model.rows import Technique
from mtp_spec.model.transformer import Transformer
from mtp_spec.planner import Planner
from mtp_spec.progress import step_progress
from mtp_spec.text import Tokenizer
from mtp_spec.times import PASSES, StepTimes, measure


class Planners:
    """The planners of a loaded model, one for each number of threads.

    Args:
        longest: most tokens of prompt and text.
        measuring: measure, unless that was done before; otherwise start from typical times and write nothing.
        show: a progress bar while measuring.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer | None, longest: int, measuring: bool, show: bool
    ) -> None:
        self._model, self._tokenizer, self._longest = model, tokenizer, longest
        self._measuring, self._show = measuring, show
        self._planners: dict[int, Planner] = {}

    def here(self, technique: Technique) -> Planner:
        """Returns the planner for torch's present number of threads."""
        threads = torch.get_num_threads()
        if threads not in self._planners:
            self._planners[threads] = Planner(self._times(technique) if self._measuring else StepTimes.typical())
        return self._planners[threads]

    def _times(self, technique: Technique) -> StepTimes:
        ranks, subject = self._model.ranks, times_subject(self._model, technique)
        try:
            return StepTimes.from_json(ranks.from_first(read(subject) if ranks.rank == 0 else None) or {})
        except (KeyError, TypeError, ValueError):
            pass  # nothing was kept, or it cannot be used
        with step_progress(self._show and ranks.rank == 0, "measuring step times, once") as report:
            times = measure(self._model, technique, self._tokenizer, self._longest, report)
        if times is None:  # the machine is too busy: the next start tries again
            return StepTimes.typical()
        if ranks.rank == 0:
            write(subject, times.to_json())
        return times


def subject_of(model: Transformer | DeviceModel) -> dict[str, Any]:
    """Returns what times depend on: the machine and the model."""
    weights = model.norm.weight if isinstance(model, Transformer) else model.norm
    text = json.dumps(asdict(model.config), sort_keys=True, default=str) + str(weights.double().sum().item())
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None,
        "model": hashlib.sha256(text.encode()).hexdigest()[:16],
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def times_subject(model: Transformer, technique: Technique) -> dict[str, Any]:
    """Returns what a model's step times depend on, with torch's present number of threads."""
    return {
        **subject_of(model), "threads": torch.get_num_threads(), "rows": technique, "ranks": model.ranks.size,
        "passes": PASSES,
    }  # fmt: skip


def processor_name() -> str:
    """Returns the processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Returns the user's cache directory for this library.

    Raises:
        OSError: the user has no home.
    """
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    if base:
        return Path(base) / "mtp_spec"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError(str(error)) from None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "mtp_spec"


def read(subject: dict[str, Any]) -> dict[str, Any] | None:
    """Returns what was kept about a subject by this version of the library and of torch, or None."""
    try:
        document = json.loads(file_of(subject).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fits = isinstance(document, dict) and document.get("of") == {**subject, **_versions()}
    return document.get("values") if fits else None


def write(subject: dict[str, Any], values: dict[str, Any]) -> None:
    """Keeps values about a subject; warns where that is not possible."""
    try:
        file = file_of(subject)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"of": {**subject, **_versions()}, "values": values}), encoding="utf-8")
        part.replace(file)
    except OSError as error:
        warnings.warn(
            f"step times cannot be kept ({error}) and will be measured again at the next start: set "
            "XDG_CACHE_HOME to a folder that is writable, or load with measure=False", stacklevel=2,
        )  # fmt: skip


def file_of(subject: dict[str, Any]) -> Path:
    """Returns where values about a subject are kept."""
    name = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "times" / f"{name}.json"


def _versions() -> dict[str, str]:
    return {"mtp_spec": mtp_spec.__version__, "torch": torch.__version__}
