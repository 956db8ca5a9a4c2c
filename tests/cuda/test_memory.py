"""The memory plan against what passes really hold: counted on the meta device, where nothing is computed."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mtp_spec
import small
from device_models import DEMO
from mtp_spec import host_memory, memory
from mtp_spec.cuda.memory import (
    COPIES,
    check_memory,
    check_room,
    group_bytes,
    logits_bytes,
    pass_bytes,
    plan_memory,
    rule_bytes,
)
from mtp_spec.cuda.pages import READ_SEQUENCES, STEP_ROWS, DevicePages, planned_pages
from mtp_spec.cuda.prefill import Whole
from mtp_spec.cuda.runtime import DeviceRuntime
from mtp_spec.cuda.state import PREFILL_ROWS, ROWS, SLACK, State, stages_of
from mtp_spec.cuda.step import Prefill, Step
from mtp_spec.errors import MTPSpecError
from mtp_spec.kernels import commit, direct, gemm, mla, quant
from mtp_spec.kernels.mla import attention
from mtp_spec.kernels.moe import grouping, layer, router
from mtp_spec.kernels.sampler import Stages, sampling, uniform
from mtp_spec.model.cache import PAGE
from mtp_spec.model.checkpoint.folder import open_checkpoint
from mtp_spec.model.config import load_config
from mtp_spec.model.cuda.checkpoint import empty_device_model, load_device_model
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.speculation import Speculation
from mtp_spec.tree_shape import TreeShape


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._now = 0, 0
        self._live: dict[int, tuple[Any, int]] = {}
        self._old: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for place, (reference, size) in list(self._live.items()):
            if reference.expired():
                self._now -= size
                del self._live[place]
        for storage in _storages((args, kwargs)):
            if storage.cdata not in self._live:
                self._old[storage.cdata] = storage
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            for storage in _storages(tensor):
                if storage.cdata not in self._live and storage.cdata not in self._old:
                    self._live[storage.cdata] = storage, tensor.untyped_storage().nbytes()
                    self._now += tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, self._now)
        return out


def _storages(tree: Any) -> list[Any]:
    return [StorageWeakRef(t.untyped_storage()) for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def held(work: Any) -> int:
    work()  # what is made once and kept is no part of a pass
    with Held() as counted:
        work()
    return counted.peak


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not launched: their wrappers allocate what they need and no more."""
    jit = pytest.importorskip("triton.runtime.jit")
    monkeypatch.setattr(direct, "KINDS", ())  # every launch as Triton makes it
    monkeypatch.setattr(jit.JITFunction, "run", lambda *_, **__: None)
    for module in (commit, gemm, attention, layer, grouping, router, quant, sampling, uniform):
        monkeypatch.setattr(module, "runs_triton", lambda _: True)


def models() -> list[DeviceModel]:
    folder = Path(str(files("mtp_spec.configs")))
    full = replace(load_config(folder / "config_671B.json"), num_hidden_layers=4, num_nextn_predict_layers=1)
    return [DeviceModel(load_config(DEMO), "meta"), DeviceModel(full, "meta")]


@pytest.mark.parametrize("model", models(), ids=["bundled", "V3"])
def test_passes_hold_what_is_planned(no_launches: None, model: DeviceModel) -> None:
    state = State(model, 1000)
    for rows in (64, 256):
        peak = held(Prefill(model, state, rows, True).run)
        assert 0.9 * pass_bytes(model, rows) < peak <= 1.05 * pass_bytes(model, rows)
    tree = TreeShape.of(Speculation(branching=(4, 4, 2), budget=64))
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=5, repetition_penalty=1.1)
    peak = held(Step(model, state, tree, stages_of(params), tree.depth + 1))
    assert peak <= pass_bytes(model, ROWS) + 2 * ROWS * model.config.vocab_size * 4
    for shape, rule in ((Speculation(depth=3), "rejection"), (Speculation(branching=(4, 4, 2)), "traversal"),
                        (Speculation(branching=(3, 2, 1)), "hybrid")):  # fmt: skip
        tree = TreeShape.of(shape)
        peak = held(Step(model, state, tree, stages_of(params), tree.depth + 1, rule))
        assert COPIES * (peak - pass_bytes(model, len(tree.parents) + 1)) <= rule_bytes(model.config, len(tree.parents))


@pytest.mark.parametrize("model", models(), ids=["bundled", "V3"])
@pytest.mark.parametrize("batch", [1, 2, 5, 32])
def test_reading_several_prompts_is_planned(no_launches: None, model: DeviceModel, batch: int) -> None:
    plan, head, vocabulary = plan_memory(model, 1000, batch), model.layers[0].attention.head, model.config.vocab_size
    for rows in PREFILL_ROWS:
        texts = min(batch, READ_SEQUENCES, STEP_ROWS // rows)
        caches = model.new_caches(1000 + SLACK, 0, 40)
        tables = torch.zeros(texts, caches[0].capacity // PAGE, dtype=torch.int32, device="meta")
        one = Whole(DeviceRuntime(model, 1000), tables, State(model, 1000, caches, tables), rows, True, Stages())
        peak = held(one.read)
        room = mla.room_bytes(caches[0].capacity, head, texts * rows, texts)
        assert COPIES * peak + room + group_bytes(model, batch) + logits_bytes(model, batch) <= 1.01 * plan.passes
        with Held() as counted:
            one.read()
        # every captured pass keeps what it has made
        assert sum(size for made, size in counted._live.values() if not made.expired()) <= texts * (4 * vocabulary + 64)


def test_memory_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_device_model(DEMO, "cpu")
    planned = plan_memory(model, 300)
    assert planned == plan_memory(empty_device_model(open_checkpoint(DEMO), "meta"), 300)
    assert planned.weights + planned.draft_head == sum(t.nbytes for t in model.parameters())
    pages = DevicePages(model, 300, planned_pages(300, 1), 1)
    assert planned.caches == pages.caches[0].store.nbytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (planned.weights + 300 * 2**20, 0))
    assert check_memory(model, 300, "cuda") == planned
    with pytest.raises(MTPSpecError, match="max_context="):
        check_memory(model, 200_000, "cuda")
    check_room(10**6, torch.device("cuda"), "A text")
    with pytest.raises(MTPSpecError, match=r"A sequence beside 1 more needs 900\.00 GB .* end other sequences"):
        check_room(900 * 10**9, torch.device("cuda"), "A sequence beside 1 more")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**20, 0))
    with pytest.raises(MTPSpecError, match="weights alone"):
        check_memory(model, 300, "cuda")


def test_a_cpu_without_room_for_the_weights_is_refused_before_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_torch: None
) -> None:
    folder = small.make(tmp_path / "model")
    read: list[tuple[int, int]] = []
    needed = memory.model_bytes(load_config(folder), torch.float32)
    monkeypatch.setattr(host_memory, "free_memory", lambda: needed - 1)
    with pytest.raises(mtp_spec.MTPSpecError, match=r"GB in float32 and .* GB of memory are free"):
        mtp_spec.load(folder, dtype="float32", progress=lambda done, total: read.append((done, total)))
    assert read == []
    monkeypatch.setattr(host_memory, "free_memory", lambda: needed)
    mtp_spec.load(folder, dtype="float32", progress=lambda done, total: read.append((done, total)))
    assert read[-1][0] == read[-1][1] == sum(t.nbytes for t in small.tensors(folder).values())
