"""Checks that processes that share a model have the same program, machine, checkpoint and requests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from mtp_spec._version import __version__
from mtp_spec.machine import processor_name
from mtp_spec.model.checkpoint.folder import Checkpoint
from mtp_spec.model.distributed.group import Ranks
from mtp_spec.model.files.tensors import read_tensor

# about how many matrices are compared, by one row each
SAMPLES = 32
DIGITS = 16


def start_facts(checkpoint: Checkpoint, device: str) -> dict[str, object]:
    """Returns facts on versions, machine and checkpoint, compared before the weights are read."""
    cuda = torch.device(device).type == "cuda"
    return {
        "mtp_spec": __version__,
        "torch": torch.__version__,
        # rounding depends on the processor and on the number of threads
        "device": torch.cuda.get_device_name(device) if cuda else processor_name(),
        "threads of torch": "any" if cuda else torch.get_num_threads(),
        "configuration": _digest(json.dumps(asdict(checkpoint.config), sort_keys=True, default=str).encode()),
        "weights": _weights(checkpoint),
    }


def check_first(ranks: Ranks, call: str, prompts: Sequence[Sequence[int]], options: Mapping[str, Any]) -> None:
    """Checks, before anything is computed for a call, that every rank makes the same one.

    Args:
        call: the method and model.

    Raises:
        RankError: raised on every rank, with the differences, if the calls differ.
    """
    ranks.agree({"call": call, **request_facts(prompts, options)})


def request_facts(prompts: Sequence[Sequence[int]], options: Mapping[str, Any]) -> dict[str, object]:
    """Returns facts on prompts and options, for comparison."""
    facts: dict[str, object] = {name: repr(value) for name, value in sorted(options.items())}
    if options.get("logits_processor") is not None:  # functions have no value to compare
        facts["logits_processor"] = "given"
    facts = {"options": ", ".join(facts), **facts, "prompts": len(prompts)}
    for number, ids in enumerate(prompts):
        name = "prompt" if len(prompts) == 1 else f"prompt {number}"
        facts[name] = f"{len(ids)} tokens {_digest(str(list(ids)).encode())}"
    return facts


def _weights(checkpoint: Checkpoint) -> str:
    """Returns a digest of all names, shapes and dtypes, of all vectors, and of the first rows of some matrices."""
    tensors = checkpoint.tensors
    names = sorted(tensors)
    whole = hashlib.sha256("".join(f"{n} {tensors[n].shape} {tensors[n].dtype};" for n in names).encode())
    matrices = [name for name in names if len(tensors[name].shape) > 1]
    vectors = [tensors[name] for name in names if len(tensors[name].shape) == 1]
    rows = [tensors[name].rows(0, 1) for name in matrices[:: max(1, len(matrices) // SAMPLES)]]
    for info in vectors + rows:
        whole.update(read_tensor(info).view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:DIGITS]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]
