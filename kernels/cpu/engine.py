"""Calls the compiled engine; see lanes.h for the order of its sums and phases.h for a forward pass.

The library holds the same source compiled for several kinds of processors, which differ in speed but not in results.
If there is no library, or the processor lacks fused multiply-add, `why_not` says so and the models run in torch.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import CFUNCTYPE, POINTER, Structure, c_float, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_spec.kernels.cpu.build import HERE, digest, library_name

# "torch" switches the engine off; a level's name chooses it. For tests and comparisons: results do not depend on it
SWITCH = "MTP_SPEC_CPU"
CHOICES = ("auto", "torch", "avx2", "avx512", "neon")
LEVELS = {0: None, 1: "avx2", 2: "avx512"}
KINDS = {torch.float8_e4m3fn: 0, torch.bfloat16: 1, torch.float32: 2, torch.float16: 3}
LANES = 16
STALE = "the CPU engine was compiled from other sources than are here"
REMEDY = f"compile it again (pip install -e . or python kernels/cpu/build.py), or set {SWITCH}=torch"


class MatrixStruct(Structure):
    """A matrix, as in products.h."""

    _fields_ = (
        ("kind", c_int64), ("rows", c_int64), ("columns", c_int64), ("block_rows", c_int64), ("block_columns", c_int64),
        ("data", c_void_p), ("scale", c_void_p),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Matrix:
    """A stored matrix `[N, K]`, contiguous; FP8 with float32 block scales."""

    data: Tensor
    scale: Tensor | None = None
    block: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        if self.data.dtype not in KINDS or not self.data.is_contiguous() or self.data.dim() != 2:
            raise ValueError(f"a contiguous matrix of {', '.join(map(str, KINDS))} is expected, not {self.data.dtype}")
        if (self.scale is not None) != (self.data.dtype == torch.float8_e4m3fn):
            raise ValueError("FP8 has scales, other types have none")
        if self.scale is not None:
            expected = tuple(-(-n // b) for n, b in zip(self.data.shape, self.block, strict=True))
            fits = self.scale.dtype == torch.float32 and self.scale.is_contiguous() and self.scale.shape == expected
            if not fits:
                raise ValueError(f"scales of shape {list(expected)} in float32 are expected")

    def struct(self) -> MatrixStruct:
        """Returns the library's structure, which does not keep the tensors alive."""
        rows, columns = self.data.shape
        scale = None if self.scale is None else self.scale.data_ptr()
        return MatrixStruct(KINDS[self.data.dtype], rows, columns, *self.block, self.data.data_ptr(), scale)


class LayerStruct(Structure):
    """A layer, as in pass.h."""

    _fields_ = (
        *((name, MatrixStruct) for name in ("q_a", "kv_a", "q_b", "kv_b", "o", "router", "gate", "up", "down")),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "kv_norm", "bias")),
        ("experts", c_void_p),
    )


class ModuleStruct(Structure):
    """The parts of an MTP module other than its layer."""

    _fields_ = (("mix", MatrixStruct), ("embedding_norm", c_void_p), ("hidden_norm", c_void_p), ("norm", c_void_p))


class RoutingStruct(Structure):
    """How experts are chosen, as in layers.h."""

    _fields_ = (
        *((name, c_int64) for name in
          ("experts", "chosen", "groups", "kept_groups", "scoring", "method", "normalised")),
        ("factor", c_float),
    )  # fmt: skip


class ModelStruct(Structure):
    """A model, as in pass.h."""

    _fields_ = (
        *((name, c_int64) for name in (
            "hidden", "heads", "latent", "rope", "nope", "value", "q_rank", "layers", "modules", "inner",
            "expert_inner", "interleaved",
        )),
        *((name, c_float) for name in ("eps", "latent_eps", "scale")),
        ("routing", RoutingStruct), ("embedding", MatrixStruct), ("norm", c_void_p), ("layer", c_void_p),
        ("module", c_void_p),
    )  # fmt: skip


EXCHANGE = CFUNCTYPE(c_int64, c_void_p, c_int64, c_int64, c_int64, c_int64)


class PassStruct(Structure):
    """A forward pass, as in pass.h."""

    _fields_ = (
        ("model", POINTER(ModelStruct)),
        *((name, c_int64) for name in ("module", "rows", "threads", "blocks")),
        *((name, c_void_p) for name in
          ("ids", "further", "block", "row", "cache", "rope", "before")),
        ("kept", c_void_p), ("kept_rows", c_int64), ("kept_blocks", c_int64),
        *((name, c_void_p) for name in ("kept_row", "kept_block", "after")),
        ("head", MatrixStruct), ("picked", c_void_p), ("logits", c_void_p), ("scored", c_int64),
        ("memory", c_void_p),
        *((name, c_int64) for name in ("memory_rows", "memory_context", "memory_threads", "rank", "ranks")),
        ("exchange", EXCHANGE), ("hits", POINTER(c_int64)),
    )  # fmt: skip


class HeadStruct(Structure):
    """Logits of hidden states, as in pass.h."""

    _fields_ = (
        ("head", MatrixStruct), ("hidden", c_void_p), ("logits", c_void_p), ("rows", c_int64),
        ("threads", c_int64), ("first", c_int64), ("end", c_int64), ("memory", c_void_p),
    )  # fmt: skip


class Library:
    """The compiled engine at one level."""

    def __init__(self, loaded: ctypes.CDLL, level: str) -> None:
        self.level, self._loaded = level, loaded
        self.run, self.head, self.help = self._of("pass", c_int64), self._of("head"), self._of("help")
        self.rest, self.close, self.forked = self._of("rest"), self._of("close"), self._of("forked")
        self.finite = self._of("finite", c_int64)
        self.memory, self.head_memory = self._of("memory", c_int64), self._of("head_memory", c_int64)
        # single operations
        self.product, self.columns, self.attend = self._of("product"), self._of("columns"), self._of("attend")
        self.norm, self.activate, self.rotate = self._of("norm"), self._of("activate"), self._of("rotate")
        self.choose = self._of("choose")
        self.ordered_products, self.ordered_totals = self._of("ordered_products"), self._of("ordered_totals")
        # of a row that a token is drawn from
        self.noise, self.draw = self._of("noise"), self._of("draw", c_int64)
        self.noise.argtypes = (c_uint64, c_uint64, c_int64, c_void_p)
        self.draw.argtypes = (c_void_p, c_int64, POINTER(c_float), c_void_p, POINTER(c_float))

    def _of(self, name: str, returns: Any = None) -> Any:
        function = getattr(self._loaded, f"mtp_{self.level}_{name}")
        function.restype = returns
        return function


@cache
def _loaded() -> ctypes.CDLL | str:
    """Returns the library, or the reason why there is none."""
    file = Path(HERE) / library_name()
    if not file.is_file():
        return "the CPU engine was not compiled when this package was installed"
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        return f"the CPU engine cannot be loaded ({error})"
    if (wanted := digest()) is None:
        return loaded
    made_of = getattr(loaded, "mtp_sources", None)  # earlier ones do not tell
    if made_of is not None:
        made_of.restype = c_int64
    return loaded if made_of is not None and made_of() == wanted else STALE


def levels() -> tuple[str, ...]:
    """Returns the levels that this processor can run, the fastest first."""
    loaded = _loaded()
    if isinstance(loaded, str):
        return ()
    loaded.mtp_level.restype = c_int64
    highest = int(loaded.mtp_level())
    if hasattr(loaded, "mtp_neon_pass"):
        return ("neon",)
    return tuple(str(LEVELS[level]) for level in range(highest, 0, -1))


def _wanted() -> str:
    return os.environ.get(SWITCH) or "auto"


def unusable() -> str | None:
    """Returns what must be put right before a model is loaded, an unknown switch or a library of other sources."""
    if _wanted() not in CHOICES:
        return f"{SWITCH}={_wanted()}: allowed are {', '.join(CHOICES)}"
    return f"{STALE}; {REMEDY}" if _wanted() != "torch" and _loaded() == STALE else None


def why_not() -> str | None:
    """Returns why models do not run on the engine here, or None."""
    loaded, wanted = _loaded(), _wanted()
    if wanted == "torch":
        return f"{SWITCH}=torch switches the CPU engine off"
    if isinstance(loaded, str):
        return loaded
    there = levels()
    if not there:
        return "this processor lacks AVX2 or FMA, which the CPU engine needs"
    if wanted != "auto" and wanted not in there:
        return f"{SWITCH}={wanted}: this processor has {', '.join(there)}"
    return None


@cache
def _library(level: str) -> Library:
    loaded = _loaded()
    assert isinstance(loaded, ctypes.CDLL)
    return Library(loaded, level)


def library(level: str | None = None) -> Library:
    """Returns the engine at a level, by default the fastest; it must exist, even if it was switched off since."""
    wanted = level or _wanted()
    return _library(wanted if wanted in levels() else levels()[0])


def usable() -> Library | None:
    """Returns the engine if it is there and not switched off."""
    return library() if why_not() is None else None
