"""Logits processors on the GPU model: by the kernels' references on a CPU, on a GPU (`pytest -m gpu`) as they are."""

from __future__ import annotations

import json
import random
import re
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mtp_spec
from asked import Steps, Turns, check, wishes
from device_models import FEW, SAMPLING, SHAPES, OnceThenAgain, batch_lm, checkpoint, device_lm
from lms import assert_same, runtime
from mtp_spec.acceptance import RULES
from mtp_spec.api import LM
from mtp_spec.cuda import group as device_group
from mtp_spec.cuda.guided import Guide
from mtp_spec.cuda.sequence import Drafts, tree_of
from mtp_spec.errors import MTPSpecError
from mtp_spec.speculation import Speculation
from mtp_spec.tree_shape import TreeShape
from short_demo import short_demo

installed = pytest.mark.skipif(find_spec("llguidance") is None, reason="mtp-spec[grammar] is not installed")


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return device_lm(checkpoint(tmp_path_factory.mktemp("guided"), "v3"))


class Blind(Turns):
    """Never sees a row."""

    def apply(self, state: int, logits: Tensor) -> Tensor:
        raise AssertionError("rows are not needed")


def no_repeats(ids: list[int], logits: Tensor) -> Tensor:
    logits[ids[-6:]] = -float("inf")
    logits[sum(ids) % 3 :: 3] += 3.0
    return logits


def same_texts(lm: LM, prompt: Any, count: int, sampling: dict[str, Any]) -> None:
    options: dict[str, Any] = {"max_new_tokens": count, "seed": 3, "logprobs": 1, **sampling}
    plain = lm.generate(prompt, speculation=None, logits_processor=no_repeats, **options)
    for shape in SHAPES[2:]:
        out = lm.generate(prompt, speculation=shape, logits_processor=no_repeats, **options)
        assert out.token_ids == plain.token_ids, shape
        assert out.logprobs == plain.logprobs
        assert len(out.token_ids) == len(plain.token_ids)
    ids = plain.token_ids
    assert all(ids[i] not in ids[max(0, i - 6) : i] for i in range(len(ids)))


@pytest.mark.parametrize("sampling", SAMPLING, ids=lambda s: str(s)[:40])
def test_same_text_with_and_without_speculation(lm: LM, sampling: dict[str, Any]) -> None:
    same_texts(lm, [3, 1, 4], 10, sampling)


def test_drafts_are_accepted_and_the_text_is_the_one_without(lm: LM) -> None:
    """A processor that changes nothing: what the host draws and hands back is what the step would have drawn."""
    options: dict[str, Any] = {"max_new_tokens": 16, "seed": 0, "temperature": 0.4, "frequency_penalty": 0.1}
    options["logit_bias"] = {7: 9.0, 9: 8.5}  # what both sides of a random model can agree on
    for shape in SHAPES[2:4]:
        without = lm.generate([3, 1, 4], speculation=shape, **options)
        out = lm.generate([3, 1, 4], speculation=shape, logits_processor=lambda ids, logits: logits, **options)
        assert out.token_ids == without.token_ids
        assert out.stats.accepted == without.stats.accepted > 0


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("guide", [Steps(), Blind()], ids=["rows", "masks"])
def test_other_rules(lm: LM, name: str, guide: Any) -> None:
    """Whatever the rule, no token that may not follow is in the text; at temperature 0 it is plain decoding's."""
    shape = Speculation(branching=(1, 1) if RULES[name].chains_only else (2, 2), acceptance=name)
    options: dict[str, Any] = {"max_new_tokens": 12, "logits_processor": guide, "logit_bias": FEW, "seed": 3}
    for temperature in (0.0, 1.0):
        out = lm.generate([3, 1, 4], speculation=shape, temperature=temperature, **options)
        guide.check(out.token_ids)
        assert out.stats.drafted > 0
        if temperature == 0.0 and RULES[name].lossless:
            assert out.token_ids == lm.generate([3, 1, 4], speculation=None, temperature=0.0, **options).token_ids
            assert out.stats.accepted > 0


@pytest.mark.parametrize("guide", [Steps(), Blind(), [Turns(), Steps()]], ids=["rows", "masks", "both"])
def test_processors_with_state(lm: LM, guide: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 14, "logits_processor": guide, "logit_bias": FEW, "seed": 5}
    plain = lm.generate([3, 1, 4], speculation=None, logprobs=2, **options)
    for one in guide if isinstance(guide, list) else [guide]:
        one.check(plain.token_ids)
    for shape in (*SHAPES[1:], "auto", Speculation(2, adaptive=True)):
        out = lm.generate([3, 1, 4], speculation=shape, logprobs=2, **options)
        assert (out.token_ids, out.logprobs) == (plain.token_ids, plain.logprobs), shape


def test_the_host_is_asked_about_paths_that_may_be_taken_only(lm: LM) -> None:
    class Seen(Turns):
        def advance(self, state: int, token: int) -> int:
            self.check([*[0] * state, token][-1:], state)
            return super().advance(state, token)

    lm.generate([3, 1, 4], speculation=Speculation(branching=(3, 2, 1)), seed=1, max_new_tokens=8,
                logits_processor=Seen())  # fmt: skip


def guided_wishes(count: int, seed: int) -> list[tuple[list[int], dict[str, Any]]]:
    dice = random.Random(seed)
    ways: list[dict[str, Any]] = [{}, {"logits_processor": Steps()}, {"logits_processor": Turns()},
                                  {"min_new_tokens": 3, "stop_token_ids": [1, 2, 3, 4]}]  # fmt: skip
    asked = wishes(count, seed, [None, 2, Speculation(branching=(2, 2))])
    return [(prompt, {**options, "max_new_tokens": 3 + number % 5, **ways[number % 4], "logit_bias": FEW,
                      "seed": dice.randrange(9)}) for number, (prompt, options) in enumerate(asked)]  # fmt: skip


@pytest.mark.parametrize("most", [2, 6])
def test_a_guided_text_is_the_same_beside_any_others(tmp_path: Path, most: int) -> None:
    lm = batch_lm(checkpoint(tmp_path, "two modules"), most)
    check(lm, guided_wishes(8, most))


def test_guided_texts_share_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of three rows, in two parts of a step, beside a fifth that another rule keeps apart."""
    monkeypatch.setattr(device_group, "STEP_ROWS", 8)
    taken: list[int] = []
    end = Guide.end

    def counted(guide: Guide, step: Any, texts: Any, wait: Any) -> Any:
        taken.append(len(texts))
        return end(guide, step, texts, wait)

    monkeypatch.setattr(Guide, "end", counted)
    lm = batch_lm(checkpoint(tmp_path, "v3"), 5)
    options = {"logits_processor": Turns(), "logit_bias": FEW, "max_new_tokens": 8, "speculation": 2}
    asked = [([5, n], {**options, "seed": n}) for n in range(4)]
    asked.append(([9], {**options, "seed": 1, "speculation": Speculation(2, acceptance="rejection")}))
    check(lm, asked)
    assert 2 in taken


def test_capturing_a_guided_step_leaves_its_texts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("pool", "group"):
        monkeypatch.setattr(f"mtp_spec.cuda.{place}.check_room", lambda *_: None)
    folder, asked = checkpoint(tmp_path, "v3"), guided_wishes(6, 4)
    lm, alone = batch_lm(folder, 3), batch_lm(folder, 1)
    runtime(lm).graphs = OnceThenAgain()
    handles = [lm.submit(prompt, **options) for prompt, options in asked]
    for handle, (prompt, options) in zip(handles, asked, strict=True):
        assert_same(handle.result(300), alone.generate(prompt, **options))


@pytest.mark.parametrize("speculation", [None, 2, Speculation(branching=(2, 2), acceptance="traversal")])
def test_where_nothing_may_follow(tmp_path: Path, speculation: Any) -> None:
    """The text is an error of its own, on the path that is taken only; neighbours go on."""

    class Ends(Turns):
        def mask(self, state: int) -> Any:
            return super().mask(state) if state < 4 else np.zeros(20, np.uint8)

    class Breaks(Steps):
        def apply(self, state: int, logits: Tensor) -> Tensor:
            if state == 4:
                raise ValueError("no further")
            return super().apply(state, logits)

    lm = batch_lm(checkpoint(tmp_path, "v3"), 4)
    options: dict[str, Any] = {"logit_bias": FEW, "max_new_tokens": 9, "seed": 3, "speculation": speculation}
    for guide, error, match in ((Ends(), MTPSpecError, "response_format"), (Breaks(), ValueError, "no further")):
        stuck = lm.submit([3, 1], logits_processor=guide, **options)
        others = [lm.submit([4, n], logits_processor=other, **options) for n, other in enumerate((Turns(), None))]
        with pytest.raises(error, match=match):
            stuck.result(300)
        for n, (handle, other) in enumerate(zip(others, (Turns(), None), strict=True)):
            assert handle.result(300).token_ids == lm.generate([4, n], logits_processor=other, **options).token_ids
        # up to there it is a text like any other
        short = {**options, "max_new_tokens": 4}
        assert len(lm.generate([3, 1], logits_processor=guide, **short).token_ids) == 4


GRAMMARS: tuple[dict[str, Any], ...] = (
    {"type": "regex", "regex": "(red|quick|shy)( and (red|quick|shy)){2}[.]"},
    {"type": "json_schema", "schema": {"type": "object", "properties": {"legs": {"enum": [2, 4, 6]}},
                                       "required": ["legs"], "additionalProperties": False}},
)  # fmt: skip


@pytest.fixture(scope="module")
def short() -> LM:
    return device_lm(short_demo())


@installed
@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar["type"])
def test_a_grammar_that_ends(short: LM, grammar: dict[str, Any]) -> None:
    options: dict[str, Any] = {"response_format": grammar, "seed": 1, "temperature": 0.7, "max_new_tokens": 40}
    plain = short.generate("A fox is ", speculation=None, **options)
    assert plain.finish_reason == "stop"
    if grammar["type"] == "regex":
        assert re.fullmatch(grammar["regex"], plain.text)
    else:
        assert json.loads(plain.text)["legs"] in (2, 4, 6)
    for shape in (2, Speculation(branching=(3, 2)), "auto"):
        out = short.generate("A fox is ", speculation=shape, **options)
        assert (out.token_ids, out.text, out.finish_reason) == (plain.token_ids, plain.text, "stop"), shape
    assert out.stats.phase_seconds["sample"] > 0


@installed
def test_a_grammar_that_the_bias_forbids(short: LM) -> None:
    digits = [token for token in range(short.config.vocab_size) if any(c.isdigit() for c in short.decode([token]))]
    options: dict[str, Any] = {"response_format": {"type": "regex", "regex": "a [0-9]"}, "seed": 0,
                               "logit_bias": dict.fromkeys(digits, -float("inf"))}  # fmt: skip
    for shape in (None, 2):
        with pytest.raises(MTPSpecError, match=r"no token can be drawn at position .*response_format"):
            short.generate("x", speculation=shape, **options)


def test_repeated_siblings_are_no_nodes() -> None:
    shape = TreeShape.of(Speculation(branching=(2, 2)))
    assert shape.parents == (-1, -1, 0, 0, 1, 1)
    drafts = Drafts(shape, [9, 5, 5, 1, 2, 3, 4], {node: torch.zeros(9) for node in (-1, 0, 1)})
    tree, rows = tree_of(drafts)
    assert tree.tokens == [5, 1, 2]
    assert tree.parents == [-1, 0, 0]
    assert rows == [1, 3, 4]


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLING, ids=lambda s: str(s)[:40])
def test_same_text_on_the_gpu(sampling: dict[str, Any]) -> None:
    same_texts(mtp_spec.load(device="cuda"), "One day a fox", 64, sampling)


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("llguidance") is None, reason="mtp-spec[grammar] is not installed")
def test_json_on_the_gpu() -> None:
    lm = mtp_spec.load(device="cuda")
    schema = {"type": "object", "properties": {"legs": {"type": "integer", "minimum": 0, "maximum": 9}},
              "required": ["legs"], "additionalProperties": False}  # fmt: skip
    options: dict[str, Any] = {"response_format": {"type": "json_schema", "schema": schema}, "seed": 0}
    plain = lm.generate("A fox as JSON: ", speculation=None, **options)
    assert 0 <= json.loads(plain.text)["legs"] <= 9
    assert lm.generate("A fox as JSON: ", **options).token_ids == plain.token_ids


@pytest.mark.gpu
def test_guided_texts_side_by_side_on_the_gpu() -> None:
    lm = mtp_spec.load(device="cuda", max_batch=4)
    ways: list[dict[str, Any]] = [{}, {"logits_processor": no_repeats}, {"min_new_tokens": 20}]
    if find_spec("llguidance") is not None:
        ways.append({"response_format": GRAMMARS[0]})
    tree = Speculation(branching=(3, 2))
    asked = list[tuple[str, dict[str, Any]]]()
    for number, (way, shape) in enumerate(product(ways, (3, tree, "auto"))):
        options = {"seed": number, "max_new_tokens": 40, "speculation": shape, **way}
        asked.append((f"Day {number} of the fox", options))
    handles = [lm.submit(prompt, **options) for prompt, options in asked]
    for handle, (prompt, options) in zip(handles, asked, strict=True):
        plain = lm.generate(prompt, **{**options, "speculation": None})
        assert handle.result(300).token_ids == plain.token_ids, options
    for name, rule in RULES.items():
        shape = Speculation(branching=(1, 1, 1) if rule.chains_only else (2, 2), acceptance=name)
        out = lm.generate("One day a fox", speculation=shape, min_new_tokens=30, max_new_tokens=40, seed=2)
        assert len(out.token_ids) >= 30
        assert out.stats.accepted > 0
