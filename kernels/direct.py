"""Launches whose host side is short: Triton chooses a compiled kernel once for each class of arguments.

`kernel[grid](...)` looks up its compiled kernel by the types and values of 15 to 25 arguments, checks and encodes the
descriptors of matrices, asks the driver about every address and calls the hooks of profilers. That takes the host
longer than many kernels run, and passes over long prompts are not captured. `enqueue` lets Triton do all of it the
first time, and keeps the compiled kernel for arguments between which Triton makes no difference: equal dtypes and
constants, addresses that are multiples of 16 bytes or are not, numbers that are 1, multiples of 16 or others. Later
launches call the compiled kernel's launcher. What is not known to be alike goes Triton's way.

Legend: `M` rows, `K` columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor

from mtp_spec.kernels import launching

# versions whose launchers are known; with others, every launch goes Triton's way
KNOWN = ((3, 6), (3, 9))
MOST_MAPS = 1024  # encoded descriptors kept for each matrix of a compiled kernel

KINDS: tuple[type, ...] = ()
if launching.triton_obstacle() is None:
    import triton
    from triton.compiler import CompiledKernel
    from triton.experimental.gluon._runtime import GluonJITFunction
    from triton.runtime.jit import JITFunction
    from triton.tools.tensor_descriptor import TensorDescriptor

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) in KNOWN:
        KINDS = (JITFunction, GluonJITFunction)


class Tiles:
    """A matrix `[M, K]` that a kernel reads or writes by TMA, in tiles of some rows by some columns.

    Args:
        make: returns the descriptor that Triton takes, given the other arguments.
    """

    __slots__ = ("columns", "make", "matrix", "rows")

    def __init__(self, matrix: Tensor, rows: int, columns: int, make: Callable[[Tensor, int, int], Any]) -> None:
        self.matrix, self.rows, self.columns, self.make = matrix, rows, columns, make

    def described(self) -> Any:
        """Returns Triton's descriptor."""
        return self.make(self.matrix, self.rows, self.columns)


# by type, of the argument x{n}: a statement, what the launcher takes, and what Triton tells apart: dtypes and multiples
# of 16 bytes; numbers that are 1, multiples of 16, or of more than 32 bits (by value); tiles
READ = {
    Tensor: ("p{n} = x{n}.data_ptr()", "p{n}", "x{n}.dtype, not p{n} & 15"),
    int: ("", "x{n}", "x{n} == 1, not x{n} & 15, -0x80000000 <= x{n} < 0x80000000 or x{n}"),
    Tiles: ("", "x{n}", "x{n}.make, x{n}.matrix.dtype, x{n}.rows, x{n}.columns"),
    float: ("", "x{n}", "float"),
}


def described(x: Tensor, rows: int, columns: int) -> Tiles:
    """Returns a matrix in tiles of `rows` by `columns`, for kernels that are not Gluon's."""
    return Tiles(x, rows, columns, _descriptor)


def _descriptor(x: Tensor, rows: int, columns: int) -> Any:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def enqueue(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches a kernel on the current device and stream, as `kernel[grid](*args, **options)` does.

    Args:
        args: tensors, `Tiles`, whole numbers and floats: the kernel's first parameters, and all that are not constant.
        options: the other parameters, and options of the launch.
    """
    if type(kernel) not in KINDS or kernel.pre_run_hooks or _watched():
        _ordinary(kernel, grid, args, options)
        return
    read = _reader(tuple(map(type, args)))
    if read is None:
        _ordinary(kernel, grid, args, options)
        return
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    given, alike = read(*args)
    key = (id(kernel), device, alike, *options, *options.values())
    known = _compiled.get(key)
    if known is not None:
        known(grid, driver.get_current_stream(device), given)
        return
    compiled = _ordinary(kernel, grid, args, options)
    if type(compiled) is CompiledKernel and _plain(compiled.run):
        _compiled[key] = _Compiled(kernel, compiled, args)


@lru_cache
def _reader(kinds: tuple[type, ...]) -> Callable[..., tuple[list[Any], tuple[Any, ...]]] | None:
    """Returns a function of arguments of these types, None if there is one that is not in `READ`.

    It returns the arguments as the launcher takes them, and what Triton tells apart. Like Triton's own it is written
    out, since loops and branches would take three times as long.
    """
    if not READ.keys() >= set(kinds):
        return None
    numbers = range(len(kinds))
    names = ", ".join(f"x{number}" for number in numbers)
    firsts, given, alike = (
        [READ[kind][part].format(n=number) for number, kind in zip(numbers, kinds, strict=True)] for part in range(3)
    )
    lines = [f"def read({names}):", *(f"    {first}" for first in firsts if first),
             f"    return [{', '.join(given)}], ({', '.join(part for part in alike if part)},)"]  # fmt: skip
    found: dict[str, Any] = {}
    exec("\n".join(lines), found)  # of this file's text and numbers alone
    read: Callable[..., tuple[list[Any], tuple[Any, ...]]] = found["read"]
    return read


class _Compiled:
    """A compiled kernel, and what its launcher takes beside the arguments."""

    __slots__ = ("after", "before", "kernel", "launch", "nested", "tiles")

    def __init__(self, kernel: Any, compiled: Any, args: tuple[Any, ...]) -> None:
        constant = [parameter.is_constexpr for parameter in kernel.params]
        assert constant == [False] * len(args) + [True] * (len(constant) - len(args)), kernel.__name__
        run, self.kernel = compiled.run, kernel  # kept, since the key holds its id
        places = [place for place, x in enumerate(args) if type(x) is Tiles]
        metas = compiled.metadata.tensordesc_meta if places else []
        # of each matrix, the last first: its place, how it is encoded, and what was encoded
        self.tiles = [(place, meta, dict[Any, tuple[Any, ...]]()) for place, meta in zip(places, metas, strict=True)]
        self.tiles.reverse()
        self.launch = _inner(run.launch) if places else run.launch
        self.nested = hasattr(run, "arg_annotations")  # Triton 3.9 takes the arguments as one
        handles = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
        # neither scratch memory nor hooks
        if self.nested:
            self.before = (*handles, compiled.packed_metadata, *[None] * 5, run.arg_annotations, run.kernel_signature)
        else:
            self.before = (*handles, None, None, compiled.packed_metadata, None, None, None)
        self.after = (None,) * constant.count(True)

    def __call__(self, grid: tuple[int, ...], stream: int, given: list[Any]) -> None:
        for place, meta, kept in self.tiles:
            tiles: Tiles = given[place]
            matrix = tiles.matrix
            key = (matrix.data_ptr(), matrix.shape, matrix.stride())
            found = kept.get(key)
            if found is None:
                if len(kept) >= MOST_MAPS:
                    kept.clear()
                found = kept[key] = _encoded(tiles, meta, self.nested)
            given[place : place + 1] = found
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        if self.nested:
            self.launch(x, y, z, stream, *self.before, (*given, *self.after))
        else:
            self.launch(x, y, z, stream, *self.before, *given, *self.after)


_compiled: dict[tuple[Any, ...], _Compiled] = {}


def _ordinary(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Launches a kernel Triton's way; returns it compiled."""
    return kernel[grid](*(x.described() if type(x) is Tiles else x for x in args), **options)


def _plain(run: Any) -> bool:
    """Whether a launcher adds nothing to the arguments, no scratch memory for instance."""
    return not (run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False))


def _watched() -> bool:
    """Whether something, a profiler for instance, is called at every launch."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def _inner(launch: Any) -> Any:
    """Returns the launcher that takes encoded descriptors, out of the one that encodes them."""
    return dict(zip(launch.__code__.co_freevars, launch.__closure__, strict=True))["launcher"].cell_contents


def _encoded(tiles: Tiles, meta: Any, nested: bool) -> tuple[Any, ...]:
    """Returns a matrix as the launcher takes it: the encoded descriptor, sizes and strides."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    given = tiles.described()
    return tuple(make_tensordesc_arg(given, meta, None) if nested else make_tensordesc_arg(given, meta))
