"""Several processes that share a model, as torchrun starts them: `python ranks.py OUT JOB` in each."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mtp_spec
from mtp_spec.api import LM
from mtp_spec.backends import open_backend
from mtp_spec.handle import Handle
from mtp_spec.model.cuda.checkpoint import load_device_model
from mtp_spec.model.distributed import store as control
from mtp_spec.model.distributed.group import Ranks
from mtp_spec.model.distributed.joining import join_ranks
from mtp_spec.model.errors import RankError
from mtp_spec.serving import Worker

SUBMIT = Worker.submit
PROMPT = list(range(2, 40))
SHAPES: dict[str, Any] = {
    "plain": None, "chain": 3, "tree": mtp_spec.Speculation(branching=(3, 2, 1)), "auto": "auto",
    "text": mtp_spec.Speculation(2, references=[[7, *PROMPT[:20]]]),
}  # fmt: skip


def texts(lm: mtp_spec.LM, names: Sequence[str] = tuple(SHAPES), tokens: int = 20) -> dict[str, Any]:
    """Returns ids and log-probabilities of shapes of drafts, greedy and sampled, and the sum of all scores."""
    found: dict[str, Any] = {}
    for name in names:
        for temperature in (0.0, 0.9):
            options: dict[str, Any] = {"max_new_tokens": tokens, "temperature": temperature, "seed": 3, "logprobs": 2}
            one = lm.generate(PROMPT, speculation=SHAPES[name], **options)
            found[f"{name} {temperature}"] = [one.token_ids, repr(one.logprobs)]
    found["scores"] = lm.score(PROMPT).logits.double().sum().item()
    return found


def short_text(lm: mtp_spec.LM) -> list[Any]:
    """Returns what the kernels' references, which are slow, write in reasonable time."""
    one = lm.generate(PROMPT[:6], max_new_tokens=3, seed=3, logprobs=2, speculation=2)
    return [one.token_ids, repr(one.logprobs)]


class Deserted(Ranks):
    """A rank where a text fails that others go on with."""

    def first(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def fail_alike(self, where: str, error: BaseException) -> None:
        raise RankError(f"{where}: {error}") from error


class Wishes:
    """A processor that forbids most tokens, and fails at its third if it is to.

    Args:
        fails: whether it does.
    """

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.calls = fails, 0

    def __call__(self, ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.fails and self.calls > 2:
            raise LookupError("a processor's own error")
        return torch.where(torch.arange(len(logits), device=logits.device) < 40, logits, -torch.inf)


def wishes(tokens: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Returns seven prompts, two with a page in common, and options of all kinds."""
    common = {"temperature": 0.9, "logprobs": 2, "seed": 0}
    return [
        (2 * PROMPT, {**common, "max_new_tokens": tokens, "speculation": "auto"}),
        (PROMPT[:5], {**common, "max_new_tokens": 2 * tokens, "speculation": None, "top_p": 0.8}),
        (PROMPT[3:20], {"seed": 0, "max_new_tokens": tokens // 2, "speculation": SHAPES["tree"], "temperature": 0.0}),
        (PROMPT[:1], {**common, "max_new_tokens": tokens, "speculation": 2, "logits_processor": Wishes()}),
        (2 * PROMPT, {**common, "max_new_tokens": tokens, "speculation": "auto", "min_p": 0.01, "seed": 5}),
        (PROMPT[:30], {"seed": 0, "max_new_tokens": 1, "speculation": "auto"}),
        (PROMPT[:9], {**common, "max_new_tokens": tokens, "speculation": 3, "presence_penalty": 1.0}),
    ]


def one_by_one(lm: mtp_spec.LM, tokens: int) -> list[Any]:
    """Returns the texts of `wishes`, each written alone."""
    return [written(lm.generate(prompt, **options)) for prompt, options in wishes(tokens)]


def written(one: mtp_spec.Generation) -> list[Any]:
    return [one.token_ids, repr(one.logprobs), one.finish_reason, one.stats.new_tokens]


def side_by_side(lm: mtp_spec.LM, tokens: int, rank: int) -> dict[str, Any]:
    """Returns the texts of `wishes`, submitted at other moments on each rank, and what became of others."""

    def late(self: Worker, *given: Any) -> list[Handle]:
        time.sleep(0.02 * rank)
        return SUBMIT(self, *given)

    Worker.submit = late  # type: ignore[method-assign, assignment]
    endless = lm.submit(PROMPT[:3], max_new_tokens=3000, logit_bias=no_end(lm), logits_processor=in_no_hurry)
    handles = [lm.submit(prompt, **options) for prompt, options in wishes(tokens)]
    found: dict[str, Any] = {"streams": streams(lm, tokens), "scores": lm.score(PROMPT[:4]).logits.sum().item()}
    failing = lm.submit(PROMPT[:4], max_new_tokens=9, logit_bias=no_end(lm), logits_processor=Wishes(fails=True))
    if rank == 0:
        endless.cancel()
    heard: list[int] = []
    asyncio.run(listen(handles[1], heard))
    found["texts"] = [written(handle.result()) for handle in handles]
    found["heard"] = heard == handles[1].result().token_ids
    found["failing"], found["cancelled"] = said(failing.result), said(endless.result)
    last = lm.submit(PROMPT[:3], max_new_tokens=2)
    last.result()
    found["list"] = [written(one) for one in lm.generate([PROMPT[:4]] * 2, n=2, max_new_tokens=3, seed=0)[1]]
    found["scores alone"] = lm.score(PROMPT[:4]).logits.sum().item()
    lm.close()
    again = lm.submit(PROMPT[:3], max_new_tokens=2, seed=last.result().seed).result()
    found["again"] = again.token_ids == last.result().token_ids
    # drawn once for all ranks
    drawn = [lm.submit(PROMPT[:3], max_new_tokens=2).result(), *lm.generate([PROMPT[:3]] * 2, max_new_tokens=2)]
    found["drawn"] = [[one.seed, one.token_ids] for one in drawn]
    return found


STREAMED, LEFT = (3, 6), 1  # of `wishes`


def streams(lm: mtp_spec.LM, tokens: int) -> list[list[Any]]:
    """Returns two texts whose streams were read in turn, and one of which two tokens were read."""
    some = wishes(tokens)
    both = [lm.stream(some[number][0], **some[number][1]) for number in STREAMED]
    left = lm.stream(some[LEFT][0], **some[LEFT][1])
    while [event for one in both if (event := next(one, None)) is not None]:
        if len(left.result.token_ids) < 2:
            next(left)
    ids, logprobs = left.result.token_ids, left.result.logprobs
    after = lm.stream(PROMPT[:4], after=left, max_new_tokens=2)
    told: list[Any] = [*(written(one.result) for one in both), [ids, repr(logprobs)], said(next, left)]
    return [*told, after.rest().token_ids]


def in_no_hurry(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Lets a text last on a GPU too."""
    time.sleep(0.01)
    return logits


def no_end(lm: mtp_spec.LM) -> dict[int, float]:
    return dict.fromkeys(lm.stop_ids(), -float("inf"))


async def listen(handle: Handle, heard: list[int]) -> None:
    heard += [event.token_id async for event in handle]


def said(call: Callable[..., Any], *given: Any) -> str:
    """Returns the error of a call."""
    try:
        return f"none, but {call(*given)!r}"
    except (Exception, CancelledError) as error:
        return f"{type(error).__name__}: {error}"


def parted(lm: mtp_spec.LM, rank: int) -> dict[str, str]:
    """Returns what is said where ranks are asked for different things, close the model or cancel alone, are
    interrupted, and where a text fails on one."""
    found = dict[str, str]()
    alone = lm.generate(PROMPT[:3], max_new_tokens=9, seed=0).token_ids
    found["prompt"] = said(lm.generate, PROMPT[rank:])
    found["call"] = said(lm.score if rank else lm.generate, PROMPT)
    found["interrupted"] = interrupted(lm)
    for closing in range(2):
        some = [lm.submit(PROMPT[:3], max_new_tokens=9, seed=0, logits_processor=in_no_hurry) for _ in range(2)]
        stream = lm.stream(PROMPT[:3], max_new_tokens=9, seed=0, logits_processor=in_no_hurry)
        if rank == 1 - closing:
            some[0].cancel()
        found[f"cancelled {closing}"] = ended(some[0], alone)
        if rank == 1 - closing:
            lm.close()
        found[f"closed {closing}"] = ended(some[1], alone)
        found[f"stream {closing}"] = said(lambda stream=stream: stream.rest().token_ids == alone)
        found[f"closed alone {closing}"] = said(lm.generate, PROMPT[:3])
        if rank == closing:
            lm.close()
    handles = [lm.submit(PROMPT[:4], max_new_tokens=99, logit_bias=no_end(lm),
                         logits_processor=Wishes(fails=bool(rank and one))) for one in range(2)]  # fmt: skip
    found["failed"], found["beside"] = said(handles[1].result), said(handles[0].result)
    with suppress(mtp_spec.RankError):
        lm.submit([1])
    return found


def ended(handle: Handle, text: list[int]) -> str:
    """Returns what became of a text that would be this one."""
    return said(lambda: handle.result().token_ids == text)


def interrupted(lm: mtp_spec.LM) -> str:
    """Returns what a long text ends with on Ctrl-C, on the first rank last."""
    rank, main = lm.model.ranks.rank, threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.4 - 0.1 * rank, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    try:
        return said(partial(lm.generate, PROMPT[:3], max_new_tokens=3000, logit_bias=no_end(lm),
                            logits_processor=in_no_hurry))  # fmt: skip
    except KeyboardInterrupt:
        return "KeyboardInterrupt"


def start(job: dict[str, Any], count: int, folder: Path, absent: Sequence[int] = ()) -> list[subprocess.Popen[str]]:
    """Starts the processes of a job, but for `absent` ranks; what they find goes to folder/RANK.json.

    Args:
        job: "model": a folder, one for each rank, or None, the bundled one; "device", "dtype"; "patience": seconds;
            "kernels": on the kernels' references;
            "names", "tokens": of `texts`; "batch": tokens of `side_by_side`, which comes after; in place of both
            "forever": texts without end, so many side by side, or "parted".
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in set(range(count)) - set(absent):
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port, "OMP_NUM_THREADS": 1}  # fmt: skip
        command = [sys.executable, "-P", __file__, str(folder / f"{rank}.json"), json.dumps(job)]
        processes.append(subprocess.Popen(
            command, env=os.environ | {name: str(value) for name, value in given.items()}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        ))  # fmt: skip
    return processes


def run(job: dict[str, Any], count: int, folder: Path) -> list[Any]:
    """Returns what every rank found."""
    for process in start(job, count, folder):
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def failures(processes: Sequence[subprocess.Popen[str]], seconds: float) -> list[str]:
    """Returns the last line of what every process that still can says when it fails."""
    said = []
    for process in processes:
        try:
            _, errors = process.communicate(timeout=seconds)
        finally:
            process.kill()
        assert process.returncode
        said.append(errors.strip().splitlines()[-1] if errors.strip() else "")
    return said


def main(out: Path, job: dict[str, Any]) -> None:
    control.PATIENCE = job.get("patience", control.PATIENCE)
    control.SILENCE = job.get("patience", control.SILENCE)
    model = job["model"][int(os.environ["RANK"])] if isinstance(job["model"], list) else job["model"]
    if job.get("kernels"):
        shared = join_ranks("auto", "cpu")
        lm = LM(open_backend(load_device_model(Path(model), "cpu", ranks=shared), None, 200, 3), None, 200, 3)
        found: Any = [short_text(lm), side_by_side(lm, 4, shared.rank)]
        out.write_text(json.dumps(found))
        return
    rank, most = int(os.environ["RANK"]), job.get("forever", 2 if job.get("parted") else 1)
    options = {"dtype": job.get("dtype"), "device": job.get("device", "cpu"), "measure": False}
    lm = mtp_spec.load(model, max_batch=most, **options)
    if job.get("forever"):
        out.write_text("{}")
        while True:
            if most == 1:
                lm.stream(PROMPT, max_new_tokens=100).rest()
            else:
                lm.generate([PROMPT] * most, max_new_tokens=100)
    if job.get("parted"):
        out.write_text(json.dumps(parted(lm, rank)))
        return
    found = texts(lm, job.get("names", tuple(SHAPES)), job.get("tokens", 20))
    if job.get("batch"):
        other = mtp_spec.load(model, max_batch=3, **options)
        found = [found, side_by_side(other, job["batch"], rank)]
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
