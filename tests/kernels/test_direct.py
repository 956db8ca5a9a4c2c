"""Launches by `kernels.direct` are those that Triton itself would make, for any arguments; nothing is compiled."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from itertools import count, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
tl: Any = pytest.importorskip("triton.language")

from mtp_spec.kernels import direct  # noqa: E402
from mtp_spec.kernels.direct import described, enqueue  # noqa: E402

if not direct.KINDS:
    pytest.skip("this Triton's launchers are not known: all launches are its own", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402

TENSORS = [torch.zeros(64, dtype=dtype) for dtype in (torch.float32, torch.int32, torch.bfloat16)]
NUMBERS = [0, 1, 2, 15, 16, 17, 4096, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31) - 1, 2**40, 2**40 + 3]
OTHER = 7  # a device that is not the first


@triton.jit(do_not_specialize=["m"])
def _kernel(x, y, n, m, eps, SIZE: tl.constexpr, PDL: tl.constexpr):
    tl.store(x, tl.load(y) + n + m + eps)


@triton.jit
def _tiled_kernel(a_desc, w, w_desc, n, SIZE: tl.constexpr):
    a_desc.store([0, 0], w_desc.load([0, 0]) + n)


class Card:
    """A driver that notes what is launched; every compiled kernel is a number."""

    def __init__(self) -> None:
        self.launched, self.hooked, self.device = list[tuple[Any, ...]](), list[Any](), 0
        self.launcher_cls = nvidia.CudaLauncher
        self.utils = SimpleNamespace(
            launch=self._launch, build_signature_metadata=lambda given: bytes(len(given)),
            fill_tma_descriptor=self._encode, fill_tma_descriptor_tiled=self._encode,
        )  # fmt: skip
        self._numbers = count(1)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 + device

    def _launch(self, *args: Any) -> None:
        """Notes the sizes, stream, compiled kernel and arguments; neither flags nor constants, which nothing reads."""
        self.hooked += [x for x in args if isinstance(x, triton.knobs.HookChain) and x.calls]
        flat = (*args[:-1], *args[-1]) if isinstance(args[-1], (tuple, list)) else args  # Triton 3.9 and 3.6
        plain = (x.data_ptr() if isinstance(x, Tensor) else x for x in flat)
        self.launched.append(tuple(x for x in plain if type(x) in (int, float, tuple)))

    def _encode(self, *args: Any) -> tuple[Any, ...]:
        return tuple(tuple(x) if isinstance(x, (list, torch.Size)) else x for x in args)

    def compile(self, source: Any, target: Any, options: dict[str, Any], **others: Any) -> Any:
        kernel = CompiledKernel.__new__(CompiledKernel)
        tiles = [text for text in source.signature.values() if text.startswith("tensordesc")]
        metas = [{"swizzle": 3, "elem_size": 2, "elem_type": 9, "block_size": [16, 64], "fp4_padded": False,
                  "own": number} for number, _ in enumerate(tiles)]  # fmt: skip
        sizes = dict.fromkeys(("global_scratch_size", "profile_scratch_size"), 0)
        kernel.metadata = SimpleNamespace(
            **sizes, global_scratch_align=1, profile_scratch_align=1, num_ctas=1, launch_cooperative_grid=False,
            launch_pdl=options["launch_pdl"], tensordesc_meta=metas,
        )  # fmt: skip
        kernel.src, kernel.name, kernel.module, kernel._module_pid = source, "kernel", 1, -1
        kernel.function, kernel.packed_metadata = next(self._numbers), (options["num_warps"], 1, 0)
        kernel._run = self.launcher_cls(source, kernel.metadata)
        return kernel


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    monkeypatch.setattr(triton.runtime.driver, "_active", made)
    monkeypatch.setattr(triton.compiler, "compile", made.compile)
    monkeypatch.setattr(nvidia, "annotate_arguments", list, raising=False)
    # Triton 3.6 compiles its launchers
    monkeypatch.setattr(nvidia, "library_dirs", list, raising=False)
    monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **_: made.utils, raising=False)
    monkeypatch.setattr(direct, "_compiled", {})
    for kernel in (_kernel, _tiled_kernel):
        kernel.device_caches.clear()
    return made


def _alike(card: Card, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], **options: Any) -> tuple[Any, ...]:
    """Launches by Triton and by `enqueue`; returns what was launched, which must be the same."""
    first = len(card.launched)
    enqueue(kernel, grid, *args, **options)  # by Triton, if arguments like these are new
    enqueue(kernel, grid, *args, **options)
    kernel[grid](*(x.described() if isinstance(x, direct.Tiles) else x for x in args), **options)
    new, again, ordinary = card.launched[first:]
    assert new == again == ordinary
    return again


def test_the_compiled_kernel_is_the_one_that_triton_chooses(card: Card) -> None:
    chosen = set()
    for x, start, n, m in product(TENSORS, (0, 1, 8), NUMBERS, (1, 16, 2**31)):
        args = (x[start:], TENSORS[0], n, m, 0.5)
        chosen.add(_alike(card, _kernel, (2, 3), args, SIZE="constant", PDL="constant")[4])
    # addresses in two classes for each dtype; n: one, multiples of 16 and others, in 32 or 64 bits; m in 32 or 64 bits
    assert len(chosen) == 3 * 2 * 5 * 2
    known = sum(one is not None for one in direct._compiled.values())
    assert len(chosen) <= known < 4 * len(chosen)


@pytest.mark.parametrize(
    "options", [{"num_warps": 8}, {"launch_pdl": True}, {"SIZE": "other"}], ids=lambda given: next(iter(given))
)
def test_options_and_constants_make_another_kernel(card: Card, options: dict[str, Any]) -> None:
    args, common = (*TENSORS[:2], 3, 3, 0.5), {"SIZE": "constant", "PDL": "constant"}
    plain = _alike(card, _kernel, (1,), args, **common)
    other = _alike(card, _kernel, (1,), args, **common | options)
    again = _alike(card, _kernel, (1,), args, **common)
    assert plain == again != other


def test_each_device_has_its_kernel_and_stream(card: Card) -> None:
    args = (*TENSORS[:2], 3, 3, 0.5)
    first = _alike(card, _kernel, (1,), args, SIZE="constant", PDL="constant")
    card.device = OTHER
    second = _alike(card, _kernel, (1,), args, SIZE="constant", PDL="constant")
    assert (first[3], second[3]) == (100, 100 + OTHER)
    assert first[4] != second[4]


def test_matrices_are_encoded_as_by_triton_and_once(card: Card) -> None:
    store = torch.zeros(256, 256, dtype=torch.bfloat16)
    matrices = [store, store[8:], store[:64, :128], store[:64, 128:], store.view(128, 512)]
    for a, w in product(matrices, matrices):
        args = (described(a, 16, 64), w, described(w, 16, 64), 5)
        _alike(card, _tiled_kernel, (4,), args, SIZE="constant")
    (known,) = direct._compiled.values()
    assert known is not None
    assert [len(kept) for _, _, kept in known.tiles] == [len(matrices)] * 2
    with pytest.raises(AssertionError, match="16-byte aligned"):
        enqueue(_tiled_kernel, (4,), described(store.flatten()[1:-255].view(-1, 1), 16, 64), store,
                described(store, 16, 64), 5, SIZE="constant")  # fmt: skip


def test_few_encoded_matrices_are_kept(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MOST_MAPS", 4)
    store = torch.zeros(64, 64, dtype=torch.bfloat16)
    for row in range(30):
        args = (described(store[row:], 16, 64), store, described(store, 16, 64), 5)
        _alike(card, _tiled_kernel, (4,), args, SIZE="constant")
    (known,) = direct._compiled.values()
    assert known is not None
    assert all(len(kept) <= 4 for _, _, kept in known.tiles)


@pytest.mark.parametrize("make", [lambda x: None, lambda x: torch.nn.Parameter(x), lambda x: x.bool()])
def test_what_is_not_known_goes_tritons_way(card: Card, make: Callable[[Tensor], Any]) -> None:
    args = (TENSORS[0], make(TENSORS[0]), True, 3, 0.5)
    _alike(card, _kernel, (1,), args, SIZE="constant", PDL="constant")
    assert not direct._compiled


def test_a_profiler_sees_every_launch(card: Card) -> None:
    given, seen = (*TENSORS[:2], 3, 3, 0.5), list[Any]()
    options = {"SIZE": "constant", "PDL": "constant"}
    _alike(card, _kernel, (1,), given, **options)
    plain = card.launched[-1]
    chain = triton.knobs.runtime.launch_enter_hook
    hook = seen.append
    chain.add(hook)
    try:
        enqueue(_kernel, (1,), *given, **options)
    finally:
        chain.remove(hook)
    assert card.launched[-1] == plain
    assert card.hooked == [chain]
    enqueue(_kernel, (1,), *given, **options)
    assert card.launched[-1] == plain
    assert card.hooked == [chain]
