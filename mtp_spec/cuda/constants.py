"""Constant tensors that captured work reads."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Constants:
    """Constant tensors that are kept alive as long as captured work, because its graph reads them at every replay;
    they are created beforehand, as nothing may be copied to the device during a capture."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[str, Tensor] = {}

    def integers(self, values: Iterable[int]) -> Tensor:
        """Returns values as int32."""
        return self._constant(list(values), torch.int32)

    def bytes(self, values: Iterable[int]) -> Tensor:
        """Returns values as uint8."""
        return self._constant(list(values), torch.uint8)

    def places(self, values: Iterable[int]) -> Tensor:
        """Returns values as int64, for indexing."""
        return self._constant(list(values), torch.int64)

    def table(self, paths: list[list[int]]) -> Tensor:
        """Returns `[M, A]` int32, each row a path padded with -1."""
        most = max(len(path) for path in paths)
        return self._constant([path + [-1] * (most - len(path)) for path in paths], torch.int32)

    def flags(self, values: list[list[bool]]) -> Tensor:
        """Returns values as bool."""
        return self._constant(values, torch.bool)

    def _constant(self, values: object, dtype: torch.dtype) -> Tensor:
        name = f"{values} {dtype}"
        if name not in self._held:
            self._held[name] = torch.tensor(values, dtype=dtype).to(self.device)
        return self._held[name]
