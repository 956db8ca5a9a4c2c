"""Drafts that are right with given probabilities: on both backends, alone and in batches; nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mtp_spec
import tiny
from device_models import batch_lm, checkpoint
from lms import host
from mtp_spec import Speculation
from mtp_spec.api import LM
from mtp_spec.drafting import Replay
from simulated import CHEAP_ROWS

RIGHT = (0.7, 0.5, 0.2)
OPTIONS: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.8, "ignore_eos": True}


@pytest.fixture(scope="module", params=["processor", "kernels"])
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LM:
    """A model of random weights, whose own drafts are hardly ever right."""
    folder = tmp_path_factory.mktemp("replay")
    if request.param == "kernels":
        return batch_lm(checkpoint(folder, "two modules"), 3)
    lm = mtp_spec.load(tiny.make(folder / "model", "v3_two_modules", seed=1).folder, dtype="bfloat16", max_batch=3)
    host(lm).planners.here().times = CHEAP_ROWS
    return lm


def replayed(lm: LM, prompt: list[int], seed: int, acceptance: Any = RIGHT, **shape: Any) -> tuple[Any, Speculation]:
    plain = lm.generate(prompt, seed=seed, speculation=None, **OPTIONS)
    return plain, Speculation(**shape, drafters=("mtp", Replay(plain.token_ids, acceptance, seed=seed)))


def test_drafts_are_accepted_by_the_law(lm: LM) -> None:
    won, tried = np.zeros(3), np.zeros(3)
    for seed in range(2 if lm.backend.captured else 8):
        plain, speculation = replayed(lm, [3, 4, 5], seed, depth=3)
        out = lm.generate([3, 4, 5], seed=seed, speculation=speculation, **OPTIONS)
        assert out.token_ids == plain.token_ids
        assert out.stats.accepted_by_source == {"replay": out.stats.accepted}
        assert out.stats.drafted_by_source == {"replay": out.stats.drafted}
        table = Replay(plain.token_ids, RIGHT, seed=seed).table(3, lm.config.vocab_size)
        made, accepted = 1, 0
        while made < len(plain.token_ids):  # the steps as the table has them
            count = 0
            while count < 3 and table[made, count] == (plain.token_ids + [-2] * 3)[made + count]:
                count += 1
            for depth in range(min(3, count + 1)):
                won[depth], tried[depth] = won[depth] + (depth < count), tried[depth] + 1
            made, accepted = made + count + 1, accepted + count
        assert abs(out.stats.accepted - accepted) <= 3  # the end cuts the last step
    assert np.all(np.abs(won / tried - RIGHT) < 3.5 * np.sqrt(np.array(RIGHT) * (1 - np.array(RIGHT)) / tried))


@pytest.mark.usefixtures("auto_drafts")
def test_always_and_never_right_alone_and_in_batches(lm: LM) -> None:
    prompts = [[3, 4, 5], [9, 8]]
    options = {**OPTIONS, "max_new_tokens": 18}
    for acceptance, tokens in ((1.0, 17 / 5), (0.0, 1.0)):
        made = [replayed(lm, prompt, seed, [acceptance], depth=3) for seed, prompt in enumerate(prompts)]
        handles = [lm.submit(prompt, seed=seed, speculation=speculation, **options)
                   for seed, (prompt, (_, speculation)) in enumerate(zip(prompts, made, strict=True))]  # fmt: skip
        for handle, (plain, speculation), prompt, seed in zip(handles, made, prompts, range(2), strict=True):
            alone = lm.generate(prompt, seed=seed, speculation=speculation, **options)
            for out in (handle.result(), alone):
                assert out.token_ids == plain.token_ids[:18]
                assert out.stats.tokens_per_step == pytest.approx(tokens, abs=0.1)
    plain, adaptive = replayed(lm, [3, 4], 5, [0.95], depth=3, adaptive=True)
    out = lm.generate([3, 4], seed=5, speculation=adaptive, **options)
    assert out.token_ids == plain.token_ids[:18]
    assert set(out.stats.drafted_by_source) == {"replay"}
    assert out.stats.accepted > 0


def test_draws_depend_on_place_depth_and_seed_only() -> None:
    text = list(range(100, 160))
    table = Replay(text, [0.5], seed=3).table(8, 1000)
    assert table.shape == (61, 8)
    assert np.array_equal(table, Replay(text, [0.5], seed=3).table(8, 1000))
    assert not np.array_equal(table, Replay(text, [0.5], seed=4).table(8, 1000))
    assert np.all((table[:50] == np.add.outer(np.arange(100, 150), np.arange(8))) | (table[:50] > 100))
    assert np.all(table[60] == -1)
    assert table[59, 0] in (159, 160)
    assert np.array_equal(Replay([9], [0.0]).table(1, 10), [[0], [-1]])  # a wrong token is a token


def test_wrong_laws_ids_and_shapes_are_named(lm: LM) -> None:
    for acceptance in ((), "0.5", [1.5], [-0.1], [float("nan")], 0.5):
        with pytest.raises(mtp_spec.OptionError, match="acceptance="):
            Replay([1], acceptance)
    with pytest.raises(mtp_spec.OptionError, match="seed="):
        Replay([1], [0.5], seed=-1)
    wrong: list[Any] = ["ab", None, [1.5], [-1], [True]]
    for tokens in wrong:
        with pytest.raises(mtp_spec.OptionError, match="a list of token ids"):
            Replay(tokens, [0.5])
    most = lm.config.vocab_size
    with pytest.raises(mtp_spec.OptionError, match=f"Replay's tokens hold the id {most}: "):
        lm.generate([1], speculation=Speculation(2, drafters=("mtp", Replay([1, most], [0.5]))))
    replay = Replay([1], [0.5])
    for options in ({"drafters": (replay,)}, {"drafters": ("mtp", "text", replay)}, {"drafters": (replay, "mtp")},
                    {"drafters": ("mtp", replay), "branching": (2, 1)},
                    {"drafters": ("mtp", replay), "acceptance": "rejection"}):  # fmt: skip
        with pytest.raises(mtp_spec.OptionError, match="replays what the modules draft"):
            Speculation(**options)
