"""Models in bfloat16 and float16, and with some matrices in FP8, on the kernels; see test_step.py for FP8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mtp_spec
from device_models import KINDS, SHAPES, SIZES, checkpoint
from lms import lm_of
from mtp_spec.analysis.scoring import score_ids
from mtp_spec.api import LM
from mtp_spec.kernels.fp8 import E4M3, weight_dequant
from mtp_spec.model.checkpoint.folder import load_checkpoint, open_checkpoint, save_checkpoint
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.cuda.checkpoint import load_device_model, obstacle
from mtp_spec.model.transformer import Transformer
from small import tensors

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# of logits: rounding of activations, eight bits or eleven
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.005}
# sizes that nothing divides evenly: of attention heads and of experts, as in GLM-4.7-Flash and Kanana-2
UNEVEN = {"num_attention_heads": 5, "qk_nope_head_dim": 48, "v_head_dim": 64, "moe_intermediate_size": 96}
IDS = [(37 * i) % 160 for i in range(80)]


def wide(folder: Path, kind: str, dtype: torch.dtype, **changes: Any) -> Path:
    """Writes a random checkpoint of 16 bits."""
    torch.manual_seed(0)
    given = {**SIZES, **KINDS[kind], **changes, "fp8_block": None}
    model = Transformer(ModelConfig(**given), dtype)
    with torch.no_grad():
        for name, slot in model.checkpoint_slots().items():
            slot.normal_(1.0, 0.1) if "norm" in name else slot.normal_(0.0, slot.shape[-1] ** -0.5)
    save_checkpoint(model, folder / "model")
    return folder / "model"


def mixed(folder: Path, *widened: str) -> Path:
    """Rewrites an FP8 folder with the matrices of these parts in bfloat16."""
    found, out = tensors(folder), {}
    for name, value in found.items():
        if not any(part in name for part in widened):
            out[name] = value
        elif not name.endswith("_scale_inv"):
            scale = found.get(f"{name}_scale_inv")
            out[name] = value if scale is None else weight_dequant(value, scale)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(out, folder / "model.safetensors")
    return folder


def assert_near(got: Any, exact: Any, tolerance: float) -> None:
    assert (got.logits - exact.logits).norm() / exact.logits.norm() < tolerance
    for depth, (theirs, expected) in enumerate(zip(got.mtp_logits, exact.mtp_logits, strict=True), start=1):
        assert theirs[-depth:].isnan().all()
        assert (theirs - expected)[:-depth].norm() / expected[:-depth].norm() < tolerance


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("kind", [*KINDS, "uneven"])
def test_same_logits_as_in_float32(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    # all experts are chosen: near ties of a random gate would flip
    changes = UNEVEN if kind == "uneven" else {}
    name = "v3" if kind == "uneven" else kind
    folder = wide(tmp_path, name, dtype, num_experts_per_tok=8, topk_group=KINDS[name].get("n_group", 4), **changes)
    model = load_device_model(folder, "cpu")
    assert model.dtype == model.activations == dtype
    assert not any(slot.dtype == E4M3 for slot in model.checkpoint_slots().values())
    exact = score_ids(load_checkpoint(folder, dtype=torch.float32), IDS)
    assert_near(score_ids(model, IDS), exact, TOLERANCE[dtype])


PARTS = {"attention": ("self_attn",), "one of two down-projections": ("q_a_proj",), "dense": ("layers.0.mlp",),
         "experts": (".experts.",), "one expert": ("layers.1.mlp.experts.3.down",), "shared": ("shared_experts",),
         "the module": ("layers.3.",)}  # fmt: skip


@pytest.mark.parametrize("widened", PARTS.values(), ids=PARTS)
def test_folders_of_two_formats(tmp_path: Path, widened: tuple[str, ...]) -> None:
    """What is stored in FP8 stays so, unless a matrix of 16 bits is read in the same product."""
    folder = mixed(checkpoint(tmp_path, "v3", num_experts_per_tok=8, topk_group=4), *widened)
    model = load_device_model(folder, "cpu")
    slots = model.checkpoint_slots()
    assert sum(slot.dtype == E4M3 for slot in slots.values()) > 0
    for name, slot in slots.items():
        if any(part in name for part in widened):
            assert slot.dtype in (torch.bfloat16, torch.float32), name
    assert_near(score_ids(model, IDS), score_ids(load_checkpoint(folder, dtype=torch.float32), IDS), 0.15)


def test_fp8_weights_can_be_widened(tmp_path: Path) -> None:
    """As a card without FP8 has it, and a caller who asks for it: every weight is the product rounded once."""
    folder = checkpoint(tmp_path, "two shared experts", num_experts_per_tok=8, topk_group=4)
    exact = score_ids(load_checkpoint(folder, dtype=torch.float32), IDS)
    for options in ({"fp8_products": False}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}):
        model = load_device_model(folder, "cpu", **options)
        assert not any(slot.dtype == E4M3 for slot in model.parameters()) or options.get("fp8_products", True)
        assert_near(score_ids(model, IDS), exact, TOLERANCE[model.activations])


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"intermediate_size": 100}, "intermediate_size 100"), ({"num_attention_heads": 3, "v_head_dim": 20}, "60")],
)
def test_sizes_that_no_product_reads_are_named_before_loading(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    """Rows of a matrix are read 16 bytes at a time."""
    folder = wide(tmp_path, "v3", torch.bfloat16, **changes)
    reason = obstacle(open_checkpoint(folder))
    assert reason is not None
    assert named in reason
    assert "no multiple of 16" in reason
    assert score_ids(load_checkpoint(folder, dtype=torch.bfloat16), IDS).logits.isfinite().all()  # by torch


@pytest.mark.parametrize("ids", [None, range(40)], ids=["all", "some"])
@pytest.mark.parametrize("fp8_products", [True, False])
def test_same_text_whatever_is_drafted(tmp_path: Path, fp8_products: bool, ids: range | None) -> None:
    folder = wide(tmp_path, "two modules", torch.bfloat16 if fp8_products else torch.float16)
    lm = lm_of(load_device_model(folder, "cpu", draft_ids=ids, fp8_products=fp8_products), None, 200)
    for options in ({"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9}):
        texts = [lm.generate(IDS[:9], max_new_tokens=24, seed=1, speculation=shape, **options) for shape in SHAPES[:4]]
        assert all(text.token_ids == texts[0].token_ids for text in texts)
        assert texts[1].stats.drafted > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("kind", ["v3", "three modules", "ragged", "no shared expert, three heads", "v2", "uneven"])
def test_random_checkpoints_on_the_gpu(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    changes = UNEVEN if kind == "uneven" else {}
    name = "v3" if kind == "uneven" else kind
    group = KINDS[name].get("n_group", 4)
    folder = wide(tmp_path, name, dtype, num_experts_per_tok=8, topk_group=group, **changes)
    exact = score_ids(load_checkpoint(folder, dtype=torch.float32), IDS)
    assert_near(mtp_spec.load(folder, device="cuda").score(IDS), exact, TOLERANCE[dtype])
    assert_same_texts(mtp_spec.load(wide(tmp_path / "sparse", name, dtype, **changes), device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("widened", PARTS.values(), ids=PARTS)
def test_folders_of_two_formats_on_the_gpu(tmp_path: Path, widened: tuple[str, ...]) -> None:
    folder = mixed(checkpoint(tmp_path, "v3", num_experts_per_tok=8, topk_group=4), *widened)
    exact = score_ids(load_checkpoint(folder, dtype=torch.float32), IDS)
    assert_near(mtp_spec.load(folder, device="cuda").score(IDS), exact, 0.2)
    assert_same_texts(mtp_spec.load(folder, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_the_bundled_model_widened_on_the_gpu(dtype: str) -> None:
    """Same text with and without drafts, alone and beside others; and as many drafts are accepted as in FP8."""
    fp8, lm = mtp_spec.load(device="cuda"), mtp_spec.load(device="cuda", dtype=dtype, max_batch=4)
    assert lm.model.dtype == HALVES[dtype]
    prompts = ("One day a fox", "List five animals", "The king said", "Rain")
    kept = []
    for one in (fp8, lm):
        plain = [one.generate(prompt, max_new_tokens=96, seed=3, speculation=None) for prompt in prompts]
        for shape in (*SHAPES[1:], "auto"):
            texts = [one.generate(prompt, max_new_tokens=96, seed=3, speculation=shape) for prompt in prompts]
            assert [text.token_ids for text in texts] == [text.token_ids for text in plain], shape
            if shape == 1:
                kept.append(sum(text.stats.accepted for text in texts) / sum(text.stats.drafted for text in texts))
    together = lm.generate(list(prompts), max_new_tokens=96, seed=3, speculation=2)
    again = [lm.generate(prompt, max_new_tokens=96, seed=one.seed, speculation=None)
             for prompt, one in zip(prompts, together, strict=True)]  # fmt: skip
    assert [one.token_ids for one in together] == [one.token_ids for one in again]
    assert abs(kept[0] - kept[1]) < 0.1


def assert_same_texts(lm: LM) -> None:
    shapes = SHAPES[::2] if lm.config.num_nextn_predict_layers else (None,)
    texts = [lm.generate(IDS[:9], max_new_tokens=40, seed=1, speculation=shape).token_ids for shape in shapes]
    assert all(text == texts[0] for text in texts)
