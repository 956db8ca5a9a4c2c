"""DeepSeek's per-rank files: names and shares, the way back bit for bit, loading, and writing whole or nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mtp_spec
import small
import tiny
from mtp_spec.cli.main import main
from mtp_spec.model.checkpoint import writer as assembly
from mtp_spec.model.checkpoint.convert import hf_job, model_args, ranks_job
from mtp_spec.model.checkpoint.folder import load_checkpoint, open_checkpoint
from mtp_spec.model.checkpoint.jobs import run_job
from mtp_spec.model.checkpoint.writer import wrong_checksums
from mtp_spec.model.config import load_config
from mtp_spec.model.files.deepseek import hf_name, place
from places import CONFIGS

# the table of DeepSeek-V3's inference/convert.py: Hugging Face's key -> its name and divided axis
THEIRS: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("embed", 0), "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None), "q_proj": ("wq", 0), "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None), "q_b_proj": ("wq_b", 0), "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None), "kv_b_proj": ("wkv_b", 0), "o_proj": ("wo", 1), "gate": ("gate", None),
    "gate_proj": ("w1", 0), "down_proj": ("w2", 1), "up_proj": ("w3", 0), "norm": ("norm", None),
    "lm_head": ("head", 0),
}  # fmt: skip


def deepseeks(tensors: dict[str, Tensor], experts: int, ranks: int, first_mtp: int) -> list[dict[str, Tensor]]:
    """Returns what DeepSeek's program would write: its loop, with its renaming by `str.replace`."""
    out: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for hf, tensor in tensors.items():
        if f"model.layers.{first_mtp}" in hf:
            continue
        name = hf.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
        name = name.replace("weight_scale_inv", "scale").replace("e_score_correction_bias", "bias")
        key = name.split(".")[-2]
        new, axis = THEIRS[key]
        name = name.replace(key, new)
        for rank in range(ranks):
            if "experts" in name and "shared_experts" not in name:
                if int(name.split(".")[-3]) // (experts // ranks) == rank:
                    out[rank][name] = tensor
            elif axis is None:
                out[rank][name] = tensor
            else:
                out[rank][name] = tensor.chunk(ranks, axis)[rank].contiguous()
    return out


def test_files_are_those_of_deepseeks_program(fp8: Path, two: Path) -> None:
    expected = deepseeks(small.tensors(fp8), 8, 2, 3)
    for rank in range(2):
        assert small.same(load_file(two / f"model{rank}-mp2.safetensors"), expected[rank])


def test_the_mtp_layer_lies_beside(two: Path) -> None:
    held = load_file(two / "mtp1-mp2.safetensors")
    assert {name.split(".")[1] for name in held} == {"3"}
    for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "attn.wq_b.scale"):
        assert f"layers.3.{name}" in held
    assert held["layers.3.attn.wo.weight"].shape == (256, 128)


@pytest.mark.parametrize("ranks", [1, 2])
def test_there_and_back_bit_for_bit(fp8: Path, tmp_path: Path, ranks: int) -> None:
    main(["convert", "--hf-ckpt-path", str(fp8), "--save-path", str(tmp_path / "ranks"), "--model-parallel", str(ranks),
          "--n-experts", "8"])  # fmt: skip
    main(["convert", str(tmp_path / "ranks"), str(tmp_path / "back"), "--to-hf"])
    assert small.same(small.tensors(fp8), small.tensors(tmp_path / "back"))
    for name in (*small.SMALL_FILES, "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (fp8 / name).read_bytes()
    for name in ("ranks", "back"):
        assert wrong_checksums(tmp_path / name) == []


def test_ranks_of_one_number_become_those_of_another(fp8: Path, two: Path, tmp_path: Path) -> None:
    run_job(ranks_job(two, 1), tmp_path / "one")
    run_job(hf_job(tmp_path / "one", shard_bytes=2**20), tmp_path / "back")
    assert small.same(small.tensors(fp8), small.tensors(tmp_path / "back"))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("kind", sorted(tiny.KINDS))
def test_every_kind_of_model_keeps_its_names(tmp_path: Path, kind: str) -> None:
    folder = tiny.make(tmp_path / "model", kind).folder
    run_job(ranks_job(folder, 4), tmp_path / "ranks")
    run_job(hf_job(tmp_path / "ranks"), tmp_path / "back")
    assert small.same(small.tensors(folder), small.tensors(tmp_path / "back"))
    for name in small.tensors(folder):
        assert hf_name(place(name).name) == name


def weights(folder: Path, config: Path | None = None) -> dict[str, Tensor]:
    """Returns the weights of the model that a folder loads as."""
    return load_checkpoint(open_checkpoint(folder, config), dtype=torch.bfloat16).checkpoint_slots()


def test_converted_folders_load(fp8: Path, two: Path, tmp_path: Path) -> None:
    expected = weights(fp8)
    assert small.same(expected, weights(two))
    theirs, args = tmp_path / "theirs", two / "model_args.json"
    theirs.mkdir()  # DeepSeek's program leaves no config.json and no MTP layer
    for rank in range(2):
        shutil.copy(two / f"model{rank}-mp2.safetensors", theirs)
    with pytest.raises(mtp_spec.CheckpointError, match=r"no config\.json"):
        mtp_spec.load(theirs)
    assert small.same({n: t for n, t in expected.items() if ".layers.3." not in n}, weights(theirs, args))
    shutil.copy(two / "mtp0-mp2.safetensors", theirs)
    with pytest.raises(mtp_spec.CheckpointError, match=r"lacks mtp1-mp2\.safetensors"):
        mtp_spec.load(theirs, config=args)
    shutil.copy(two / "mtp1-mp2.safetensors", theirs)
    assert small.same(expected, weights(theirs, args))
    lm = mtp_spec.load(theirs, config=args)
    assert lm.generate([5, 7, 200], max_new_tokens=4, speculation=2, seed=0).stats.drafted > 0
    with pytest.raises(mtp_spec.OptionError, match="needs a path"):
        mtp_spec.load(config=args)


@pytest.mark.parametrize("name", ["16B", "236B", "671B", "v3.1"])
def test_model_args_say_what_deepseeks_files_say(name: str) -> None:
    file = CONFIGS / f"config_{name}.json"
    given = json.loads(file.read_text())
    args = model_args(load_config(file), given.get("scale_fmt"))
    assert args is not None
    assert given.items() <= args.items()


def refuses(message: str, job: Callable[[], Any], target: Path) -> None:
    with pytest.raises(mtp_spec.CheckpointError, match=message):
        run_job(job(), target)
    assert not target.exists()


def test_refusals_come_before_work_starts(fp8: Path, two: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuses("n-experts 16: config.json says 8", lambda: ranks_job(fp8, 2, n_experts=16), out)
    refuses("n_routed_experts 8 is no multiple", lambda: ranks_job(fp8, 3), out)
    refuses("whole blocks of 128", lambda: ranks_job(fp8, 4), out)
    refuses("model-parallel 0", lambda: ranks_job(fp8, 0), out)
    refuses("no model0-mp", lambda: hf_job(fp8), out)
    shutil.copytree(two, tmp_path / "copy")
    (tmp_path / "copy" / "model1-mp2.safetensors").unlink()
    refuses(r"lacks model1-mp2\.safetensors", lambda: hf_job(tmp_path / "copy"), out)
    shutil.copy(two / "model0-mp2.safetensors", tmp_path / "copy" / "model0-mp1.safetensors")
    refuses("1 and 2 ranks", lambda: hf_job(tmp_path / "copy"), out)
    assert not list(tmp_path.glob("out*"))


def test_ranks_that_disagree_are_refused(two: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(two, tmp_path / "copy"))
    held = load_file(copy / "model1-mp2.safetensors")
    held["layers.1.ffn.gate.bias"][3] += 1
    save_file(held, copy / "model1-mp2.safetensors")
    refuses("another .*gate.e_score_correction_bias than rank 0", lambda: hf_job(copy), tmp_path / "out")
    del held["layers.1.attn.wq_b.weight"]
    save_file(held, copy / "model1-mp2.safetensors")
    refuses("in 1 of 2 ranks", lambda: hf_job(copy), tmp_path / "out")


# whole or nothing


class FullAfter:
    """Stands for `os.pwrite` on a disk that is full after so many writes."""

    def __init__(self, writes: int) -> None:
        self.left, self.done = writes, 0

    def __call__(self, descriptor: int, data: Any, start: int) -> int:
        if self.left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left, self.done = self.left - 1, self.done + 1
        return os.pwrite(descriptor, data, start)


def limited(monkeypatch: pytest.MonkeyPatch, writes: int) -> FullAfter:
    disk = FullAfter(writes)
    monkeypatch.setattr(assembly, "pwrite", disk)
    return disk


@pytest.mark.parametrize("writes", [0, 3, 60])
def test_a_full_disk_leaves_nothing_that_loads_and_the_rest_goes_on(
    fp8: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    limited(monkeypatch, writes)
    refuses("no space is left .* run the same command again", lambda: ranks_job(fp8, 2), tmp_path / "out")
    with pytest.raises(mtp_spec.CheckpointError, match=r"no config\.json"):
        mtp_spec.load(tmp_path / "out.part")
    again = limited(monkeypatch, 10**9)
    run_job(ranks_job(fp8, 2), tmp_path / "out")
    whole = limited(monkeypatch, 10**9)
    run_job(ranks_job(fp8, 2), tmp_path / "other")
    # a worker's tensor may have been cut and is written again
    assert whole.done - writes <= again.done <= whole.done + 2 * 4
    assert small.same(small.tensors(tmp_path / "out"), small.tensors(two))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in two.iterdir())


def test_what_was_damaged_meanwhile_is_written_again(
    fp8: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, 60)
    refuses("no space is left", lambda: ranks_job(fp8, 2), tmp_path / "out")
    file = tmp_path / "out.part" / "model0-mp2.safetensors.part"
    file.write_bytes(file.read_bytes()[:5000])
    journal = tmp_path / "out.part" / assembly.JOURNAL
    journal.write_bytes(journal.read_bytes()[:-7])
    monkeypatch.undo()
    run_job(ranks_job(fp8, 2), tmp_path / "out")
    assert small.same(small.tensors(tmp_path / "out"), small.tensors(two))


def test_parts_of_another_run_are_refused(fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 20)
    refuses("no space is left", lambda: ranks_job(fp8, 2), tmp_path / "out")
    monkeypatch.undo()
    refuses("holds parts of another run", lambda: ranks_job(fp8, 1), tmp_path / "out")
    source = Path(shutil.copytree(fp8, tmp_path / "copy"))
    refuses("holds parts of another run", lambda: ranks_job(source, 2), tmp_path / "out")


def test_a_disk_too_small_is_refused_before_work_starts(
    fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    disk = limited(monkeypatch, 10**9)
    refuses("needs .* GB more and 0.000 GB are free", lambda: ranks_job(fp8, 1), tmp_path / "out")
    assert disk.done == 2  # the headers


def test_two_runs_do_not_write_one_folder(fp8: Path, tmp_path: Path) -> None:
    job = ranks_job(fp8, 1)
    with assembly.Assembly(tmp_path / "out", job.outputs, job.identity()):
        refuses("another run writes", lambda: job, tmp_path / "out")


def test_existing_folders_are_not_touched(fp8: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(mtp_spec.CheckpointError, match="nothing is overwritten"):
        run_job(ranks_job(fp8, 1), tmp_path / "out")


def test_a_source_cut_while_it_is_read(fp8: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(fp8, tmp_path / "copy"))
    job = ranks_job(source, 1)
    for file in source.glob("*.safetensors"):
        os.truncate(file, file.stat().st_size // 2)
    refuses("ended early", lambda: job, tmp_path / "out")


SLOW = """
import sys, time
from mtp_spec.model.checkpoint import writer as assembly
import os
def slow(*args):
    time.sleep(0.005)
    return os.pwrite(*args)
assembly.pwrite = slow
from mtp_spec.cli.main import main
main(["convert", *sys.argv[1:], "--model-parallel", "2"])
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_signals_at_any_moment(fp8: Path, two: Path, tmp_path: Path, sent: signal.Signals) -> None:
    out, part = tmp_path / "out", tmp_path / "out.part"
    command = [sys.executable, "-P", "-c", SLOW, str(fp8), str(out)]
    for wanted in (1, 200):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and _lines(part / assembly.JOURNAL) < wanted:
            time.sleep(0.005)
        process.send_signal(sent)
        message = process.communicate()[1]
        assert process.returncode == (130 if sent == signal.SIGINT else -sent), message
        if sent == signal.SIGINT and "stopped" in message:
            assert "run the same command again" in message
            assert "Traceback" not in message
        assert not out.exists()
    before = _lines(part / assembly.JOURNAL)
    assert before >= 200
    run_job(ranks_job(fp8, 2), out)
    assert small.same(small.tensors(out), small.tensors(two))


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_a_target_that_cannot_become_a_folder_is_refused_before_work(fp8: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "new.part").write_text("")
    for target, said in (("file/new", "file is a file"), ("dangling", "exists"), ("new", "new.part is a file")):
        with pytest.raises(mtp_spec.CheckpointError, match=said):
            run_job(ranks_job(fp8, 1), tmp_path / target)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dangling", "file", "new.part"]
