"""`bench host`: what the host does for a batch on a GPU, measured without one.

The GPU's backend runs on the CPU with captured work that computes nothing: a step only leaves a record of made-up
tokens, so what is measured is the library's own work for each token and for each text. Launches and copies, which cost
a host with a GPU more, are not in it; `bench batch` measures both together.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from time import process_time
from typing import Any

import numpy as np
import torch

from mtp_spec.api import LM
from mtp_spec.backends import open_backend
from mtp_spec.bench import parsing
from mtp_spec.bench.common import Report, Row
from mtp_spec.bench.options import JSON, Benchmark, Option
from mtp_spec.cuda.backend import DeviceBackend
from mtp_spec.cuda.graphs import Graphs
from mtp_spec.cuda.prefill import Whole
from mtp_spec.cuda.state import MOST
from mtp_spec.cuda.step import Step
from mtp_spec.kernels import commit as commits
from mtp_spec.model.checkpoint.folder import open_checkpoint
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.shapes import model_folder
from mtp_spec.text import Tokenizer

# different records of a step, taken in turn; a text's prompt
RECORDS, PROMPT = 61, 24
WAYS: dict[str, Any] = {"plain": None, "chain of 3": 3, "auto": "auto"}
ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a stop string": {"stop": ["\x00never"]},
    "logprobs": {"logprobs": 1},
}


class Nothing(Graphs):
    """Captured work that computes nothing: steps leave made-up records.

    Args:
        acceptance: probability that a draft is accepted, given that the ones before it were.
        ordinary: tokens that records are made of.
    """

    def __init__(self, acceptance: float, ordinary: list[int]) -> None:
        self._acceptance, self._ordinary = acceptance, np.array(ordinary)
        self._random = np.random.default_rng(0)

    def capture(self, work: Callable[[], None], ran: bool = False) -> Callable[[], None]:
        step = getattr(work, "__self__", None)
        if not isinstance(step, Step):
            return _nothing  # a transition between shapes
        step._outputs = step.ids = step.logits = torch.empty(0)
        records, target = cycle(self._records(step.state.sequences, step.shape.depth)), step.state.record

        def leave() -> None:
            target.copy_(next(records))

        return leave

    def later(self, work: Callable[[], None]) -> Callable[[], None]:
        read = getattr(work, "__self__", None)
        if not isinstance(read, Whole):
            return _nothing
        texts = read.state.sequences
        read.logits = torch.zeros(texts, read.model.config.vocab_size)
        read.record = torch.stack((torch.full((texts,), int(self._ordinary[0])), torch.zeros(texts))).int()
        return _nothing

    def _records(self, texts: int, depth: int) -> list[torch.Tensor]:
        """Returns records of chains of this depth, see `kernels.commit.accept`."""
        held = np.zeros((RECORDS, texts, commits.record_size(MOST)), dtype=np.int32)
        wins = self._random.random((RECORDS, texts, depth)) < self._acceptance
        held[..., commits.COUNT] = 1 + np.cumprod(wins, axis=-1).sum(-1)
        held[..., commits.HEADER : commits.HEADER + MOST] = self._random.choice(self._ordinary, (RECORDS, texts, MOST))
        held[..., commits.HEADER + MOST :] = np.arange(MOST)
        return list(torch.from_numpy(held))


def idle_lm(texts: int, context: int, acceptance: float) -> LM:
    """Returns a model for `texts` texts side by side whose steps compute nothing, with the bundled tokenizer."""
    folder = model_folder()
    tokenizer, config = Tokenizer(folder), open_checkpoint(folder).config
    # as few layers as there can be: zeroing their pages is the GPU's work
    small = replace(config, num_hidden_layers=1, hidden_size=128, kv_lora_rank=32, first_k_dense_replace=1)
    model = DeviceModel(small, "cpu", lambda _: False, torch.bfloat16)
    backend = open_backend(model, tokenizer, context, texts)
    assert isinstance(backend, DeviceBackend)
    ordinary = [token for token in range(small.vocab_size) if not tokenizer.special_text(token)]
    backend.runtime.graphs = Nothing(acceptance, ordinary)
    return LM(backend, tokenizer, context, texts)


def host(args: argparse.Namespace) -> Report:
    """Measures the processor time of `generate(list)` for each token and each text with steps that compute nothing."""
    rows, before = list[Row](), torch.get_num_threads()
    # zeroing pages, the GPU's work, would keep other threads spinning, which counts as the host's time
    torch.set_num_threads(1)
    try:
        for texts in args.sizes:
            lm = idle_lm(texts, PROMPT + args.max_new_tokens, args.acceptance)
            for temperature in args.temperatures:
                for asked, options in ASKED.items():
                    for way, speculation in WAYS.items():
                        given = {**options, "temperature": temperature, "speculation": speculation}
                        rows.append(_row(lm, texts, way, asked, given, args))
            lm.close()
    finally:
        torch.set_num_threads(before)
    return Report(f"The host's microseconds, with steps that compute nothing, best of {args.repeats} batches", rows)


BENCHMARK = Benchmark(
    name="host",
    help="what the host does for each token and text of a batch on a GPU, measured without one",
    run=host,
    options=(
        JSON,
        Option("--sizes", "texts at once (1,8,64)", type=parsing.integers, default=[1, 8, 64], metavar="N,..."),
        Option("--temperatures", "(0,0.8)", type=parsing.numbers, default=[0.0, 0.8], metavar="T,..."),
        Option("--acceptance", "of every draft (0.75)", type=parsing.chance, default=0.75, metavar="P"),
        Option("--repeats", "batches of each kind (5)", type=parsing.count, default=5, metavar="N"),
        Option("--max-new-tokens", "tokens a text (128)", type=parsing.count, default=128, metavar="N"),
    ),
)


def _row(lm: LM, texts: int, way: str, asked: str, options: dict[str, Any], args: argparse.Namespace) -> Row:
    """Returns a row: the time of a text of one token is what a text costs, the rest is that of its other tokens."""
    times, steps = dict[int, list[float]](), 0
    for length in (1, args.max_new_tokens):
        times[length] = []
        for repeat in range(args.repeats + 1):  # the first captures
            prompts = [[3 + (number * 7 + repeat + i) % 500 for i in range(PROMPT)] for number in range(texts)]
            gc.collect()
            start = process_time()
            out = lm.generate(prompts, seed=0, max_new_tokens=length, **options)
            times[length].append(process_time() - start)
        steps = sum(text.stats.steps for text in out)
    short, long = (min(own[1:]) for own in times.values())
    tokens = texts * (args.max_new_tokens - 1)
    return {
        "texts": texts,
        "T": options["temperature"],
        "asked for": asked,
        "way": way,
        "tokens a step": tokens / max(1, steps),
        "us a token": (long - short) / tokens * 1e6,
        "us a step": (long - short) / max(1, steps) * texts * 1e6,
        "us a text": short / texts * 1e6,
    }


def _nothing() -> None:
    pass
