"""The CPU engine's single operations as functions of arrays, and matrices to call them with.

Outputs are written into the middle of buffers that are NaN elsewhere, and every call checks that they stay so.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mtp_spec.kernels.cpu import reference
from mtp_spec.kernels.cpu.engine import LANES, Library, Matrix, RoutingStruct, library

Array = npt.NDArray[np.float32]
PAGE = 64
MARGIN = 37  # floats before and after what is written; no multiple of the lanes, so that nothing is aligned
E4M3_CODES = [code for code in range(256) if code & 0x7F != 0x7F]
# numbers at which arithmetic has edges: zeros, subnormal ones, the least normal one, ones whose products are subnormal
EDGES = np.array([0.0, -0.0, 1e-45, -1e-45, 3e-39, -7e-40, 1.17549435e-38, 1e-20, -3e-23, 1.0, -1.5, 3e18], np.float32)


def room_for(columns: int) -> int:
    """Returns the floats of an operation's working memory, as pass.h has them."""
    pitch = -(-columns // reference.GROUP) * reference.GROUP + LANES
    return max(64 * pitch, min(128 * pitch, 65536 + 128 * (reference.GROUP + LANES))) + 16 * pitch


class CacheStruct(Structure):
    _fields_ = (("layers", c_void_p), ("pages", c_void_p))


@dataclass(frozen=True)
class Seen:
    """What a row of attention sees of which sequence: a run of slots, then further ones."""

    sequence: int
    run: int
    more: tuple[int, ...] = ()


def padded(count: int) -> int:
    return -(-count // LANES) * LANES


def same(a: Any, b: Any) -> bool:
    """Whether two float32 arrays or tensors have the same bits; NaN equals NaN."""
    left, right = np.asarray(a, np.float32), np.asarray(b, np.float32)
    both = np.isnan(left) & np.isnan(right)
    return left.shape == right.shape and bool((both | (left.view(np.int32) == right.view(np.int32))).all())


def numbers(seed: int, *shape: int, edges: bool = False) -> Array:
    """Returns random numbers, some of them at edges of arithmetic."""
    random = np.random.default_rng(seed)
    out = random.standard_normal(shape).astype(np.float32)
    return np.where(random.random(shape) < 0.3, random.choice(EDGES, shape), out) if edges else out


def matrix(kind: torch.dtype, rows: int, columns: int, seed: int = 0, block: tuple[int, int] = (128, 128),
           edges: bool = False) -> Matrix:  # fmt: skip
    """Returns a random matrix; one of FP8 has every code that is a number, with scales that are no powers of two."""
    random = np.random.default_rng(seed)
    if kind != torch.float8_e4m3fn:
        values = torch.from_numpy(numbers(seed, rows, columns, edges=edges))
        return Matrix(values.clamp(-6e4, 6e4).to(kind) if kind == torch.float16 else values.to(kind))
    codes = random.choice(np.array([0, 0x80, 1, 0x81, 7, 8, 0x7E, 0xFE] if edges else E4M3_CODES, np.uint8),
                          (rows, columns))  # fmt: skip
    counts = [-(-n // b) for n, b in zip((rows, columns), block, strict=True)]
    scale = random.uniform(1e-3, 2e-2, counts).astype(np.float32)
    if edges:
        scale = random.choice(np.array([1e-30, 3e-39, 1.0, 0.0, 1e10], np.float32), counts)
    return Matrix(torch.from_numpy(codes).view(kind), torch.from_numpy(scale), block)


class Guarded:
    """An array `[rows, columns]` in the middle of NaN, its rows some floats apart."""

    def __init__(self, rows: int, columns: int, pitch: int = 0, fill: Array | None = None) -> None:
        self.pitch = pitch or columns + 5
        self._all = np.full(MARGIN + rows * self.pitch + MARGIN, np.nan, np.float32)
        self._inside = np.zeros(len(self._all), bool)
        self.values = self._rows(self._all, rows, columns)
        self._rows(self._inside, rows, columns)[:] = True
        if fill is not None:
            self.values[:] = fill

    def _rows(self, base: npt.NDArray[Any], rows: int, columns: int) -> Any:
        return base[MARGIN : MARGIN + rows * self.pitch].reshape(rows, self.pitch)[:, :columns]

    @property
    def address(self) -> c_void_p:
        return c_void_p(self._all.ctypes.data + 4 * MARGIN)

    def done(self) -> Array:
        """Returns a copy; nothing may have been written beside it."""
        assert np.isnan(self._all[~self._inside]).all(), "written outside of the output"
        return np.array(self.values)


class Kernels:
    """The single operations of a compiled engine."""

    def __init__(self, engine: Library | str) -> None:
        self._engine = library(engine) if isinstance(engine, str) else engine

    def product(self, m: Matrix, first: int, end: int, x: Array, chosen: Sequence[int] | None = None,
                before: Array | None = None) -> Array:  # fmt: skip
        """Returns x, or the chosen rows of it, times rows of the matrix, added to `before`."""
        rows = len(x) if chosen is None else len(chosen)
        given = Guarded(len(x), x.shape[1], fill=x)
        out = Guarded(rows, end - first, fill=before)
        index = None if chosen is None else np.array(chosen, np.int32)
        room = Guarded(1, room_for(x.shape[1]))
        self._engine.product(
            byref(m.struct()), c_int64(first), c_int64(end), c_int64(rows), given.address, c_int64(given.pitch),
            None if index is None else c_void_p(index.ctypes.data), out.address, c_int64(out.pitch),
            c_int64(before is not None), room.address,
        )  # fmt: skip
        room.done()
        return out.done()

    def columns(self, m: Matrix, first: int, count: int, x: Array) -> Array:
        given, out = Guarded(len(x), x.shape[1], fill=x), Guarded(len(x), m.data.shape[1])
        room = Guarded(1, room_for(count))
        self._engine.columns(
            byref(m.struct()), c_int64(first), c_int64(count), c_int64(len(x)), given.address, c_int64(given.pitch),
            out.address, c_int64(out.pitch), room.address,
        )  # fmt: skip
        room.done()
        return out.done()

    def attend(self, q: Array, caches: Sequence[Array], seen: Sequence[Seen], values: int, scale: float,
               seed: int = 0) -> Array:  # fmt: skip
        """Returns `[rows, heads, values]` of q `[rows, heads, W]`.

        Args:
            caches: of each sequence `[slots, W]`, in order of position; put into pages out of order, NaN elsewhere.
        """
        rows, heads, width = q.shape
        random, structs, kept = np.random.default_rng(seed), (CacheStruct * len(caches))(), list[Any]()
        for struct, latents in zip(structs, caches, strict=True):
            count = -(-len(latents) // PAGE)
            memory = np.full(((count + 2) * PAGE, width), np.nan, np.float32)
            pages = (random.permutation(count + 2)[:count] * PAGE).astype(np.int64)
            for page, start in enumerate(pages):
                part = latents[page * PAGE : (page + 1) * PAGE]
                memory[start : start + len(part)] = part
            layers = np.array([0, memory.ctypes.data], np.int64)
            struct.layers, struct.pages = layers.ctypes.data, pages.ctypes.data
            kept.append((memory, pages, layers))
        table, further = np.zeros((rows, 6), np.int64), list[int]()
        for row, own in enumerate(seen):
            table[row] = own.sequence, -1, -1, own.run, len(own.more), len(further)
            further += own.more
        slots = np.array([*further, -1], np.int64)
        given = Guarded(rows * heads, width, padded(width), q.reshape(-1, width))
        out = Guarded(rows * heads, values, padded(values))
        pitch = padded(max(own.run + len(own.more) for own in seen))
        scores = Guarded(1, 8 * 8 * pitch)
        self._engine.attend(
            structs, c_int64(1), c_void_p(table.ctypes.data), c_void_p(slots.ctypes.data), c_int64(rows),
            c_int64(heads), c_int64(width), c_int64(values), byref(c_float(scale)), given.address, out.address,
            scores.address, c_int64(pitch),
        )  # fmt: skip
        scores.done()
        return out.done().reshape(rows, heads, values)

    def norm(self, x: Array, weight: Array, eps: float) -> Array:
        given, factor, out = Guarded(1, len(x), fill=x), Guarded(1, len(x), fill=weight), Guarded(1, len(x))
        self._engine.norm(given.address, factor.address, byref(c_float(eps)), c_int64(len(x)), out.address)
        return out.done()[0]

    def rotate(self, x: Array, table: Array, interleaved: bool) -> Array:
        out, given = Guarded(1, len(x), fill=x), Guarded(1, table.size, fill=table.ravel())
        self._engine.rotate(out.address, given.address, c_int64(len(x)), c_int64(interleaved))
        return out.done()[0]

    def activate(self, gate: Array, up: Array) -> Array:
        out, given = Guarded(1, len(gate), fill=gate), Guarded(1, len(up), fill=up)
        self._engine.activate(out.address, given.address, c_int64(len(gate)))
        return out.done()[0]

    def choose(self, routing: reference.Routing, logits: Array, bias: Array | None) -> tuple[list[int], Array]:
        scores, weight = Guarded(1, len(logits), fill=logits), Guarded(1, routing.chosen)
        extra = None if bias is None else Guarded(1, len(logits), fill=bias)
        room, index = Guarded(1, 3 * len(logits)), np.full(routing.chosen + 2, -7, np.int32)
        struct = RoutingStruct(
            routing.experts, routing.chosen, routing.groups, routing.kept_groups, routing.scoring, routing.method,
            routing.normalised, routing.factor,
        )  # fmt: skip
        self._engine.choose(
            byref(struct), scores.address, None if extra is None else extra.address, room.address,
            c_void_p(index.ctypes.data + 4), weight.address,
        )  # fmt: skip
        scores.done()
        room.done()
        assert index[0] == index[-1] == -7
        return index[1:-1].tolist(), weight.done()[0]


def load(file: Any, level: str) -> Library:
    """Returns an engine that a test has compiled."""
    return Library(ctypes.CDLL(str(file)), level)
