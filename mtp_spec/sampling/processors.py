"""Custom logits processors, with a state for every path of a draft tree.

A processor gets the row of every node with that node's own history, as it would in plain decoding, so the text does not
depend on speculation. It is also called for drafts and for paths that are not accepted, so it must be a pure function
of its arguments. It is not called for rows after a token that ends the text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtp_spec.errors import OptionError

Float32Array = npt.NDArray[np.float32]
S = TypeVar("S")


class LogitsProcessor(Protocol[S]):
    """Changes the logits that a token is drawn from; a state of any type represents the tokens before.

    Branches share states: `advance` returns a new state and must not change the old one (copy it if it is mutable).
    """

    def start(self, prompt_ids: Sequence[int]) -> S:
        """Returns the state at the end of the prompt."""
        ...

    def advance(self, state: S, token: int) -> S:
        """Returns the state after one more token."""
        ...

    def apply(self, state: S, logits: Tensor) -> Tensor:
        """Returns the row to draw from: `[V]`, any float dtype; -inf removes a token.

        Args:
            logits: `[V]` float32 on the CPU, after logit bias and penalties, before temperature; may be written to.
        """
        ...


ProcessorFunction = Callable[[list[int], Tensor], Tensor]
Processor = ProcessorFunction | LogitsProcessor[Any]


class Masking(ABC):
    """A `LogitsProcessor` that only removes tokens, whatever the row."""

    @abstractmethod
    def mask(self, state: Any) -> npt.NDArray[np.uint8]:
        """Returns the allowed tokens, one bit each, lowest bit first. The result must not be written to."""


class _Stateless:
    """A function of the ids so far and the row; the ids are the state."""

    def __init__(self, function: ProcessorFunction) -> None:
        self.function = function

    def start(self, prompt_ids: Sequence[int]) -> list[int]:
        return list(prompt_ids)

    def advance(self, state: list[int], token: int) -> list[int]:
        return [*state, token]

    def apply(self, state: list[int], logits: Tensor) -> Tensor:
        return self.function(list(state), logits)


class _Chain:
    """Several processors, one after another."""

    def __init__(self, parts: Sequence[LogitsProcessor[Any]]) -> None:
        self.parts = parts

    def start(self, prompt_ids: Sequence[int]) -> list[Any]:
        return [part.start(prompt_ids) for part in self.parts]

    def advance(self, state: list[Any], token: int) -> list[Any]:
        return [part.advance(own, token) for part, own in zip(self.parts, state, strict=True)]

    def apply(self, state: list[Any], logits: Tensor) -> Tensor:
        for part, own in zip(self.parts, state, strict=True):
            logits = part.apply(own, logits)
        return logits


def resolve_processors(value: object) -> list[LogitsProcessor[Any]]:
    """Returns the processors given as `logits_processor=`: none, a function, a `LogitsProcessor`, or a list of these.

    Raises:
        OptionError: anything else.
    """
    if value is None:
        return []
    return [_one(item) for item in (value if isinstance(value, list | tuple) else [value])]


def _one(value: object) -> LogitsProcessor[Any]:
    methods = [callable(getattr(value, name, None)) for name in ("start", "advance", "apply")]
    if all(methods):
        return cast("LogitsProcessor[Any]", value)
    if any(methods) or not callable(value):
        raise OptionError(
            f"logits_processor={value!r} is not possible: allowed is a function of (ids, logits), an object with "
            "start, advance and apply (mtp_spec.LogitsProcessor), or a list of these"
        )
    return _Stateless(value)


class Trail:
    """The state of a path's processor, computed on first use and once for all branches."""

    __slots__ = ("_branches", "_parent", "_processor", "_state", "_stop_ids", "_token")

    def __init__(self, processor: LogitsProcessor[Any], stop_ids: frozenset[int]) -> None:
        self._processor, self._stop_ids = processor, stop_ids
        self._parent: Trail | None = None
        self._state: Any = None
        self._token = -1
        self._branches: dict[int, Trail] = {}

    @classmethod
    def begin(
        cls, processors: Sequence[LogitsProcessor[Any]], prompt_ids: Sequence[int], stop_ids: frozenset[int]
    ) -> Trail | None:
        """Returns the trail at the end of the prompt; None without processors."""
        if not processors:
            return None
        trail = cls(processors[0] if len(processors) == 1 else _Chain(processors), stop_ids)
        trail._state = trail._processor.start(prompt_ids)
        return trail

    def after(self, token: int) -> Trail | None:
        """Returns the trail after one more token; None after one that ends the text."""
        if token in self._stop_ids:
            return None
        if token not in self._branches:
            branch = self._branches[token] = Trail(self._processor, self._stop_ids)
            branch._parent, branch._token = self, token
        return self._branches[token]

    def apply(self, row: Float32Array) -> Float32Array:
        """Returns the processed row; the given one may be written to.

        Raises:
            OptionError: the processor did not return a row.
        """
        logits = torch.from_numpy(row)
        out: object = self._processor.apply(self._resolve(), logits)
        if not isinstance(out, Tensor) or out.shape != logits.shape or not out.is_floating_point():
            given = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else repr(out)
            raise OptionError(f"logits_processor returned {given}: a float tensor of shape ({len(row)},) is expected")
        # copied, because the processor may keep what it returned, and later stages write into the row
        result: Float32Array = (out if out is logits else out.detach().to("cpu", torch.float32, copy=True)).numpy()
        return result

    def mask(self) -> npt.NDArray[np.uint8]:
        """Returns the mask of a `Masking` processor."""
        assert isinstance(self._processor, Masking)
        return self._processor.mask(self._resolve())

    def _resolve(self) -> Any:
        pending = [self]
        while (parent := pending[-1]._parent) is not None:
            pending.append(parent)
        for above, trail in pairwise(reversed(pending)):
            trail._state = self._processor.advance(above._state, trail._token)
            trail._parent = None
        return self._state
