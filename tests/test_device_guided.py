"""Logits processors on the GPU model: by the kernels' references on a CPU, on a GPU (`pytest -m gpu`) as they are."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_device import SAMPLING, SHAPES, checkpoint, device_lm
from torch import Tensor

import mtp_spec
from mtp_spec.api import LM
from mtp_spec.cuda.text import Drafts, tree_of
from mtp_spec.speculation import Speculation
from mtp_spec.tree_shape import TreeShape


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return device_lm(checkpoint(tmp_path_factory.mktemp("guided"), "v3"))


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


def test_other_rules_are_refused_by_name(lm: LM) -> None:
    shape = Speculation(depth=2, acceptance="rejection")
    with pytest.raises(mtp_spec.OptionError, match=r"rejection.*logits_processor"):
        lm.generate([3], speculation=shape, logits_processor=no_repeats)


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
