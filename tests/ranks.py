"""Several processes that share a model, as torchrun starts them: `python ranks.py OUT JOB` in each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mtp_spec
from mtp_spec.api import LM
from mtp_spec.model import control
from mtp_spec.model.device_checkpoint import load_device_model
from mtp_spec.model.joining import join_ranks

PROMPT = list(range(2, 40))
SHAPES: dict[str, Any] = {
    "plain": None, "chain": 3, "tree": mtp_spec.Speculation(branching=(3, 2, 1)), "auto": "auto",
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


def start(job: dict[str, Any], count: int, folder: Path, absent: Sequence[int] = ()) -> list[subprocess.Popen[str]]:
    """Starts the processes of a job, but for `absent` ranks; what they find goes to folder/RANK.json.

    Args:
        job: "model": a folder, or one for each rank; "kernels": on the kernels' references; "patience": seconds;
            "forever": texts without end; "names", "tokens": of `texts`.
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


def run(job: dict[str, Any], count: int, folder: Path) -> list[dict[str, Any]]:
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
    model = job["model"] if isinstance(job["model"], str) else job["model"][int(os.environ["RANK"])]
    if job.get("kernels"):
        shared = join_ranks("auto", "cpu")
        lm = LM(load_device_model(Path(model), "cpu", ranks=shared), None, "batched", 200)
        out.write_text(json.dumps(short_text(lm)))
        return
    lm = mtp_spec.load(model, dtype=job.get("dtype"), measure=False)
    if job.get("forever"):
        out.write_text("{}")
        while True:
            lm.generate(PROMPT, max_new_tokens=100)
    out.write_text(json.dumps(texts(lm, job.get("names", tuple(SHAPES)), job.get("tokens", 20))))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
