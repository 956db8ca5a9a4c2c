"""Room that launches need beside their operands and outputs: partial results, and counts of arrivals.

One room for each use and device, made when it is first needed and kept until the process ends. Its lifetime:

- A captured CUDA graph holds the address of its room and writes there at every replay. So room that was handed out is
  never freed, moved or resized. A launch that needs more gets a new one; the old one stays for the graphs that know it.
- Room is not made while a graph is captured: it would belong to the graph's memory, and counts would be zeroed by
  replays, not now. What is captured therefore runs once before, at the same sizes; else this is an error.
- A room is everybody's on its device: of all models, layers and graphs. That is sound because launches follow one
  another on one stream (`launching` for kernels that overlap), and nothing is kept in a room from one operation to the
  next. Counts are zero when a room is made, and every kernel that counts leaves zeros behind.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Room of one dtype for one use, on every device where it is asked for.

    Args:
        dtype: of its numbers.
        zeros: whether a new room holds zeros, for counts; else it holds anything.
        least: numbers that a room has at least.
    """

    def __init__(self, dtype: torch.dtype, zeros: bool = False, least: int = 1) -> None:
        self._dtype, self._make, self._least = dtype, torch.zeros if zeros else torch.empty, least
        self._rooms: dict[torch.device, list[Tensor]] = {}

    def room(self, device: torch.device, count: int) -> Tensor:
        """Returns `count` numbers or more, `[.]`; the same ones at every call, until a call needs more.

        Raises:
            RuntimeError: there is not enough room, and a CUDA graph is being captured.
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
