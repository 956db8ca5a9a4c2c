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
from statistics import median
from time import perf_counter
from typing import Any

import torch

import mtp_spec
from mtp_spec.cpu.engine import Decoder
from mtp_spec.cpu.passes import Runner
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.host import HostModel, Technique
from mtp_spec.model.undisturbed import undisturbed
from mtp_spec.planning.costs import NEAR, PASSES, TEXT, StepTimes, measure
from mtp_spec.planning.node_planner import Planner
from mtp_spec.progress import step_progress
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.sampling.sampler import Sampler
from mtp_spec.speculation import Speculation
from mtp_spec.text import Tokenizer

# steps of a text, plain and with a chain so deep, that times are brought to; the first ones warm up
STEPS, WARM, CHAIN = 20, 4, 2
# drafts have to promise so much more than plain decoding: times that are measured in a moment are not surer
MARGIN = 1.1


class Planners:
    """The planners of a loaded model, one for each number of threads.

    Args:
        longest: most tokens of prompt and text.
        measuring: measure, unless that was done before; otherwise start from typical times and write nothing.
        show: a progress bar while measuring.
    """

    def __init__(
        self, model: HostModel, tokenizer: Tokenizer | None, longest: int, measuring: bool, show: bool
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
        times = calibrated(times, self._model, technique, self._tokenizer)
        if ranks.rank == 0:
            write(subject, times.to_json())
        return times


@undisturbed()
def calibrated(
    times: StepTimes, model: HostModel, technique: Technique, tokenizer: Tokenizer | None
) -> StepTimes:
    """Returns the times of passes brought to what whole steps take in a text, one plain and one with drafts.

    Passes that follow their like find more in the processor's caches than passes taken in turn, and a step is more than
    its passes.
    """
    ids = tokenizer.encode(TEXT) if tokenizer is not None else [i % model.config.vocab_size for i in range(NEAR)]
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0), model.config.vocab_size)

    def step(speculation: Speculation | None) -> float:
        length = STEPS * (1 + CHAIN)
        decoder = Decoder(Runner(model, technique), ids[:NEAR], sampler, speculation, length, lambda _: False)
        decoder.prefill()
        taken = list[float]()
        for _ in range(STEPS):
            start = perf_counter()
            decoder.step()
            taken.append(perf_counter() - start)
        return median(taken[WARM:])

    plain, drafted = model.ranks.first([step(None), step(Speculation(depth=CHAIN))])
    expected = times.extend(2, NEAR) + (CHAIN - 1) * times.level(1, NEAR) + times.verify(1 + CHAIN, NEAR)
    # the first level is the last row of what was appended, and its head
    expected += max(0.0, times.level(1, NEAR) - times.extend(1, NEAR))
    return times.scaled(plain, MARGIN * drafted / expected)


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
    """Returns what a model's step times depend on, with torch's present number of threads."""
    return {
        **subject_of(model), "threads": torch.get_num_threads(), "rows": technique, "ranks": model.ranks.size,
        "passes": PASSES, "runs on": model.runs_on, "stored": model.stored,
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
