"""What stops in the middle: an interrupt at any step of writing, a disk that fills, a file that was cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mtp_spec
import small
from mtp_spec.model.checkpoint import writer as assembly
from mtp_spec.model.checkpoint.cast import cast_job
from mtp_spec.model.checkpoint.convert import hf_job, ranks_job
from mtp_spec.model.checkpoint.folder import save_checkpoint
from mtp_spec.model.checkpoint.jobs import Job, run_job
from mtp_spec.model.config import load_config
from mtp_spec.model.files import tensors as stored
from mtp_spec.model.files.tensors import read_header
from mtp_spec.model.transformer import Transformer

MOMENTS = 14  # of a run, from its first write to its last, at which it is stopped


class Stopped(BaseException):
    """Stands for whatever ends a process."""


class Steps:
    """Counts what a run asks of the system, and stops it at one of these calls, before or after it is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: float = float("inf"), after: bool = False) -> None:
        self.done, self.stop, self.after = 0, stop, after
        monkeypatch.setattr(assembly, "pwrite", self.counted(os.pwrite))
        monkeypatch.setattr(os, "open", self.counted(os.open))
        monkeypatch.setattr(os, "fsync", self.counted(lambda descriptor: None))  # the disk itself does not fail here
        for name in ("rename", "unlink", "mkdir"):
            monkeypatch.setattr(Path, name, self.counted(getattr(Path, name)))

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            self.done += 1
            if self.done < self.stop:
                return call(*args, **options)
            if self.done == self.stop and self.after:
                call(*args, **options)
            raise Stopped  # and nothing that comes later is done

        return step


JOBS: dict[str, Callable[[Path, Path], Job]] = {
    "convert": lambda fp8, two: ranks_job(fp8, 2),
    "back": lambda fp8, two: hf_job(two),
    "cast": lambda fp8, two: cast_job(fp8, "bf16"),
}


@pytest.mark.parametrize("kind", sorted(JOBS))
def test_stopped_at_any_step_it_is_whole_or_not_there_and_goes_on(
    kind: str, fp8: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, whole = JOBS[kind](fp8, two), tmp_path / "whole"
    with monkeypatch.context() as patch:
        count = Steps(patch)
        run_job(job, whole, workers=1)
    expected, names = small.tensors(whole), sorted(file.name for file in whole.iterdir())
    last = range(count.done - 10, count.done + 1)  # giving names is the delicate part
    moments = sorted({*range(1, count.done, count.done // MOMENTS), *last})
    for moment in moments:
        out = tmp_path / f"out{moment}"
        with monkeypatch.context() as patch:
            Steps(patch, moment, after=moment % 2 == 0)
            with pytest.raises(Stopped):
                run_job(job, out, workers=1)
        if not out.exists():
            part = out.with_name(out.name + ".part")
            if part.exists() and not (part / "config.json").exists():
                with pytest.raises(mtp_spec.CheckpointError, match=r"no config\.json"):
                    mtp_spec.load(part)
            run_job(job, out, workers=1)
        found = sorted(file.name for file in out.iterdir() if file.name != assembly.JOURNAL)
        assert found == names
        assert small.same(small.tensors(out), expected)
        assert assembly.wrong_checksums(out) == []
        shutil.rmtree(out)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 4 MB, where the system lets a test have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_really_fills(
    disk: Path, fp8: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, out = ranks_job(fp8, 2), disk / "out"
    assert job.bytes > 5e6
    with pytest.raises(mtp_spec.CheckpointError, match=r"needs .* GB more"):
        run_job(job, out)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:  # another program fills it after the check
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
        with pytest.raises(mtp_spec.CheckpointError, match="no space is left"):
            run_job(job, out)
    assert not out.exists()
    with pytest.raises(mtp_spec.CheckpointError, match=r"no config\.json"):
        mtp_spec.load(disk / "out.part")
    subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
    run_job(job, out)
    assert small.same(small.tensors(out), small.tensors(two))


def test_a_saved_model_is_whole_or_not_there(fp8: Path, disk: Path) -> None:
    model = Transformer(load_config(fp8), mtp_spec.load_checks.DTYPES["float32"])
    with pytest.raises(Exception, match="No space left"):
        save_checkpoint(model, disk / "model", max_shard_bytes=2**20)
    assert list(disk.iterdir()) == []


LIMITED = """
import resource, sys
from mtp_spec.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
main(["convert", *sys.argv[1:], "--model-parallel", "2"])
"""


def test_a_quota_on_files_ends_with_one_line(fp8: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", LIMITED, str(fp8), str(tmp_path / "out")], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "writing" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["Hugging Face", "per rank"])
def test_a_file_cut_anywhere_is_refused(kind: str, fp8: Path, two: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(fp8 if kind == "Hugging Face" else two, tmp_path / "copy"))
    file = sorted(copy.glob("*.safetensors"))[0]
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (0, 4, 8, header - 1, header, header + 100, len(whole) // 2, len(whole) - 1):
        os.truncate(file, size)
        for read in (mtp_spec.load, lambda folder: ranks_job(folder, 1)):
            with pytest.raises(mtp_spec.CheckpointError, match=f"{file.name} is truncated"):
                read(copy)
        file.write_bytes(whole)
    assert mtp_spec.load(copy, measure=False)


def test_a_shard_cut_while_the_model_is_loaded(fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(fp8, tmp_path / "copy"))
    last = sorted(copy.glob("*.safetensors"))[-1]
    monkeypatch.setattr(stored, "READERS", 1)

    def cut(done: int, total: int) -> None:
        if last.stat().st_size > 100:
            os.truncate(last, len(read_header(last)))

    with pytest.raises(mtp_spec.CheckpointError, match="ended early"):
        mtp_spec.load(copy, progress=cut)


LOADING = """
import os, sys, time
from mtp_spec.model.cpu import checkpoint as cpu_checkpoint
from mtp_spec.model.files import tensors as stored
def slowly(read):
    def slow(*what):
        os.write(1, b"reading\\n")  # at once: several threads are here, and print writes a line in two parts
        time.sleep(0.4)
        return read(*what)
    return slow
stored.read_tensor = slowly(stored.read_tensor)  # by torch
cpu_checkpoint.read_part = slowly(stored.read_part)  # onto the engine
from mtp_spec.cli.main import main
main(["generate", "--model", sys.argv[1], "--raw", "x"])
"""


def test_an_interrupt_while_a_model_is_loaded(fp8: Path) -> None:
    process = subprocess.Popen([sys.executable, "-P", "-c", LOADING, str(fp8)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    errors = process.communicate()[1]
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert time.monotonic() - begin < 30  # it does not read the rest first
