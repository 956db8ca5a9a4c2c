"""`bench prefill` on a CPU: how long a prompt takes on a model's folder, beside transformers on the same weights.

Every prompt is new, of random tokens, so nothing is shared with an earlier one and experts are chosen independently.
transformers' part is one forward pass that fills its cache and computes the last row's logits; ours is the whole of
`generate` with one new token. The MTP module reads a prompt when the first draft is made: "with the MTP module" ends
there, after the first token.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

import mtp_spec
from mtp_spec.acceptance.accept import Accepted
from mtp_spec.api import LM
from mtp_spec.bench.common import Report, Row, average, publish, spread
from mtp_spec.bench.peer import transformers_copy
from mtp_spec.errors import MTPSpecError, OptionError
from mtp_spec.sampling.sampler import History
from mtp_spec.tree import TokenTree

DRAFTED = 3  # new tokens with which the first step drafts: the prompt's own, and two that are left
TOKENS = [128, 512, 1024, 2045]  # the bundled model takes 2,048 with the new ones
PLAIN, MODULE = "plain", "with the MTP module"
SAME = 0.5  # least share of first tokens that float32 gives alike: rounding may move some, another model moves all


class Taken(NamedTuple):
    """A prompt: its first token, seconds by the clock and of the processor."""

    token: int
    seconds: float
    cpu: float


Way = Callable[[list[int]], Taken]


def cpu_prompts(args: argparse.Namespace) -> None:
    """Times prompts, every way in turn, and publishes the report."""
    before, rows, facts, notes = torch.get_num_threads(), list[Row](), dict[str, Any](), list[str]()
    try:
        with tempfile.TemporaryDirectory(prefix="mtp_spec.") as folder:
            lm = mtp_spec.load(args.model, device="cpu", measure=False)
            most = lm.max_context - (DRAFTED if lm.model.mtp else 1)
            if max(args.tokens) > most:
                raise OptionError(
                    f"--tokens {max(args.tokens)}: the model takes {lm.max_context} tokens with the new ones: give "
                    f"{most} at most"
                )
            ways, peers = _ways(lm, args, Path(folder))
            for threads in args.threads or [before]:
                torch.set_num_threads(threads)
                for tokens in args.tokens:
                    taken = _in_turn(ways, lm.config.vocab_size, tokens, args.repeats, f"{threads} threads")
                    part = _table(taken, peers, tokens, threads)
                    rows += part
                    facts[f"seconds, {threads} threads, {tokens} tokens"] = {
                        name: [one.seconds for one in found] for name, found in taken.items()
                    }
                    notes += [_note(part)] if peers else []
    finally:
        torch.set_num_threads(before)
    title = f"Prompts to their first token, median of {args.repeats} of each length"
    publish(Report(title, rows, facts, notes=notes), lm, args)


def _ways(lm: LM, args: argparse.Namespace, folder: Path) -> tuple[dict[str, Way], list[str]]:
    """Returns every way, and the names of those of transformers."""
    ways = {PLAIN: _ours(lm, None)} | ({MODULE: _ours(lm, 1)} if lm.model.mtp else {})
    if not args.transformers:
        return ways, []
    loaded = transformers_copy(lm, folder, args)
    peers = {
        f"transformers, {str(dtype).removeprefix('torch.')}": _theirs(loaded(dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    return ways | peers, list(peers)


class _FirstDraft:
    """Notes when the first draft's row is there; see `mtp_spec.sequence.Observer`."""

    seconds = cpu = 0.0

    def drafted(self, parent: int, row: Tensor) -> None:
        self.seconds, self.cpu = self.seconds or time.perf_counter(), self.cpu or time.process_time()

    def pruned(self, kept: list[int]) -> None:
        """Does nothing."""

    def verified(self, tree: TokenTree, logits: Tensor, history: History, accepted: Accepted) -> None:
        """Does nothing."""


def _ours(lm: LM, speculation: int | None) -> Way:
    new = 1 if speculation is None else DRAFTED
    options: dict[str, Any] = {"max_new_tokens": new, "temperature": 0.0, "seed": 0, "ignore_eos": True}

    def read(ids: list[int]) -> Taken:
        # the two ways begin with other tokens: what one has cached would spare the other the prompt
        given = ids if speculation is None else [(ids[0] + 1) % lm.config.vocab_size, *ids[1:]]
        drafted = _FirstDraft()
        start, used = time.perf_counter(), time.process_time()
        events = lm.stream(given, speculation=speculation, observer=drafted, **options)
        token, seconds, cpu = next(events).token_id, time.perf_counter(), time.process_time()
        if speculation is not None:
            next(events)
            seconds, cpu = drafted.seconds, drafted.cpu
        events.close()
        return Taken(token, seconds - start, cpu - used)

    return read


def _theirs(model: Any) -> Way:
    def read(ids: list[int]) -> Taken:
        start, used = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            token = int(model(torch.tensor([ids]), logits_to_keep=1, use_cache=True).logits[0, -1].argmax())
        return Taken(token, time.perf_counter() - start, time.process_time() - used)

    return read


def _in_turn(ways: dict[str, Way], vocab: int, tokens: int, repeats: int, title: str) -> dict[str, list[Taken]]:
    """Returns what each way took for the same prompts; the first prompt warms up, and the first way changes."""
    generator, names = torch.Generator().manual_seed(tokens), list(ways)
    taken: dict[str, list[Taken]] = {name: [] for name in names}
    for number in track(range(repeats + 1), f"{title}, {tokens} tokens", transient=True):
        ids: list[int] = torch.randint(vocab, (tokens,), generator=generator).tolist()
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found = ways[name](ids)
            if number:
                taken[name].append(found)
    return taken


def _table(taken: dict[str, list[Taken]], peers: list[str], tokens: int, threads: int) -> list[Row]:
    """Returns the rows; ratios are medians over prompts, to the faster of transformers' types.

    Raises:
        MTPSpecError: transformers computes another model.
    """
    best = min(peers, key=lambda name: spread([one.seconds for one in taken[name]])[0], default=None)
    for name in peers[:1]:
        same = average([float(a.token == b.token) for a, b in zip(taken[name], taken[PLAIN], strict=True)])
        if same < SAME:
            raise MTPSpecError(
                f"{name}: {same:.0%} of first tokens are ours, at least {SAME:.0%} are expected: it computes another "
                "model, and its times mean nothing"
            )
    rows = list[Row]()
    for name, found in taken.items():
        seconds = spread([one.seconds for one in found])[0]
        row: Row = {
            "threads": threads,
            "tokens": tokens,
            "way": name,
            "ms": 1e3 * seconds,
            "tokens/s": tokens / seconds,
        }
        if best is not None:
            over = spread([theirs.seconds / own.seconds for theirs, own in zip(taken[best], found, strict=True)])
            used = spread([theirs.cpu / own.cpu for theirs, own in zip(taken[best], found, strict=True)])
            row["times transformers"], row["quartiles"] = over[0], f"{over[1]:.2f}-{over[2]:.2f}"
            row["by CPU time"] = used[0]
        rows.append(row)
    return rows


def _note(rows: list[Row]) -> str:
    ratios = ", ".join(f"{row['way']} {row['times transformers']:.2f}" for row in rows if "transf" not in row["way"])
    return f"{rows[0]['threads']} threads, {rows[0]['tokens']} tokens, times transformers: {ratios}"
