"""HostPages of cache: none is lost or given twice, beginnings are shared bit for bit, memory stays within the plan."""

from __future__ import annotations

import random
import threading
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mtp_spec
import tiny
from lms import host
from mtp_spec.cache.pages import HostLease, HostPages
from mtp_spec.memory import PagePlan
from mtp_spec.model.cache import PAGE, LatentCache, pages_for
from mtp_spec.model.config import load_config


def store(pages: int, modules: int = 1) -> HostPages:
    return HostPages([torch.full((pages * PAGE, 2), torch.nan) for _ in range(1 + modules)], modules)


def fill(lease: HostLease, tokens: list[int], held: int, drafted: bool) -> None:
    """Writes slots that tell which tokens they were computed from, and publishes them."""
    for cache in (lease.cache, *lease.mtp_caches):
        new = range(cache.length, held)
        if new:
            values = torch.tensor([[float(hash(tuple(tokens[: slot + 1])) % 4096), 1.0] for slot in new])
            cache.put(0, new.start, values, held)
            cache.commit(range(len(new)))
    lease.publish(tokens, held, drafted)


def assert_holds(lease: HostLease, tokens: list[int], held: int) -> None:
    for cache in (lease.cache, *lease.mtp_caches):
        found = cache.read(0, held)[:, 0].tolist()
        assert found == [float(hash(tuple(tokens[: slot + 1])) % 4096) for slot in range(held)]


@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_texts_lose_no_page(seed: int) -> None:
    dice, pages = random.Random(seed), store(24, modules=seed % 3)
    running: list[tuple[HostLease, list[int], int]] = []
    shared = refused = 0
    for _ in range(3000):
        if running and dice.random() < 0.5:
            lease, tokens, held = running.pop(dice.randrange(len(running)))
            assert_holds(lease, tokens, held)
            lease.end()
            lease.end()
        else:
            # few different beginnings, so that many are alike
            tokens = [dice.randrange(2) for _ in range(3)] * dice.randrange(1, 90)
            drafting = dice.random() < 0.5
            found = pages.lease(tokens, len(tokens) + dice.randrange(1, 200), drafting)
            if found is None:
                refused += 1
                continue
            shared += found.reused
            held = min(len(tokens) - 1, found.reused + dice.randrange(300))
            assert_holds(found, tokens, found.reused)
            fill(found, tokens, max(held, found.reused), drafting)
            running.append((found, tokens, max(held, found.reused)))
        in_use = {page for lease, *_ in running for page in lease._pages}
        assert pages.free + pages.idle + len(in_use) == 24, "a page was lost or counted twice"
        own = [page for lease, *_ in running for page in lease._pages[lease.reused // PAGE :]]
        assert len(own) == len(set(own)), "two texts write to one page"
    for lease, *_ in running:
        lease.end()
    assert pages.free + pages.idle == 24
    assert shared > 1000
    assert refused
    pages.forget()
    assert pages.free == 24


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 260), st.booleans()), min_size=1, max_size=30))
def test_what_is_shared_was_computed_from_the_same_tokens(texts: list[tuple[int, int, bool]]) -> None:
    pages = store(8)
    for kind, length, drafting in texts:
        tokens = [(kind * (place // 70)) % 5 for place in range(length)]
        lease = pages.lease(tokens, length + 1, drafting)
        assert lease is not None
        assert lease.reused < length
        assert_holds(lease, tokens, lease.reused)
        fill(lease, tokens, max(lease.reused, length - 1), drafting)
        lease.end()


def test_modules_need_the_tokens_that_follow() -> None:
    pages, tokens = store(8, modules=2), list(range(3 * PAGE))
    lease = pages.lease(tokens, len(tokens), True)
    assert lease is not None
    fill(lease, tokens, 3 * PAGE - 1, True)
    lease.end()
    same = pages.lease([*tokens[: 2 * PAGE + 2], 0], 3 * PAGE, True)
    assert same is not None
    assert same.reused == 2 * PAGE
    other = pages.lease([*tokens[: 2 * PAGE + 1], 0, 0, 0], 3 * PAGE, True)
    assert other is not None
    assert other.reused == PAGE


def test_what_was_used_longest_ago_goes_first() -> None:
    pages = store(4, modules=0)
    prompts = [[kind] * (PAGE + 1) for kind in range(4)]
    for prompt in prompts[:3]:
        lease = pages.lease(prompt, PAGE + 1, False)
        assert lease is not None
        fill(lease, prompt, PAGE, False)
        lease.end()
    again = pages.lease(prompts[0], PAGE + 1, False)
    assert again is not None
    assert again.reused == PAGE
    again.end()
    needy = pages.lease(prompts[3], 2 * PAGE, False)  # one page was free, one more has to go
    assert needy is not None
    assert [len(pages.shared(prompt, False)) for prompt in prompts[:3]] == [1, 0, 1]


def test_pages_anywhere_hold_what_pages_in_a_row_hold() -> None:
    memory = [torch.zeros(8 * PAGE, 3)]
    apart, together = LatentCache(memory, [6, 1, 4]), LatentCache.alone(1, 3 * PAGE, 3, torch.float32)
    for start, count, path in ((0, 100, range(100)), (100, 5, [0, 2, 4]), (103, 60, range(60)), (163, 4, [0, 3])):
        rows = torch.randn(count, 3)
        found = [cache.put(0, start, rows, start + count)[: start + count] for cache in (apart, together)]
        assert torch.equal(*found)
        for cache in (apart, together):
            cache.commit(path)
    assert apart.length == together.length == 165
    assert torch.equal(apart.read(0, 165), together.read(0, 165))
    for cache in (apart, together):
        cache.restart(130)
        cache.put(0, 0, torch.ones(2, 3), 2)
        assert (cache.capacity, cache.length) == (PAGE, 0)
    assert torch.equal(memory[0][4 * PAGE : 4 * PAGE + 2], torch.ones(2, 3))


@pytest.fixture(scope="module", params=["v3", "v3_two_modules"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny") / "model", request.param, seed=2).folder


def reusable(lm: mtp_spec.LM, *tokens: int) -> list[int]:
    """What texts reuse of one another: nothing where rows run one by one, whose bits depend on their passes."""
    return [*tokens] if lm.technique == "batched" else [0] * len(tokens)


RULE = mtp_spec.Speculation(3, acceptance="rejection")  # its text depends on the drafts, so on the modules' caches


@pytest.mark.parametrize("speculation", [None, 2, mtp_spec.Speculation(branching=(2, 2)), "auto", RULE], ids=str)
def test_a_shared_beginning_changes_no_bit(folder: Path, speculation: Any) -> None:
    lm = mtp_spec.load(folder, dtype="bfloat16", max_batch=3)
    options: dict[str, Any] = {"max_new_tokens": 12, "speculation": speculation, "logprobs": 2, "seed": 3}
    first = [(7 * i) % 96 for i in range(150)]
    prompts = [first, [*first[:140], 5, 6], first[:70], first, [*first, 9], [3, *first]]
    hits = []
    for prompt in prompts:
        out, alone = lm.submit(prompt, **options).result(), lm.generate(prompt, **options)
        assert (out.token_ids, out.logprobs) == (alone.token_ids, alone.logprobs)
        hits.append(out.stats.reused_tokens)
    if speculation != "auto":  # which may leave tokens out, and shares only what is whole
        assert hits == reusable(lm, 0, 128, 64, 128, 128, 0)
    # a turn that goes on from the whole of an earlier text, its own tokens included
    said = [*first, *lm.submit(first, **{**options, "max_new_tokens": 60}).result().token_ids, 1, 2, 3]
    out, alone = lm.submit(said, **options).result(), lm.generate(said, **options)
    assert (out.token_ids, out.logprobs) == (alone.token_ids, alone.logprobs)
    assert speculation == "auto" or [out.stats.reused_tokens] == reusable(lm, 192)


def test_texts_with_and_without_drafts_share_what_they_can(folder: Path) -> None:
    lm = mtp_spec.load(folder, dtype="bfloat16", max_batch=3)
    prompt, options = [(5 * i) % 96 for i in range(100)], {"max_new_tokens": 8, "seed": 1}
    hits = []
    for speculation in (None, RULE, RULE, None):
        out = lm.submit(prompt, speculation=speculation, **options).result()
        assert out.token_ids == lm.generate(prompt, speculation=speculation, **options).token_ids
        hits.append(out.stats.reused_tokens)
    assert hits == reusable(lm, 0, 0, 64, 64)


@pytest.mark.parametrize("speculation", [None, 2, "auto"])
def test_texts_that_begin_together_read_their_prompt_once(folder: Path, speculation: Any) -> None:
    lm = mtp_spec.load(folder, dtype="bfloat16", max_batch=8)
    prompt, options = [(5 * i) % 96 for i in range(150)], {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    texts = lm.generate([prompt], n=5, speculation=speculation, **options)[0]
    assert [text.stats.reused_tokens for text in texts] == reusable(lm, 0, 128, 128, 128, 128)
    for text in texts:
        assert text.token_ids == lm.generate(prompt, speculation=None, **{**options, "seed": text.seed}).token_ids


def test_auto_takes_over_what_was_read_without_drafts(folder: Path, auto_drafts: None) -> None:
    """A strict shape does not: its modules would miss what came before."""
    lm = mtp_spec.load(folder, dtype="bfloat16", max_batch=2)
    prompt, options = [(5 * i) % 96 for i in range(150)], {"max_new_tokens": 40, "seed": 3}
    plain = lm.submit(prompt, speculation=None, **options).result()
    auto = lm.submit(prompt, speculation="auto", **options).result()
    assert auto.token_ids == plain.token_ids
    assert auto.stats.drafted > 0
    strict = lm.submit(prompt, speculation=2, **options).result()
    assert strict.token_ids == plain.token_ids
    assert [text.stats.reused_tokens for text in (plain, auto, strict)] == reusable(lm, 0, 128, 0)


def test_rows_that_depend_on_their_passes_are_not_shared(by_torch: None, folder: Path) -> None:
    lm = mtp_spec.load(folder, dtype="float32", max_batch=3)
    prompt = list(range(90))
    texts = [lm.submit(prompt, max_new_tokens=4, logprobs=2, seed=0).result() for _ in range(2)]
    assert texts[1].stats.reused_tokens == 0
    assert texts[0].logprobs == texts[1].logprobs == lm.generate(prompt, max_new_tokens=4, logprobs=2, seed=0).logprobs


def test_few_pages_make_texts_wait_and_refuse_the_longest(folder: Path) -> None:
    lm = mtp_spec.load(folder, dtype="bfloat16", max_batch=8, cache_tokens=2 * PAGE)
    with pytest.raises(mtp_spec.MTPSpecError, match=r"3 pages of 64 tokens .100 of the prompt, up to 40 new ones"):
        lm.submit([1] * 100, max_new_tokens=40, speculation=None, seed=0)
    prompts = [[i] * 20 for i in range(9)]
    texts = [lm.submit(prompt, max_new_tokens=20, speculation=2, seed=0) for prompt in prompts]
    for prompt, text in zip(prompts, texts, strict=True):
        assert text.result().token_ids == lm.generate(prompt, max_new_tokens=20, speculation=2, seed=0).token_ids
    pages = host(lm).pages(True)
    assert pages is not None
    assert pages.free + pages.idle == pages.total == 2


def test_cancelled_and_broken_texts_give_their_pages_back(folder: Path) -> None:
    lm = mtp_spec.load(folder, dtype="bfloat16", max_batch=4, cache_tokens=6 * PAGE)
    dice = random.Random(0)

    def fails(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise LookupError("a processor's own error")

    texts, done = deque[mtp_spec.Handle](maxlen=30), threading.Event()

    def cancels() -> None:
        choice = random.Random(1)
        while not done.wait(choice.random() * 0.003):
            if texts:
                choice.choice(list(texts)).cancel()

    other = threading.Thread(target=cancels)
    other.start()
    for _ in range(80):
        options: dict[str, Any] = {"max_new_tokens": dice.randrange(1, 30), "speculation": dice.choice((None, 2))}
        if dice.random() < 0.3:
            options["logits_processor"] = fails
        texts.append(lm.submit([dice.randrange(3)] * dice.randrange(1, 150), seed=0, **options))
        if dice.random() < 0.2:
            texts[-1].cancel()
    done.set()
    other.join()
    assert len(lm.submit([1], max_new_tokens=1, seed=0).result().token_ids) == 1
    pages = host(lm).pages(True)
    lm.close()
    assert pages is not None
    assert pages.free + pages.idle == 6


def test_closing_frees_the_memory(folder: Path) -> None:
    lm = mtp_spec.load(folder, dtype="bfloat16", max_batch=2)
    texts = [lm.submit([1, 2], max_new_tokens=100, seed=0), lm.submit([3], max_new_tokens=5, seed=0)]
    texts[1].result()
    memory = weakref.ref(host(lm).pages(True))
    lm.close()
    assert memory() is None


def test_a_ruined_page_is_cleaned_before_it_is_used_again() -> None:
    pages = store(2)
    lease = pages.lease([1, 2], PAGE, False)
    assert lease is not None
    lease.cache.slots[0].fill_(torch.nan)
    lease.end()
    again = pages.lease([1, 2], 2 * PAGE, False)
    assert again is not None
    assert all(layer.isfinite().all() for layer in pages.layers)


def test_the_plan_is_checked_against_the_machine(folder: Path) -> None:
    config = load_config(folder)
    plan = PagePlan.of(config, torch.bfloat16, 200, 3, None)
    assert plan.pages == 3 * pages_for(200 + 65)
    assert plan.page_bytes == PAGE * (config.num_hidden_layers + config.num_nextn_predict_layers) * 32 * 2
    assert PagePlan.of(config, torch.bfloat16, 200, 3, 100).pages == 2
    with pytest.raises(mtp_spec.MTPSpecError, match="load with a smaller max_context or max_batch, or with cache_tok"):
        PagePlan.of(config, torch.bfloat16, 2**30, 2**20, None)
    for wrong in (0, 1.5, True):
        with pytest.raises(mtp_spec.OptionError, match="cache_tokens"):
            mtp_spec.load(folder, cache_tokens=wrong)


def test_pages_known_without_drafts_become_known_with_them() -> None:
    pages, tokens = store(8), list(range(3 * PAGE))
    lease = pages.lease(tokens, len(tokens), True)
    assert lease is not None
    lease.publish(tokens, 2 * PAGE, False)
    assert (len(pages.shared(tokens, False)), len(pages.shared(tokens, True))) == (2, 0)
    lease.publish(tokens, PAGE, True)
    assert (len(pages.shared(tokens, False)), len(pages.shared(tokens, True))) == (2, 1)
    lease.publish(tokens, 2 * PAGE + 9, True)
    assert (len(pages.shared(tokens, False)), len(pages.shared(tokens, True))) == (2, 2)
    assert lease.published == 2 * PAGE
    lease.end()
    assert pages.free + pages.idle == 8


def test_a_text_that_never_drafted_leaves_its_pages(tmp_path: Path) -> None:
    lm = mtp_spec.load(tiny.make(tmp_path / "model", "v3").folder, dtype="bfloat16", max_batch=2, measure=False)
    prompt = [(7 * i) % 90 for i in range(PAGE + 20)]
    lm.submit(prompt, max_new_tokens=1, seed=0).result()  # "auto", at its end before a step
    assert [lm.submit([*prompt, 5], max_new_tokens=4, seed=0).result().stats.reused_tokens] == reusable(lm, PAGE)
