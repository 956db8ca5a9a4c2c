"""Several processes that train the same modules, each on its part of every batch with the whole model on its device.

torchrun or another launcher that sets RANK and WORLD_SIZE starts them. The first one reads texts, measures and writes;
the others wait meanwhile and find its files in the same folder.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtp_spec.errors import MTPSpecError, OptionError

T = TypeVar("T")
WAITING = timedelta(days=7)  # for the first process, which may have texts to write for hours


class Team:
    """This process's place among those that train together.

    Args:
        device: "cpu" or "cuda".
    Attributes:
        rank, size: number of this process, and of all.
        device: this process's own: of several GPUs the one with its local number.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.size, self.device = 0, int(os.environ.get("WORLD_SIZE", "1")), device
        if self.size == 1 or not dist.is_available():
            self.size = 1
            return
        if device == "cuda":
            number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if number >= there:
                raise OptionError(f"process {number} is to use GPU {number} and this machine has {there}: start fewer")
            torch.cuda.set_device(number)
            self.device = f"cuda:{number}"
        if not dist.is_initialized():
            dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=WAITING)
            atexit.register(dist.destroy_process_group)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def first(self, work: Callable[[], T]) -> T:
        """Returns on every process what the first one's work returns; the others wait.

        Raises:
            MTPSpecError: on every process, the first one's error.
        """
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        error: BaseException | None = None
        if not self.rank:
            try:
                told[0] = work()
            except BaseException as caught:
                error = caught
                told[1] = f"{type(caught).__name__}: {caught}"
        dist.broadcast_object_list(told)
        if error is not None:
            raise error
        if told[1] is not None:
            raise MTPSpecError(f"the first process ended with {told[1]}")
        result: T = told[0]
        return result

    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum over all processes of a tensor without gradients."""
        if self.size > 1:
            x = x.detach().clone()
            dist.all_reduce(x)
        return x

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces gradients by their sums over all processes, in one exchange."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        whole = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, part in zip(gradients, whole.split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))

    def part(self, numbers: list[int]) -> list[int]:
        """Returns this process's part of a batch; it may be empty."""
        return numbers[self.rank :: self.size]
