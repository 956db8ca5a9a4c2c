"""Settings of the calling program that must not reach the library's arithmetic.

torch's default dtype is one for all threads, so it cannot be set aside while others run: every tensor here names its
own. The rest belongs to a thread, and is set aside where the library is entered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def undisturbed(inference: bool = True) -> Iterator[None]:
    """Without autocast, on torch's own default device, and in inference mode, or out of it; also a decorator."""
    with ExitStack() as stack:
        if torch.empty(0, dtype=torch.float32).device.type != "cpu":  # a tenth of what asking takes
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(inference))
        yield
