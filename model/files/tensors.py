"""Tensors in safetensors files: locates them from headers alone and reads them, optionally ahead of use.

A tensor of a Hugging Face folder is in one file. In a folder of per-rank files (`deepseek`) it is in several, divided
along an axis or repeated. Both are read through the same interface.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.deepseek import hf_name, layer_of, place, rank_files

INDEX = "model.safetensors.index.json"
MTP_FILE = re.compile("mtp|nextn", re.IGNORECASE)
# F8_E8M0, a power of two a byte, is read as its exponent: torch has a type for it only since 2.7
DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.uint8, "U8": torch.uint8, "I8": torch.int8,
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip
# bits per number in other weight formats, to report their sizes
OTHER_BITS = {
    "BOOL": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64,
}  # fmt: skip
OTHER_FILES = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".npz")
LISTED = 10
LENGTH_BYTES = 8  # size of the header's length field, at the start of a file
READERS = 4
AHEAD_BYTES = 256 * 2**20
MOST_BYTES = 2**30  # Linux reads at most 2 GiB at once
Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Part:
    """A run of bytes that holds a tensor, or one rank's share of it."""

    file: Path
    start: int
    shape: tuple[int, ...]

    def rows(self, first: int, count: int, itemsize: int) -> Part:
        """Returns the bytes of some rows."""
        row = prod(self.shape[1:]) * itemsize
        return Part(self.file, self.start + first * row, (count, *self.shape[1:]))


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's place in the files.

    Attributes:
        shape: of the whole.
        dtype: safetensors' name, such as F8_E4M3.
        parts: a single part; or shares along `axis` in order; or, if `axis` is None, copies.
    """

    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]
    axis: int | None = None

    @property
    def file(self) -> Path:
        return self.parts[0].file

    @property
    def bytes(self) -> int:
        if self.dtype in OTHER_BITS:
            return -(-prod(self.shape) * OTHER_BITS[self.dtype] // 8)
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def rows(self, first: int, count: int) -> TensorInfo:
        """Returns the place of rows `first` to `first + count - 1`."""
        size, begin, parts = DTYPES[self.dtype].itemsize, 0, list[Part]()
        for part in self.parts:
            low, high = (min(max(edge - begin, 0), part.shape[0]) for edge in (first, first + count))
            if high > low:
                parts.append(part.rows(low, high - low, size))
            begin += part.shape[0] if self.axis == 0 else 0
        return TensorInfo((count, *self.shape[1:]), self.dtype, tuple(parts), self.axis)


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Returns every tensor of a folder by its Hugging Face name.

    Raises:
        CheckpointError: no weights, a file of the index or of a rank is missing, a file is truncated or not
            safetensors, or ranks do not fit together.
    """
    ranks = rank_files(folder)
    if ranks:
        return _merged([_combined(files) for files in ranks], folder)
    index = _read_index(folder)
    return _combined(_weight_files(folder, index), index)


def _combined(files: Sequence[Path], index: Mapping[str, str] | None = None) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if index is not None and index.get(name, file.name) != file.name:
                continue  # the index says which of several copies to use
            if name in tensors:
                raise CheckpointError(f"{name} is in {tensors[name].file.name} and in {file.name}: delete one of them")
            tensors[name] = info
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Returns every tensor of one file.

    Raises:
        CheckpointError: it is truncated, not safetensors, or holds an unknown dtype.
    """
    try:
        with safe_open(file, framework="pt"):  # refuses sizes and offsets that do not fit the file
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        message = f"{file} is truncated or not a safetensors file ({error}): download it again"
        raise CheckpointError(message) from error
    header.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        if dtype not in DTYPES and dtype not in OTHER_BITS:
            raise CheckpointError(f"{name} in {file} is {dtype}: allowed are {', '.join(DTYPES)}")
        start = LENGTH_BYTES + length + entry["data_offsets"][0]
        tensors[name] = TensorInfo(shape, dtype, (Part(file, start, shape),))
    return tensors


def unlisted_modules(
    folder: Path, tensors: Mapping[str, TensorInfo], layers: int
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Returns MTP tensors in files that the index does not name, and notes; `layers` is the main model's.

    Other tensors of such files are ignored: they may be copies in another form.

    Raises:
        CheckpointError: such a file has MTP in its name and is damaged.
    """
    if rank_files(folder) or not (folder / INDEX).is_file():
        return {}, []
    known, found, notes = {info.file for info in tensors.values()}, dict[str, TensorInfo](), list[str]()
    for file in sorted(folder.glob("*.safetensors")):
        if file in known:
            continue
        try:
            header = read_header(file)
        except CheckpointError:
            if MTP_FILE.search(file.name):
                raise
            continue
        new = {n: info for n, info in header.items() if layer_of(n) >= layers and n not in tensors and n not in found}
        if new:
            notes.append(f"{file.name} is not in {INDEX}: its {len(new)} tensors of MTP modules are used")
            found |= new
        elif header.keys() & found.keys():
            notes.append(
                f"{file.name} is not in {INDEX} and left aside: another such file has its MTP modules and is used"
            )
        elif MTP_FILE.search(file.name) and not header.keys() <= tensors.keys():
            first = next(iter(header))
            notes.append(
                f"{file.name} is not in {INDEX} and left aside: none of its tensors, such as {first}, has the name of "
                f"an MTP module, model.layers.{layers} and on"
            )
    return found, notes


def _merged(ranks: Sequence[Mapping[str, TensorInfo]], folder: Path) -> dict[str, TensorInfo]:
    """Returns whole tensors from the shares of all ranks."""
    names = dict.fromkeys(name for rank in ranks for name in rank)
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        shares, whole = [rank[name] for rank in ranks if name in rank], hf_name(name)
        where, first = place(whole), shares[0]
        if len(shares) != (1 if where.expert is not None else len(ranks)):
            raise CheckpointError(f"{folder}: {name} is in {len(shares)} of {len(ranks)} ranks' files: convert again")
        if any((share.shape, share.dtype) != (first.shape, first.dtype) for share in shares):
            raise CheckpointError(f"{folder}: {name} differs in shape or dtype between ranks: convert again")
        shape = list(first.shape)
        if where.axis is not None:
            shape[where.axis] *= len(shares)
        parts = tuple(share.parts[0] for share in shares)
        tensors[whole] = TensorInfo(tuple(shape), first.dtype, parts, where.axis)
    return tensors


def _read_index(folder: Path) -> dict[str, str] | None:
    index = folder / INDEX
    if not index.is_file():
        return None
    try:
        return {str(name): str(file) for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a weight index ({error!r}): download it again") from error


def _weight_files(folder: Path, index: Mapping[str, str] | None) -> list[Path]:
    if index is not None:
        names = sorted(set(index.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {listing(missing)}, named in {INDEX}: download them")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        other = sorted(file.name for file in folder.iterdir() if file.suffix in OTHER_FILES)
        raise CheckpointError(
            f"{folder} has {listing(other)}, which this library does not read: take the model's folder of *.safetensors"
            if other
            else f"{folder} has no *.safetensors files: download the weights, or convert them first"
        )
    return files


def listing(names: Sequence[str]) -> str:
    """Returns the first names and the number of further ones, as text."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def read_tensor(info: TensorInfo) -> Tensor:
    """Returns a tensor as stored, in newly allocated memory.

    Raises:
        CheckpointError: the file ends early or cannot be read.
    """
    out = torch.empty(info.shape, dtype=DTYPES[info.dtype])
    if info.axis is None:
        _read_into(out, info.parts[0])
        return out
    places = out.split([part.shape[info.axis] for part in info.parts], info.axis)
    for part, target in zip(info.parts, places, strict=True):
        if target.is_contiguous():
            _read_into(target, part)
        else:
            target.copy_(read_part(part, info.dtype))
    return out


def read_part(part: Part, dtype: str) -> Tensor:
    """Returns one share or copy of a tensor."""
    out = torch.empty(part.shape, dtype=DTYPES[dtype])
    _read_into(out, part)
    return out


def _read_into(out: Tensor, part: Part) -> None:
    view = out.view(-1).view(torch.uint8).numpy().data
    try:
        with part.file.open("rb", buffering=0) as stream:
            stream.seek(part.start)
            done = 0
            while done < len(view):
                count = stream.readinto(view[done : done + MOST_BYTES])
                if not count:
                    raise CheckpointError(f"{part.file} ended early: another program cut it while it was read")
                done += count
    except OSError as error:
        raise CheckpointError(f"{part.file} cannot be read: {error}") from error


def widen_scales(scales: Tensor) -> Tensor:
    """Returns block scales as float32; bytes are exponents of two ("ue8m0", biased by 127)."""
    if scales.dtype != torch.uint8:
        return scales.float()
    return torch.ldexp(torch.ones(scales.shape, dtype=torch.float32), scales.int() - 127)


def read_ahead(tensors: Mapping[Key, TensorInfo]) -> Iterator[tuple[Key, Tensor]]:
    """Yields tensors in the mapping's order; several threads read the next ones, up to `AHEAD_BYTES` of them."""
    names = list(tensors)
    waiting: list[tuple[Key, Future[Tensor]]] = []
    ahead = following = 0
    with ThreadPoolExecutor(READERS) as pool:
        try:
            while waiting or following < len(names):
                while following < len(names) and (not waiting or ahead < AHEAD_BYTES):
                    name = names[following]
                    waiting.append((name, pool.submit(read_tensor, tensors[name])))
                    ahead += tensors[name].bytes
                    following += 1
                name, future = waiting.pop(0)
                ahead -= tensors[name].bytes
                yield name, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
