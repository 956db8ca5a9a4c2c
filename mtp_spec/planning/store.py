"""Stores measurements between runs in the user's cache directory.

A file records what was measured on which machine and with which versions. If any of this differs, or the file cannot
be read, the measurement is repeated and the file replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mtp_spec._version import __version__
from mtp_spec.machine import processor_name
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.host import HostModel, Technique
from mtp_spec.planning.costs import PASSES


def subject_of(model: HostModel | DeviceModel) -> dict[str, Any]:
    """Returns what times depend on: the machine and the model."""
    fingerprint = model.fingerprint() if isinstance(model, HostModel) else model.norm.double().sum().item()
    text = json.dumps(asdict(model.config), sort_keys=True, default=str) + str(fingerprint)
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None,
        "model": hashlib.sha256(text.encode()).hexdigest()[:16],
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def times_subject(model: HostModel, technique: Technique) -> dict[str, Any]:
    """Returns what a model's step times depend on, torch's current number of threads included."""
    return {
        **subject_of(model), "threads": torch.get_num_threads(), "rows": technique, "ranks": model.ranks.size,
        "passes": PASSES, "runs on": model.runs_on, "stored": model.stored,
    }  # fmt: skip


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
    """Returns the values stored for a subject by these versions of the library and of torch, or None."""
    try:
        document = json.loads(file_of(subject).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fits = isinstance(document, dict) and document.get("of") == {**subject, **_versions()}
    return document.get("values") if fits else None


def write(subject: dict[str, Any], values: dict[str, Any]) -> None:
    """Stores values for a subject; warns if that is not possible."""
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
    """Returns the file for the values of a subject."""
    name = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "times" / f"{name}.json"


def _versions() -> dict[str, str]:
    return {"mtp_spec": __version__, "torch": torch.__version__}
