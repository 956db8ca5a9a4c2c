"""The contract: same seed, same text, with speculation off, chains, trees and any drafter; equal bits of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mtp_spec
import tiny
from mtp_spec.cpu.draft import Drafter
from mtp_spec.cpu.passes import Work
from mtp_spec.model.rows import row_logits, verify_rows
from mtp_spec.sampling.seeds import SAMPLES, derived_seed
from mtp_spec.tree import ROOT, TokenTree

SHAPES = [
    *range(1, 9),
    mtp_spec.Speculation(branching=(3, 2, 1)),
    mtp_spec.Speculation(depth=5, branching=(2, 2, 2, 1, 1)),
    mtp_spec.Speculation(depth=4, branching=(4, 4, 2, 2), budget=9),
]
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 0.8},
    "truncated": {"temperature": 1.2, "top_p": 0.9, "min_p": 0.02, "top_k": 40},
    "penalties": {
        "temperature": 1.0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {5: 1.5, 7: float("-inf")},
    },
}


@pytest.fixture(scope="module", params=["v3", "v3_two_modules", "v3_yarn"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny") / "model", request.param, seed=1).folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", list(SAMPLING))
def test_same_text_whatever_the_tree(folder: Path, dtype: str, sampling: str) -> None:
    lm = mtp_spec.load(folder, dtype=dtype)
    # float32 computes rows one by one: exact by construction, slow
    shapes = SHAPES if dtype == "bfloat16" else SHAPES[-1:]
    for seed, prompt in enumerate(([3], list(range(60)))):
        options = {"max_new_tokens": 12, "seed": seed, "logprobs": 2, **SAMPLING[sampling]}
        plain = lm.generate(prompt, speculation=None, **options)
        for shape in shapes:
            drafted = lm.generate(prompt, speculation=shape, **options)
            assert drafted.token_ids == plain.token_ids, f"{shape} changed the text"
            assert drafted.logprobs == plain.logprobs, f"{shape} changed the log-probabilities"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_bitwise_those_of_plain_decoding(folder: Path, dtype: str) -> None:
    lm = mtp_spec.load(folder, dtype=dtype)
    model, technique = lm.model, lm.technique
    with torch.inference_mode():
        for context in (1, 30, 63, 64, 100):
            ids = [(5 * i + 2) % 96 for i in range(context + 33)]
            cache = model.new_cache(200)
            model.rows(ids[:context], cache, range(-1, context - 1))
            cache.commit(range(context))
            alone = []
            for token in ids[context:]:
                alone.append(model.logits(model.rows([token], cache, [-1])))
                cache.commit([0])
            for rows in (*range(1, 10), 16, 32):
                cache.rewind(context)
                chain = ids[context : context + rows]
                hidden = verify_rows(model, chain, cache, range(-1, rows - 1), technique)
                assert torch.equal(row_logits(model, hidden, technique), torch.cat(alone[:rows]))
            # the same chain as one branch of a tree whose other nodes are noise
            cache.rewind(context)
            tree_ids, parents, branch, last = [], [], [], -1
            for token in ids[context : context + 8]:
                tree_ids += [(token + 1) % 96, token]
                parents += [last, last]
                last = len(tree_ids) - 1
                branch.append(last)
            hidden = verify_rows(model, tree_ids, cache, parents, technique)
            assert torch.equal(row_logits(model, hidden, technique)[branch], torch.cat(alone[:8]))


def _oracle(tokens: list[int], wrong: int) -> Callable[..., Work[TokenTree]]:
    """Drafts the true continuation, each token moved by `wrong`."""

    def draft(self: Drafter, known: list[int], plan: Any, depth: int, *_: Any) -> Work[TokenTree]:
        yield from self._extend(known)
        tree, parent = TokenTree(), ROOT
        for token in tokens[len(known) : len(known) + min(depth, plan.limits.depth)]:
            parent = tree.add(parent, (token + wrong) % 96, 0)
        return tree

    return draft


@pytest.mark.parametrize("wrong", [0, 1], ids=["always right", "always wrong"])
def test_any_drafter(folder: Path, wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = mtp_spec.load(folder, dtype="bfloat16")
    prompt = [4, 2]
    plain = lm.generate(prompt, max_new_tokens=25, speculation=None, seed=0)
    monkeypatch.setattr(Drafter, "draft", _oracle(prompt + plain.token_ids, wrong))
    drafted = lm.generate(prompt, max_new_tokens=25, speculation=4, seed=0)
    assert drafted.token_ids == plain.token_ids
    expected = [0.0] * 4 if wrong else [1.0] * 4
    assert drafted.stats.accepted_per_depth["conditional"][:1] == expected[:1]
    assert drafted.stats.tokens_per_step == (1.0 if wrong else pytest.approx(24 / 5))


def test_caches_after_rollback_equal_a_fresh_run(folder: Path) -> None:
    lm = mtp_spec.load(folder, dtype="bfloat16")
    ids = lm.generate([1, 2, 3], max_new_tokens=40, speculation=None, temperature=1.0, seed=0).token_ids
    again = lm.generate([1, 2, 3], max_new_tokens=40, speculation=5, temperature=1.0, seed=0).token_ids
    assert ids == again
    longer = lm.generate([1, 2, 3], max_new_tokens=60, speculation=2, temperature=1.0, seed=0).token_ids
    assert longer[:40] == ids


def test_streams_and_lists_agree_with_generate(folder: Path) -> None:
    lm = mtp_spec.load(folder)
    options: dict[str, Any] = {"max_new_tokens": 12, "speculation": 3}
    prompts = [[1, 2], [3, 4, 5], [6]]
    together = lm.generate(prompts, seed=0, **options)
    alone = [lm.generate(p, seed=one.seed, **options) for p, one in zip(prompts, together, strict=True)]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    events = list(lm.stream(prompts[0], seed=0, **options))
    assert [event.token_id for event in events] == together[0].token_ids
    assert events[0].step == 0
    assert events[0].source == "target"
    accepted = sum(event.source != "target" for event in events)
    assert accepted == together[0].stats.accepted


def test_rows_follow_the_number_of_threads() -> None:
    """Products may divide their work otherwise among other numbers of threads."""
    from mtp_spec.bench.rows import _chain_is_equal

    lm, before = mtp_spec.load(), torch.get_num_threads()
    try:
        for threads in (before + 2, before):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                assert all(_chain_is_equal(lm, 250, rows) for rows in (4, 7))
    finally:
        torch.set_num_threads(before)


def test_samples_are_the_texts_of_the_seeds_that_they_report(folder: Path) -> None:
    lm = mtp_spec.load(folder, dtype="bfloat16")
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.0}
    seeds = [derived_seed(7, i, SAMPLES) for i in range(3)]
    plain = [lm.generate([4, 2], seed=seed, speculation=None, **options).token_ids for seed in seeds]
    assert len(set(map(tuple, plain))) == 3
    assert [one.token_ids for one in lm.generate([4, 2], n=3, seed=7, speculation=3, **options)] == plain
    lists = lm.generate([[4, 2], [5]], n=2, seed=7, speculation=3, **options)
    assert [len(samples) for samples in lists] == [2, 2]
    assert [one.token_ids for one in lists[0]] == plain[:2]
    assert len(lm.generate([4, 2], n=1, **options)) == 1
    for wrong in ({"n": 0}, {"n": 1.5}):
        with pytest.raises(mtp_spec.OptionError, match="=" + str(wrong["n"])):
            lm.generate([4, 2], **wrong)
    with pytest.raises(mtp_spec.OptionError, match="n=2"):
        lm.stream([4, 2], n=2)
