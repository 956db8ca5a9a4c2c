"""Fills a corpus from a file of texts, or from prompts that the model answers itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

from mtp_spec.api import LM
from mtp_spec.errors import OptionError
from mtp_spec.training.options import TrainOptions
from mtp_spec.training.texts import Corpus, Span, domain_of, prompt_of, read_lines, text_of

COMPLETE = "complete.json"
AT_ONCE = 4  # so many batches of prompts are answered before their texts are written down
SAID_SECONDS = 10.0
Say = Callable[[str], None]


def collect(lm: LM, options: TrainOptions, folder: Path, say: Say) -> Corpus:
    """Returns the corpus in `folder`, filled as far as it was not before.

    Raises:
        OptionError: a line has no text or prompt, or nothing is left to train on or to measure on.
    """
    by_file = isinstance(options.held_out, Path)
    corpus = Corpus(folder, 0.0 if isinstance(options.held_out, Path) else options.held_out)
    if (folder / COMPLETE).is_file():
        return corpus
    start, said = perf_counter(), perf_counter()
    held = [text for text in corpus.texts if text.line < 0]
    if isinstance(options.held_out, Path):  # first, so that their prompts are not trained on; lines count downwards
        for number, entry in read_lines(options.held_out, len(held)):
            ids, spans = _held_text(lm, entry, f"{options.held_out}, line {number + 1}", options)
            if spans:
                corpus.add(-1 - number, ids, spans, domain_of(entry), True)
    source = _texts(lm, options, corpus) if options.texts else _answers(lm, options, corpus)
    for number, ids, spans, domain in source:
        corpus.add(number, ids, spans, domain)
        if perf_counter() - said > SAID_SECONDS:
            said = perf_counter()
            say(f"texts: {len(corpus.texts):,}, {corpus.tokens:,} tokens, {said - start:.0f} s")
    trained = [text for text in corpus.texts if not text.held]
    if not trained:
        raise OptionError(f"{options.texts or options.prompts} leaves no text to train on")
    if len(trained) == len(corpus.texts):
        way = "the file named by held_out has none" if by_file else "a larger share for held_out, or more prompts"
        raise OptionError(f"no text is held out, so nothing could be measured: {way}")
    (folder / COMPLETE).write_text(json.dumps({"texts": len(corpus.texts), "tokens": corpus.tokens}))
    return corpus


def _held_text(lm: LM, entry: dict[str, Any], where: str, options: TrainOptions) -> tuple[list[int], list[Span]]:
    """Returns a held-out text; a prompt alone gets an answer by the model."""
    if isinstance(entry.get("text"), str) or _has_answer(entry):
        return _cut(*text_of(lm, entry, where), options.max_tokens)
    ids = prompt_of(lm, entry, where)
    room = min(options.max_tokens - len(ids), options.answer_tokens)
    if room < 1:
        return ids, []
    whole = [*ids, *lm.generate(ids, max_new_tokens=room, temperature=0.0, seed=options.seed).token_ids]
    return whole, [(len(ids), len(whole))]


def _has_answer(entry: dict[str, Any]) -> bool:
    messages = entry.get("messages")
    return isinstance(messages, list) and any(
        isinstance(message, dict) and message.get("role") == "assistant" for message in messages
    )


def _texts(lm: LM, options: TrainOptions, corpus: Corpus) -> Iterator[tuple[int, list[int], list[Span], str]]:
    assert options.texts is not None
    for number, entry in read_lines(options.texts, max(0, corpus.next_line)):
        where = f"{options.texts}, line {number + 1}"
        ids, spans = text_of(lm, entry, where)
        if isinstance(entry.get("text"), str):
            for first in range(0, len(ids), options.max_tokens):
                piece = ids[first : first + options.max_tokens]
                if len(piece) > 1:
                    yield number, piece, [(1, len(piece))], domain_of(entry)
        else:
            ids, spans = _cut(ids, spans, options.max_tokens)
            if spans:
                yield number, ids, spans, domain_of(entry)


def _cut(ids: list[int], spans: list[Span], most: int) -> tuple[list[int], list[Span]]:
    ids = ids[:most]
    return ids, [(begin, min(end, len(ids))) for begin, end in spans if begin < len(ids)]


def _answers(lm: LM, options: TrainOptions, corpus: Corpus) -> Iterator[tuple[int, list[int], list[Span], str]]:
    """Yields prompts with the model's answers, some batches at a time; each has its own seed and temperature."""
    assert options.prompts is not None
    waiting: list[tuple[int, list[int], str]] = []

    def answered() -> Iterator[tuple[int, list[int], list[Span], str]]:
        handles = []
        for number, ids, _ in waiting:
            temperature = options.temperatures[number % len(options.temperatures)]
            room = min(options.answer_tokens, options.max_tokens - len(ids))
            handles.append(lm.submit(ids, max_new_tokens=room, temperature=temperature, seed=options.seed + number))
        for handle, (number, ids, domain) in zip(handles, waiting, strict=True):
            whole = [*ids, *handle.result().token_ids]
            yield number, whole, [(len(ids), len(whole))], domain
        waiting.clear()

    for number, entry in read_lines(options.prompts, max(0, corpus.next_line)):
        ids = prompt_of(lm, entry, f"{options.prompts}, line {number + 1}")
        if len(ids) < options.max_tokens:
            waiting.append((number, ids, domain_of(entry)))
        if len(waiting) >= AT_ONCE * options.batch:
            yield from answered()
    yield from answered()
