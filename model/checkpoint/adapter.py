"""MTP modules in a folder of their own, apart from the model that they draft for.

Such a folder has the modules' tensors under the names of a whole checkpoint, `model.layers.{num_hidden_layers + d}.`,
and `mtp.json`, which says for which model they were made. Any folder with tensors of those names may be given instead,
such as another whole checkpoint, whose other tensors are left aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mtp_spec.model.checkpoint.new_folder import new_folder
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.deepseek import layer_of
from mtp_spec.model.files.json_object import read_object
from mtp_spec.model.files.tensors import TensorInfo, read_headers, read_tensor

TENSORS, DESCRIPTION = "mtp.safetensors", "mtp.json"
SHAPE = ("hidden_size", "vocab_size", "num_hidden_layers")  # of the model that modules are for
NORM = "model.norm.weight"


def with_modules(
    folder: Path, config: ModelConfig, tensors: Mapping[str, TensorInfo]
) -> tuple[ModelConfig, dict[str, TensorInfo], list[str]]:
    """Returns a checkpoint's config and tensors with its MTP modules replaced by those of `folder`, and notes.

    Raises:
        CheckpointError: the folder holds no module, or modules for a model of another shape.
    """
    if not folder.is_dir():
        raise CheckpointError(f"mtp={str(folder)!r}: no such folder; give one with the tensors of MTP modules")
    layers, notes = config.num_hidden_layers, list[str]()
    # a whole checkpoint may have a file of that name about something else
    if (folder / TENSORS).is_file() and (folder / DESCRIPTION).is_file():
        notes = _compared(read_object(folder / DESCRIPTION), config, tensors, folder)
    modules = {name: info for name, info in read_headers(folder).items() if layer_of(name) >= layers}
    if not modules:
        raise CheckpointError(
            f"mtp={str(folder)!r} holds no tensor of an MTP module, whose names begin with model.layers.{layers}. for "
            f"this model of {layers} layers"
        )
    count = 1 + max(map(layer_of, modules)) - layers
    main = {name: info for name, info in tensors.items() if layer_of(name) < layers}
    return replace(config, num_nextn_predict_layers=count, modules=()), main | modules, notes


def fingerprint(tensors: Mapping[str, TensorInfo]) -> str:
    """Returns a digest of the weights of a model's last norm, which stay the same if the model is cast or converted."""
    norm = read_tensor(tensors[NORM]).float()
    return sha256(norm.numpy().tobytes()).hexdigest()[:16]


def _compared(
    made: Mapping[str, Any], config: ModelConfig, tensors: Mapping[str, TensorInfo], folder: Path
) -> list[str]:
    """Compares what a description says of its model with a model; returns notes."""
    base = made.get("model")
    if not isinstance(base, dict):
        raise CheckpointError(f"{folder / DESCRIPTION} does not say for which model the modules are: train them again")
    other = [name for name in SHAPE if base.get(name) != getattr(config, name)]
    if other:
        said = ", ".join(f"{name} {base.get(name)} instead of {getattr(config, name)}" for name in other)
        raise CheckpointError(f"mtp={str(folder)!r} was made for another model: {said}")
    if base.get("fingerprint") in (None, fingerprint(tensors)):
        return []
    return [f"the modules in {folder} were trained on other weights: drafts may fail more often, the text is the same"]


def describe(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Returns what `mtp.json` says of the model that modules are for."""
    return {name: getattr(config, name) for name in SHAPE} | {"fingerprint": fingerprint(tensors)}


def save_modules(folder: Path, tensors: Mapping[str, Tensor], files: Mapping[str, bytes]) -> None:
    """Writes a folder of modules under a temporary name and renames it when it is complete.

    Args:
        tensors: by their names in a checkpoint.
        files: name -> contents of the other files, `mtp.json` among them.

    Raises:
        CheckpointError: the folder exists.
    """
    with new_folder(folder) as part:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
                  part / TENSORS, metadata={"format": "pt"})  # fmt: skip
        for name, data in files.items():
            (part / name).write_bytes(data)


def module_slots(slots: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint that belong to its MTP modules."""
    return {name: slot for name, slot in slots.items() if layer_of(name) >= config.num_hidden_layers}
