"""Buffers (rooms) that launches need besides operands and outputs: partial results, and counts of arrivals.

There is one room for each use and device, made when first needed and kept until the process ends. Its lifetime:

- A captured CUDA graph holds the address of its room and writes there at every replay. So a room in use is never freed,
  moved or resized. A launch that needs more gets a new one; the old one stays for the graphs that use it.
- No room is made during capture: it would belong to the graph's memory, and counts would be zeroed by replays, not now.
  So the captured work must run once before, at the same sizes; else this is an error.
- All models, layers and graphs on a device share a room. That is sound because launches follow one another on one
  stream (`launching` for kernels that overlap), and no data stays in a room from one operation to the next. Counts are
  zero when a room is made, and every kernel that counts resets them to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Rooms of one dtype for one use, one per device.

    Args:
        dtype: of its numbers.
        zeros: whether a new room holds zeros, for counts; else it is uninitialised.
        least: least size of a room, in numbers.
    """

    def __init__(self, dtype: torch.dtype, zeros: bool = False, least: int = 1) -> None:
        self._dtype, self._make, self._least = dtype, torch.zeros if zeros else torch.empty, least
        self._rooms: dict[torch.device, list[Tensor]] = {}

    def room(self, device: torch.device, count: int) -> Tensor:
        """Returns a buffer of `count` numbers or more, `[.]`; the same at every call, until a call needs more.

        Raises:
            RuntimeError: the room is too small, and a CUDA graph is being captured.
        """
        rooms = self._rooms.setdefault(device, [])
        if not rooms or rooms[-1].numel() < count:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"a kernel needs room for {count} numbers while a CUDA graph is captured: run what is captured "
                    "once before, at the same sizes"
                )
            rooms.append(self._make(max(count, self._least), dtype=self._dtype, device=device))
        return rooms[-1]

    def held(self, device: torch.device) -> list[Tensor]:
        """Returns all rooms on a device, the one in use last."""
        return self._rooms.get(device, [])
