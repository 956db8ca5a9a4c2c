"""Stop tokens and a least length on the GPU model: by the kernels' references on a CPU, on a GPU as they are."""

from __future__ import annotations

from typing import Any

import pytest

import mtp_spec
from device_models import SHAPES, batch_lm, checkpoint, device_lm
from mtp_spec.api import LM
from mtp_spec.cuda.kinds import kind_of
from mtp_spec.speculation import Speculation

END = 7
# a random model that likes a few tokens, among them the one that ends texts
OPTIONS: dict[str, Any] = {"max_new_tokens": 10, "seed": 3, "logprobs": 1, "stop_token_ids": [END], "ignore_eos": True,
                           "logit_bias": {END: 9.0, 9: 9.0, 11: 9.0}}  # fmt: skip


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return device_lm(checkpoint(tmp_path_factory.mktemp("stops"), "v3"))


def everything(out: mtp_spec.Generation) -> tuple[Any, ...]:
    return out.token_ids, out.finish_reason, out.logprobs


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("least", [0, 6])
def test_same_text_with_and_without_drafts(lm: LM, temperature: float, least: int) -> None:
    options = {**OPTIONS, "temperature": temperature, "min_new_tokens": least}
    plain = lm.generate([3, 1, 4], speculation=None, **options)
    assert len(plain.token_ids) >= least
    assert END not in plain.token_ids
    for shape in SHAPES[2:]:
        stream = lm.stream([3, 1, 4], speculation=shape, **options)
        assert [event.token_id for event in stream] == plain.token_ids
        assert everything(stream.result) == everything(plain), shape


def test_the_least_length_changes_nothing_else(lm: LM) -> None:
    """What the host draws is what the step would have drawn."""
    for seed in range(4):
        free = lm.generate([5, 9], speculation=2, **{**OPTIONS, "seed": seed, "temperature": 0.8})
        if free.token_ids:
            least = len(free.token_ids)
            out = lm.generate([5, 9], speculation=2, min_new_tokens=least,
                              **{**OPTIONS, "seed": seed, "temperature": 0.8})  # fmt: skip
            assert everything(out) == everything(free)


def test_a_least_length_beside_others(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = checkpoint(tmp_path_factory.mktemp("batch"), "v3")
    lm, alone = batch_lm(folder, 3), batch_lm(folder, 1)
    asked = [([5, n], {**OPTIONS, "seed": n, "min_new_tokens": 5 * (n % 2), "speculation": 2}) for n in range(4)]
    requests = [lm._request(prompt, options) for prompt, options in asked]
    assert [kind_of(request).guided for request in requests] == [None, "masks", None, "masks"]
    assert all(kind_of(request).shared for request in requests)
    for handle, (prompt, options) in zip([lm.submit(p, **o) for p, o in asked], asked, strict=True):
        out = alone.generate(prompt, **options)
        assert everything(handle.result(300)) == everything(out)


@pytest.mark.parametrize("rule", ["rejection", "typical"])
def test_other_rules(lm: LM, rule: str) -> None:
    shape = Speculation(depth=2, acceptance=rule)
    for seed in range(3):
        options = {**OPTIONS, "seed": seed, "temperature": 0.8}
        assert len(lm.generate([3], speculation=shape, **{**options, "min_new_tokens": 8}).token_ids) >= 8
    # without a token that could end the text there is nothing to forbid
    assert lm.generate([3], speculation=shape, seed=0, max_new_tokens=2, min_new_tokens=2, ignore_eos=True).token_ids
