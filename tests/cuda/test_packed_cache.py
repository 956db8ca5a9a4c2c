"""The latent cache in FP8: what it holds, what it costs, and the contracts that hold as they do in bfloat16."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mtp_spec
from device_models import DEMO, KINDS, SAMPLING, SHAPES, checkpoint
from lms import device, lm_of
from mtp_spec import load_checks as loading
from mtp_spec.analysis.scoring import score_ids
from mtp_spec.api import LM
from mtp_spec.cuda.memory import plan_memory
from mtp_spec.cuda.pages import DevicePages, planned_pages
from mtp_spec.errors import OptionError
from mtp_spec.kernels import mla
from mtp_spec.kernels.mla import Layout, new_caches
from mtp_spec.load_checks import load_model, packs_cache
from mtp_spec.model.checkpoint.folder import load_checkpoint
from mtp_spec.model.cuda.checkpoint import load_device_model
from mtp_spec.model.cuda.model import DeviceModel

FP8 = "float8_e4m3fn"


def packed_lm(folder: Path, device: str = "cpu") -> LM:
    return lm_of(load_device_model(folder, device, packed_cache=True), None, 300)


def test_what_a_row_holds() -> None:
    torch.manual_seed(0)
    assert [Layout(512, 64, packed).row_bytes for packed in (False, True)] == [1152, 656]  # DeepSeek-V3
    for latent, rope in ((512, 64), (256, 64), (64, 16), (16, 16)):
        cache = new_caches(2, 100, 3, Layout(latent, rope, packed=True), "cpu")[1]
        rows = torch.randn(5, latent + rope).bfloat16() * torch.tensor([[1e-3], [1.0], [30.0], [5e4], [0.0]])
        rows[1, : min(128, latent)] = 0
        slots = torch.tensor([0, 7, 8, 99, 30])
        cache.write(slots, rows)
        got = cache.read(slots).float()
        assert torch.equal(got[:, latent:], rows[:, latent:].bfloat16().float()), "the rotated part is kept"
        blocks = rows[:, :latent].float().abs().unflatten(-1, (-1, min(128, latent))).amax(-1, keepdim=True)
        error = (got - rows)[:, :latent].unflatten(-1, (-1, min(128, latent))).abs()
        assert (error <= blocks / 14).all(), "half a step of e4m3 below the largest, whose scale may be twice as wide"
        assert torch.equal(cache.scales.log2(), cache.scales.log2().round()) or not cache.scales.any()
        cache.write(slots, cache.read(slots))
        assert torch.equal(cache.read(slots).float(), got), "a second rounding changes nothing"
        assert not cache.store[: cache.base].any(), "the other layer's rows are left alone"


@pytest.mark.parametrize(("kind", "sampling"), [("v3", SAMPLING[0]), ("v3", SAMPLING[2]), ("two modules", SAMPLING[1])])
def test_same_text_whatever_is_drafted(tmp_path: Path, kind: str, sampling: dict[str, Any]) -> None:
    lm, prompt = packed_lm(checkpoint(tmp_path, kind)), [(37 * i) % 160 for i in range(12)]
    texts = [lm.generate(prompt, max_new_tokens=6, seed=3, speculation=shape, **sampling) for shape in SHAPES[::2]]
    assert all(text.token_ids == texts[0].token_ids for text in texts)
    assert all(cache.layout.packed for cache in device(lm).pool.pages.caches)


@pytest.mark.parametrize("kind", ["v3", "v2 greedy"])
def test_close_to_the_bfloat16_cache(tmp_path: Path, kind: str) -> None:
    folder = checkpoint(tmp_path, kind, num_experts_per_tok=8, topk_group=KINDS[kind].get("n_group", 4))
    ids = [(37 * i) % 160 for i in range(24)]
    exact = score_ids(load_checkpoint(folder, dtype=torch.float32), ids).logits
    errors = [(score_ids(load_device_model(folder, "cpu", packed_cache=packed), ids).logits - exact).norm()
              for packed in (False, True)]  # fmt: skip
    # activations in FP8 are most of the distance, and flip where a latent moves
    assert errors[0] != errors[1] < 2 * errors[0]


def test_memory_is_foreseen() -> None:
    packed = load_device_model(DEMO, "cpu", packed_cache=True)
    planned, pages = plan_memory(packed, 300), DevicePages(packed, 300, planned_pages(300, 1), 1)
    assert planned.caches == pages.caches[0].store.nbytes
    assert plan_memory(load_device_model(DEMO, "cpu"), 300).caches * 400 == planned.caches * 640


def test_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in (None, "bfloat16", torch.bfloat16):
        assert not packs_cache(given)
    for given in (FP8, torch.float8_e4m3fn):
        assert packs_cache(given)
    for bad in ("int8", "float32", 8, torch.float16):
        with pytest.raises(OptionError, match=re.escape(f"cache_dtype={bad!r}: allowed are bfloat16, float8_e4m3fn")):
            mtp_spec.load(cache_dtype=bad)
    for dtype, cause in ((None, "need an NVIDIA GPU"), ("float32", "runs by torch")):
        with pytest.raises(OptionError, match=f"cache_dtype='{FP8}' .*{cause}.*leave cache_dtype out"):
            mtp_spec.load(dtype=dtype, cache_dtype=FP8)
    monkeypatch.setattr(loading, "_no_kernels", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**40, 2**40))
    for given, packed in ((None, False), (FP8, True)):
        model = load_model(DEMO, None, "cpu", 300, None, None, cache_dtype=given)
        assert isinstance(model, DeviceModel)
        assert model.packed_cache == packed


def test_wrong_caches_are_refused() -> None:
    head, length = mla.Head(4, 32, 16, 64, 32, 0.1), torch.zeros(1, dtype=torch.int32)
    q, plan = torch.zeros(1, 4, 80).bfloat16(), mla.chain(length, 1)
    cache = new_caches(1, 64, 1, head.layout(packed=True), "cpu")[0]
    for bad, words in (
        (new_caches(1, 64, 1, Layout(32, 16, packed=True), "cpu")[0], r"32 \+ 16 numbers, heads of 64 \+ 16"),
        (replace(cache, store=cache.store.bfloat16()), r"torch.bfloat16: a contiguous \[rows, 112\] torch.uint8"),
        (replace(cache, store=cache.store[:, :80].contiguous()), r"\(192, 80\) .*\[rows, 112\]"),
        (replace(cache, layout=head.layout()), r"torch.uint8: a contiguous \[rows, 80\] torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=words):
            mla.attend(q, bad, plan, head)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLING, ids=lambda s: str(s)[:40])
def test_same_text_on_the_gpu(sampling: dict[str, Any]) -> None:
    lm = mtp_spec.load(device="cuda", cache_dtype=FP8)
    for seed, prompt in enumerate(("One day a fox", "List five animals", "The king said", "Rain")):
        texts = [lm.generate(prompt, max_new_tokens=96, seed=seed, speculation=s, **sampling).text for s in SHAPES]
        assert all(text == texts[0] for text in texts)


@pytest.mark.gpu
def test_written_as_by_the_reference() -> None:
    torch.manual_seed(0)
    for latent in (512, 256, 64):
        head = mla.Head(16, 128, 64, latent, 128, 0.1)
        plan = mla.chain(torch.full((1,), 3, dtype=torch.int32, device="cuda"), 20)
        caches = [new_caches(2, 100, 0, head.layout(packed=True), "cuda")[1] for _ in range(2)]
        down = torch.randn(20, 64 + head.width, device="cuda").bfloat16()
        table = torch.randn(200, 2, 64, device="cuda")
        norms = torch.ones(64, device="cuda").bfloat16(), torch.ones(latent, device="cuda").bfloat16()
        mla.prepare(down, *norms, table, caches[0], plan, head, 1e-6)
        mla.prepare_reference(down, *norms, table, caches[1], plan, head, 1e-6)
        slots = torch.arange(30, device="cuda")
        got, expected = (cache.read(slots).float() for cache in caches)
        # a sum of squares in another order flips a rounding to bfloat16 here and there
        assert (got - expected).norm() < 2e-3 * expected.norm()
        assert torch.equal(got[:3], expected[:3])
