"""Texts to train on: formats, duplicates, what is held out, and what a crash leaves."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import os
from pathlib import Path

import pytest

import mtp_spec
import worded
from mtp_spec.errors import MTPSpecError, OptionError
from mtp_spec.training.batches import Batches
from mtp_spec.training.options import TrainOptions
from mtp_spec.training.run import held_prompts
from mtp_spec.training.texts import INDEX, Corpus, check_file, domain_of, prompt_of, read_lines, text_of


@pytest.fixture(scope="module")
def demo() -> mtp_spec.LM:
    return mtp_spec.load(measure=False)


def test_only_answers_of_a_chat_count(demo: mtp_spec.LM) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"},
                {"role": "user", "content": "More"}, {"role": "assistant", "content": "No"}]  # fmt: skip
    ids, spans = text_of(demo, {"messages": messages}, "here")
    pieces = [demo.decode(ids[begin:end]) for begin, end in spans]
    assert pieces == ["Hello there", "No"]
    assert all(ids[end - 1] in demo.stop_ids() for _, end in spans)  # ends are learnt, too
    prompt = prompt_of(demo, {"messages": messages}, "here")
    assert prompt == ids[: spans[1][0]]
    assert prompt_of(demo, {"prompt": "Hi"}, "here") == ids[: spans[0][0]]
    assert text_of(demo, {"messages": messages[:1]}, "here")[1] == []


def test_a_prompt_is_measured_once(tmp_path: Path) -> None:
    """In the domain that the file of held-out prompts names, though a text of no domain begins like it."""
    corpus = Corpus(tmp_path / "texts", 0.0)
    corpus.add("held_out", 0, [1, 2, 3, 4], [(3, 4)], "poem")
    corpus.add("texts", 0, [1, 2, 3, 5], [(3, 4)], "all")
    corpus.add("texts", 1, [1, 2, 4, 5], [(3, 4)], "all")
    options = TrainOptions(texts=Path(__file__), check_tokens=8)
    assert held_prompts(corpus, options) == {"poem": [[1, 2, 3]]}
    corpus.close()


def test_every_token_of_plain_text_counts_but_the_first(demo: mtp_spec.LM) -> None:
    ids, spans = text_of(demo, {"text": "Once upon a time"}, "here")
    assert spans == [(1, len(ids))]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"content": "x"}, r'line 3 has no "prompt" or "messages", .*: its keys are \'content\''),
        ({"prompt": 3}, 'has no "prompt" or "messages", a text or a list of messages: "prompt" is 3$'),
        ({"messages": []}, r'has no "prompt" or "messages", .*: "messages" is \[\]$'),
        ({"messages": ["x"]}, r'has no "prompt" or "messages", .*: "messages" is \[.x.\]$'),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "none of its messages is the user's"),
        ({"messages": [{"role": "nobody", "content": "x"}, {"role": "user", "content": "x"}]}, "roles are system"),
    ],
)
def test_lines_without_a_prompt_are_refused(demo: mtp_spec.LM, entry: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        prompt_of(demo, entry, "questions.jsonl, line 3")


def test_a_text_that_is_no_unicode_is_named_by_its_line(demo: mtp_spec.LM) -> None:
    for read, kind in ((text_of, "text"), (prompt_of, "prompt")):
        with pytest.raises(OptionError, match=r"texts\.jsonl, line 3: .*surrogates"):
            read(demo, {kind: "\ud800"}, "texts.jsonl, line 3")


def test_a_domain_is_one_line_of_a_table() -> None:
    assert domain_of({"domain": " a|b \n c"}) == "a/b c"
    assert domain_of({"domain": " ", "category": "d"}) == "d"
    assert domain_of({"domain": "\n"}) == "all"


def test_files_are_read_packed_or_not(tmp_path: Path) -> None:
    lines = '{"text": "a"}\n\n{"text": "b"}\n'
    (tmp_path / "x.jsonl").write_text(lines)
    (tmp_path / "marked.jsonl").write_text(lines, encoding="utf-8-sig")  # with a byte order mark
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "x.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    for file in sorted(tmp_path.iterdir()):
        assert list(read_lines(file)) == [(0, {"text": "a"}), (2, {"text": "b"})]
        assert list(read_lines(file, 1)) == [(2, {"text": "b"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n[1]\n', "line 2, cannot be read"),
        (b'{"text": "a"}\n{"text"', "line 2, cannot be read"),
        (b'{"text": 3}\n', 'line 1 has no "text" or "messages"'),
        (b"", "is empty"),
        (b'{"text": "a"}\n\xff\xfe', r"x\.jsonl cannot be read"),
        (b"[" * 100_000, "line 1, cannot be read"),
    ],
)
def test_files_are_checked_before_work_starts(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(OptionError, match=message):
        check_file(tmp_path / "x.jsonl", ["text"])
    packed = gzip.compress(b'{"text": "a"}\n')
    for torn in (packed[:-9], packed[:10] + b"\xff" * 20):
        (tmp_path / "x.jsonl.gz").write_bytes(torn)
        with pytest.raises(OptionError, match="cannot be read"):
            check_file(tmp_path / "x.jsonl.gz", ["text"])


def fill(corpus: Corpus, entries: list[tuple[list[int], int, str]]) -> None:
    for line, (ids, prompt, domain) in enumerate(entries):
        corpus.add("texts", line, ids, [(prompt, len(ids))], domain)


ENTRIES = [([domain, prompt, answer, line % 7, 9, 9], 2, "ab"[domain])
           for line, (domain, prompt, answer) in
           enumerate((d, p, a) for a in range(3) for p in range(20) for d in range(2))]  # fmt: skip


def test_no_prompt_is_in_both_parts_and_every_domain_has_its_share(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path / "texts", 0.25)
    fill(corpus, ENTRIES)
    prompts: dict[bool, set[tuple[int, ...]]] = {True: set(), False: set()}
    for text in corpus.texts:
        prompts[text.held].add(tuple(corpus.ids(text)[: text.prompt]))
    assert not prompts[True] & prompts[False]
    assert sorted(domain for domain, _ in prompts[True]) == [0] * 5 + [1] * 5
    assert len(prompts[False]) == 30


@pytest.mark.parametrize(("share", "held"), [(0.05, [0, 20, 40]), (0.3, [0, 3, 6, 10]), (0.4, [0, 2, 5, 7, 10])])
def test_a_share_is_kept_that_is_no_whole_fraction(tmp_path: Path, share: float, held: list[int]) -> None:
    corpus = Corpus(tmp_path / "texts", share)
    fill(corpus, [([number, 1, 2], 2, "a") for number in range(50)])
    assert [line for line, text in enumerate(corpus.texts) if text.held][: len(held)] == held
    assert sum(text.held for text in corpus.texts) == math.ceil(50 * share)


def test_texts_that_occur_again_are_left_out(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path / "texts", 0.25)
    fill(corpus, ENTRIES + ENTRIES)
    assert len(corpus.texts) == len(ENTRIES)
    assert corpus.left_out == len(ENTRIES)
    assert corpus.tokens == sum(len(ids) for ids, _, _ in ENTRIES)


@pytest.mark.parametrize("kept", [0, 1, 17, 61])
def test_what_a_crash_leaves_goes_on_to_the_same(tmp_path: Path, kept: int) -> None:
    """A line that was being written is dropped, and ids without a line too."""
    whole = Corpus(tmp_path / "whole", 0.25)
    fill(whole, ENTRIES)
    part = Corpus(tmp_path / "part", 0.25)
    fill(part, ENTRIES[:kept])
    part.close()
    with (tmp_path / "part" / INDEX).open("a") as file:
        file.write('{"source": "texts", "sta')
    with (tmp_path / "part" / "ids.bin").open("ab") as file:
        file.write(b"123456789")
    again = Corpus(tmp_path / "part", 0.25)
    assert len(again.texts) == kept
    for line, (ids, prompt, domain) in enumerate(ENTRIES):
        if line >= again.next_line("texts"):
            again.add("texts", line, ids, [(prompt, len(ids))], domain)
    assert again.texts == whole.texts
    assert [again.ids(text).tolist() for text in again.texts] == [whole.ids(text).tolist() for text in whole.texts]
    assert (tmp_path / "part" / INDEX).read_bytes() == (tmp_path / "whole" / INDEX).read_bytes()


def test_lost_ids_are_not_taken_as_zeros(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path / "texts", 0.25)
    fill(corpus, ENTRIES)
    corpus.close()
    os.truncate(tmp_path / "texts" / "ids.bin", 4 * corpus.tokens - 1)
    with pytest.raises(MTPSpecError, match=f"has {4 * corpus.tokens - 1} bytes of {4 * corpus.tokens}: delete"):
        Corpus(tmp_path / "texts", 0.25)


def test_each_pass_takes_every_text_once_in_batches_of_like_lengths(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path / "texts", 0.0)
    fill(corpus, [([number] * (2 + number % 50), 1, "a") for number in range(200)])
    numbers = list(range(0, 200, 2))
    batches = Batches(corpus, numbers, 120, seed=4)
    step = 0
    orders = []
    for epoch in range(3):
        taken = [batches.of(step + at) for at in range(batches.count(epoch))]
        step += batches.count(epoch)
        assert sorted(number for batch in taken for number in batch) == numbers
        for batch in taken:
            assert max(corpus.texts[number].length for number in batch) * len(batch) <= 120
        orders.append(taken)
    assert orders[0] != orders[1]
    again = Batches(corpus, numbers, 120, seed=4)
    assert again.of(step - 1) == orders[2][-1]  # of the step's number alone
    assert again.of(0) == orders[0][0]
    assert Batches(corpus, numbers, 120, seed=5).of(0) != orders[0][0]


def test_index_is_lines_of_json(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path / "texts", 0.5)
    worded.lines(tmp_path / "x.jsonl", [{"text": "w2 w3"}])
    fill(corpus, ENTRIES[:2])
    corpus.close()
    lines = [json.loads(line) for line in (tmp_path / "texts" / INDEX).read_text().splitlines()]
    assert [line["held"] for line in lines] == [True, True]  # the first of each domain
