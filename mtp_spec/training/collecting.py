"""Fills a corpus from a file of texts, or from prompts that the model answers itself."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError  # not the builtin before Python 3.11
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

from mtp_spec.api import LM
from mtp_spec.errors import OptionError
from mtp_spec.handle import Handle
from mtp_spec.model.checkpoint.writer import write_file
from mtp_spec.training.options import MOST_SEED, TrainOptions
from mtp_spec.training.texts import ANSWERS, HELD, Corpus, Span, domain_of, prompt_of, read_lines, text_of

COMPLETE = "complete.json"
AT_ONCE = 4  # batches of prompts that are underway: a text that takes long does not keep the others waiting
SAID_SECONDS = 10.0
Say = Callable[[str], None]
Tell = Callable[[], None]  # says how far it is, now and then
Line = tuple[int, list[int], list[Span], str]  # number, ids or none, what counts, domain


def collect(lm: LM, options: TrainOptions, folder: Path, say: Say) -> Corpus:
    """Returns the corpus in `folder`, filled as far as it was not before.

    Raises:
        OptionError: nothing is left to train on or to measure on.
    """
    held = options.held_out if isinstance(options.held_out, Path) else None
    corpus = Corpus(folder, 0.0 if isinstance(options.held_out, Path) else options.held_out)
    if (folder / COMPLETE).is_file():
        return corpus
    start, nothing = (said := perf_counter()), 0

    def tell() -> None:
        nonlocal said
        if perf_counter() - said > SAID_SECONDS:
            said = perf_counter()
            say(f"texts: {len(corpus.texts):,}, {corpus.tokens:,} tokens, {said - start:.0f} s")

    # what is held out comes first, so that its prompts are not trained on
    for source, file in ((HELD, held), ("texts", options.texts), (ANSWERS, options.prompts)):
        if file is None:
            continue
        for number, ids, spans, domain in _lines(lm, options, source, file, corpus.next_line(source), tell):
            if ids:
                corpus.add(source, number, ids, spans, domain)
            else:
                nothing += 1
            tell()
    why = f"a prompt that leaves no room in max_tokens={options.max_tokens}, or nothing to learn"
    if nothing and corpus.texts:
        say(f"{nothing:,} {'line has' if nothing == 1 else 'lines have'} {why}: left out")
    trained = [text for text in corpus.texts if not text.held]
    if not trained:
        few = f"all {len(corpus.texts)} are held out" if corpus.texts else f"each line has {why}"
        raise OptionError(f"{options.texts or options.prompts} leaves no text to train on: {few}; give more or others")
    if len(trained) == len(corpus.texts):
        way = f"a larger share than {options.held_out}" if held is None else f"other texts than those of {held}"
        raise OptionError(f"no text is held out, so nothing could be measured: give held_out={way}")
    write_file(folder / COMPLETE, json.dumps({"left out": corpus.left_out}).encode())
    return corpus


def _lines(lm: LM, options: TrainOptions, source: str, file: Path, first: int, tell: Tell) -> Iterator[Line]:
    """Yields what a file's lines from `first` on give, no ids for a line that gives nothing."""
    lines = read_lines(file, first)
    if source == "texts":
        for number, entry in lines:
            yield from _pieces(options, number, entry, *text_of(lm, entry, f"{file}, line {number + 1}"))
        return
    answers = _Answers(lm, options, tell)
    for number, entry in lines:
        where = f"{file}, line {number + 1}"
        if source == ANSWERS or not _has_answer(entry):
            ids = prompt_of(lm, entry, where)
            if len(ids) < options.max_tokens:
                yield from answers.to(number, ids, domain_of(entry))
            else:
                yield number, [], [], ""
        else:
            yield from answers.rest()
            yield from _pieces(options, number, entry, *text_of(lm, entry, where))
    yield from answers.rest()


def _pieces(
    options: TrainOptions, number: int, entry: dict[str, Any], ids: list[int], spans: list[Span]
) -> Iterator[Line]:
    """Yields a text, cut into pieces if it is plain, or else cut off; no ids if nothing of it can be learned."""
    domain = domain_of(entry)
    if isinstance(entry.get("text"), str) and spans:
        for begin in range(0, len(ids), options.max_tokens):
            piece = ids[begin : begin + options.max_tokens]
            if len(piece) > 1:
                yield number, piece, [(1, len(piece))], domain
        return
    spans = [(begin, min(end, options.max_tokens)) for begin, end in spans if begin < options.max_tokens]
    if spans:
        yield number, ids[: options.max_tokens], spans, domain
    else:
        yield number, [], [], domain


class _Answers:
    """Prompts with the model's answers, in the prompts' order; each has the seed and temperature of its line."""

    def __init__(self, lm: LM, options: TrainOptions, tell: Tell) -> None:
        self._lm, self._options, self._tell = lm, options, tell
        self._waiting = deque[tuple[Handle, int, list[int], str]]()

    def to(self, number: int, ids: list[int], domain: str) -> Iterator[Line]:
        """Submits a prompt; yields answers to earlier ones once enough are underway to keep the batch full."""
        options = self._options
        temperature = options.temperatures[number % len(options.temperatures)]
        room = min(options.answer_tokens, options.max_tokens - len(ids))
        seed = (options.seed + number) % (MOST_SEED + 1)
        handle = self._lm.submit(ids, max_new_tokens=room, temperature=temperature, seed=seed)
        self._waiting.append((handle, number, ids, domain))
        if len(self._waiting) > AT_ONCE * options.batch:
            yield from self._next()

    def rest(self) -> Iterator[Line]:
        """Yields the answers that are underway."""
        while self._waiting:
            yield from self._next()

    def _next(self) -> Iterator[Line]:
        handle, number, ids, domain = self._waiting.popleft()
        while not handle.done():  # the first ones take long: work is compiled
            with suppress(TimeoutError):
                handle.result(1.0)
            self._tell()
        answer, lm = handle.result(), self._lm
        own = None if lm.tokenizer is None else lm.tokenizer.eos_id
        end = [min(lm.stop_ids()) if own is None else own] if lm.stop_ids() else []
        # an answer's ids do not contain the token that ended it, but drafts should learn to end, too
        room = len(ids) + len(answer.token_ids) < self._options.max_tokens
        whole = [*ids, *answer.token_ids, *(end if answer.finish_reason == "stop" and room else [])]
        answered = len(whole) > len(ids)
        yield number, whole if answered else [], [(len(ids), len(whole))], domain


def _has_answer(entry: dict[str, Any]) -> bool:
    messages = entry.get("messages")
    roles = [message.get("role") for message in messages] if isinstance(messages, list) else []
    return isinstance(entry.get("text"), str) or "assistant" in roles
