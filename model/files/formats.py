"""Recognises the format of a checkpoint's matrices; formats that are not read are named, with their size and a remedy.

The library reads plain numbers, DeepSeek's FP8 with block scales (`weight_scale_inv`), and the same under
compressed-tensors' names (`weight_scale`). Others are recognised by `quantization_config`, by the files that quantisers
write next to config.json, or by their tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.tensors import TensorInfo

SCALE = "_scale_inv"
POWERS = "ue8m0"  # scales that are powers of two, DeepSeek-V3.1's
OTHER_SCALE = "_scale"  # compressed-tensors'
# file next to config.json -> the quantiser that writes it
SIDE_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
PLACES = ("quantization_config", "compression_config", "quantization")  # the last is MLX's
SKIPPED = ("ignore", "modules_to_not_convert", "exclude_modules", "llm_int8_skip_modules", "ignored_layers")
# last component of a tensor's name -> format, if the configuration does not say
MARKS = {
    "weight_packed": "compressed-tensors with packed integers", "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ", "weight_scale_2": "ModelOpt NVFP4", "absmax": "bitsandbytes", "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes", "input_scale": "FP8 with fixed scales of activations",
    "activation_scale": "FP8 with fixed scales of activations", "k_scale": "FP8 with scales of the cache",
    "bitsandbytes__nf4": "bitsandbytes", "weight_blocks": "MXFP4", "qscales": "another format",
}  # fmt: skip
WAY_OUT = (
    'take the bfloat16 folder of the model and load(..., weights="fp8") (or write it once: mtp-spec cast --to fp8), or '
    "an FP8 folder with 128x128 blocks"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How packed matrices are stored.

    Attributes:
        name: for messages.
        bits: bits per number, scales included; None if unknown.
        block: block size of FP8 that this library reads, else None.
        scale_fmt: "ue8m0" if scales are powers of two.
        skipped: names or patterns of modules that are not packed.
        targets: patterns of modules that are packed; empty for all.
    """

    name: str
    bits: float | None = None
    block: tuple[int, int] | None = None
    scale_fmt: str | None = None
    skipped: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    def packs(self, name: str) -> bool:
        """Whether a weight that can be packed is packed."""
        module = name.removesuffix(".weight")
        if any(_matches(pattern, module) for pattern in self.skipped):
            return False
        return not self.targets or any(_matches(pattern, module) for pattern in self.targets)

    def refusal(self) -> str:
        """Returns why a folder in this format is not loaded, and a remedy."""
        return f"its matrices are stored as {self.name}, which this library does not read: {WAY_OUT}"


def stored_format(values: Mapping[str, Any]) -> Format | None:
    """Returns the format that a configuration names; None for plain numbers.

    Raises:
        CheckpointError: a value of the wrong kind.
    """
    named = next((name for name in PLACES if values.get(name)), None)
    if named is None:
        return None
    given = values[named]
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{named} is {given!r}, it must be an object")
    given = {**given, **given["quantization"]} if isinstance(given.get("quantization"), Mapping) else given
    method = str(given.get("quant_method") or given.get("quant_type") or "").lower().replace("_", "-")
    skipped = tuple(str(name) for key in SKIPPED for name in _listed(given, key))
    found = _by_method(method, given)
    scale_fmt = values.get("scale_fmt") or given.get("scale_fmt")
    if scale_fmt not in (None, POWERS, "float", "fp32", "float32"):
        raise CheckpointError(f"scale_fmt is {scale_fmt!r}, it must be {POWERS!r} or left out")
    return Format(**{**found, "skipped": skipped, "scale_fmt": POWERS if scale_fmt == POWERS else None})


def block_scales(values: Mapping[str, Any]) -> tuple[tuple[int, int] | None, str | None]:
    """Returns the block and format of FP8 scales, for a configuration whose matrices this library reads."""
    found = stored_format(values)
    return (None, None) if found is None or found.block is None else (found.block, found.scale_fmt)


def side_format(folder: Path) -> dict[str, Any] | None:
    """Returns the settings that a quantiser wrote to a separate file instead of config.json."""
    for name, method in SIDE_FILES.items():
        try:
            given = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(given, dict):
            return {"quant_method": method, **given}
    return None


def format_of(tensors: Mapping[str, TensorInfo], block: tuple[int, int]) -> Format | None:
    """Returns the format recognised from the tensors, among those that this library does not read."""
    for name, info in tensors.items():
        mark = MARKS.get(name.rsplit(".", 1)[-1])
        if mark is not None:
            return Format(name=f"{mark} ({name})")
        for suffix in (SCALE, OTHER_SCALE):
            scale = tensors.get(name + suffix)
            if scale is None or len(info.shape) != 2 or scale.shape == _blocks(info.shape, block):
                continue
            if len(scale.shape) < 2 and len(scale.shape) and scale.shape[0] not in (1, info.shape[0]):
                continue
            if scale.shape in ((), (1,), (1, 1)) and info.dtype in ("F8_E4M3", "I8"):
                return Format(name=f"{_word(info)} with one scale a matrix ({name}{suffix})", bits=8)
            if scale.shape in ((info.shape[0],), (info.shape[0], 1)) and info.dtype in ("F8_E4M3", "I8"):
                return Format(name=f"{_word(info)} per channel ({name}{suffix} is {list(scale.shape)})", bits=8)
    return None


def usual_names(tensors: dict[str, TensorInfo], block: tuple[int, int]) -> dict[str, TensorInfo]:
    """Returns the tensors with compressed-tensors' block scales named as DeepSeek's."""
    out: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        weight = tensors.get(name.removesuffix(OTHER_SCALE)) if name.endswith(f".weight{OTHER_SCALE}") else None
        fits = weight is not None and weight.dtype == "F8_E4M3" and info.shape == _blocks(weight.shape, block)
        out[name.removesuffix(OTHER_SCALE) + SCALE if fits else name] = info
    return out


def _word(info: TensorInfo) -> str:
    return "FP8" if info.dtype.startswith("F8") else "INT8"


def _blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return tuple(-(-size // side) for size, side in zip(shape, block, strict=False))


def _by_method(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `Format` that follow from a quantiser's own settings."""
    block = given.get("weight_block_size")
    if block and method in ("", "fp8", "finegrained-fp8", "modelopt"):
        return _blocks_of("FP8", block, str(given.get("fmt") or "e4m3"))
    if given.get("config_groups"):
        return _compressed(method or "compressed-tensors", given)
    algorithm = str(given.get("quant_algo") or "").upper()
    bits = _number(given.get("bits") or given.get("w_bit"))
    group = _number(given.get("group_size") or given.get("q_group_size"))
    if method.startswith("modelopt") or algorithm:
        four = "FP4" in algorithm or "fp4" in method
        name = f"ModelOpt {algorithm or ('NVFP4' if four else 'FP8')}"
        return {"name": name, "bits": 4.5 if four else 8 if "8" in name else None}
    if method in ("awq", "gptq", "auto-round", "autoround", "gptq-marlin"):
        names = {"awq": "AWQ", "gptq": "GPTQ", "gptq-marlin": "GPTQ"}
        return _integers(names.get(method, "AutoRound"), bits or 4, group or 128, zeros=True)
    if method in ("mxfp4", "fp4"):
        return {"name": "MXFP4", "bits": 4.25}
    if method in ("bitsandbytes", "bitsandbytes-4bit", "bitsandbytes-8bit", "bnb") or "load_in_4bit" in given:
        four = bool(given.get("load_in_4bit") or given.get("_load_in_4bit") or "4bit" in method)
        doubled = bool(given.get("bnb_4bit_use_double_quant"))
        bits = 8 if not four else 4.127 if doubled else 4.5
        return {"name": f"bitsandbytes {'4' if four else '8'} bit", "bits": bits}
    if method in ("fp8", "finegrained-fp8"):
        return {"name": "FP8 with one scale a matrix", "bits": 8}
    if method == "fbgemm-fp8":
        return {"name": "FP8 per channel (fbgemm)", "bits": 8}
    if method == "mxfp8":
        return {"name": "MXFP8", "bits": 8.25}
    if bits and not method and group:
        return {**_integers("MLX", bits, group), "bits": bits + 32 / group}
    if bits:
        return _integers(method or "an unnamed format", bits, group)
    return {"name": method or f"an unnamed format ({', '.join(sorted(given))})", "bits": _said(given)}


def _blocks_of(who: str, block: Any, kind: str) -> dict[str, Any]:
    """FP8 in blocks: read if they are square and e4m3, else named."""
    rows, columns = _sides(block)
    if not kind.startswith("e4m3"):
        return {"name": f"{who} {kind} in blocks of {rows}x{columns}", "bits": 8 + 32 / (rows * columns)}
    if rows == 1:
        return {"name": "MXFP8" if columns == 32 else f"{who} in groups of {columns}", "bits": 8 + 8 / columns}
    if rows != columns:
        return {"name": f"{who} in blocks of {rows}x{columns}, which are not square", "bits": 8 + 32 / (rows * columns)}
    return {"name": f"{who} in blocks", "bits": 8, "block": (rows, columns)}


def _sides(block: Any) -> tuple[int, int]:
    sides = block.split("x") if isinstance(block, str) else block
    numbers = [_number(side) for side in sides] if isinstance(sides, list | tuple) else []
    if len(numbers) != 2 or any(not isinstance(side, int) or side < 1 for side in numbers):
        raise CheckpointError(f"weight_block_size is {block!r}, it must be two integers of at least 1")
    return int(numbers[0]), int(numbers[1])


def _number(value: Any) -> Any:
    """Returns the number if it is written as text, else the value unchanged."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _listed(given: Mapping[str, Any], key: str) -> list[Any]:
    names = given.get(key) or []
    if not isinstance(names, list | tuple):
        raise CheckpointError(f"quantization_config's {key} is {names!r}, it must be a list of modules")
    return list(names)


def _said(given: Any) -> float | None:
    """Returns the bits per number, found anywhere in a quantiser's settings; None if absent."""
    if isinstance(given, Mapping):
        plain = [_number(value) for name, value in given.items() if name in ("nbits", "num_bits", "weight_bits")]
        named = (given.get(name) for name in ("quant_type", "weights", "_type", "weight_dtype", "dtype"))
        found = [float(bits) for bits in plain if isinstance(bits, int | float) and bits > 0]
        found += [bits for name in named if isinstance(name, str) and (bits := _said(name)) is not None]
        found += [bits for value in given.values() if isinstance(value, Mapping) and (bits := _said(value)) is not None]
        return found[0] if found else None
    word = re.search(r"(?:int|float|fp|nf|mxfp)_?(2|3|4|6|8)(?!\d)", str(given).lower())
    return None if word is None else float(word[1])


def _compressed(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """compressed-tensors' groups, which ModelOpt's newer files use too."""
    who = "ModelOpt" if method.startswith("modelopt") else "compressed-tensors"
    groups = given["config_groups"]
    groups = list(groups.values()) if isinstance(groups, Mapping) else list(groups)
    found = [{**_group(who, group.get("weights") or {}, str(group.get("format") or given.get("format") or "")),
              "targets": tuple(str(target) for target in group.get("targets") or () if target != "Linear")}
             for group in groups if isinstance(group, Mapping)]  # fmt: skip
    if not found:
        return {"name": who, "bits": None}
    # a group that cannot be read decides
    return next((one for one in found if one.get("block") is None), found[0])


def _group(who: str, weights: Mapping[str, Any], packing: str) -> dict[str, Any]:
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"quantization_config's weights are {weights!r}, they must be an object")
    bits, kind = _number(weights.get("num_bits")) or 8, weights.get("type") or "int"
    strategy, group = weights.get("strategy") or "", _number(weights.get("group_size"))
    if kind == "float" and bits == 4:
        small = group == 16 or "nvfp4" in packing
        return {"name": f"{who} {'NVFP4' if small else 'MXFP4'}", "bits": 4.5 if small else 4.25}
    if kind == "float":
        if strategy == "block" and weights.get("block_structure"):
            return _blocks_of(f"{who} FP8", weights["block_structure"], "e4m3")
        if isinstance(group, int) and group > 0:
            return {"name": f"{who} {'MXFP8' if group == 32 else f'FP8 in groups of {group}'}", "bits": 8 + 8 / group}
        per = {"channel": "per channel", "tensor": "with one scale a matrix"}.get(strategy, f"by {strategy or 'part'}")
        return {"name": f"{who} FP8 {per}", "bits": 8}
    return _integers(who, bits, group)


def _integers(who: str, bits: Any, group: Any, zeros: bool = False) -> dict[str, Any]:
    grouped = isinstance(group, int) and group > 0
    scales = (16 + (bits if zeros else 0)) / group if grouped else 0
    return {"name": f"{who} INT{bits}{f' in groups of {group}' if grouped else ''}", "bits": bits + scales}


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error as error:
            raise CheckpointError(f"quantization_config's {pattern!r} is no regular expression: {error}") from error
    if "*" in pattern:
        return fnmatch(module, pattern)
    return f".{pattern}." in f".{module}."
