"""Plain steps compared with llama.cpp: a published shape with random weights, ours in FP8, theirs in Q8_0.

GGUF's weights are the same numbers, rounded once more, so both choose the same experts except in near ties, and their
logits must agree, which is checked first. Both process the same random ids after the same context.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from statistics import median

import torch

import mtp_spec
from mtp_spec.bench.common import Report, Row, spread
from mtp_spec.bench.cpu import SHARD_BYTES, check_room, pass_bytes
from mtp_spec.bench.peers.process import Peer
from mtp_spec.bench.synthetic import outputs, synthetic_job, with_module
from mtp_spec.errors import OptionError
from mtp_spec.model.cache import LatentCache
from mtp_spec.model.checkpoint.jobs import run_job
from mtp_spec.model.config import ModelConfig, load_config
from mtp_spec.model.cpu.model import CPUModel

SHAPE = "GigaChat3-10B-A1.8B"
STEPS = 8  # of each library before the other's turn
WARM = 4  # untimed steps before each turn, which refill the caches after the other library's turn
PAUSE = 0.1  # seconds between turns, so that the other's threads are asleep
AGREE = 0.98  # least correlation of logits that counts as the same model
Q8_0 = 34 / 32  # bytes per number
Steps = dict[str, list[float]]  # wall-clock "seconds" and processor time "cpu" of each step
OURS, THEIRS = "mtp_spec plain, FP8", "llama.cpp, Q8_0"


def published_config() -> ModelConfig:
    return with_module(load_config(Path(str(files("mtp_spec.configs") / f"{SHAPE}.json"))))


def shape(args: argparse.Namespace) -> ModelConfig:
    """Returns the model: the published one with fewer routed experts, but as many chosen for each token.

    Raises:
        OptionError: there are fewer experts than are chosen, or too little memory or disk for both models.
    """
    full = published_config()
    if not full.num_experts_per_tok <= args.experts <= full.n_routed_experts:
        raise OptionError(f"--experts {args.experts}: {full.num_experts_per_tok} to {full.n_routed_experts}")
    config = replace(full, n_routed_experts=args.experts)
    size = sum(output.bytes for output in outputs(config))
    check_room("the pair of models", size * (1 + Q8_0), args.folder, "fewer --experts, or another --folder")
    return config


def steps(args: argparse.Namespace) -> Report:
    """Writes both models, times steps of each in turn, deletes the models."""
    config, python = shape(args), args.llama_python
    folder = Path(tempfile.mkdtemp(prefix="mtp_spec.", dir=args.folder))
    try:
        run_job(synthetic_job(config, SHARD_BYTES), folder / "model")
        file = str(folder / "model.gguf")
        with Peer(python, "gguf_worker.py", {"folder": str(folder / "model"), "file": file}, {}) as writer:
            written = writer.facts
        tokens = args.context + args.rounds * (STEPS + WARM)
        lm = mtp_spec.load(folder / "model", max_context=tokens, measure=False)
        model = lm.model
        if not isinstance(model, CPUModel):
            raise OptionError("bench cpu-peers: models do not run on the CPU engine here, see mtp-spec inspect")
        asked = {
            "file": file,
            "context": -(-tokens // 256) * 256,
            "threads": max(args.threads),
            "repack": args.llama_repack,
        }
        with Peer(python, "llama_worker.py", asked, {}) as peer:
            return _measured(model, peer, args, written)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measured(model: CPUModel, peer: Peer, args: argparse.Namespace, written: Row) -> Report:
    config = model.config
    read = {OURS: pass_bytes(model, "1 row", _hits(config)), THEIRS: written["read a token"]}
    rows = list[Row]()
    facts: Row = {"llama.cpp": peer.facts, "gguf": written, "config": config.to_hf_dict()}
    every = published_config().n_routed_experts
    notes = [
        f"{SHAPE}'s shapes, {config.num_hidden_layers} layers, {config.n_routed_experts} of its {every} experts "
        f"a layer, {config.num_experts_per_tok} chosen, random weights; "
        f"{args.context} tokens of context; {peer.facts['llama-cpp-python']} of llama-cpp-python"
    ]
    before = torch.get_num_threads()
    try:
        for threads in args.threads:
            torch.set_num_threads(threads)
            taken, same = _turns(model, peer, args, threads)
            facts[f"seconds a step and of the processor, {threads} threads"] = taken
            facts[f"correlation of logits, {threads} threads"] = same
            rows += table(taken, read, threads)
            notes.append(f"{threads} threads: the logits after the context correlate by {same:.4f}")
    finally:
        torch.set_num_threads(before)
    return Report("Plain steps beside llama.cpp", rows, facts, notes=notes)


def _hits(config: ModelConfig) -> float:
    """Returns the number of experts that one token reads."""
    return (config.num_hidden_layers - config.first_k_dense_replace) * config.num_experts_per_tok


def table(taken: dict[str, list[Steps]], read: dict[str, float], threads: int) -> list[Row]:
    """Returns the rows: medians, over rounds, of the ratio of each round's median step.

    With one thread, processor time is the measure that a shared machine disturbs least: a thread that waits for its
    turn uses none. With several threads it includes waiting for the other threads, if a library spins.
    """
    rows = list[Row]()
    for name in (OURS, THEIRS):
        seconds, cpu = (
            spread(
                [
                    median(theirs[what]) / median(own[what])
                    for theirs, own in zip(taken[THEIRS], taken[name], strict=True)
                ]
            )
            for what in ("seconds", "cpu")
        )
        pace = median(median(round["seconds"]) for round in taken[name])
        rows.append(
            {
                "threads": threads,
                "way": name,
                "tokens/s": 1 / pace,
                "times llama.cpp": seconds[0],
                "quartiles": f"{seconds[1]:.2f}-{seconds[2]:.2f}",
                "by CPU time": cpu[0],
                "its quartiles": f"{cpu[1]:.2f}-{cpu[2]:.2f}",
                "GB read a token": read[name] / 1e9,
                "GB/s": read[name] / pace / 1e9,
            }
        )
    return rows


def _turns(model: CPUModel, peer: Peer, args: argparse.Namespace, threads: int) -> tuple[dict[str, list[Steps]], float]:
    """Returns the times of every step by round, and the correlation of the logits after the context."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size

    def ids(count: int) -> list[int]:
        drawn: list[int] = torch.randint(vocabulary, (count,), generator=generator).tolist()
        return drawn

    context = ids(args.context)
    cache = model.new_cache(args.context + args.rounds * (STEPS + WARM))
    own = model.logits(model.rows(context, cache, range(-1, len(context) - 1)))[-1]
    cache.commit(range(len(context)))
    theirs = torch.tensor(peer.ask(begin=context, threads=threads)["logits"])
    same = float(torch.corrcoef(torch.stack([own.float(), theirs]))[0, 1])
    if not same >= AGREE:
        raise mtp_spec.MTPSpecError(
            f"llama.cpp's logits correlate with ours by {same:.3f} only: not the same model, so the times mean nothing"
        )
    taken: dict[str, list[Steps]] = {OURS: [], THEIRS: []}
    for number in range(args.rounds):
        now = ids(STEPS + WARM)
        for name in (OURS, THEIRS) if number % 2 else (THEIRS, OURS):
            time.sleep(PAUSE)
            found = _own_steps(model, cache, now) if name == OURS else peer.ask(steps=now)
            taken[name].append({what: found[what][WARM:] for what in ("seconds", "cpu")})
    return taken, same


def _own_steps(model: CPUModel, cache: LatentCache, ids: list[int]) -> Steps:
    """Returns wall-clock and processor time of each step, logits included."""
    seconds, cpu = [], []
    for one in ids:
        start, used = time.perf_counter(), time.process_time()
        model.logits(model.rows([one], cache, [-1]))
        cache.commit([0])
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    return {"seconds": seconds, "cpu": cpu}
