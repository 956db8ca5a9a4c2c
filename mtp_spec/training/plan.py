"""What training will take, said before it begins, and refused if there is too little."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mtp_spec.errors import MTPSpecError
from mtp_spec.host_memory import free_memory
from mtp_spec.model.training import ModulesForward
from mtp_spec.training.backbone import States
from mtp_spec.training.captured import SPARE
from mtp_spec.training.loop import autocast
from mtp_spec.training.objective import CHUNK, Objective, draft_loss

# bytes that a logit takes while the loss of its chunk is computed: on a GPU target, draft and gradient in 16 bits
TEMPORARIES = {"cpu": 24, "cuda": 6}
# of its gradients, what is there when a step takes most memory: 0.4 to 0.75 on an H200 (docs/results/train_shape_h200)
GRADIENTS = 0.6


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of memory and disk.

    Attributes:
        modules: float32 weights, gradients and the optimiser's numbers.
        shared: copies of the main model's embedding and head, and its layers where they are widened.
        step: what a step of the largest batch holds until its gradients are known.
        loss: temporaries of the loss.
        graphs: what captured steps take beside that, if there is room for them: a piece of memory for their largest
            step and one for a launched step, instead of `step`, `loss` and the gradients of `modules`.
        backbone: temporaries of the main model's passes, which come before a step's.
        near: hidden states that are kept in a GPU's memory.
        disk: hidden states that are kept on disk.
    """

    modules: int
    shared: int
    step: int
    loss: int
    graphs: int
    backbone: int
    near: int
    disk: int

    @property
    def memory(self) -> int:
        return self.modules + self.shared + self.near + self.working + self.graphs

    @property
    def working(self) -> int:
        """Bytes of temporaries."""
        return max(self.step + self.loss, self.backbone)

    def __str__(self) -> str:
        parts = {"modules": self.modules, "copies of the main model's weights": self.shared, "hidden states": self.near}
        if self.step + self.loss >= self.backbone:
            parts |= {"a step": self.step, "its loss": self.loss}
        else:
            parts |= {"a pass of the main model": self.backbone}
        parts["CUDA graphs"] = self.graphs
        said = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
        return f"memory beside the model: {_size(self.memory)} ({said}); disk: {_size(self.disk)} of hidden states"

    def check(self, device: torch.device, folder: Path) -> None:
        """Rejects a plan that does not fit, even without CUDA graphs.

        Raises:
            MTPSpecError: it does not; the message says what to give less of.
        """
        free, held = free_bytes(device), self.working + self.modules
        if free is not None and held > free:
            raise MTPSpecError(
                f"training takes {_size(held)} of memory and {_size(free)} are free ({self}): give fewer batch_tokens "
                "or a smaller depth, or block='dense' with a smaller width"
            )
        room = shutil.disk_usage(folder).free
        if self.disk > room:
            raise MTPSpecError(
                f"the hidden states take {_size(self.disk)} of disk and {_size(room)} are free: give "
                f"cache_gigabytes={room / 2e9:.1f} or less; without room they are computed again at each use"
            )


def check_modules(weights: int, numbers: int, device: torch.device) -> None:
    """Rejects modules that alone take more memory than there is, before the model is loaded and texts are read.

    Args:
        weights: how many numbers they have.
        numbers: float32 numbers of the optimiser for each of them.

    Raises:
        MTPSpecError: they do.
    """
    size, free = (2 + numbers) * 4 * weights, free_bytes(device)
    if free is not None and size > free:
        raise MTPSpecError(
            f"modules of {weights:,} numbers take {_size(size)} of memory to train and {_size(free)} are free: give "
            "block='dense', a smaller width or fewer modules"
        )


def plan_of(
    forward: ModulesForward, modules: nn.ModuleList, objective: Objective, shape: tuple[int, int], numbers: int,
    shared: Sequence[Tensor], states: States, backbone: tuple[int, int] = (0, 0), captured: bool = False,
) -> Plan:  # fmt: skip
    """Returns the plan.

    Args:
        shape: sequences and tokens of the largest batch.
        numbers: float32 numbers of the optimiser for each weight.
        shared: tensors that were copied for training.
        states: what is kept of hidden states.
        backbone: bytes of the main model's widened weights, and of its passes.
        captured: whether steps are captured as CUDA graphs.
    """
    weights = sum(parameter.numel() for parameter in modules.parameters())
    device, vocabulary = forward.embedding.device, len(forward.head)
    loss = min(CHUNK[device.type], shape[0] * shape[1] * vocabulary) * TEMPORARIES[device.type]
    step, gradients = saved_bytes(forward, objective, shape), 4 * weights
    pieces = int(2 * SPARE * (step + loss + GRADIENTS * gradients))
    return Plan(
        modules=(2 + numbers) * gradients,
        shared=sum(tensor.nbytes for tensor in shared) + backbone[0],
        step=step,
        loss=loss,
        graphs=max(0, pieces - step - loss - gradients) if captured else 0,
        backbone=backbone[1],
        near=states.near_bytes,
        disk=states.bytes,
    )


def saved_bytes(forward: ModulesForward, objective: Objective, shape: tuple[int, int]) -> int:
    """Returns the bytes that a step keeps for its gradients: counted on one and two short texts, and extended.

    What grows with the number of tokens grows evenly; copies of weights in 16 bits do not.
    """
    depths = len(objective.depths)
    rows = min(64, shape[1] - depths)
    one, two = (_saved(forward, objective, texts, rows + depths) for texts in (1, 2))
    return int(one + (two - one) * (shape[0] * (shape[1] - depths) / rows - 1))


def _saved(forward: ModulesForward, objective: Objective, texts: int, length: int) -> int:
    device, seen = forward.embedding.device, dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that kept its own output would keep itself

    ids = torch.zeros(texts, length, dtype=torch.int64, device=device)
    hidden = torch.zeros(*ids.shape, forward.embedding.shape[1], dtype=torch.float32, device=device)
    ones = torch.ones(ids.shape, dtype=torch.float32, device=device)
    own = {p.untyped_storage().data_ptr() for module in forward.modules for p in module.parameters()}
    own |= {tensor.untyped_storage().data_ptr() for tensor in (forward.embedding, forward.head)}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast(forward):
        outcome = draft_loss(forward, objective, ids, hidden, ones)
    del outcome
    return sum(size for storage, size in seen.items() if storage not in own)


def free_bytes(device: torch.device) -> int | None:
    """Returns the free bytes of a device's memory, None if they are not known."""
    free: int | None = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return free


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.1f} MB"
