"""Where texts end, and what is reported of them, whatever the rule and the tree: as in plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import mtp_spec
import tiny
from mtp_spec import Speculation
from mtp_spec.acceptance import RULES
from mtp_spec.cpu.draft import Drafter
from mtp_spec.cpu.passes import Work
from mtp_spec.planning.fixed_plan import TreePlan
from mtp_spec.speculation import ACCEPTANCE_RULES, MAX_DEPTH
from mtp_spec.tree import ROOT, TokenTree

PROMPT = "One day a fox"
SHAPES: list[Any] = [4, Speculation(branching=(2, 2, 1)), "auto"]


@pytest.fixture(scope="module")
def lm() -> mtp_spec.LM:
    return mtp_spec.load()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> mtp_spec.LM:
    return mtp_spec.load(tiny.make(tmp_path_factory.mktemp("tiny") / "model", seed=1).folder, dtype="bfloat16")


def shape_of(rule: str) -> Speculation:
    chain = rule in RULES and RULES[rule].chains_only
    return Speculation(branching=(1, 1, 1) if chain else (2, 2, 1), acceptance=rule)


def everything(out: mtp_spec.Generation) -> tuple[Any, ...]:
    return out.text, out.token_ids, out.finish_reason, out.logprobs


def test_stop_strings_across_tokens_and_steps(lm: mtp_spec.LM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.7, "seed": 2, "logprobs": 1}
    whole = lm.generate(PROMPT, speculation=None, **options)
    for first in range(8, 48, 6):
        stop = whole.text[first : first + 7]
        plain = lm.generate(PROMPT, speculation=None, stop=[stop, "zzz"], **options)
        assert plain.text == whole.text[: whole.text.index(stop)]
        assert plain.finish_reason == "stop"
        for shape in SHAPES:
            drafted = lm.generate(PROMPT, speculation=shape, stop=[stop, "zzz"], **options)
            assert everything(drafted) == everything(plain)


@pytest.mark.parametrize("rule", ACCEPTANCE_RULES)
def test_streams_and_stops_under_every_rule(lm: mtp_spec.LM, rule: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.9, "speculation": shape_of(rule)}
    whole = lm.generate(PROMPT, seed=0, **options)
    assert whole.stats.accepted > 0
    events = list(lm.stream(PROMPT, seed=0, **options))
    assert "".join(event.text for event in events) == whole.text
    assert [event.token_id for event in events] == whole.token_ids
    stop = whole.text[20:26]
    cut = lm.generate(PROMPT, stop=stop, seed=0, **options)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    stream = lm.stream(PROMPT, stop=stop, seed=0, **options)
    assert "".join(event.text for event in stream) == cut.text
    assert everything(stream.result) == everything(cut)


def along(prompt_length: int, ids: Sequence[int]) -> Any:
    """A processor that leaves one text."""

    def force(so_far: list[int], logits: Tensor) -> Tensor:
        only = torch.full_like(logits, -torch.inf)
        only[ids[len(so_far) - prompt_length]] = 0.0
        return only

    return force


@pytest.mark.parametrize("rule", ACCEPTANCE_RULES)
def test_logprobs_are_bitwise_those_of_plain_decoding(lm: mtp_spec.LM, rule: str) -> None:
    """Plain decoding is led along the rule's text; log-probabilities are of the row before anything was changed."""
    prompt = lm.encode(PROMPT)
    options: dict[str, Any] = {"max_new_tokens": 20, "logprobs": 3, "top_k": 20, "presence_penalty": 0.3}
    out = lm.generate(prompt, speculation=shape_of(rule), seed=5, **options)
    assert out.stats.accepted > 0
    forced = along(len(prompt), out.token_ids)
    plain = lm.generate(prompt, speculation=None, logits_processor=forced, seed=0, **options)
    assert plain.token_ids == out.token_ids
    assert plain.logprobs == out.logprobs


def test_an_end_inside_an_accepted_run(small: mtp_spec.LM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, options = [4, 2], {"max_new_tokens": 20, "logprobs": 1}
    plain = small.generate(prompt, speculation=None, seed=0, **options)
    true = [*prompt, *plain.token_ids]

    def draft(self: Drafter, known: list[int], plan: TreePlan, depth: int, *_: Any) -> Work[TokenTree]:
        """Drafts the whole text, beyond its end too."""
        yield from self._extend(known)
        tree, parent = TokenTree(), ROOT
        for token in true[len(known) : len(known) + min(depth, plan.limits.depth)]:
            parent = tree.add(parent, token, 0)
        return tree

    monkeypatch.setattr(Drafter, "draft", draft)
    for length in range(1, 12):
        end = plain.token_ids[length]
        if end in plain.token_ids[:length]:
            continue
        monkeypatch.setattr(small, "stop_ids", lambda end=end: frozenset([end]))
        expected = small.generate(prompt, speculation=None, seed=0, **options)
        assert expected.token_ids == plain.token_ids[:length]
        stream = small.stream(prompt, speculation=7, seed=0, **options)
        list(stream)
        assert everything(stream.result) == everything(expected)
        assert stream.sequence.tokens == true[: len(prompt) + length + 1]
        # the drafts after the end were right, and none was taken
        assert stream.result.stats.accepted_per_depth["conditional"][0] == 1.0
        assert stream.result.stats.new_tokens == length + 1


@pytest.mark.parametrize("rule", ACCEPTANCE_RULES)
def test_every_depth(small: mtp_spec.LM, rule: str) -> None:
    """A constant of four once broke what lay beyond it (SGLang PR 33872)."""
    options: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 14}
    plain = small.generate([3, 1], speculation=None, seed=0, **options)
    for depth in range(1, MAX_DEPTH + 1):
        shape = Speculation(depth=depth, acceptance=rule)
        ids = small.generate([3, 1], speculation=shape, seed=0, **options).token_ids
        assert len(ids) == 14
        if rule not in RULES or RULES[rule].lossless:
            assert ids == plain.token_ids, depth


def test_forbidden_tokens_never_come_and_a_single_allowed_one_always_does(small: mtp_spec.LM) -> None:
    plain = small.generate([3], speculation=None, max_new_tokens=30, temperature=1.0, seed=0)
    forbidden = {token: -float("inf") for token in plain.token_ids[:20]}
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 1.0, "logit_bias": forbidden}
    for rule in ACCEPTANCE_RULES:
        out = small.generate([3], speculation=shape_of(rule), seed=0, **options)
        assert not set(out.token_ids) & set(forbidden)
        alone = {token: -float("inf") for token in range(96) if token != 7}
        out = small.generate([3], speculation=shape_of(rule), seed=0, **{**options, "logit_bias": alone})
        assert out.token_ids == [7] * 30
        assert out.stats.accepted > 0
