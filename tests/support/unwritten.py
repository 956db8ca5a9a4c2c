"""Memory that nobody has written holds NaN, so that whatever reads it shows.

`torch.empty` and its kin return what lay there before, in tests mostly zeros or the right numbers of the run before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_spec.kernels.workspace import Workspace

MAKERS = (
    (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
    (Tensor, "new_empty"), (Tensor, "new_empty_strided"),
)  # fmt: skip


def spoil(patch: pytest.MonkeyPatch) -> None:
    """Fills what `MAKERS` return, and a workspace's room each time that a launch asks for it; integers are left."""
    for owner, name in MAKERS:
        patch.setattr(owner, name, _spoilt(getattr(owner, name)))
    room = Workspace.room
    patch.setattr(Workspace, "room", lambda *given, **named: _spoil(room(*given, **named)))


def _spoilt(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(make)
    def made(*given: Any, **named: Any) -> Tensor:
        return _spoil(make(*given, **named))

    return made


def _spoil(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and not tensor.is_meta:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.fill_(float("nan"))
    return tensor
