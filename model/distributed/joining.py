"""How ranks find each other, and which GPU each uses."""

from __future__ import annotations

import atexit
import os
import warnings
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from mtp_spec.kernels import exchange
from mtp_spec.kernels.launching import runs_triton
from mtp_spec.model.distributed import store as control
from mtp_spec.model.distributed.group import ALONE, Ranks
from mtp_spec.model.distributed.store import Control, first_line
from mtp_spec.model.errors import CheckpointError, RankError

_places: dict[dist.ProcessGroup, Ranks] = {}
_held: list[Any] = []  # rooms live as long as the process


def join_ranks(parallel: object, device: str) -> Ranks:
    """Returns this process's place among the ranks.

    Args:
        parallel: "auto": the ranks started by torchrun or another launcher that sets RANK and WORLD_SIZE; or the
            caller's own process group; or None: this process alone.
        device: "cpu" or "cuda": exchanges go through gloo or NCCL.

    Raises:
        CheckpointError: no such value.
        RankError: the ranks do not find each other.
    """
    if parallel is None:
        return ALONE
    if isinstance(parallel, dist.ProcessGroup):
        return _placed(parallel)
    if parallel != "auto":
        raise CheckpointError(f'parallel={parallel!r}: "auto", None, or a torch.distributed process group')
    if not dist.is_available() or (int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized()):
        return ALONE
    if not dist.is_initialized():
        _start(device)
    assert dist.group.WORLD is not None
    return _placed(dist.group.WORLD)


def _start(device: str) -> None:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, init_method="env://", timeout=timedelta(seconds=control.PATIENCE))
        atexit.register(_leave)
    except (RuntimeError, ValueError, KeyError) as error:
        raise RankError(
            f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} found not all others at {where} within "
            f"{control.PATIENCE:.0f} s ({first_line(error)}): start all, with the same MASTER_ADDR and MASTER_PORT"
        ) from error


def _leave() -> None:
    if not dist.is_initialized():
        return
    with suppress(Exception):  # the process ends in any case
        if "nccl" in dist.get_backend_config():
            dist.distributed_c10d._abort_process_group()  # destroying would wait for graphs that are still alive
        else:
            dist.destroy_process_group()
            # the group's threads may still hold tensors of an exchange, and a thread that releases one while the
            # interpreter exits aborts the process; they end with the group, once it has no more references
            for ranks in _places.values():
                ranks.group = None
            _places.clear()


def local_device(device: str, ranks: Ranks) -> str:
    """Returns this rank's device: of several GPUs, the one with its local number on this machine.

    Raises:
        CheckpointError: there are fewer GPUs than ranks.
    """
    if ranks.size == 1 or device != "cuda":
        return device
    number, there = int(os.environ.get("LOCAL_RANK", ranks.rank)), torch.cuda.device_count()
    if number >= there:
        raise CheckpointError(f"rank {ranks.rank} is to use GPU {number} and this machine has {there}: start fewer")
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def open_rooms(ranks: Ranks, device: str) -> None:
    """Makes GPUs that can access each other's memory exchange small tensors there; otherwise the group does it."""
    if ranks.size == 1 or not device.startswith("cuda") or not runs_triton(torch.empty(0, device=device)):
        return
    assert ranks.group is not None
    failure, words = "", exchange.room_words(ranks.size)
    try:
        import torch.distributed._symmetric_memory as symmetric

        room = symmetric.empty(words, dtype=torch.int32, device=torch.device(device)).zero_()
        torch.cuda.synchronize()
        handle = symmetric.rendezvous(room, ranks.group)
        addresses = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
    except (RuntimeError, ImportError, AttributeError, TypeError) as error:
        failure = first_line(error) or type(error).__name__
    failures = [one for one in ranks.everyone(failure) if one]
    if failures:
        warnings.warn(f"GPUs exchange through NCCL, which is slower: {failures[0]}", stacklevel=2)
        return
    turns = torch.zeros(exchange.PROGRAMS, dtype=torch.int32, device=device)
    lost = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    ranks.rooms = exchange.Rooms(ranks.rank, addresses, turns, lost)
    _held.append((room, handle))


def _placed(group: dist.ProcessGroup) -> Ranks:
    """Returns the `Ranks` of a group, one object for each group."""
    if group.size() == 1:
        return ALONE
    if group not in _places:
        rank, size = group.rank(), group.size()
        members = "-".join(str(member) for member in dist.get_process_group_ranks(group))
        store = PrefixStore(f"mtp_spec/{members}", dist.distributed_c10d._get_default_store())
        facts = Control(store, rank, size)
        facts.start()
        _places[group] = Ranks(rank, size, group, facts)
    return _places[group]
