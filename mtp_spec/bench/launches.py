"""`bench step --parts launches`: what each launch of a MoE layer costs.

Kernels overlap (`kernels.launching`), so their times in a profile do not add up. Here a layer is timed without one of
its launches: what that saves is what the launch costs, gap included. Without it the numbers are wrong, and only the
time is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mtp_spec.bench.timing import graph_time
from mtp_spec.cuda.state import State
from mtp_spec.kernels import gemm, mla, quant
from mtp_spec.kernels.launching import hopper_module, on_hopper
from mtp_spec.kernels.moe import layer as mixture
from mtp_spec.kernels.moe import route
from mtp_spec.model.cuda.layers import Mixture
from mtp_spec.model.cuda.model import DeviceModel

Work = Callable[[], Any]


def launches(model: DeviceModel, state: State, context: int) -> dict[str, float]:
    """Returns microseconds of one row in a MoE layer: "layer" the whole, other keys what leaving a launch out saves."""
    from mtp_spec.kernels.mla import kernels, row_kernels  # as `attends`

    layers = [
        (layer, cache)
        for layer, cache in zip(model.layers, state.caches, strict=True)
        if isinstance(layer.mlp, Mixture)
    ]
    x = torch.randn(1, model.config.hidden_size, device=model.device, dtype=model.activations)
    state.length.fill_(context)
    plan, table = mla.chain(state.length, 1), model.table(state.caches[0].capacity)

    def run() -> None:
        total: Tensor = x
        branch: Tensor | None = None
        for layer, cache in layers:
            total, branch = layer(total, branch, table, cache, plan)

    shapes = _products(run)
    names = {"norms": [(quant, "_rms_norm_quant_kernel")], "prepare": [(row_kernels, "_prepare_kernel")]}
    names |= {"absorb": [(row_kernels, "_absorb_kernel")], "up": [(row_kernels, "_up_kernel")]}
    names |= {"attend": attends(model.device)}
    names |= {"combine": [(kernels, "_combine_kernel")]}
    names |= {"gate and up": [(mixture, "_gate_up_kernel")], "down": [(mixture, "_down_kernel")]}
    whole = _time(run)
    found = {"layer": whole / len(layers)}
    for shape in shapes:
        found[f"product {shape[0]}x{shape[1]}"] = (whole - _time(run, _product_left_out(shape))) / len(layers)
    for name, places in names.items():
        found[name] = (whole - _time(run, without(places))) / len(layers)
    found["gate (two launches)"] = (whole - _time(run, gate_kept(run))) / len(layers)
    return found


def attends(device: torch.device) -> list[tuple[Any, str]]:
    """Returns the kernels that attend over the cache, as modules and names."""
    from mtp_spec.kernels.mla import kernels  # needs Triton, which not every platform has

    hopper = hopper_module("mla.hopper") if on_hopper(device) else None
    return [(kernels, "_attend_kernel"), *([(hopper, "attend_kernel")] if hopper else [])]


@contextmanager
def without(places: list[tuple[Any, str]]) -> Iterator[None]:
    """Inside the block these kernels, modules and names, are not launched."""
    with ExitStack() as stack:
        for module, kernel in places:
            stack.enter_context(patch.object(module, kernel, _Nothing()))
        yield


class _Nothing:
    """A kernel whose launch does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: None


def _time(run: Work, *left_out: Any) -> float:
    with ExitStack() as stack:
        for part in left_out:
            stack.enter_context(part)
        run()
        return min(graph_time(run) for _ in range(2))


def _products(run: Work) -> list[tuple[int, ...]]:
    """Returns the shapes of the matrices that are multiplied, in order."""
    shapes: dict[tuple[int, ...], None] = {}
    launch = gemm._launch

    def noted(a: Tensor, w: Tensor, *others: Any) -> Tensor:
        shapes[tuple(w.shape)] = None
        return launch(a, w, *others)

    with patch.object(gemm, "_launch", noted):
        run()
    return list(shapes)


def _product_left_out(shape: tuple[int, ...]) -> Any:
    launch = gemm._launch

    def some(a: Tensor, w: Tensor, a_scale: Any, w_scale: Any, out: Tensor, how: gemm.Launch) -> Tensor:
        return out if tuple(w.shape) == shape else launch(a, w, a_scale, w_scale, out, how)

    return patch.object(gemm, "_launch", some)


@contextmanager
def gate_kept(run: Work) -> Iterator[None]:
    """Inside the block every gate returns its first choice again, without a launch."""
    kept: dict[int, Any] = {}

    def again(x: Tensor, weight: Tensor, *others: Any) -> Any:
        if weight.data_ptr() not in kept:
            kept[weight.data_ptr()] = route(x, weight, *others)
        return kept[weight.data_ptr()]

    with patch.object(mixture, "route", again):
        run()
        yield
