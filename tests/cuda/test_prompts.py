"""Long prompts on a GPU: rows attended in the expanded form, wherever the prompt is cut and whoever is read beside it.

On a CPU by the kernels' references, on a GPU (`pytest -m gpu`) as they are.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mtp_spec
from device_models import FEW, checkpoint
from lms import assert_same, lm_of
from mtp_spec.api import LM
from mtp_spec.cuda import prefill
from mtp_spec.cuda.memory import OVERHEAD_BYTES, check_memory, plan_memory
from mtp_spec.cuda.prompts import Piece, read_pieces
from mtp_spec.cuda.state import State
from mtp_spec.errors import MTPSpecError
from mtp_spec.kernels.mla import EXPANDED_ROWS
from mtp_spec.model.cache import PAGE
from mtp_spec.model.config import load_config
from mtp_spec.model.cuda.checkpoint import load_device_model
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.request import new_request
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.scheduler import Scheduler
from mtp_spec.sequence import Sequence
from mtp_spec.shapes import named_shape
from mtp_spec.speculation import Speculation

CONTEXT = 400
OPTIONS: dict[str, Any] = {"top_k": 4, "logit_bias": FEW, "seed": 2, "max_new_tokens": 4}
PROMPT = [(7 * i + i // 9) % 150 for i in range(135)]
RULE = Speculation(2, acceptance="rejection")  # its text depends on what is drafted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"), "two modules", num_hidden_layers=2, eos_token_ids=(159,))


def wide_lm(folder: Path, most: int = 1, tokens: int = 8192, run: int = PAGE) -> LM:
    """A model whose prompts are attended in the expanded form, in passes of up to `tokens` rows."""
    model = load_device_model(folder, "cpu")
    model.expanded, model.prefill_tokens, model.least_expanded = run, tokens, 0
    return lm_of(model, None, CONTEXT, max_batch=most)


def test_whole_runs_are_expanded(folder: Path) -> None:
    model = load_device_model(folder, "cpu")
    assert model.expanded == 0
    assert model.expanded_on("cpu") == 0
    model.expanded = EXPANDED_ROWS
    # the last run is whole only if both modules' slots are filled from the prompt; short prompts have none
    for tokens, rows in ((1, 0), (66, 0), (511, 0), (512, 448), (513, 448), (514, 512), (4097, 4032), (4098, 4096)):
        assert model.expanded_rows(tokens) == rows
    model.least_expanded = 0
    for tokens, rows in ((1, 0), (65, 0), (66, 64), (511, 448)):
        assert model.expanded_rows(tokens) == rows


@pytest.mark.parametrize("cut", [1, 63, 64, 129])
def test_a_prompt_may_be_cut_anywhere(folder: Path, cut: int) -> None:
    asked = {**OPTIONS, "speculation": RULE, "logprobs": 2}
    whole, cut_up = wide_lm(folder), wide_lm(folder, tokens=cut)
    assert_same(cut_up.generate(PROMPT, **asked), whole.generate(PROMPT, **asked))


def test_prompts_share_the_last_pass_of_the_first(folder: Path) -> None:
    """Several long prompts in a pass, ragged ones and guided ones too: each is what it is alone."""
    lm, alone = wide_lm(folder, 4, 300), wide_lm(folder)
    prompts = [PROMPT, [9, *PROMPT[:66]], [8, *PROMPT[:70], 4], [7, *PROMPT[2:131]]]
    asked: list[dict[str, Any]] = [
        {"speculation": 2, "logprobs": 1},
        {"speculation": RULE, "repetition_penalty": 1.2},
        {"speculation": 2, "temperature": 0.0, "logits_processor": lambda ids, row: row},
        {"speculation": None, "logit_bias": {**FEW, 2: 1.0}},
    ]
    handles = [lm.submit(prompt, **{**OPTIONS, **own}) for prompt, own in zip(prompts, asked, strict=True)]
    for handle, prompt, own in zip(handles, prompts, asked, strict=True):
        assert_same(handle.result(300), alone.generate(prompt, **{**OPTIONS, **own}))


def test_a_running_text_waits_for_a_bounded_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks beside steps are short ones; a prompt that nobody waits for is read at once."""
    monkeypatch.setattr("mtp_spec.cuda.backend.BESIDE_ROWS", 40)
    monkeypatch.setattr("mtp_spec.cuda.backend.PROMPT_ROWS", 40)
    read, passes = read_pieces, list[int]()

    def watched(model: DeviceModel, state: State, pieces: Seq[Piece], drafts: bool) -> torch.Tensor:
        passes.append(sum(piece.rows for piece in pieces))
        return read(model, state, pieces, drafts)

    monkeypatch.setattr(prefill, "read_pieces", watched)
    lm, alone = wide_lm(folder, 4), wide_lm(folder)
    scheduler = Scheduler(lm.backend.runner(shared=True), 4)
    first, late = (
        Sequence(new_request(ids, SamplingParams(**{**OPTIONS, "max_new_tokens": tokens}), None, lm.config, CONTEXT, (),
                             None, frozenset({159})), number)
        for number, (ids, tokens) in enumerate((([5, 6, 7], 60), (PROMPT, 3)))
    )  # fmt: skip
    scheduler.add(first)
    while first.steps < 3:
        scheduler.round()
    assert passes == []
    scheduler.add(late)
    while not late.finished:
        scheduler.round()
    assert passes == [40, 40, 40, 15]
    assert first.steps > 5, "steps ran between the chunks"
    while not first.finished:
        scheduler.round()
    scheduler.close()
    passes.clear()
    expected = alone.generate(PROMPT, **{**OPTIONS, "max_new_tokens": 3, "speculation": None})
    assert late.tokens[len(PROMPT) :] == expected.token_ids
    assert passes == [135]


def test_pages_are_shared_with_texts_that_would_compute_the_same_bits(folder: Path) -> None:
    lm, fresh = wide_lm(folder, 2, run=2 * PAGE), wide_lm(folder, run=2 * PAGE)
    asked = {**OPTIONS, "speculation": 2, "logprobs": 2}
    short, middle, long = PROMPT[:100], [*PROMPT, *range(60)], [*PROMPT, *range(60), *PROMPT[:80]]
    reused = []
    # rows expanded: 0, 0, 128, 128, 256, 0
    for prompt in (short, [*short, 1], middle, [*middle, 3, 4], long, [*short, 2]):
        found = lm.generate(prompt, **asked)
        reused.append(found.stats.reused_tokens)
        fresh_one = wide_lm(folder, run=2 * PAGE) if len(reused) % 2 else fresh
        assert_same(found, fresh_one.generate(prompt, **asked))
    assert reused == [0, 64, 0, 192, 128, 64]


def test_scores_take_the_same_path(folder: Path) -> None:
    ids = [*PROMPT, *range(40)]
    whole, cut = wide_lm(folder).score(ids), wide_lm(folder, tokens=50).score(ids)
    assert torch.equal(whole.logits, cut.logits)
    assert torch.equal(whole.mtp_logits.nan_to_num(7.0), cut.mtp_logits.nan_to_num(7.0))
    absorbed = wide_lm(folder, run=0).score(ids)
    apart = (whole.logits - absorbed.logits).abs().amax(-1)
    assert 0 < float(apart.median()) < 0.3, "the two forms are one function, but for roundings"


def test_fewer_rows_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(load_config(named_shape(Path("671B"))), num_hidden_layers=4)
    model = DeviceModel(config, "meta")
    plain = plan_memory(model, 30_000).total
    model.expanded = EXPANDED_ROWS
    sizes = {}
    for rows in (8192, 4096, 2048, 256):
        model.prefill_tokens = rows
        sizes[rows] = plan_memory(model, 30_000).total
    assert sizes[8192] > sizes[4096] > sizes[2048] > sizes[256] > plain
    model.prefill_tokens = 8192
    room = sizes[2048] + OVERHEAD_BYTES
    monkeypatch.setattr("mtp_spec.cuda.memory._free", lambda _: room)
    assert check_memory(model, 30_000, "cuda", shrinks=True).total == sizes[2048]
    assert model.prefill_tokens == 2048
    model.prefill_tokens = 8192
    with pytest.raises(MTPSpecError, match="max_context"):  # a number that was asked for stays
        check_memory(model, 30_000, "cuda")


@pytest.mark.parametrize("wrong", [0, 255, 32769, 1.5, True, "most"])
def test_impossible_sizes_are_refused(wrong: Any) -> None:
    with pytest.raises(mtp_spec.OptionError, match=r'prefill_tokens=.*: an integer from 256 to 32768, "auto" or None'):
        mtp_spec.load(prefill_tokens=wrong)
    with pytest.raises(mtp_spec.OptionError, match="prefill_tokens=512 is for a Hopper GPU: leave it out on a CPU"):
        mtp_spec.load(prefill_tokens=512)


@pytest.mark.gpu
def test_prompts_on_the_gpu(tmp_path: Path) -> None:
    """The sizes that the kernels are for: whatever the cut, with and without drafts, beside others, after others."""
    changes = {
        "hidden_size": 1024, "num_attention_heads": 8, "kv_lora_rank": 256, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "num_hidden_layers": 2, "max_position_embeddings": 8192,
        "num_nextn_predict_layers": 2,
    }  # fmt: skip
    folder = checkpoint(tmp_path, "v3", **changes)
    prompt = [(7 * i + i // 9) % 150 for i in range(4500)]
    asked = {**OPTIONS, "max_new_tokens": 8, "logprobs": 2}

    def load(tokens: int, most: int = 1) -> LM:
        return mtp_spec.load(folder, device="cuda", max_context=6000, prefill_tokens=tokens, max_batch=most)

    lm = load(8192)
    whole = lm.generate(prompt, **asked, speculation=RULE)
    again = lm.generate(prompt, **asked, speculation=RULE)
    assert again.stats.reused_tokens > 4000
    assert_same(again, whole)
    for cut in (4095, 1000, 257, 256):
        assert_same(load(cut).generate(prompt, **asked, speculation=RULE), whole)
    plain = lm.generate(prompt, **asked, speculation=None)
    assert plain.token_ids == load(600).generate(prompt, **asked, speculation=2).token_ids
    lm, others = load(8192, 4), [prompt, [9, *prompt[:700]], [8, *prompt[:300]], [7, *prompt[:1299]]]
    handles = [lm.submit(one, **asked, speculation=2) for one in others]
    for handle, one in zip(handles, others, strict=True):
        assert_same(handle.result(300), load(8192).generate(one, **asked, speculation=2))
    scores = [load(tokens).score(prompt[:3000]).logits for tokens in (8192, 700)]
    assert torch.equal(*scores)


@pytest.mark.gpu
def test_a_pass_may_be_longer_than_by_default(tmp_path: Path) -> None:
    changes = {
        "hidden_size": 1024, "num_attention_heads": 8, "kv_lora_rank": 256, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "num_hidden_layers": 2, "max_position_embeddings": 32768,
    }  # fmt: skip
    folder, prompt = checkpoint(tmp_path, "v3", **changes), [(7 * i + i // 9) % 150 for i in range(17000)]
    made = []
    for tokens in (8192, 16384, 32768):
        lm = mtp_spec.load(folder, device="cuda", max_context=18000, prefill_tokens=tokens)
        made.append(lm.generate(prompt, **{**OPTIONS, "max_new_tokens": 8, "logprobs": 2}, speculation=2))
    assert_same(made[1], made[0])
    assert_same(made[2], made[0])
