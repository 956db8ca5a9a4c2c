"""Decisions of `load` before it reads weights: device, dtype, context, and which code runs a checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from mtp_spec.cpu.foresight import check_engine
from mtp_spec.cuda.memory import check_memory
from mtp_spec.cuda.state import PREFILL_ROWS
from mtp_spec.errors import MTPSpecError, OptionError
from mtp_spec.kernels.cpu import engine
from mtp_spec.kernels.launching import triton_obstacle
from mtp_spec.memory import check_host
from mtp_spec.model.checkpoint.folder import Checkpoint, load_checkpoint, open_checkpoint
from mtp_spec.model.config import ModelConfig, load_config
from mtp_spec.model.cpu.checkpoint import load_cpu_model
from mtp_spec.model.cuda.checkpoint import (
    empty_device_model,
    fp8_obstacle,
    has_fp8,
    load_device_model,
    stored_dtype,
)
from mtp_spec.model.cuda.checkpoint import obstacle as kernels_obstacle
from mtp_spec.model.cuda.model import LEAST_HIDDEN, DeviceModel
from mtp_spec.model.distributed.group import ALONE, Ranks
from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.host import HostModel
from mtp_spec.text import Tokenizer
from mtp_spec.weights import runs_as_fp8, with_weights

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}  # fmt: skip
CACHE_DTYPES = ("bfloat16", "float8_e4m3fn")  # the first is the default
# dtypes of the kernels' 16-bit products, and the least compute capabilities for them and for FP8
HALVES, HALF_CAPABILITY, FP8_CAPABILITY = (torch.bfloat16, torch.float16), (8, 0), (8, 9)
MOST_PREFILL, AUTO_PREFILL = 32768, "auto"  # prompt tokens in a pass
DraftVocabulary = int | str | Path | None


def context_limit(path: Path, max_context: int | None) -> int:
    """Returns the most tokens of prompt and text together; `path` is a folder with config.json, or the JSON file."""
    limit = load_config(path).max_position_embeddings
    if max_context is None:
        return limit
    if isinstance(max_context, bool) or not isinstance(max_context, int) or not 1 < max_context <= limit:
        raise OptionError(f"max_context={max_context!r}: an integer from 2 to {limit}, the model's own limit")
    return max_context


def load_model(
    source: Path | Checkpoint, dtype: torch.dtype | None, device: str, limit: int, drafts: DraftVocabulary, report: Any,
    cache_dtype: str | torch.dtype | None = None, ranks: Ranks = ALONE, max_batch: int = 1,
    cache_tokens: int | None = None, weights: str | None = None, prefill_tokens: int | str | None = None,
) -> HostModel | DeviceModel:  # fmt: skip
    """Returns the model on the GPU kernels, or on a CPU on the engine, if they can run it; else by torch."""
    packed, checkpoint = packs_cache(cache_dtype), open_checkpoint(source) if isinstance(source, Path) else source
    checkpoint = with_weights(checkpoint, weights)
    ids = draft_ids(drafts, checkpoint.config)
    if dtype == torch.float8_e4m3fn:
        found = _no_kernels(device, FP8_CAPABILITY) or fp8_obstacle(checkpoint)
        if found is not None:
            raise OptionError(f"dtype={dtype!r}: {found}; leave dtype out")
    obstacle = f"dtype={dtype!r} runs by torch" if dtype == torch.float32 else None
    obstacle = obstacle or _no_kernels(device, HALF_CAPABILITY) or kernels_obstacle(checkpoint)
    if packed and obstacle is None:
        obstacle = _no_kernels(device, FP8_CAPABILITY)
    if packed and torch.float16 in (dtype, stored_dtype(checkpoint)) and dtype != torch.bfloat16:
        obstacle = obstacle or "float16 cannot hold all that FP8 latents with their scales can"
    if obstacle is None:
        return _on_kernels(
            checkpoint, dtype, device, limit, ids, report, packed, ranks, max_batch, cache_tokens, prefill_tokens
        )  # fmt: skip
    if cache_dtype is not None:
        raise cache_refused(cache_dtype, obstacle)
    if isinstance(prefill_tokens, int):
        raise OptionError(f"prefill_tokens={prefill_tokens!r} is for the kernels: {obstacle}; leave it out")
    if device != "cpu" and cache_tokens is not None:
        raise OptionError(f"cache_tokens={cache_tokens!r} on a GPU is for the kernels: {obstacle}; leave it out")
    if dtype is None:
        if device != "cpu":
            warnings.warn(
                f"{checkpoint.folder} runs in bfloat16 by torch, not on the kernels: {obstacle}. Text is the same with "
                "and without speculation, but nothing is fast", stacklevel=4,
            )  # fmt: skip
        if device == "cpu" and runs_engine():
            dtype = torch.float32
        else:
            dtype = torch.bfloat16 if device != "cpu" or cpu_has_bfloat16() else torch.float32
    if device == "cpu" and runs_engine():
        check_engine(checkpoint, dtype, ranks)
        return load_cpu_model(checkpoint, dtype, report, ids, ranks)
    if device == "cpu" and ranks.size == 1:
        check_host(checkpoint.config, dtype)
    model = load_checkpoint(checkpoint, dtype=dtype, device=device, progress=report, ranks=ranks)
    if ids is not None:
        model.draft_from(ids)
    return model


def _on_kernels(
    checkpoint: Checkpoint, dtype: torch.dtype | None, device: str, limit: int, ids: list[int] | None, report: Any,
    packed_cache: bool, ranks: Ranks, max_batch: int, cache_tokens: int | None, prefill_tokens: int | str | None,
) -> DeviceModel:  # fmt: skip
    """Returns the model on the kernels; FP8 weights stay FP8 if the GPU can multiply them and `dtype` allows it."""
    wide, no_fp8 = dtype if dtype in HALVES else None, _no_kernels(device, FP8_CAPABILITY)
    stored_packed = has_fp8(checkpoint)
    widened = no_fp8 or fp8_obstacle(checkpoint)
    if wide is None and stored_packed and widened is not None:
        warnings.warn(f"{checkpoint.folder} has FP8 weights, which become 16 bits wide: {widened}", stacklevel=5)
    empty = empty_device_model(checkpoint, "meta", ids, packed_cache, ranks, wide, no_fp8 is None)
    remedy = 'load with weights="fp8", ' if not stored_packed and runs_as_fp8(checkpoint) else ""
    if prefill_tokens is not None:
        empty.expanded = empty.expanded_on(device)
        if isinstance(prefill_tokens, int):
            empty.prefill_tokens = prefill_tokens
            if not empty.expanded:
                raise OptionError(f"prefill_tokens={prefill_tokens!r} is for models of hidden_size {LEAST_HIDDEN} and "
                                  "more, on a Hopper GPU; leave it out")  # fmt: skip
    check_memory(empty, limit, device, max_batch, cache_tokens, remedy, prefill_tokens == AUTO_PREFILL)
    model = load_device_model(checkpoint, device, report, ids, packed_cache, ranks, wide, no_fp8 is None)
    model.expanded, model.prefill_tokens = empty.expanded, empty.prefill_tokens
    return model


def draft_ids(drafts: DraftVocabulary, config: ModelConfig) -> list[int] | None:
    """Returns the tokens that drafts may use, in ascending order, or None for all.

    Args:
        drafts: a number for the first tokens, which in a byte-pair vocabulary are the earliest merges and so the most
            frequent; or a file that lists ids, one a line. End-of-sequence tokens are always included.
    """
    if drafts is None:
        return None
    whole, name = config.vocab_size, f"draft_vocabulary={drafts!r}"
    if not config.num_nextn_predict_layers:
        raise OptionError(f"{name}: this checkpoint has no MTP modules, so nothing is drafted; leave it out")
    if isinstance(drafts, str | Path):
        found = _listed_ids(Path(drafts), whole, name)
    elif isinstance(drafts, bool) or not isinstance(drafts, int) or not 0 < drafts < whole:
        raise OptionError(f"{name}: a number of tokens from 1 to {whole - 1}, or a file of token ids, one a line")
    else:
        found = set(range(drafts))
    return sorted(found | set(config.eos_token_ids))


def check_ends(tokenizer: Tokenizer | None, config: ModelConfig, folder: Path) -> None:
    """Rejects end-of-sequence tokens outside the vocabulary."""
    size = config.vocab_size
    for token in config.eos_token_ids:
        if not 0 <= token < size:
            raise CheckpointError(
                f"config.json: eos_token_id {token} is no token of a vocabulary of {size}: correct it"
            )
    if tokenizer is not None and tokenizer.eos_id is not None and tokenizer.eos_id >= size:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: eos_token has the id {tokenizer.eos_id}, beyond the vocabulary of "
            f"{size} that config.json states: the tokenizer is not this model's"
        )


def _listed_ids(file: Path, whole: int, name: str) -> set[int]:
    try:
        lines = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{name}: {file} cannot be read ({error})") from error
    for line in lines:
        if not (line.isascii() and line.isdigit() and int(line) < whole):
            raise OptionError(f"{name}: {line!r} in {file} is no token id from 0 to {whole - 1}")
    if not lines:
        raise OptionError(f"{name}: {file} is empty; list token ids, one a line")
    return {int(line) for line in lines}


def runs_engine() -> bool:
    """Whether the library's own engine runs models on this CPU.

    Raises:
        MTPSpecError: it was compiled from other sources, or MTP_SPEC_CPU names nothing.
    """
    if (wrong := engine.unusable()) is not None:
        raise MTPSpecError(wrong)
    return engine.why_not() is None


def _no_kernels(device: str, least: tuple[int, int]) -> str | None:
    """Returns why kernels that need a compute capability do not run on a device, or None."""
    what = "FP8" if least == FP8_CAPABILITY else "bfloat16"
    if device.split(":")[0] != "cuda":
        return f"{what} kernels need an NVIDIA GPU"
    found = torch.cuda.get_device_capability(device)
    if found < least:
        return f"this GPU has compute capability {found[0]}.{found[1]}, {what} begins with {least[0]}.{least[1]}"
    return triton_obstacle()


def check_device(device: str | torch.device) -> str:
    """Returns a device's name, "cpu" or "cuda" with a number if one was given.

    Raises:
        OptionError: it does not exist here.
    """
    try:
        found = torch.device(device) if isinstance(device, str | torch.device) else None
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise OptionError(f'device={device!r}: allowed are "cpu" and "cuda"')
    if found.type == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise OptionError(
            f'device={device!r}: torch finds no CUDA device here; use device="cpu", or install a CUDA build of torch '
            "on a machine with an NVIDIA GPU"
        )
    if found.index is not None and found.index >= (there := torch.cuda.device_count()):
        raise OptionError(f"device={device!r}: torch finds {there} CUDA devices here, numbered from 0 on")
    return str(found)


def check_batch(max_batch: int, cache_tokens: int | None, device: str) -> None:
    """Rejects an impossible batch size or cache size."""
    if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
        raise OptionError(f"max_batch={max_batch!r}: an integer, 1 or more")
    if cache_tokens is None:
        return
    if isinstance(cache_tokens, bool) or not isinstance(cache_tokens, int) or cache_tokens < 1:
        raise OptionError(f"cache_tokens={cache_tokens!r}: an integer, 1 or more")
    if max_batch == 1 and str(device).split(":")[0] != "cpu":
        raise OptionError(f"cache_tokens={cache_tokens!r} is for texts side by side: give max_batch too")


def check_prefill(prefill_tokens: int | str | None, device: str) -> None:
    """Rejects an impossible number of prompt tokens per pass."""
    if prefill_tokens is None or prefill_tokens == AUTO_PREFILL:
        return
    least, most, given = PREFILL_ROWS[-1], MOST_PREFILL, f"prefill_tokens={prefill_tokens!r}"
    number = isinstance(prefill_tokens, int) and not isinstance(prefill_tokens, bool)
    if not number or not least <= int(prefill_tokens) <= most:
        raise OptionError(f'{given}: an integer from {least} to {most}, "{AUTO_PREFILL}" or None')
    if str(device).split(":")[0] == "cpu":
        raise OptionError(f"{given} is for a Hopper GPU: leave it out on a CPU")


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Returns the torch dtype that a caller named; None leaves the choice open."""
    if dtype is None:
        return None
    chosen = DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise OptionError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}, or None to choose")
    return chosen


def packs_cache(cache_dtype: str | torch.dtype | None) -> bool:
    """Whether the kernels should cache latents in FP8; None is the dtype of activations."""
    name = CACHE_DTYPES[0] if cache_dtype is None else str(cache_dtype).removeprefix("torch.")
    if name not in CACHE_DTYPES:
        raise OptionError(f"cache_dtype={cache_dtype!r}: allowed are {', '.join(CACHE_DTYPES)}, or None for the first")
    return name != CACHE_DTYPES[0]


def cache_refused(cache_dtype: str | torch.dtype, obstacle: str) -> OptionError:
    """Returns the error for a model that runs by torch, whose cache always has the dtype of its arithmetic."""
    return OptionError(f"cache_dtype={cache_dtype!r} is for the kernels of a GPU: {obstacle}; leave cache_dtype out")


def cpu_has_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 in hardware here (AVX512-BF16 or AMX).

    Torch's own checks query the processor even if torch was told not to use it (ATEN_CPU_CAPABILITY=avx2).
    """
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    told = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return told and any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)
