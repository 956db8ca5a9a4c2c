"""Fills a corpus from a file of texts, or from prompts that the model answers itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

from mtp_spec.api import LM
from mtp_spec.errors import OptionError
from mtp_spec.model.checkpoint.writer import write_file
from mtp_spec.training.options import TrainOptions
from mtp_spec.training.texts import HELD, Corpus, Span, domain_of, prompt_of, read_lines, text_of

COMPLETE = "complete.json"
AT_ONCE = 4  # so many batches of prompts are answered before their texts are written down
SAID_SECONDS = 10.0
Say = Callable[[str], None]
Line = tuple[int, list[int], list[Span], str]  # number, ids, what counts, domain


def collect(lm: LM, options: TrainOptions, folder: Path, say: Say) -> Corpus:
    """Returns the corpus in `folder`, filled as far as it was not before.

    Raises:
        OptionError: nothing is left to train on or to measure on.
    """
    held = options.held_out if isinstance(options.held_out, Path) else None
    corpus = Corpus(folder, 0.0 if isinstance(options.held_out, Path) else options.held_out)
    if (folder / COMPLETE).is_file():
        return corpus
    start, said = perf_counter(), perf_counter()
    # what is held out comes first, so that its prompts are not trained on
    for source, file in ((HELD, held), ("texts", options.texts), ("prompts", options.prompts)):
        if file is None:
            continue
        for number, ids, spans, domain in _lines(lm, options, source, file, corpus.next_line(source)):
            corpus.add(source, number, ids, spans, domain)
            if perf_counter() - said > SAID_SECONDS:
                said = perf_counter()
                say(f"texts: {len(corpus.texts):,}, {corpus.tokens:,} tokens, {said - start:.0f} s")
    trained = [text for text in corpus.texts if not text.held]
    if not trained:
        few = f"all {len(corpus.texts)} are held out" if corpus.texts else "none has a token to learn"
        raise OptionError(f"{options.texts or options.prompts} leaves no text to train on: {few}; give more or others")
    if len(trained) == len(corpus.texts):
        way = f"a larger share than {options.held_out}" if held is None else f"other texts than those of {held}"
        raise OptionError(f"no text is held out, so nothing could be measured: give held_out={way}")
    write_file(folder / COMPLETE, json.dumps({"left out": corpus.left_out}).encode())
    return corpus


def _lines(lm: LM, options: TrainOptions, source: str, file: Path, first: int) -> Iterator[Line]:
    """Yields what a file's lines from `first` on give; prompts are answered some batches at a time."""
    waiting: list[tuple[int, list[int], str]] = []
    for number, entry in read_lines(file, first):
        where, domain = f"{file}, line {number + 1}", domain_of(entry)
        if source == "prompts" or (source == HELD and not _has_answer(entry)):
            ids = prompt_of(lm, entry, where)
            if len(ids) < options.max_tokens:
                waiting.append((number, ids, domain))
            if len(waiting) >= AT_ONCE * options.batch:
                yield from _answered(lm, options, waiting)
                waiting.clear()
            continue
        ids, spans = text_of(lm, entry, where)
        if isinstance(entry.get("text"), str):
            for begin in range(0, len(ids), options.max_tokens):
                piece = ids[begin : begin + options.max_tokens]
                if len(piece) > 1:
                    yield number, piece, [(1, len(piece))], domain
            continue
        spans = [(begin, min(end, options.max_tokens)) for begin, end in spans if begin < options.max_tokens]
        if spans:
            yield number, ids[: options.max_tokens], spans, domain
    yield from _answered(lm, options, waiting)


def _answered(lm: LM, options: TrainOptions, prompts: list[tuple[int, list[int], str]]) -> Iterator[Line]:
    """Yields prompts with the model's answers; each has the seed and temperature of its line."""
    handles = []
    for number, ids, _ in prompts:
        temperature = options.temperatures[number % len(options.temperatures)]
        room = min(options.answer_tokens, options.max_tokens - len(ids))
        handles.append(lm.submit(ids, max_new_tokens=room, temperature=temperature, seed=options.seed + number))
    own = None if lm.tokenizer is None else lm.tokenizer.eos_id
    end = [min(lm.stop_ids()) if own is None else own] if lm.stop_ids() else []
    for handle, (number, ids, domain) in zip(handles, prompts, strict=True):
        answer = handle.result()
        # an answer's ids do not contain the token that ended it, but drafts should learn to end, too
        ended = end if answer.finish_reason == "stop" and len(ids) + len(answer.token_ids) < options.max_tokens else []
        whole = [*ids, *answer.token_ids, *ended]
        if len(whole) > len(ids):
            yield number, whole, [(len(ids), len(whole))], domain


def _has_answer(entry: dict[str, Any]) -> bool:
    messages = entry.get("messages")
    roles = [message.get("role") for message in messages] if isinstance(messages, list) else []
    return isinstance(entry.get("text"), str) or "assistant" in roles
