"""Several ranks write what one process writes, read their part of a checkpoint, and none outlives another's end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mtp_spec
import ranks
import small
import tiny
from lms import lm_of
from mtp_spec.cli.main import main
from mtp_spec.cpu.passes import Pass, Passes
from mtp_spec.model.checkpoint.convert import ranks_job
from mtp_spec.model.checkpoint.folder import Checkpoint, load_checkpoint, open_checkpoint, rank_part, save_checkpoint
from mtp_spec.model.checkpoint.jobs import run_job
from mtp_spec.model.cuda.checkpoint import load_device_model
from mtp_spec.model.distributed import store as control
from mtp_spec.model.distributed.group import Ranks
from mtp_spec.model.errors import RankError
from mtp_spec.model.transformer import Transformer
from mtp_spec.serving import Worker

PATIENCE = 4.0
SECONDS = 60


def as_a_rank(work: Callable[[], Any]) -> Any:
    """Returns what one process finds, as ranks would write it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return json.loads(json.dumps(work()))
    finally:
        torch.set_num_threads(threads)


def test_two_ranks_are_one_process_bit_for_bit(fp8: Path, tmp_path: Path) -> None:
    lm = mtp_spec.load(fp8, dtype="bfloat16", measure=False)
    expected, texts = as_a_rank(lambda: [ranks.texts(lm), ranks.one_by_one(lm, 8)])
    assert len({str(expected[f"{name} 0.9"]) for name in ranks.SHAPES}) == 1
    found = ranks.run({"model": str(fp8), "dtype": "bfloat16", "batch": 8}, 2, tmp_path)
    assert [one for one, _ in found] == [expected] * 2
    assert_side_by_side([beside for _, beside in found], texts)


def assert_side_by_side(found: list[dict[str, Any]], texts: list[Any]) -> None:
    """Texts side by side on every rank are those of one process, one by one; see `ranks.side_by_side`."""
    first = found[0]
    for name, value in first.items():
        for rank, one in enumerate(found):
            assert one[name] == value, f"{name} on rank {rank}"
    assert first["texts"] == texts
    *streams, left, closed, after = first["streams"]
    assert streams == [texts[number] for number in ranks.STREAMED]
    assert left[0] == texts[ranks.LEFT][0][:2]
    assert texts[ranks.LEFT][1].startswith(left[1][:-2])
    assert closed.startswith("MTPSpecError: this stream was closed")
    assert len(after) <= 2
    assert first["scores"] == first["scores alone"]
    assert first["heard"]
    assert first["again"]
    assert first["cancelled"].startswith("CancelledError")  # by the first rank
    assert first["failing"] == "LookupError: a processor's own error"


def test_what_one_rank_does_alone_hangs_none(fp8: Path, tmp_path: Path) -> None:
    job = {"model": str(fp8), "dtype": "bfloat16", "parted": True, "patience": PATIENCE}
    assert_parted(*ranks.run(job, 2, tmp_path))


def assert_parted(first: dict[str, str], second: dict[str, str]) -> None:
    """The first rank decides, and what differs or fails is said everywhere; see `ranks.parted`."""
    # the second rank cancels and closes: the first one's texts are written to their ends
    assert first["cancelled 0"] == first["closed 0"] == first["stream 0"] == "none, but True"
    for found, round in ((second, 0), (first, 1), (second, 1)):
        assert found[f"cancelled {round}"].startswith("CancelledError")
        assert found[f"closed {round}"].startswith("CancelledError")
        assert found[f"stream {round}"].startswith("MTPSpecError: this stream was closed")
    for found in (first, second):
        assert found["prompt"].startswith("RankError: ranks differ in prompt: rank 0 has 38 tokens")
        assert found["call"].startswith("RankError: ranks differ in call: rank 0 has text, model 1, closed 0 times, "
                                        "rank 1 has score, model 1, closed 0 times")  # fmt: skip
        assert found["interrupted"] == "KeyboardInterrupt"
        for round, closed in (0, (0, 1)), (1, (2, 1)):
            assert (f"rank 0 has text, model 1, closed {closed[0]} times, rank 1 has text, model 1, closed {closed[1]}"
                    in found[f"closed alone {round}"])  # fmt: skip
        assert found["failed"] == found["beside"] == "RankError: rank 1 of 2 failed: text 1: a processor's own error"


class Leading(Ranks):
    """The second of two ranks, whose first one was asked for one text more."""

    def first(self, values: Sequence[float]) -> list[float]:
        return [values[0] + 1, *values[1:]] if values else []

    def fail_alike(self, where: str, error: BaseException) -> None:
        raise RankError(f"{where}: {error}") from error


def test_a_text_that_one_rank_does_not_begin_ends_the_others(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "PATIENCE", 1.0)
    lm = mtp_spec.load(fp8, measure=False)
    worker = Worker(lm.backend.runner(True), 1, Leading(1, 2))
    (handle,) = worker.submit([lm._sequence(lm._request([1, 2], {"seed": 0}))], lm)
    said = "its worker: a text that rank 0 was asked for did not come here within 0 s"
    with pytest.raises(mtp_spec.RankError, match=said):
        handle.result(SECONDS)
    worker.rest()
    with pytest.raises(mtp_spec.RankError, match=said):
        worker.call(lambda: None)


@pytest.mark.parametrize("call", range(5), ids=["admitted", "read", "drafted", "accepted", "drafted-again"])
def test_a_rank_where_a_text_fails_computes_nothing_more(call: int, fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its passes would have fewer rows than those of the others, who could not tell whose bytes they get."""
    passes, run, calls, computed = list[int](), Passes.run, 0, -1

    def counted(self: Passes, some: Sequence[Pass]) -> None:
        passes.append(len(some))
        run(self, some)

    def fail() -> None:
        nonlocal computed
        computed = len(passes)
        raise LookupError("a processor's own error")

    def fails(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            fail()
        return logits

    monkeypatch.setattr(Passes, "run", counted)
    lm = mtp_spec.load(fp8, measure=False, max_batch=2)
    runner = lm.backend.runner(True)
    if call == 0:
        admit = runner.admit

        def refuses(sequence: Any, running: Sequence[Any]) -> bool:
            if running:
                fail()
            return admit(sequence, running)

        monkeypatch.setattr(runner, "admit", refuses)
    worker = Worker(runner, 2, ranks.Deserted(1, 2))
    options: list[dict[str, Any]] = [{"speculation": 2}, {"speculation": 1, "logits_processor": fails}]
    handles = worker.submit([lm._sequence(lm._request([1, 2, 3], {"seed": 0, **one})) for one in options], lm)
    for handle in handles:
        with pytest.raises(mtp_spec.RankError, match="text 1: a processor's own error"):
            handle.result(SECONDS)
    worker.rest()
    assert computed == len(passes)


@pytest.fixture(scope="module")
def three_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of three blocks of 128 channels, of which one rank has one and the other two."""
    folder = tmp_path_factory.mktemp("blocks")
    config = replace(small.CONFIG, hidden_size=384, num_hidden_layers=2)
    wide = load_checkpoint(small.make(folder / "bf16", config), dtype=torch.bfloat16)
    save_checkpoint(wide, folder / "fp8", fp8=True)
    return folder / "fp8"


def test_two_ranks_on_the_kernels_references(three_blocks: Path, tmp_path: Path) -> None:
    lm = lm_of(load_device_model(three_blocks, "cpu"), None, 200)
    expected, texts = as_a_rank(lambda: [ranks.short_text(lm), ranks.one_by_one(lm, 4)])
    found = ranks.run({"model": str(three_blocks), "kernels": True}, 2, tmp_path)
    assert [one for one, _ in found] == [expected] * 2
    assert_side_by_side([beside for _, beside in found], texts)


def test_a_rank_of_the_kernels_reads_whole_blocks(three_blocks: Path) -> None:
    whole = load_device_model(three_blocks, "cpu").checkpoint_slots()
    for rank in range(2):
        part = load_device_model(three_blocks, "cpu", ranks=Ranks(rank, 2)).checkpoint_slots()
        for name, slot in part.items():
            wanted = whole[name]
            for dimension in range(slot.ndim):
                most, count = wanted.shape[dimension], slot.shape[dimension]
                wanted = wanted.narrow(dimension, rank * (most - count), count)
            assert torch.equal(slot.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)), name


def test_fewer_blocks_than_ranks_are_refused(fp8: Path) -> None:
    with pytest.raises(mtp_spec.CheckpointError, match="hidden_size 256: fewer blocks of 128 than 4 ranks"):
        load_device_model(fp8, "cpu", ranks=Ranks(0, 4))


def test_four_ranks_with_a_head_each(tmp_path: Path) -> None:
    tiny.make(tmp_path / "model", "v3_two_modules")
    few: dict[str, Any] = {"names": ["plain", "tree"], "tokens": 8}
    lm = mtp_spec.load(tmp_path / "model", dtype="bfloat16", measure=False)
    expected = as_a_rank(lambda: ranks.texts(lm, **few))
    assert ranks.run({"model": str(tmp_path / "model"), "dtype": "bfloat16", **few}, 4, tmp_path) == [expected] * 4


def bytes_of(checkpoint: Checkpoint) -> int:
    return sum(info.bytes for info in checkpoint.tensors.values())


@pytest.mark.parametrize(("kind", "files"), [("whole blocks", 0), ("whole blocks", 2), ("odd", 0), ("wide", 4)])
def test_a_rank_reads_its_part(kind: str, files: int, fp8: Path, tmp_path: Path) -> None:
    folder = fp8
    if kind != "whole blocks":
        folder = tiny.make(tmp_path / "wide").folder
    if kind == "odd":  # 48 channels in blocks of 128: a rank's rows begin within a block
        save_checkpoint(load_checkpoint(folder, dtype=torch.float32), tmp_path / "odd", fp8=True)
        folder = tmp_path / "odd"
    if files:
        run_job(ranks_job(folder, files), tmp_path / "ranks")
        folder = tmp_path / "ranks"
    opened = open_checkpoint(folder)
    whole = load_checkpoint(opened, dtype=torch.float32).checkpoint_slots()
    for rank in range(2):
        mine = Ranks(rank, 2)
        part = load_checkpoint(opened, dtype=torch.float32, ranks=mine).checkpoint_slots()
        assert bytes_of(rank_part(opened, part, mine)) < 0.75 * bytes_of(opened)
        experts = {name.split(".experts.")[1].split(".")[0] for name in part if ".experts." in name}
        assert experts == {str(e) for e in range(4 * rank, 4 * rank + 4)}
        for name, slot in part.items():
            expected = whole[name]
            if slot.shape != expected.shape:
                expected = expected.chunk(2)[rank]
            assert torch.equal(slot, expected), name


def test_ranks_that_do_not_divide_the_model() -> None:
    with pytest.raises(mtp_spec.CheckpointError, match="num_attention_heads 4 cannot be divided among 3 ranks"):
        Transformer(small.CONFIG, torch.bfloat16, "meta", Ranks(0, 3))
    with pytest.raises(mtp_spec.CheckpointError, match="parallel=2"):
        mtp_spec.load(parallel=2)


def test_an_error_without_words_is_heard_all_the_same() -> None:
    said = []

    class Facts:
        def exchange(self, value: Any) -> list[Any]:
            said.append(value)
            return [value, ""]

    with pytest.raises(LookupError), Ranks(0, 2, None, Facts()).together():
        raise LookupError
    assert said == [{"failed": "LookupError"}]


def test_a_killed_rank_ends_the_other(fp8: Path, tmp_path: Path) -> None:
    processes = ranks.start({"model": str(fp8), "forever": 2}, 2, tmp_path)
    wait_for(tmp_path / "0.json", tmp_path / "1.json")
    processes[1].kill()
    said = ranks.failures(processes[:1], SECONDS)[0]
    processes[1].communicate()
    assert "RankError: rank 0 of 2 lost the others: one of them ended" in said


def test_a_rank_that_stops_answering_ends_the_other(fp8: Path, tmp_path: Path) -> None:
    processes = ranks.start({"model": str(fp8), "forever": 1, "patience": PATIENCE}, 2, tmp_path)
    wait_for(tmp_path / "0.json", tmp_path / "1.json")
    processes[1].send_signal(signal.SIGSTOP)
    try:
        said = ranks.failures(processes[:1], SECONDS)[0]
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert "rank 0 of 2 lost the others" in said or "rank 1 of 2 gave no sign of life" in said


def wait_for(*files: Path) -> None:
    end = time.monotonic() + SECONDS
    while not all(file.exists() for file in files):
        assert time.monotonic() < end
        time.sleep(0.1)
    time.sleep(1.0)  # texts are being written


def test_other_weights_of_the_same_shape_are_refused_everywhere(fp8: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in fp8.iterdir():
        (other / file.name).symlink_to(file)
    name = next(file for file in sorted(other.glob("*.safetensors")) if "model.norm.weight" in load_file(file))
    changed = load_file(name) | {"model.norm.weight": load_file(name)["model.norm.weight"] * 2}
    name.unlink()
    save_file(changed, name)
    for said in ranks.failures(ranks.start({"model": [str(fp8), str(other)]}, 2, tmp_path), SECONDS):
        assert "RankError: ranks differ in weights: rank 0 has" in said


def test_what_one_rank_cannot_read_ends_all(fp8: Path, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    first, second = ranks.failures(ranks.start({"model": [str(fp8), nowhere]}, 2, tmp_path), SECONDS)
    assert f"RankError: rank 1 of 2 failed: {nowhere} does not exist" in first
    assert f"CheckpointError: {nowhere} does not exist" in second


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_never_comes(absent: int, fp8: Path, tmp_path: Path) -> None:
    started = ranks.start({"model": str(fp8), "patience": PATIENCE}, 2, tmp_path, absent=[absent])
    (said,) = ranks.failures(started, SECONDS)
    assert f"RankError: rank {1 - absent} of 2 found not all others at 127.0.0.1:" in said


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the rank among the processes of Linux")
def test_a_rank_killed_under_torchrun(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mtp_spec", "generate", "--raw", "Once",
               "--max-new-tokens", "2000", "--no-speculation", "--temperature", "2"]  # fmt: skip
    run = subprocess.Popen(
        [sys.executable, "-P", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.stdout is not None
    run.stdout.read(1)
    for folder in Path("/proc").glob("[0-9]*"):
        stat, environment = folder / "stat", folder / "environ"
        if stat.read_text().rsplit(")", 1)[1].split()[1] == str(run.pid) and b"\0RANK=1\0" in environment.read_bytes():
            os.kill(int(folder.name), signal.SIGKILL)
    _, errors = run.communicate(timeout=SECONDS)
    assert "mtp-spec: rank 0 of 2 lost the others" in errors or "mtp-spec: told to stop" in errors, errors


def test_torchrun_with_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Tell me about a fox\nTell me about rain\nAnd the sea?\n")
    command = ["generate", "--input-file", str(prompts), "--max-new-tokens", "8", "--depth", "2", "--max-batch", "2",
               "--json", "--seed", "0"]  # fmt: skip
    start = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mtp_spec"]
    two = subprocess.run([*start, *command], capture_output=True, text=True, timeout=180, cwd=tmp_path,
                         env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)  # fmt: skip
    assert two.returncode == 0, two.stderr
    one = as_a_rank(lambda: [main(command), capsys.readouterr().out][1])
    found, expected = ([json.loads(line) for line in lines.splitlines()] for lines in (two.stdout, one))
    assert [one["prompt"] for one in expected] == prompts.read_text().splitlines()
    for mine, alone in zip(found, expected, strict=True):
        assert {**mine, "stats": None} == {**alone, "stats": None}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_texts_of_two_gpus_are_those_of_one(tmp_path: Path) -> None:
    lm = mtp_spec.load(device="cuda", measure=False)
    expected, texts = as_a_rank(lambda: [ranks.texts(lm), ranks.one_by_one(lm, 40)])
    found = ranks.run({"model": None, "device": "cuda", "batch": 40}, 2, tmp_path)
    assert [one for one, _ in found] == [expected] * 2
    assert_side_by_side([beside for _, beside in found], texts)
    job = {"model": None, "device": "cuda", "parted": True, "patience": 20.0}
    assert_parted(*ranks.run(job, 2, tmp_path))
