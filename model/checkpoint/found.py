"""Finds the MTP modules in a checkpoint's files: how many, of what kind, with which embedding and head.

A module's tensors show whether its block has experts or is dense. Its copies of embedding and head usually equal the
model's, and are then read once; if they differ, the module keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from mtp_spec.model.config import SHARED, ModelConfig, ModuleShape
from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.deepseek import FILE, layer_of
from mtp_spec.model.files.formats import SCALE
from mtp_spec.model.files.tensors import TensorInfo, read_tensor

PIECE_BYTES = 2**25  # embeddings and heads are large: compared in pieces of this size
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OWN = ("eh_proj.weight", "enorm.weight", "hnorm.weight")  # tensors that only an MTP module's layer has


def module_prefix(config: ModelConfig, module: int) -> str:
    """Returns the prefix of the names of a module's tensors."""
    return f"model.layers.{config.num_hidden_layers + module}"


def found_modules(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> tuple[ModelConfig, list[str]]:
    """Returns the config with the modules that the files hold, and notes.

    If there is no MTP tensor, the modules are absent, as in folders saved by transformers. DeepSeek's own JSON has no
    number of modules, so they are counted in the files.
    """
    wanted, layers = config.num_nextn_predict_layers, config.num_hidden_layers
    beyond = {layer_of(name) - layers for name in tensors if layer_of(name) >= layers}
    count = 0
    while any(f"{module_prefix(config, count)}.{name}" in tensors for name in OWN):
        count += 1
    if not beyond:
        count = 0
    elif count < wanted or max(beyond) >= count:
        count = wanted  # something is missing or left over: `open_checkpoint` lists it
    notes = []
    by_ranks = any(FILE.fullmatch(info.file.name) for info in tensors.values())
    if count > wanted and not by_ranks:
        notes.append(f"config.json counts {wanted} MTP modules and the files have {count}: all are used")
    shapes = tuple(_shape(module_prefix(config, module), tensors) for module in range(count))
    modules = () if all(shape == SHARED for shape in shapes) else shapes
    return replace(config, num_nextn_predict_layers=count, modules=modules), notes


def _shape(prefix: str, tensors: Mapping[str, TensorInfo]) -> ModuleShape:
    gate, dense = f"{prefix}.mlp.gate.weight", tensors.get(f"{prefix}.mlp.gate_proj.weight")
    if dense is None or gate in tensors or len(dense.shape) != 2:
        return SHARED
    return ModuleShape(intermediate_size=dense.shape[0])


def shared_copies(config: ModelConfig) -> dict[str, str]:
    """Names under which checkpoints repeat the main embedding and head -> the original.

    Modules that have their own are left out.
    """
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    copies = {HEAD: head} if config.tie_word_embeddings else {}
    for module in range(config.num_nextn_predict_layers):
        prefix, shape = module_prefix(config, module), config.module(module)
        if not shape.own_embedding:
            copies[f"{prefix}.embed_tokens.weight"] = EMBEDDING
        if not shape.own_head:
            copies[f"{prefix}.shared_head.head.weight"] = head
    return copies


def own_copies(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> tuple[ModelConfig, list[str]]:
    """Returns the config with the modules that have an embedding or head of their own, and notes; reads the copies.

    Raises:
        CheckpointError: the head differs from the embedding that it is tied to.
    """
    differing = {copy for copy, original in shared_copies(config).items() if _differ(copy, original, tensors)}
    if HEAD in differing:
        raise CheckpointError(
            f"{HEAD} differs from {EMBEDDING} and tie_word_embeddings is true: set it to false in config.json, or "
            "delete the tensor that does not belong to the model"
        )
    shapes, notes = [], []
    for module in range(config.num_nextn_predict_layers):
        prefix, shape = module_prefix(config, module), config.module(module)
        embedding, head = (f"{prefix}.{name}.weight" in differing for name in ("embed_tokens", "shared_head.head"))
        shapes.append(replace(shape, own_embedding=embedding, own_head=head))
        own = " and ".join(name for name, has in (("embedding", embedding), ("head", head)) if has)
        if own:
            notes.append(
                f"MTP module {module + 1} has its own {own}, which the main model's differs from: drafts use it, the "
                "text does not"
            )
    return (replace(config, modules=tuple(shapes)) if notes else config), notes


def _differ(copy: str, original: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a copy exists and differs from the original; a wrong shape is left to `open_checkpoint`."""
    one, other = tensors.get(copy), tensors.get(original)
    if copy == original or one is None or other is None or one.shape != other.shape:
        return False
    if any(name + SCALE in tensors for name in (copy, original)):
        return True  # packed with different scales
    return any(not torch.equal(*pair) for pair in _pieces(one, other))


def _pieces(one: TensorInfo, other: TensorInfo) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rows = max(1, PIECE_BYTES * one.shape[0] // max(1, one.bytes))
    for first in range(0, one.shape[0], rows):
        count = min(rows, one.shape[0] - first)
        value, whole = (read_tensor(info.rows(first, count)) for info in (one, other))
        yield value.to(whole.dtype), whole
