"""Captured steps of several shapes in turn: the text and the modules' caches are what they are without turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mtp_spec
from device_models import SAMPLING, checkpoint, device_lm
from lms import device
from mtp_spec.api import LM
from mtp_spec.cuda import group as device_group
from mtp_spec.cuda import sequence as device_sequence
from mtp_spec.cuda import shapes as device_planned
from mtp_spec.cuda import state as device_state
from mtp_spec.planning.shape_planner import ShapeTable
from mtp_spec.speculation import Speculation
from scripted import RING, SMALL, Script

# shapes in turn, again and again: always deep, every second step, pauses of several lengths, one longer than the ring
SCRIPTS = ([4], [0, 4], [0, 0, 3, 1, 0], [2] * 3 + [0] * (RING - 3), [0] * (RING + SMALL) + [4, 4, 1])


@pytest.fixture(autouse=True)
def _small_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (device_state, device_planned, device_group, device_sequence):
        monkeypatch.setattr(module, "WAITING", RING)
    for module in (device_planned, device_group):
        monkeypatch.setattr(module, "CATCH_UP_ROWS", (SMALL, RING))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(shapes: list[int]) -> list[Script]:
        made: list[Script] = []

        def make(_: ShapeTable) -> Script:
            made.append(Script(shapes))
            return made[-1]

        monkeypatch.setattr(device_group, "ShapePlanner", make)
        return made

    return use


def turns(lm: LM, scripted: Any, prompt: Any, count: int, options: dict[str, Any], scripts: Any = SCRIPTS) -> None:
    """Writes the same text by every script and compares texts, statistics and the modules' caches."""
    options = {"max_new_tokens": count, "seed": 2, "logprobs": 1, **options}
    plain = lm.generate(prompt, speculation=None, **options)
    held: list[list[torch.Tensor]] = []
    for shapes in scripts:
        made = scripted(shapes)
        stream = lm.stream(prompt, speculation=Speculation(depth=4, adaptive=True), **options)
        for _ in stream:
            pass
        out, state = stream.result, next(group for group in device(lm).pool.known if group.kind.takes_turns).state
        assert out.token_ids == plain.token_ids, shapes
        assert out.logprobs == plain.logprobs
        taken = made[0].taken
        assert {shape for shape, _ in taken} <= set(shapes)
        assert out.stats.drafted == pytest.approx(sum(shape for shape, _ in taken), abs=4)
        assert state.pages is not None
        slots = (state.pages[0].long()[:, None] + torch.arange(64, device=state.pages.device)).flatten()
        known = slots[: int(state.fed[0]) - len(state.mtp_caches)]
        held.append([cache.slots[known].clone() for cache in state.mtp_caches])
    for other in held[1:]:
        for ours, theirs in zip(held[0], other, strict=True):
            both = min(len(ours), len(theirs))
            assert torch.equal(ours[:both], theirs[:both])


def test_turns_change_nothing(tmp_path: Path, scripted: Any) -> None:
    lm = device_lm(checkpoint(tmp_path, "v3", num_nextn_predict_layers=3))
    # forbidding most tokens makes random drafts right now and then
    few = {token: -float("inf") for token in range(6, 160)}
    for prompt, count, scripts in (([5], 12, SCRIPTS[1:3]), ([7, 9, 3, 5], 2 * RING, SCRIPTS[::2])):
        turns(lm, scripted, prompt, count, {"top_k": 4, "logit_bias": few}, scripts)


def test_auto_writes_the_plain_text() -> None:
    lm = device_lm()
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0}
    plain = lm.generate("Tell me a story about a fox", speculation=None, **options)
    out = lm.generate("Tell me a story about a fox", **options)
    assert out.token_ids == plain.token_ids
    assert out.stats.drafted > 0


def test_at_the_end_of_the_context(tmp_path: Path, scripted: Any) -> None:
    lm = device_lm(checkpoint(tmp_path, "v3"), context=3 * RING)
    options: dict[str, Any] = {"max_new_tokens": 3 * RING - 3, "temperature": 0.0}
    plain = lm.generate([5, 6, 7], speculation=None, **options)
    for shapes in ([0] * RING + [4], [0] * (2 * RING + 3) + [4]):
        scripted(shapes)
        out = lm.generate([5, 6, 7], speculation=Speculation(depth=4, adaptive=True), **options)
        assert out.token_ids == plain.token_ids


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLING, ids=lambda s: str(s)[:40])
def test_turns_change_nothing_on_the_gpu(tmp_path: Path, scripted: Any, sampling: dict[str, Any]) -> None:
    turns(mtp_spec.load(device="cuda"), scripted, "Tell me a story about a fox", 160, sampling)
    lm = mtp_spec.load(checkpoint(tmp_path, "three modules"), device="cuda")
    turns(lm, scripted, [(37 * i) % 160 for i in range(12)], 160, {**sampling, "top_k": 4})


def test_adaptive_speculation_goes_as_deep_as_it_says(tmp_path: Path, scripted: Any) -> None:
    lm = device_lm(checkpoint(tmp_path, "v3"))
    scripted([7, 0, 6])
    deep = Speculation(depth=7, adaptive=True)
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": 1, "temperature": 0.0}
    out = lm.generate([3, 1, 4], speculation=deep, **options)
    assert out.token_ids == lm.generate([3, 1, 4], speculation=None, **options).token_ids
    assert out.stats.drafted >= 13
