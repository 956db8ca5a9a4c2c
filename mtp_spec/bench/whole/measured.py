"""Passes of all layers, and what limits them: each part is left out in turn, and the time without it is taken.

A pass of a slice is extended to all layers by its MoE layers alone, timed in the same run: every figure of the missing
ones is that of these. Gates choose again what they chose first, so that both times of a difference read the same
experts.

Legend: `M` rows, `S` ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import mean
from typing import Any
from unittest.mock import patch

from torch import Tensor

from mtp_spec.bench.common import Row
from mtp_spec.bench.launches import attends, gate_kept, without
from mtp_spec.bench.passes import Work, chosen, draft_pass, hit, layers_pass, pass_bytes, verify_pass
from mtp_spec.bench.whole.clock import Clock
from mtp_spec.cuda.state import State
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.cuda.layers import Mixture
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.distributed.group import Ranks

DRAFT = "draft, 1 row"
MEASURED, EXTRAPOLATED = "measured", "extrapolated"


def verify_name(rows: int) -> str:
    return "plain, 1 row" if rows == 1 else f"verify, {rows} rows"


@dataclass
class Whole:
    """A pass of all layers: one that runs, and MoE layers that stand for the missing ones.

    Attributes:
        name: in the table.
        rows: M.
        run: the pass of the layers that there are.
        layer: their MoE layers alone.
        held: how many of these.
        missing: how many MoE layers there are not.
    """

    name: str
    rows: int
    run: Work
    layer: Work
    held: int
    missing: int

    def of(self, measure: Callable[[Work], float]) -> float:
        """Returns a measure of all layers, which adds up over layers."""
        value = measure(self.run)
        return value + self.missing / self.held * measure(self.layer) if self.missing else value

    @property
    def kind(self) -> str:
        return EXTRAPOLATED if self.missing else MEASURED


@dataclass
class Passes:
    """The passes of a model after `context` committed tokens.

    Attributes:
        full: the whole model, of which `model` may be a slice.
        rate: TB/s of reading.
    """

    model: DeviceModel
    state: State
    context: int
    full: ModelConfig
    clock: Clock
    rate: float

    def all(self, rows: list[int]) -> list[Whole]:
        """Returns plain and verify passes, and the draft's."""
        model, state, context = self.model, self.state, self.context
        held = sum(isinstance(layer.mlp, Mixture) for layer in model.layers)
        missing = self.full.num_hidden_layers - len(model.layers)
        found = [
            Whole(verify_name(m), m, verify_pass(model, state, context, m),
                  layers_pass(model, state, context, m, Mixture), held, missing)
            for m in rows
        ]  # fmt: skip
        draft = draft_pass(model, state, context)
        return [*found, Whole(DRAFT, 1, draft, draft, 1, 0)]

    def row(self, one: Whole) -> Row:
        """Returns a pass's line: time on the slowest rank, the bytes that this rank must read."""
        counts = list[int]()

        def size(work: Work) -> float:
            here = hit(work)
            counts.extend(here)
            return pass_bytes(work, here)

        read, ms = one.of(size), one.of(lambda work: self.clock.slowest(work.run)) / 1e3
        floor = read / self.rate / 1e9
        return {
            "context": self.context,
            "pass": one.name,
            "ms": ms,
            "floor ms": floor,
            "x floor": ms / floor,
            "GB a rank": read / 1e9,
            "experts a layer": mean(counts) if counts else 0.0,
            "time": one.kind,
        }

    def layer_ms(self, one: Whole) -> float:
        """Returns the milliseconds of one MoE layer on the slowest rank."""
        return self.clock.slowest(one.layer.run) / one.held / 1e3

    def limits(self, one: Whole) -> Row:
        """Returns what each part of a pass costs."""
        clock = self.clock
        kept = gate_kept if clock.on_gpu else _nothing_kept

        def micro(part: Callable[[], AbstractContextManager[None]]) -> list[float]:
            """Returns each rank's microseconds of a pass with its gates kept, and without a part."""

            def both(work: Work) -> list[float]:
                with kept(work.run), part():
                    return clock.each(work.run)

            found = both(one.run)
            if one.missing:
                share = one.missing / one.held
                found = [mine + share * more for mine, more in zip(found, both(one.layer), strict=True)]
            return found

        whole = one.of(lambda work: clock.slowest(work.run))
        with_gates = max(micro(nullcontext))
        alone = micro(unanswered)
        exchange = with_gates - max(alone)
        counts = Counter[int](exchanged(one.run.run))
        for size, count in Counter(exchanged(one.layer.run)).items() if one.missing else ():
            counts[size] += count * one.missing // one.held  # every layer has the same ones
        row = {
            "context": self.context,
            "pass": one.name,
            "ms": whole / 1e3,
            "exchanges": counts.total(),
            "exchange ms": exchange / 1e3,
            "slowest rank ms": (max(alone) - mean(alone)) / 1e3,
            "gates ms": max(0.0, whole - with_gates) / 1e3 if clock.on_gpu else None,
            "attention ms": None,
            "launches": None,
            "launches ms": None,
            "busiest with whole experts": uneven(self.full.n_routed_experts, chosen(one.run), clock.ranks.size),
            "time": one.kind,
            "without exchange ms": (whole - exchange) / 1e3,
            "ranks' ms without exchange": [value / 1e3 for value in alone],
            "bytes of exchanges": [[size, count] for size, count in sorted(counts.items())],
        }
        if clock.on_gpu:
            places = attends(self.model.device)
            row["attention ms"] = (with_gates - max(micro(lambda: without(places)))) / 1e3
            launches = one.of(lambda work: float(clock.launches(work.run) or 0))
            row["launches"], row["launches ms"] = round(launches), launches * clock.launch / 1e3
        return row


@contextmanager
def _nothing_kept(run: Callable[[], Any]) -> Iterator[None]:
    """Stands for `gate_kept` where kernels' references run: they have no gates to leave out."""
    yield


@contextmanager
def unanswered() -> Iterator[None]:
    """Inside the block ranks exchange nothing: what would come from the others is whatever the memory holds."""

    def alone(self: Ranks, *tensors: Tensor) -> Any:
        return tuple(x.new_empty(*x.shape[:-1], self.size * x.shape[-1]) for x in tensors)

    with patch.object(Ranks, "gather_all", alone):
        yield


def exchanged(run: Callable[[], Any]) -> list[int]:
    """Runs a pass; returns for each of its exchanges the bytes of all ranks together."""
    found, gather = list[int](), Ranks.gather_all

    def noted(self: Ranks, *tensors: Tensor) -> Any:
        if self.size > 1:
            found.append(self.size * sum(x.nbytes for x in tensors))
        return gather(self, *tensors)

    with patch.object(Ranks, "gather_all", noted):
        run()
    return found


def uneven(experts: int, layers: list[list[int]], ranks: int) -> float:
    """Returns how many times the mean the busiest rank would read if ranks had whole experts, in order.

    Args:
        layers: the experts that each layer chose, and shared ones, which are not counted.
    """
    shares = [1.0]
    for one in layers:
        busy = Counter(expert * ranks // experts for expert in one if expert < experts)
        shares.append(max(busy.values()) * ranks / busy.total())
    return mean(shares[1:] or shares)
