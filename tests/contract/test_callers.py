"""What the calling program has set in torch changes nothing: not the text, not what is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mtp_spec
import tiny
from mtp_spec.kernels.cpu.engine import SWITCH, why_not

PROMPTS = [[5, 9, 2, 7], [1, 2, 3]]
OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "seed": 4, "speculation": 2}


@contextmanager
def setting(setter: Callable[[Any], None], value: Any, back: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(back)


@contextmanager
def deterministic() -> Iterator[None]:
    """Empty tensors are then full of NaN."""
    with setting(torch.use_deterministic_algorithms, True, False):
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    with setting(torch.set_num_threads, count, torch.get_num_threads()):
        yield


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default bfloat16": partial(setting, torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default float64": partial(setting, torch.set_default_dtype, torch.float64, torch.float32),
    "default device meta": partial(setting, torch.set_default_device, "meta", None),
    "device meta": partial(torch.device, "meta"),
    "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "deterministic": deterministic,
    "one thread": partial(threads, 1),
    "three threads": partial(threads, 3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("callers") / "two", "v3_two_modules").folder


@pytest.fixture(scope="module", params=["engine", "torch"])
def load(request: pytest.FixtureRequest, folder: Path) -> Iterator[Callable[..., mtp_spec.LM]]:
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        if request.param == "torch":
            patch.setenv(SWITCH, "torch")
            # its threads spin while they wait for one another, on a busy machine for seconds a text
            stack.enter_context(threads(1))
        elif why_not():
            pytest.skip(f"no CPU engine here: {why_not()}")
        yield lambda dtype: mtp_spec.load(folder, dtype=dtype, measure=False, max_batch=2)


def results(lm: mtp_spec.LM) -> list[Any]:
    """Returns a text alone, the same beside another, one that goes on after it, one by rule, and scores."""
    stream = lm.stream(PROMPTS[0], **OPTIONS)
    ids = [event.token_id for event in stream]
    after = [event.token_id for event in lm.stream([*PROMPTS[0], *ids], after=stream, **OPTIONS)]
    together = [text.token_ids for text in lm.generate(PROMPTS, **OPTIONS)]
    rule = mtp_spec.Speculation(branching=(2, 2), acceptance="rejection")
    ruled = lm.generate(PROMPTS[0], **{**OPTIONS, "speculation": rule}).token_ids
    auto = lm.generate(PROMPTS[0], **{**OPTIONS, "speculation": "auto"}).token_ids
    scores = lm.score(PROMPTS[0])
    assert scores.logits.dtype == scores.mtp_logits.dtype == torch.float32
    assert scores.logits.device.type == "cpu"
    return [ids, after, together, ruled, auto, scores.logits.tolist()]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def plain(request: pytest.FixtureRequest, load: Callable[..., mtp_spec.LM]) -> tuple[str, list[Any]]:
    """A dtype, and the results in it where nothing was set."""
    lm = load(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mtp_spec.LM, "drafts_pay", True)
        expected = results(lm)
    lm.close()
    return request.param, expected


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_nothing_changes(
    load: Callable[..., mtp_spec.LM], plain: tuple[str, list[Any]], name: str, auto_drafts: None
) -> None:
    dtype, expected = plain
    lm = load(dtype)
    with SETTINGS[name]():
        assert results(lm) == expected
        lm.close()
        loaded = load(dtype)
        assert results(loaded) == expected
        loaded.close()


def test_what_is_loaded_in_inference_mode_can_be_used_outside(load: Callable[..., mtp_spec.LM]) -> None:
    with torch.inference_mode():
        lm = load("float32")
    assert not any(weight.is_inference() for weight in lm.model.checkpoint_slots().values())
    assert lm.generate(PROMPTS[0], **OPTIONS).token_ids == load("float32").generate(PROMPTS[0], **OPTIONS).token_ids
