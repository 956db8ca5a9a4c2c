"""`load(weights="fp8")`: selects the matrices of a 16- or 32-bit checkpoint that become FP8 while they are read."""

from __future__ import annotations

from dataclasses import replace

from mtp_spec.errors import MTPSpecError, OptionError
from mtp_spec.kernels.fp8 import BLOCK
from mtp_spec.model.checkpoint.folder import Checkpoint, stored_weights
from mtp_spec.model.checkpoint.narrow import WIDE, is_packed
from mtp_spec.model.cuda.checkpoint import fp8_obstacle
from mtp_spec.model.files.formats import SCALE

WEIGHTS = ("fp8",)


def check_weights(weights: object) -> None:
    """Rejects an unknown value of `weights`.

    Raises:
        OptionError: the name is unknown.
    """
    if weights is not None and weights not in WEIGHTS:
        raise OptionError(f"weights={weights!r}: allowed are {', '.join(map(repr, WEIGHTS))}, or None to keep them")


def with_weights(checkpoint: Checkpoint, weights: str | None) -> Checkpoint:
    """Returns the checkpoint to read: with "fp8", matrices that are FP8 in released checkpoints are converted to it.

    Those that are FP8 already stay as they are.

    Raises:
        OptionError: the name is unknown, or the folder has FP8 in other blocks.
    """
    check_weights(weights)
    if weights is None:
        return checkpoint
    block, tensors = checkpoint.config.fp8_block, stored_weights(checkpoint)
    wide = {name: info.shape[0] for name, info in tensors.items() if info.dtype in WIDE and is_packed(name, info.shape)}
    if not wide:
        return checkpoint
    if block not in (None, (BLOCK, BLOCK)) and any(name + SCALE in tensors for name in tensors):
        sides = list(block or ())
        raise OptionError(f"weights={weights!r}: {checkpoint.folder} has FP8 in blocks of {sides}; leave it out")
    return replace(checkpoint, config=replace(checkpoint.config, fp8_block=(BLOCK, BLOCK)), narrowed=wide)


def runs_as_fp8(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint would run in FP8 with `weights="fp8"`."""
    try:
        return fp8_obstacle(with_weights(checkpoint, "fp8")) is None
    except MTPSpecError:
        return False
