"""Shields the library's arithmetic from settings of the calling program.

torch's default dtype is global to all threads, so it cannot be reset while others run: every tensor in the library
names its dtype. The other settings are per thread and are reset at the library's entry points.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def undisturbed(inference: bool = True) -> Iterator[None]:
    """Disables autocast, resets the default device, and turns inference mode on or off; also a decorator."""
    with ExitStack() as stack:
        if torch.empty(0, dtype=torch.float32).device.type != "cpu":  # ten times faster than asking torch
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(inference))
        yield
