"""NaN and infinity: dropped where they are a draft's, an error that says where in the main model, never text."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mtp_spec
import small
import tiny
from mtp_spec.cpu.backend import AUTO
from mtp_spec.cpu.draft import Drafter
from mtp_spec.kernels.cpu.engine import SWITCH, why_not
from mtp_spec.model.moe import Gate
from mtp_spec.planning.costs import StepTimes
from mtp_spec.planning.fixed_plan import Standing, TreeBatch
from mtp_spec.planning.governor import DOUBTED_DEBT
from mtp_spec.planning.node_planner import NodePlanner
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.sampling.sampler import Sampler
from mtp_spec.tree import TokenTree

PROMPTS = [[5, 9, 2, 7], [1, 2, 3], [40, 41, 42, 43, 44]]
LAYERS: Any = tiny.V3["num_hidden_layers"]
TREE = mtp_spec.Speculation(branching=(3, 2, 1), budget=5)
RULES = ("rejection", "hybrid", "traversal", "typical", "relaxed")
DRAFTS = [1, 3, TREE, "auto", *(mtp_spec.Speculation(branching=(2, 2), acceptance=rule) for rule in RULES),
          mtp_spec.Speculation(depth=3, acceptance="block")]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("unsound") / "two", "v3_two_modules").folder


@pytest.fixture(params=["engine", "torch"])
def load(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[..., mtp_spec.LM]:
    if request.param == "torch":
        monkeypatch.setenv(SWITCH, "torch")
    elif why_not():
        pytest.skip(f"no CPU engine here: {why_not()}")
    return lambda **options: mtp_spec.load(folder, measure=False, max_batch=3, **options)


def damage(lm: mtp_spec.LM, name: str, value: float = math.nan, part: Any = 0) -> None:
    """Writes a number into a loaded matrix, which both ways to compute read in place."""
    lm.model.checkpoint_slots()[name].detach()[part] = value


def plain(lm: mtp_spec.LM, **options: Any) -> list[list[int]]:
    texts = lm.generate(PROMPTS, max_new_tokens=12, speculation=None, **options)
    return [text.token_ids for text in texts]


@pytest.mark.parametrize("speculation", DRAFTS, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_damaged_modules_drafts_are_dropped(
    load: Callable[..., mtp_spec.LM], speculation: Any, temperature: float, auto_drafts: None
) -> None:
    lm, options = load(), {"temperature": temperature, "seed": 3, "max_new_tokens": 12}
    damage(lm, f"model.layers.{LAYERS}.eh_proj.weight")
    expected = plain(lm, temperature=temperature, seed=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alone = [lm.generate(prompt, **options, speculation=speculation) for prompt in PROMPTS[:1]]
        together = lm.generate(PROMPTS, **options, speculation=speculation)
    assert [text.token_ids for text in alone] == expected[:1]
    assert [text.token_ids for text in together] == expected
    assert [text.stats.drafted for text in alone] == [0]
    assert alone[0].stats.dropped > 0
    assert alone[0].stats.to_json()["dropped"] == alone[0].stats.dropped
    told = [str(warning.message) for warning in caught]
    assert len(told) == 1
    assert f"MTP module 1 of 2 (model.layers.{LAYERS})" in told[0]


def test_only_the_damaged_modules_drafts_are_dropped(load: Callable[..., mtp_spec.LM]) -> None:
    lm = load()
    damage(lm, f"model.layers.{LAYERS + 1}.eh_proj.weight")
    with pytest.warns(UserWarning, match=rf"MTP module 2 of 2 \(model\.layers\.{LAYERS + 1}\)"):
        out = lm.generate(PROMPTS[0], max_new_tokens=12, temperature=0.0, speculation=3)
    assert out.token_ids == plain(lm, temperature=0.0)[0]
    assert out.stats.drafted >= out.stats.dropped > 0  # the first level drafts, the second never does


def test_infinity_of_a_draft(load: Callable[..., mtp_spec.LM]) -> None:
    lm = load()
    damage(lm, f"model.layers.{LAYERS}.eh_proj.weight", math.inf)
    with pytest.warns(UserWarning, match="MTP module 1"):
        out = lm.generate(PROMPTS[0], max_new_tokens=12, speculation=2, seed=1)
    assert out.token_ids == lm.generate(PROMPTS[0], max_new_tokens=12, speculation=None, seed=1).token_ids


@pytest.mark.parametrize("speculation", [1, 3, TREE], ids=str)
def test_a_token_that_only_drafts_propose(
    load: Callable[..., mtp_spec.LM], speculation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its embedding is NaN, and so are its slots in every cache: none of it stays behind."""
    lm = load()
    written = plain(lm, temperature=0.0)
    bad = next(token for token in range(96) if token not in chain(*written, *PROMPTS))
    propose = Drafter._propose

    def proposes(self: Drafter, *given: Any) -> tuple[list[int], list[Any]]:
        top, distributions = propose(self, *given)
        return [bad, *(token for token in top if token != bad)][: len(top)], distributions

    damage(lm, "model.embed_tokens.weight", math.nan, bad)
    monkeypatch.setattr(Drafter, "_propose", proposes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [lm.generate(prompt, max_new_tokens=12, temperature=0.0, speculation=speculation) for prompt in PROMPTS]
        together = lm.generate(PROMPTS, max_new_tokens=12, temperature=0.0, speculation=speculation)
    assert [text.token_ids for text in found] == [text.token_ids for text in together] == written
    assert found[0].stats.drafted > 0


@pytest.mark.parametrize(
    ("name", "part", "value", "told"),
    [
        ("model.embed_tokens.weight", 2, math.nan, r"position 4.*token position 2 \(id 2\): made by the embedding"),
        ("model.layers.0.mlp.down_proj.weight", 0, math.nan, "token position 0 .id 5.: made by model.layers.0, or"),
        ("model.layers.1.self_attn.o_proj.weight", 0, math.inf, "token position 0 .*made by model.layers.1, or"),
        ("model.layers.1.mlp.gate.weight", 3, math.nan, "made by model.layers.1, or"),
        ("model.layers.1.mlp.gate.weight", 3, math.inf, "made by model.layers.1, or"),
        ("model.layers.2.mlp.gate.weight", 3, math.nan, "made by model.layers.2 or model.norm"),
        ("lm_head.weight", 7, math.nan, "contain nan.*made by lm_head"),
        ("lm_head.weight", (7, 0), -math.inf, "contain -?inf.*made by lm_head"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "speculation", [None, 2, mtp_spec.Speculation(branching=(2, 2), acceptance="rejection")], ids=str
)
def test_the_main_models_are_an_error_that_says_where(
    load: Callable[..., mtp_spec.LM], name: str, part: Any, value: float, told: str, speculation: Any
) -> None:
    lm = load()
    damage(lm, name, value, part)
    with pytest.raises(mtp_spec.MTPSpecError, match=told):
        lm.generate(PROMPTS[0], max_new_tokens=4, seed=0, speculation=speculation)
    handles = [lm.submit(prompt, max_new_tokens=4, seed=0, speculation=speculation) for prompt in PROMPTS[:2]]
    with pytest.raises(mtp_spec.MTPSpecError, match=told):
        handles[0].result()


@pytest.mark.filterwarnings("ignore:MTP module")
def test_it_says_where_in_the_middle_of_a_text(load: Callable[..., mtp_spec.LM]) -> None:
    lm = load()
    written = plain(lm, temperature=0.0)[0]
    place, token = next((i, t) for i, t in enumerate(written) if i > 2 and t not in written[:i] + PROMPTS[0])
    damage(lm, "model.embed_tokens.weight", math.nan, token)
    for speculation in (None, 3, TREE):
        stream, seen = lm.stream(PROMPTS[0], max_new_tokens=12, temperature=0.0, speculation=speculation), list[int]()
        position = len(PROMPTS[0]) + place
        with pytest.raises(
            mtp_spec.MTPSpecError, match=rf"position {position + 1}: .* position {position} \(id {token}\)"
        ):
            seen.extend(event.token_id for event in stream)
        assert seen == written[: len(seen)]
        assert speculation or len(seen) == place + 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_a_gate_hides_nothing(value: float, scoring: str) -> None:
    config = dataclasses.replace(small.CONFIG, scoring_func=scoring)
    gate = Gate(config, "cpu")
    with torch.no_grad():
        gate.weight.normal_(0, 0.1)
        if gate.e_score_correction_bias is not None:
            gate.e_score_correction_bias.zero_()
    x = torch.randn(3, config.hidden_size)
    sound, _ = gate.choose(x)
    with torch.no_grad():
        for place in (gate.weight, gate.e_score_correction_bias):
            if place is None:
                continue
            before = place[5].clone()
            place[5] = value
            weights, indices = gate.choose(x)
            assert np.isnan(weights).all()
            assert all(len(set(row)) == config.num_experts_per_tok for row in indices)
            place[5] = before
    x[1, 0] = value  # one row of several: the others are as they were
    weights, _ = gate.choose(x)
    assert np.isnan(weights[1]).all()
    assert [weights[0], weights[2]] == [sound[0], sound[2]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_one_of_them_anywhere(value: float, temperature: float) -> None:
    """Also where a processor or a bias would remove the token."""
    masked = [lambda ids, row: row.masked_fill(torch.arange(50) == 20, -math.inf)]
    for options in ({}, {"logit_bias": {20: -50.0}}, {"logits_processor": masked}, {"top_k": 3}):
        sampler = Sampler(SamplingParams.from_options({"temperature": temperature, **options}), 50)
        row = torch.randn(50, generator=torch.Generator().manual_seed(0))
        sampler.process(row, sampler.history([1]), 8)
        row[20] = value
        with pytest.raises(mtp_spec.MTPSpecError, match=f"position 8: the logits contain {value}"):
            sampler.check(row, 8) if value == -math.inf else sampler.process(row, sampler.history([1]), 8)
        # a draft's: -inf is where the vocabulary of drafts has no such token
        assert sampler.leaves_nothing(sampler.process(row, sampler.history([1]))) == (value != -math.inf)


def test_a_processors_nan_on_a_path_that_is_not_taken(load: Callable[..., mtp_spec.LM], auto_drafts: None) -> None:
    """No fault of a module: the draft is dropped, nothing is told, and a planner goes on."""
    lm, asked = load(), [0]
    written = lm.generate(PROMPTS[0], max_new_tokens=12, temperature=0.0, speculation=None).token_ids

    def processor(ids: Sequence[int], row: Tensor) -> Tensor:
        own = list(ids)[len(PROMPTS[0]) :]
        if own == written[: len(own)]:
            return row
        asked[0] += 1
        return row.fill_(math.nan)

    options = {"max_new_tokens": 12, "temperature": 0.0, "logits_processor": processor}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for speculation in (3, TREE, "auto"):
            out = lm.generate(PROMPTS[0], **options, speculation=speculation)
            assert out.token_ids == written
            assert speculation == "auto" or out.stats.dropped > 0
    assert asked[0]


def test_a_planner_goes_on_where_nothing_can_be_drafted(load: Callable[..., mtp_spec.LM], auto_drafts: None) -> None:
    lm, end = load(), len(PROMPTS[0]) + 12

    def processor(ids: Sequence[int], row: Tensor) -> Tensor:  # nothing may follow the one token that may be
        return row.masked_fill(torch.arange(96) != 7, -math.inf) if len(ids) < end else row.fill_(-math.inf)

    adaptive = mtp_spec.Speculation(branching=(2, 2), adaptive=True)
    for speculation in ("auto", adaptive, 3):
        out = lm.generate(PROMPTS[0], max_new_tokens=12, seed=2, speculation=speculation, logits_processor=processor)
        assert out.token_ids == [7] * 12


def test_a_doubting_planner_of_an_empty_tree() -> None:
    planner = NodePlanner(StepTimes.typical())
    memory = planner.begin()
    memory.pace.record(-DOUBTED_DEBT)
    (plan,) = planner.plan(TreeBatch([Standing(AUTO, memory, 32, 1, 100)], alone=True))
    assert plan.drafts
    plan.expand([1.0], 0)
    assert plan.choose(TokenTree(), []) == []
