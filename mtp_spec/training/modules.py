"""The modules that are trained: new ones, or those of the checkpoint, with float32 weights.

Legend: `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mtp_spec.kernels.fp8_cpu import dequantise
from mtp_spec.model.checkpoint.folder import Checkpoint, square_block
from mtp_spec.model.checkpoint.found import EMBEDDING, HEAD, module_prefix
from mtp_spec.model.config import ModelConfig, ModuleShape
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.files.formats import SCALE
from mtp_spec.model.files.tensors import read_tensor, widen_scales
from mtp_spec.model.host import HostModel
from mtp_spec.model.rope import rope_table
from mtp_spec.model.training import ModulesForward
from mtp_spec.model.transformer import MTPModule
from mtp_spec.training.options import TrainOptions

INNER = 0.5  # standard deviation of a random matrix's entries, times the square root of its inputs
BRANCH = 0.2  # of the last matrix of a branch, relative to that
FINAL_NORM = "model.norm.weight"


def ready_modules(options: TrainOptions, checkpoint: Checkpoint, device: torch.device | str) -> nn.ModuleList:
    """Returns the modules that the options ask for; everything that is trained has gradients."""
    if options.start == "shipped":
        modules = shipped_modules(checkpoint, device)
    else:
        width = width_of(options, checkpoint.config)
        modules = new_modules(checkpoint.config, width, options.modules, options.seed, device)
        if options.start == "last-layer":
            begin_as_last_layer(modules, checkpoint)
    for module in modules:
        assert isinstance(module, MTPModule)
        for own in (module.embed_tokens, module.head):
            if own is not None:
                own.requires_grad_(False)
    return modules


def trained_numbers(options: TrainOptions, config: ModelConfig) -> int:
    """Returns how many numbers the modules have that the options ask for, without making them."""
    shapes = [ModuleShape(intermediate_size=width_of(options, config))] * options.modules
    if options.start == "shipped":
        shapes = [config.module(number) for number in range(config.num_nextn_predict_layers)]
    modules = [MTPModule(config, shape, torch.float32, "meta") for shape in shapes]
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def width_of(options: TrainOptions, config: ModelConfig) -> int | None:
    """Returns the width of a new dense block; None for a block with experts."""
    return (options.width or config.intermediate_size) if options.block == "dense" else None


def shared_weights(
    model: HostModel | DeviceModel, checkpoint: Checkpoint, modules: nn.ModuleList, most: int
) -> tuple[ModulesForward, list[Tensor]]:
    """Returns the modules with the model's embedding and head, and those of its tensors that were copied.

    Args:
        most: most positions of a text.
    """
    copies = list[Tensor]()
    if isinstance(model, DeviceModel):
        embedding, head = model.embed_tokens, model.lm_head
    else:
        embedding = head = read_weight(checkpoint, EMBEDDING).to(model.device)
        copies.append(embedding)
        if not checkpoint.config.tie_word_embeddings:
            head = read_weight(checkpoint, HEAD).to(model.device)
            copies.append(head)
    return joined(checkpoint.config, modules, embedding, head, most), copies


def joined(config: ModelConfig, modules: nn.ModuleList, embedding: Tensor, head: Tensor, most: int) -> ModulesForward:
    """Returns modules with an embedding and a head, for texts of at most `most` positions."""
    table = rope_table(config, most + 8, embedding.device)
    own = [module for module in modules if isinstance(module, MTPModule)]
    return ModulesForward(own, embedding, head, lambda length: table)


def new_modules(
    config: ModelConfig, width: int | None, count: int, seed: int, device: torch.device | str
) -> nn.ModuleList:
    """Returns random modules.

    A new module begins as a copy of the main model's hidden state: the half of `eh_proj` that reads it is the
    identity, the branches of the block are small. Training then has only to learn the way to the next position.

    Args:
        config: the main model's shape.
        width: of a dense block; None for a block with experts.
        count: number of modules.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = nn.ModuleList(
        MTPModule(config, ModuleShape(intermediate_size=width), torch.float32, device) for _ in range(count)
    )
    with torch.no_grad():
        for number, module in enumerate(modules):
            assert isinstance(module, MTPModule)
            for name, slot in module.checkpoint_slots(module_prefix(config, number)).items():
                if "norm" in name:
                    slot.fill_(1)
                elif slot.dim() == 1:  # the bias that balances experts
                    slot.zero_()
                else:
                    size = 0.02 if name.endswith("gate.weight") else INNER * slot.shape[1] ** -0.5
                    size *= BRANCH if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                    slot.copy_(torch.empty(slot.shape, dtype=torch.float32).normal_(std=size, generator=generator))
            module.eh_proj.weight[:, config.hidden_size :] = torch.eye(config.hidden_size, device=device)
    return modules


@torch.no_grad()
def begin_as_last_layer(modules: nn.ModuleList, checkpoint: Checkpoint) -> None:
    """Gives new modules the main model's last layer and last norm.

    A module then reads the sum of the next token's embedding and of the hidden state, freed of the last norm's weights,
    as that layer reads its residual stream. A dense block takes no experts: where the layer has these, its MLP stays
    random.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    last, final = f"model.layers.{config.num_hidden_layers - 1}", read_weight(checkpoint, FINAL_NORM)
    freed = (final.abs().mean() / final).nan_to_num().clamp(-4, 4)
    for number, module in enumerate(modules):
        assert isinstance(module, MTPModule)
        prefix = module_prefix(config, number)
        slots = module.checkpoint_slots(prefix)
        own = {name: last + name.removeprefix(prefix) for name in slots}
        same = all(own[name] in tensors and tensors[own[name]].shape == tuple(slot.shape)
                   for name, slot in slots.items() if ".mlp." in name)  # fmt: skip
        for name, slot in slots.items():
            if own[name] in tensors and (same or ".mlp." not in name):
                slot.copy_(read_weight(checkpoint, own[name]))
        module.norm.weight.copy_(final)
        module.hnorm.weight.copy_(freed)
        for half in module.eh_proj.weight.split(config.hidden_size, dim=1):
            half.copy_(torch.eye(config.hidden_size))


def shipped_modules(checkpoint: Checkpoint, device: torch.device | str) -> nn.ModuleList:
    """Returns the modules of a checkpoint, widened to float32."""
    config = checkpoint.config
    modules = nn.ModuleList(
        MTPModule(config, config.module(number), torch.float32, device)
        for number in range(config.num_nextn_predict_layers)
    )
    with torch.no_grad():
        for name, slot in slots_of(modules, config).items():
            slot.copy_(read_weight(checkpoint, name))
    return modules


def slots_of(modules: nn.ModuleList, config: ModelConfig) -> dict[str, Tensor]:
    """Returns every tensor of the modules by its name in a checkpoint, with a view of its place."""
    slots: dict[str, Tensor] = {}
    for number, module in enumerate(modules):
        assert isinstance(module, MTPModule)
        slots |= module.checkpoint_slots(module_prefix(config, number))
    return slots


def rounded(slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors as they are stored: matrices and norms in bfloat16, gates in float32."""
    return {name: slot.detach().clone() if ".mlp.gate." in name else slot.detach().bfloat16()
            for name, slot in slots.items()}  # fmt: skip


def read_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """Returns a matrix or vector of a checkpoint in float32."""
    weight, scale = read_tensor(checkpoint.tensors[name]), checkpoint.tensors.get(name + SCALE)
    if scale is None:
        return weight.float()
    block = square_block(checkpoint.config)
    return dequantise(weight, widen_scales(read_tensor(scale)).contiguous(), block, torch.float32)


def trained_config(config: ModelConfig, modules: nn.ModuleList) -> ModelConfig:
    """Returns the config of the model with these modules."""
    shapes = tuple(
        ModuleShape(
            intermediate_size=getattr(module.block.mlp, "intermediate", None),
            own_embedding=module.embed_tokens is not None,
            own_head=module.head is not None,
        )
        for module in modules
        if isinstance(module, MTPModule)
    )
    return replace(config, num_nextn_predict_layers=len(modules), modules=shapes)
