"""Drafters beside the MTP modules: they never change a text, whatever they propose, and are told apart."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, product
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import mtp_spec
import tiny
from lms import host
from mtp_spec import Speculation
from mtp_spec.acceptance import RULES
from mtp_spec.drafting import Continuation, Text
from mtp_spec.sampling.seeds import derived_seed
from simulated import CHEAP_ROWS

VOCAB = 96
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 5, 6, 7], [1, 2] * 6, list(range(40)), [3]]
BOTH, ALONE = ("mtp", "text"), ("text",)
SHAPES: list[dict[str, Any]] = [
    {"depth": 3, "drafters": BOTH},
    {"branching": (3, 2, 1), "drafters": ("text", "mtp")},
    {"drafters": ALONE},
    {"branching": (2, 2, 1)},
    {"branching": (4, 4, 2, 2), "budget": 9},
    {"branching": (2,) * 8, "budget": 64, "adaptive": True},
    {"adaptive": True, "drafters": ALONE},
]


def without_the_best(ids: list[int], row: Tensor) -> Tensor:
    return row.index_fill_(0, row.argmax(), -torch.inf)


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.2},
    "truncated": {"temperature": 1.0, "top_k": 2},
    "penalties": {"temperature": 0.3, "repetition_penalty": 1.2, "frequency_penalty": 0.2, "logit_bias": {5: 9.0}},
    "processor": {"temperature": 0.3, "logits_processor": without_the_best},
}


def nearly(ids: Sequence[int]) -> list[int]:
    """Returns a text with every sixth token changed."""
    return [(token + 1) % VOCAB if place % 6 == 0 else token for place, token in enumerate(ids)]


class Fixed:
    """Proposes the same after every token."""

    def __init__(self, *continuations: Sequence[int], name: str = "fixed", chance: float = 0.9) -> None:
        self.name, self._found = name, [Continuation(one, [chance], name) for one in continuations]

    def begin(self, prompt: Sequence[int]) -> Fixed:
        return self

    def commit(self, tokens: Sequence[int]) -> None:
        pass

    def propose(self, path: Sequence[int], most: int) -> list[Continuation]:
        return self._found


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> mtp_spec.LM:
    lm = mtp_spec.load(
        tiny.make(tmp_path_factory.mktemp("tiny") / "model", seed=1).folder, dtype="bfloat16", max_batch=4
    )
    host(lm).planners.here().times = CHEAP_ROWS
    return lm


@pytest.fixture(scope="module")
def plain_lm(tmp_path_factory: pytest.TempPathFactory) -> mtp_spec.LM:
    """A model without MTP modules."""
    folder = tiny.make(tmp_path_factory.mktemp("plain") / "model", "v2", seed=1).folder
    lm = mtp_spec.load(folder, dtype="bfloat16")
    host(lm).planners.here().times = CHEAP_ROWS
    return lm


@pytest.mark.usefixtures("auto_drafts")
@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_text_stays_whoever_drafts(lm: mtp_spec.LM, sampling: str) -> None:
    """560 combinations of shapes, drafters, references, sampling, seeds and prompts, half of them in batches."""
    proposed = 0
    for seed, logprobs in ((0, 0), (1, 2)):
        options = {"max_new_tokens": 14, "logprobs": logprobs, **SAMPLING[sampling]}
        seeds = [derived_seed(seed, number) for number in range(len(PROMPTS))]
        plain = [lm.generate(prompt, seed=own, speculation=None, **options)
                 for prompt, own in zip(PROMPTS, seeds, strict=True)]  # fmt: skip
        documents = [nearly(prompt + one.token_ids) for prompt, one in zip(PROMPTS, plain, strict=True)]
        for number, shape in enumerate(SHAPES):
            speculation = Speculation(**shape, references=documents if number != seed else ())
            alone = [lm.generate(prompt, seed=own, speculation=speculation, **options)
                     for prompt, own in zip(PROMPTS, seeds, strict=True)]  # fmt: skip
            together = lm.generate(PROMPTS, seed=seeds, speculation=speculation, **options)
            for one, found in product((alone, together), range(len(PROMPTS))):
                assert one[found].token_ids == plain[found].token_ids, f"{shape} changed the text"
                assert one[found].logprobs == plain[found].logprobs
            proposed += sum(one.stats.accepted_by_source.get("text", 0) for one in (*alone, *together))
    assert proposed > 60


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.lossless])
def test_lossless_rules_are_greedy_at_temperature_0(lm: mtp_spec.LM, rule: str) -> None:
    proposed, shapes = 0, [{"depth": 3}, {"drafters": ALONE}, {"depth": 2, "drafters": BOTH}]
    if not RULES[rule].chains_only:
        shapes += [{"branching": (2, 2)}, {"branching": (3, 1), "drafters": BOTH}]
    for prompt, processor in product(PROMPTS, (None, without_the_best)):
        options: dict[str, Any] = {"max_new_tokens": 14, "temperature": 0.0, "logits_processor": processor}
        plain = lm.generate(prompt, speculation=None, **options)
        for shape in shapes:
            speculation = Speculation(**shape, acceptance=rule, references=[nearly(prompt + plain.token_ids)])
            out = lm.generate(prompt, speculation=speculation, **options)
            assert out.token_ids == plain.token_ids
            proposed += out.stats.accepted_by_source.get("text", 0)
    assert proposed > 60


@pytest.mark.parametrize("rule", ["typical", "relaxed"])
def test_lossy_rules_take_what_is_proposed(lm: mtp_spec.LM, rule: str) -> None:
    for adaptive in (False, True):
        shape = Speculation(4, acceptance=rule, adaptive=adaptive, drafters=("mtp", "text"))
        out = lm.generate([1, 2] * 6, max_new_tokens=20, temperature=0.3, seed=0, speculation=shape)
        assert len(out.token_ids) == 20


def test_proposals_join_the_modules_drafts_and_are_told_apart(lm: mtp_spec.LM) -> None:
    prompt, options = [4, 2], {"max_new_tokens": 30, "temperature": 0.0}
    plain = lm.generate(prompt, speculation=None, **options)

    class Right(Fixed):
        """Proposes what will be written, from the second token on, or at least a first token that is wrong."""

        def begin(self, given: Sequence[int]) -> Right:
            self.made = 0
            return self

        def commit(self, tokens: Sequence[int]) -> None:
            self.made += len(tokens)

        def propose(self, path: Sequence[int], most: int) -> list[Continuation]:
            made = self.made + len(path)
            true = plain.token_ids[made : made + most]
            return [Continuation([(true[0] + 1) % VOCAB], [0.6], self.name), Continuation(true, [0.9], self.name)]

    fixed = Speculation(branching=(2, 2, 2, 2), drafters=(Right(name="right"),))
    stream = lm.stream(prompt, speculation=fixed, **options)
    events, stats = list(stream), stream.result.stats
    assert [event.token_id for event in events] == plain.token_ids
    assert {event.source for event in events} == {"target", "right"}
    assert stats.accepted_by_source == {"right": stats.accepted}
    assert stats.tokens_per_step == pytest.approx(29 / 6)
    assert stats.drafted_by_source.total() == stats.drafted
    mixed = Speculation(branching=(3, 1, 1), drafters=("mtp", Right(name="right")))
    stats = lm.generate(prompt, speculation=mixed, **options).stats
    assert set(stats.drafted_by_source) == {"mtp", "right"}
    assert stats.accepted_by_source["right"] > 10
    # deeper than the modules draft, as far as the budget goes
    deep = Speculation(2, budget=20, adaptive=True, drafters=("mtp", Right(name="right")))
    out = lm.generate(prompt, speculation=deep, **options)
    assert out.token_ids == plain.token_ids
    assert max(out.stats.histogram) > 8
    shown = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    shown.print(lm.explain(prompt, steps=2, speculation=mixed, **options))
    assert "from right" in shown.export_text()


def test_a_wrong_proposal_fails_its_own_text_by_name(lm: mtp_spec.LM) -> None:
    class Broken(Fixed):
        def propose(self, path: Sequence[int], most: int) -> list[Continuation]:
            raise RuntimeError("no answers today")

    class Unsure(Fixed):
        def propose(self, path: Sequence[int], most: int) -> list[Continuation]:
            return [Continuation([1, 2], [0.9, math.nan], self.name)]

    for drafter, message in ((Fixed([VOCAB], name="mine"), "'mine' proposed"), (Fixed([1], chance=1.5), "chances"),
                             (Unsure(), "chances"), (Broken(), "no answers today")):  # fmt: skip
        good = lm.submit([1, 2, 3], max_new_tokens=8, seed=0, speculation=2)
        for drafters in ((drafter,), ("mtp", drafter)):
            bad = lm.submit([1, 2, 3], max_new_tokens=8, seed=0, speculation=Speculation(2, drafters=drafters))
            with pytest.raises(Exception, match=message):
                bad.result()
        assert good.result().token_ids == lm.generate([1, 2, 3], max_new_tokens=8, seed=0, speculation=None).token_ids
    nothing = Speculation(2, drafters=("mtp", Fixed([], name="silent")))
    assert len(lm.generate([1], max_new_tokens=8, speculation=nothing).token_ids) == 8


class Selfish(Fixed):
    """Takes each list that it is given for its own: goes on with the prompt's, and empties the others."""

    def begin(self, prompt: Sequence[int]) -> Selfish:
        self.text: Any = prompt
        return self

    def commit(self, tokens: Any) -> None:
        self.text += tokens
        tokens.clear()

    def propose(self, path: Any, most: int) -> list[Continuation]:
        found = [Continuation([self.text[-2], *path], [0.9], self.name)]
        path.clear()
        return found


def test_a_drafter_may_change_the_lists_that_it_gets(lm: mtp_spec.LM) -> None:
    for number, drafters in enumerate([(Selfish(),), ("mtp", Selfish(), "text"), (Selfish(), Selfish(name="other"))]):
        for shape in ({"depth": 3}, {"branching": (2, 2)}, {"adaptive": True, "budget": 12}):
            options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.9, "seed": number}
            plain = lm.generate([1, 2, 3], speculation=None, **options)
            out = lm.generate([1, 2, 3], speculation=Speculation(**shape, drafters=drafters), **options)
            assert out.token_ids == plain.token_ids


@pytest.mark.parametrize("given", [
    None, 3, "abc", [1], [[1, 2]], [((1,), (0.9,), "d")], [Continuation([1.5], [0.9], "d")],  # type: ignore[list-item]
    [Continuation(np.array(5), [0.9], "d")], [Continuation([1], torch.tensor(0.9), "d")],
    [Continuation([1], [10**400], "d")], [Continuation(torch.ones(2, device="meta"), [1], "d")],
    [Continuation("12", [0.9], "d")], [Continuation([1], 0.9, "d")], [Continuation([1], [None], "d")],  # type: ignore
])  # fmt: skip
def test_what_is_no_continuation_is_refused_by_name(lm: mtp_spec.LM, given: Any) -> None:
    class Wrong(Fixed):
        def propose(self, path: Sequence[int], most: int) -> Any:
            return given

    for drafters in ((Wrong(name="mine"),), ("mtp", Wrong(name="mine"))):
        with pytest.raises(mtp_spec.MTPSpecError, match=r"'mine' proposed .*: propose returns a list of"):
            lm.generate([1, 2, 3], max_new_tokens=8, speculation=Speculation(2, drafters=drafters))


def test_proposals_without_an_end_are_refused(lm: mtp_spec.LM) -> None:
    class Endless(Fixed):
        def propose(self, path: Sequence[int], most: int) -> Any:
            return (Continuation([number % VOCAB], [0.5], "mine") for number in count())

    with pytest.raises(mtp_spec.MTPSpecError, match="'mine' proposed more than 1024 continuations at once"):
        lm.generate([1, 2, 3], max_new_tokens=8, speculation=Speculation(2, drafters=(Endless(name="mine"),)))


def test_arrays_are_continuations_too(lm: mtp_spec.LM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0}
    plain = lm.generate([1, 2, 3], speculation=None, **options)
    for kind in (np.asarray, torch.tensor):

        class Arrays(Fixed):
            def commit(self, tokens: Sequence[int], kind: Any = kind) -> None:
                self._done = [*getattr(self, "_done", ()), *tokens]
                rest = plain.token_ids[len(self._done) :]
                self._found = [Continuation(kind(rest), kind([0.9, 0.8]), "arrays")] if rest else []

        out = lm.generate([1, 2, 3], speculation=Speculation(4, drafters=(Arrays(),)), **options)
        assert out.token_ids == plain.token_ids
        assert out.stats.accepted > 6


def test_what_begin_returns_is_checked(lm: mtp_spec.LM) -> None:
    class Forgetful(Fixed):
        def begin(self, prompt: Sequence[int]) -> Any:
            self.prompt = prompt

    with pytest.raises(mtp_spec.MTPSpecError, match="'fixed' began with None: return an object with commit"):
        lm.generate([1], max_new_tokens=8, speculation=Speculation(2, drafters=(Forgetful([1]),)))


def test_what_always_fails_is_soon_left_alone(lm: mtp_spec.LM) -> None:
    """A planner believes a drafter's chances only as long as they come true."""
    wrong = Fixed([95] * 30, chance=0.95)
    shape = Speculation(budget=32, adaptive=True, drafters=(wrong,))
    options: dict[str, Any] = {"max_new_tokens": 120, "seed": 0, "temperature": 1.0, "logit_bias": {95: -50.0}}
    out = lm.generate([1, 2, 3], speculation=shape, ignore_eos=True, **options)
    assert out.stats.accepted == 0
    assert out.stats.steps_by_source["fixed"] < 20


@pytest.mark.usefixtures("auto_drafts")
def test_a_model_without_modules_drafts_from_its_text(plain_lm: mtp_spec.LM) -> None:
    drafted = 0
    for prompt, speculation in product(PROMPTS, ("auto", Speculation(drafters=("text",)))):
        for temperature in (0.0, 0.4):
            options: dict[str, Any] = {"max_new_tokens": 24, "temperature": temperature, "seed": 3}
            plain = plain_lm.generate(prompt, speculation=None, **options)
            out = plain_lm.generate(prompt, speculation=speculation, **options)
            assert out.token_ids == plain.token_ids
            assert set(out.stats.drafted_by_source) <= {"text"}
            drafted += out.stats.accepted
    assert drafted > 20
    for wanted in (3, Speculation(2, drafters=("mtp", "text"))):
        with pytest.raises(mtp_spec.OptionError, match=r'drafters=\("text",\)'):
            plain_lm.generate([1], speculation=wanted)


def test_options_are_checked_by_name(lm: mtp_spec.LM) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"drafters": "text"}, "drafters='text'"),
        ({"drafters": ()}, r"drafters=\(\)"),
        ({"drafters": ("mtp", "suffix")}, "'suffix'"),
        ({"drafters": (object(),)}, "drafters entry"),
        ({"drafters": (Text,)}, "drafters entry=<class"),
        *(({"drafters": (Fixed(name=name),)}, "a name whose first word is neither") for name in (" ", "mtp", "mtp 1")),
        ({"drafters": ("text", Text())}, "different names"),
        ({"references": "a document"}, "list of texts"),
        ({"references": "a document " * 999}, r"^.{200,400}$"),
        ({"references": [3]}, "references entry=3"),
        ({"references": [[1, -1]]}, "references token=-1"),
        ({"references": ["a" * 999], "drafters": ("mtp",)}, r"looks in, and drafters=\('mtp',\) does not"),
    ]
    for options, message in bad:
        with pytest.raises(mtp_spec.OptionError, match=message):
            Speculation(**options)
    with pytest.raises(mtp_spec.OptionError, match="references hold the id 96"):
        lm.generate([1], speculation=Speculation(references=[[96]]))
    with pytest.raises(mtp_spec.MTPSpecError, match="no tokenizer"):
        lm.generate([1], speculation=Speculation(references=["text"]))
    assert Speculation().drafters == ("mtp",)
    assert Speculation(references=[[1]]).drafters == ("mtp", "text")
    assert Speculation(adaptive=True).chosen(True).drafters == ("mtp", "text")
    assert "digest" in repr(Speculation(references=["a long document"]))


def test_references_may_come_from_many_threads(lm: mtp_spec.LM) -> None:
    def ask(number: int) -> None:
        for one in range(1000):  # a whole request takes too long for threads to meet often
            lm._drafters(Speculation(2, references=[[number, one % 90, one % 7]]))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(24) as pool:
            list(pool.map(ask, range(24)))
    finally:
        sys.setswitchinterval(before)


def test_a_grammar_is_followed_past_proposals_that_leave_it() -> None:
    lm = mtp_spec.load()
    host(lm).planners.here().times = CHEAP_ROWS
    wrong = [lm.encode('{"name": no'), lm.encode(" Once upon a time")]
    regex = {"type": "regex", "regex": '\\{"name": "[a-z]+", "age": [0-9]+\\}'}
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.7, "seed": 2, "response_format": regex}
    messages = [{"role": "user", "content": 'Write {"name": "fox", "age": 3} as JSON: {"name": '}]
    plain = lm.chat(messages, speculation=None, **options)
    drafters = ("mtp", "text", Fixed(*wrong))
    for shape in (Speculation(branching=(4, 2, 1), drafters=drafters), Speculation(adaptive=True, drafters=drafters),
                  Speculation(3, drafters=("text", Fixed(*wrong)))):  # fmt: skip
        assert lm.chat(messages, speculation=shape, **options).token_ids == plain.token_ids
    for rule in ("traversal", "rejection", "hybrid", "block"):
        shape = Speculation(3, acceptance=rule, drafters=drafters)
        greedy = {**options, "temperature": 0.0}
        out = lm.chat(messages, speculation=shape, **greedy)
        assert out.token_ids == lm.chat(messages, speculation=None, **greedy).token_ids
    explained = lm.explain(
        messages, steps=2, speculation=Speculation(branching=(4, 2, 1), drafters=drafters), **options
    )
    assert {node.source for step in explained.steps for node in step.nodes} >= {"mtp", "fixed"}
