"""Drafts from a part of the vocabulary: the same text, fewer rows of the head, and errors that say what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mtp_spec
from device_models import DEMO, checkpoint
from lms import lm_of
from mtp_spec import load_checks as loading
from mtp_spec.api import LM
from mtp_spec.cuda.memory import plan_memory
from mtp_spec.errors import OptionError
from mtp_spec.load_checks import draft_ids, load_model
from mtp_spec.model.checkpoint import folder as checkpoints
from mtp_spec.model.checkpoint.folder import open_checkpoint
from mtp_spec.model.config import load_config
from mtp_spec.model.cuda.checkpoint import empty_device_model
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.speculation import Speculation
from mtp_spec.text import Tokenizer

SHAPES = (3, Speculation(branching=(3, 2)), Speculation(branching=(2, 2), acceptance="rejection"))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the FP8 path run on the CPU, where its kernels have references."""
    monkeypatch.setattr(loading, "_no_kernels", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**40, 2**40))


def on_kernels(drafts: loading.DraftVocabulary) -> LM:
    return lm_of(load_model(DEMO, None, "cpu", 300, drafts, None), Tokenizer(DEMO), 300)


def check(lm: LM, plain: list[int], **options: Any) -> None:
    for shape in SHAPES:
        out = lm.generate("One day a fox", speculation=shape, **options)
        if not isinstance(shape, Speculation) or shape.acceptance == "coupled":
            assert out.token_ids == plain
        assert out.stats.accepted > 0


def test_same_text_on_the_cpu() -> None:
    options: dict[str, Any] = {"max_new_tokens": 32, "seed": 1, "temperature": 0.9}
    plain = mtp_spec.load().generate("One day a fox", speculation=None, **options).token_ids
    check(mtp_spec.load(draft_vocabulary=2000), plain, **options)
    assert any(token >= 2000 for token in plain), "the text needs a token that is never drafted"


def test_same_text_on_the_kernels(kernels: None) -> None:
    options: dict[str, Any] = {"max_new_tokens": 7, "seed": 1, "temperature": 0.9}
    plain = on_kernels(None).generate("One day a fox", speculation=None, **options).token_ids
    check(on_kernels(2000), plain, **options)


def test_nothing_to_draft_is_no_error(kernels: None) -> None:
    """Where every token that drafts may be is forbidden the text goes on without them."""
    options: dict[str, Any] = {"max_new_tokens": 4, "seed": 0, "logit_bias": dict.fromkeys(range(500), -float("inf"))}
    for lm in (mtp_spec.load(draft_vocabulary=500), on_kernels(500)):
        plain = lm.generate("One day a fox", speculation=None, **options)
        for shape in (SHAPES[0], SHAPES[2]):
            out = lm.generate("One day a fox", speculation=shape, **options)
            assert out.stats.accepted == 0
            if shape == 3:
                assert out.token_ids == plain.token_ids


def test_which_tokens(tmp_path: Path) -> None:
    config = load_config(DEMO)
    assert draft_ids(None, config) is None
    assert draft_ids(3, config) == sorted({0, 1, 2, *config.eos_token_ids})
    listed = tmp_path / "ids.txt"
    listed.write_text("700\n5\n9\n")
    assert draft_ids(listed, config) == draft_ids(str(listed), config) == sorted({5, 9, 700, *config.eos_token_ids})
    for bad in (0, -3, True, config.vocab_size, 1.5, tmp_path / "none.txt"):
        with pytest.raises(OptionError, match="draft_vocabulary="):
            draft_ids(bad, config)
    for text, words in (("", "is empty"), ("5\nfox\n", "'fox'"), (f"{config.vocab_size}", "no token id")):
        listed.write_text(text)
        with pytest.raises(OptionError, match=words):
            draft_ids(listed, config)
    with pytest.raises(OptionError, match="no MTP modules"):
        mtp_spec.load(checkpoint(tmp_path, "v2"), draft_vocabulary=20)


def test_only_these_rows_of_the_head(kernels: None) -> None:
    whole, part = (load_model(DEMO, None, "cpu", 300, drafts, None) for drafts in (None, 1000))
    assert isinstance(whole, DeviceModel)
    assert isinstance(part, DeviceModel)
    hidden = torch.randn(3, whole.config.hidden_size).bfloat16()
    got, expected = part.draft_logits(hidden), whole.draft_logits(hidden)
    assert got.shape == expected.shape
    assert (got[:, 1000:] == -torch.inf).all()
    # blocks of 128 rows have a scale each, the same ones here
    torch.testing.assert_close(got[:, :896], expected[:, :896])
    opened = open_checkpoint(DEMO)
    plans = [plan_memory(empty_device_model(opened, "meta", ids), 300) for ids in (None, range(1000))]
    assert plans[0].draft_head > 8 * plans[1].draft_head
    assert plans[1].draft_head == sum(tensor.nbytes for tensor in part.derived())


def test_headers_are_read_once_and_absent_modules_not_counted(
    kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path, "v3", num_nextn_predict_layers=0)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_nextn_predict_layers": 0', '"num_nextn_predict_layers": 1'))
    reads, planned, read = list[Any](), list[Any](), checkpoints.__dict__["read_headers"]
    monkeypatch.setattr(checkpoints, "read_headers", lambda path: reads.append(path) or read(path))
    monkeypatch.setattr(loading, "check_memory", lambda model, *_: planned.append(model))
    model = load_model(folder, None, "cpu", 300, None, None)
    assert reads == [folder]
    assert len(model.mtp) == len(planned[0].mtp) == 0


@pytest.mark.gpu
def test_same_text_on_the_gpu() -> None:
    options: dict[str, Any] = {"max_new_tokens": 64, "seed": 1, "temperature": 0.9}
    plain = mtp_spec.load(device="cuda").generate("One day a fox", speculation=None, **options).token_ids
    check(mtp_spec.load(device="cuda", draft_vocabulary=2000), plain, **options)
