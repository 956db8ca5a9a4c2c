"""Drafts that the host sends to captured steps: the text stays, and they are accepted where it repeats."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mtp_spec
from device_models import SAMPLING, OnceThenAgain, batch_lm, checkpoint, device_lm
from lms import device, runtime
from mtp_spec import Speculation
from mtp_spec.api import LM
from mtp_spec.cuda import group as device_group
from mtp_spec.cuda.constants import Constants
from mtp_spec.cuda.kinds import kind_of
from mtp_spec.cuda.script import LONGEST, RING, expected, promised, replaced, ring_of
from mtp_spec.cuda.state import MOST
from mtp_spec.drafting import Continuation, Text
from mtp_spec.planning.shape_planner import ShapeTable
from mtp_spec.speculation import LONGEST_CHAIN
from scripted import Script

PROMPTS = [[5, 6, 7, 8, 9, 10], [1, 2, 3] * 5, [9]]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    lm = batch_lm(checkpoint(tmp_path_factory.mktemp("text"), "v3"), 3)
    runtime(lm).graphs = OnceThenAgain()
    return lm


def nearly(ids: Sequence[int]) -> list[int]:
    """Returns a text with every ninth token changed."""
    return [(token + 1) % 160 if place % 9 == 0 else token for place, token in enumerate(ids)]


@pytest.mark.parametrize("sampling", [0, 2])
def test_the_text_stays(sampling: int, tmp_path: Path) -> None:
    lm = batch_lm(checkpoint(tmp_path, "v3"), 3)  # no other text has taught it what proposals are worth
    runtime(lm).graphs = OnceThenAgain()
    options = {"max_new_tokens": 18, "logprobs": 1, "ignore_eos": True, **SAMPLING[sampling]}
    plain = [lm.generate(prompt, seed=seed, speculation=None, **options) for seed, prompt in enumerate(PROMPTS)]
    documents = [nearly(prompt + one.token_ids) for prompt, one in zip(PROMPTS, plain, strict=True)]
    found = []
    for speculation in (Speculation(drafters=("text",), references=documents),
                        Speculation(3, adaptive=True, drafters=("mtp", "text"), references=documents),
                        Speculation(branching=(2, 1), references=documents)):  # fmt: skip
        alone = [lm.generate(prompt, seed=seed, speculation=speculation, **options)
                 for seed, prompt in enumerate(PROMPTS)]  # fmt: skip
        together = lm.generate(PROMPTS, seed=list(range(3)), speculation=speculation, **options)
        for out in (alone, together):
            assert [one.token_ids for one in out] == [one.token_ids for one in plain]
            assert [one.logprobs for one in out] == [one.logprobs for one in plain]
        found.append(sum(one.stats.accepted_by_source.get("text", 0) for one in (*alone, *together)))
    assert found[0] > 40
    assert found[2] > 0  # a proposal takes the place of the tree only where it promises more
    speculation = Speculation(drafters=("text",), references=documents)
    events = list(lm.stream(PROMPTS[0], seed=0, speculation=speculation, **options))
    assert {event.source for event in events} == {"target", "text"}


def test_modules_and_proposals_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order the modules' caches are what they are without proposals, so their drafts are the same."""
    lm = device_lm(checkpoint(tmp_path, "v3"))
    options: dict[str, Any] = {"max_new_tokens": 30, "seed": 1, "temperature": 0.0, "ignore_eos": True,
                               "logit_bias": {token: -float("inf") for token in range(6, 160)}}  # fmt: skip
    plain = lm.generate([5, 3], speculation=None, **options)
    references = [nearly([5, 3, *plain.token_ids])]
    speculation = Speculation(2, adaptive=True, drafters=("mtp", "text"), references=references)
    held = list[list[torch.Tensor]]()
    # plain, chains of 1 and 2, proposals of 8 and of 31
    for shapes in (
        [1],
        [3],
        [4],
        [3, 1],
        [4, 1],
        [4, 2],
        [0, 3, 2],
        [0, 4, 2, 4],
        [0, 0, 3, 3, 2],
        [4, 0, 4, 0, 0, 3, 1],
    ):

        def make(_: ShapeTable, shapes: list[int] = shapes) -> Script:
            return Script(shapes)

        monkeypatch.setattr(device_group, "ShapePlanner", make)
        out = lm.generate([5, 3], speculation=speculation, **options)
        assert out.token_ids == plain.token_ids, shapes
        group = next(one for one in device(lm).pool.known if one.kind.scripted and one.kind.modules)
        assert group.state.pages is not None
        slots = (group.state.pages[0].long()[:, None] + torch.arange(64)).flatten()
        held.append([cache.slots[slots[: int(group.state.fed[0]) - 1]].clone() for cache in group.state.mtp_caches])
    for other in held[1:]:
        for ours, theirs in zip(held[0], other, strict=True):
            both = min(len(ours), len(theirs), 24)
            assert both > 15
            assert torch.equal(ours[:both], theirs[:both])


@pytest.mark.parametrize("drafters", [("text",), ("mtp", "text")], ids=["text", "both"])
def test_chains_of_31_drafts(lm: LM, drafters: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    follow_documents(lm, drafters, PROMPTS[:2], monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("drafters", [("text",), ("mtp", "text")], ids=["text", "both"])
def test_chains_of_31_drafts_on_the_gpu(drafters: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = mtp_spec.load(device="cuda", max_batch=3)
    prompts = [lm.encode(text) for text in ("Once upon a time there was", "The storm came in the night")]
    follow_documents(lm, drafters, prompts, monkeypatch)


def follow_documents(
    lm: LM, drafters: tuple[str, ...], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that follow a document for long, end within a step, leave it, or resume it; alone and side by side."""
    options: dict[str, Any] = {"max_new_tokens": 70, "temperature": 0.0, "ignore_eos": True}
    plain = [lm.generate(prompt, seed=0, speculation=None, **options) for prompt in prompts]
    whole = [prompt + one.token_ids for prompt, one in zip(prompts, plain, strict=True)]
    left = [ids[: len(ids) - 20] + [3, 4, 5] * 7 for ids in whole]
    resumed = [[*ids[:-40], ids[-40] + 1, *ids[-39:]] for ids in whole]
    steps = list[int]()
    for documents, most in ((whole, 70), (whole, 45), (left, 70), (resumed, 70)):
        speculation = Speculation(2, adaptive=True, drafters=drafters, references=documents)
        last = 2 if drafters == ("text",) else 4  # plain, chains of 1 and 2 of the modules, of 8 and 31 of the text
        monkeypatch.setattr(device_group, "ShapePlanner", lambda _: Script([last]))  # noqa: B023 - called at once
        given = options | {"max_new_tokens": most, "speculation": speculation, "seed": 0}
        alone = [lm.generate(prompt, **given) for prompt in prompts]
        stopped = lm.generate(prompts[0], stop_token_ids=[plain[0].token_ids[40]], **given)
        for out in (alone, lm.generate(prompts, **given)):
            assert [one.token_ids for one in out] == [one.token_ids[:most] for one in plain]
        assert stopped.token_ids == plain[0].token_ids[: plain[0].token_ids.index(plain[0].token_ids[40])]
        steps += [one.stats.steps for one in alone]
    assert max(steps[:4]) < 8
    assert max(steps[4:6]) < 40
    assert max(steps[6:]) < 12  # drafts are sent by position: after one other token they are right again


def test_every_step_of_a_fixed_tree_drafts(tmp_path: Path) -> None:
    """Proposals take the tree's place where they promise more; no step is plain, however badly drafts do."""
    lm = device_lm(checkpoint(tmp_path, "v3"))
    options: dict[str, Any] = {"max_new_tokens": 30, "seed": 1, "temperature": 0.0, "ignore_eos": True}
    plain = lm.generate([5, 3], speculation=None, **options)
    for references in ([nearly([5, 3, *plain.token_ids])], [[1, 2] * 20]):
        out = lm.generate([5, 3], speculation=Speculation(branching=(2, 1), references=references), **options)
        assert out.token_ids == plain.token_ids
        assert sum(out.stats.steps_by_source[name] for name in ("text", "mtp")) == out.stats.steps > 0


def test_a_model_without_modules_drafts_from_its_text(tmp_path: Path) -> None:
    lm = batch_lm(checkpoint(tmp_path, "v2"), 1)
    assert lm.speculation_for("auto") is None  # on a GPU proposals take part by name
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.0, "ignore_eos": True, "seed": 0}
    plain = lm.generate([1, 2, 3], speculation=None, **options)
    document = nearly([1, 2, 3, *plain.token_ids])
    for speculation in (
        Speculation(adaptive=True, drafters=("text",)),
        Speculation(4, drafters=("text",), references=[document]),
    ):
        assert lm.generate([1, 2, 3], speculation=speculation, **options).token_ids == plain.token_ids
    out = lm.generate([1, 2, 3], speculation=Speculation(drafters=("text",), references=[document]), **options)
    assert out.stats.accepted_by_source["text"] > 8


def test_processors_grammars_and_observers(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime(lm), "graphs", None)

    def avoid(ids: list[int], row: torch.Tensor) -> torch.Tensor:
        row[ids[-1]] = -torch.inf
        return row

    for options in ({"logits_processor": avoid}, {"min_new_tokens": 12}):
        given: dict[str, Any] = {"max_new_tokens": 16, "temperature": 0.0, **options}
        plain = lm.generate([7, 8, 9], speculation=None, **given)
        references = [nearly([7, 8, 9, *plain.token_ids])]
        out = lm.generate([7, 8, 9], speculation=Speculation(drafters=("text",), references=references), **given)
        assert out.token_ids == plain.token_ids
        assert out.stats.accepted > 3
    explained = lm.explain([7, 8, 9], steps=2, speculation=Speculation(drafters=("text",)), temperature=0.0)
    assert len(explained.steps) == 2


def test_what_cannot_take_part_is_named(lm: LM) -> None:
    for speculation, message in (
        (Speculation(2, acceptance="rejection", drafters=("text",)), 'need "coupled"'),
        (Speculation(branching=(2, 1), drafters=("text",)), "a chain on a GPU"),
    ):
        with pytest.raises(mtp_spec.OptionError, match=message):
            lm.generate([1], speculation=speculation)


def test_drafts_are_sent_by_position() -> None:
    constants = Constants(torch.device("cpu"))
    tokens = list(range(100, 100 + LONGEST + 9))
    for known in (1, 30, RING, 1000):
        script = torch.from_numpy(ring_of(known, tokens))[None]
        for ahead in range(2 * MOST + 1):  # tokens that the steps in flight commit
            length = torch.tensor([known - 1 + ahead], dtype=torch.int32)
            for depth in (5, LONGEST_CHAIN):
                own = tokens[ahead : min(ahead + depth, LONGEST)]
                assert expected(script, length, constants, depth).tolist() == [own + [-1] * (depth - len(own))]
    short = torch.from_numpy(ring_of(5, [7, 8]))[None]
    given = expected(short, torch.tensor([5], dtype=torch.int32), constants, 3)
    assert given.tolist() == [[8, -1, -1]]
    assert replaced(torch.tensor([[1, 2, 3]]), given).tolist() == [[8, 2, 3]]


def test_a_step_in_flight_makes_proposals_less_sure() -> None:
    one = Continuation(list(range(20)), [0.5], "text")
    assert promised(None, 3, (8,)) == [1.0]
    assert promised(one, 0, (3,)) == pytest.approx([1 + 0.5 + 0.25 + 0.125])
    assert promised(one, 2, (3,)) == pytest.approx([1 + 0.125 + 0.0625 + 0.03125])
    assert promised(one, 40, (8,)) == [1.0]
    for flying, follows in ((0, 0), (2, 0), (19, 0), (40, 0), (0, 3), (0, 15), (0, 31)):
        found = promised(one, flying, (2, 8, 31), follows)
        assert found == [promised(one, flying, (depth,), follows)[0] for depth in (2, 8, 31)]


def test_a_continuation_that_is_left_may_resume() -> None:
    """After a chain that was not right as a whole the next one's tokens are still sent by position."""
    never, often = (Continuation(list(range(40)), [0.9], "text", resumes) for resumes in (0.0, 0.5))
    assert promised(never, 4, (8,)) < promised(often, 4, (8,))
    assert promised(never, 0, (8,), 31)[0] < 1.2
    assert promised(often, 0, (8,), 31)[0] > 2.5
    assert promised(often, 41, (8,)) == [1.0]  # nothing is left of it
    assert promised(often, 0, (8,)) == promised(never, 0, (8,))  # nothing is in flight


def test_chains_that_do_not_fit_are_left_out_of_large_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules' own steps take as many passes as without proposals."""
    kind = kind_of(SimpleNamespace(
        speculation=Speculation(5, adaptive=True, drafters=("mtp", "text")), drafters=[Text()], modules=True,
        sampler=SimpleNamespace(guides=False, masks=False)))  # fmt: skip
    assert [kind.extend(rows) for rows in (16, 8)] == [9, 6]
    monkeypatch.setattr(device_group, "STEP_ROWS", 128)  # 8 slots of 16 rows
    lm, prompts = batch_lm(checkpoint(tmp_path, "v3"), 5), [*PROMPTS, [4, 4], [8]]
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True, "seed": 0}
    plain = lm.generate(prompts, speculation=None, **options)
    documents = [prompt + one.token_ids for prompt, one in zip(prompts, plain, strict=True)]
    speculation = Speculation(2, adaptive=True, drafters=("mtp", "text"), references=documents)
    out = lm.generate(prompts, speculation=speculation, **options)
    assert [one.token_ids for one in out] == [one.token_ids for one in plain]
    group = next(one for one in device(lm).pool.known if one.kind.scripted)
    with torch.inference_mode():
        (part,) = group._parts(5)
        table = group._measured([part])
    assert [group.shapes[number].depth for number in part.steps] == [0, 1, 2, 8]  # not the chain of 31
    assert [table.relative(number) < inf for number in range(len(group.shapes))] == [True] * 4 + [False]
