"""What a CPU can hold and how fast it will write, foreseen before weights are read."""

from __future__ import annotations

import json
import warnings
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import mtp_spec
import small
from mtp_spec import host_memory
from mtp_spec.bench.cpu import pass_bytes
from mtp_spec.cli.main import main
from mtp_spec.cpu import foresight
from mtp_spec.cpu.foresight import StepBytes, disk_rate, engine_rate, foresee, step_bytes
from mtp_spec.kernels.cpu.engine import why_not
from mtp_spec.model.checkpoint.cast import cast_job
from mtp_spec.model.checkpoint.convert import ranks_job
from mtp_spec.model.checkpoint.folder import open_checkpoint
from mtp_spec.model.checkpoint.jobs import run_job
from mtp_spec.model.cpu import checkpoint as cpu_checkpoint
from mtp_spec.model.cpu.checkpoint import footprint, load_cpu_model
from mtp_spec.model.cpu.model import CPUModel
from mtp_spec.weights import with_weights

DEMO = Path(str(files("mtp_spec.configs") / "demo"))
GB = 10**9
engine = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


# memory


def system(root: Path, groups: str, limits: dict[str, dict[str, str]]) -> None:
    """Writes the files that tell of 8 GB of available memory, 1 GB of swap, and of cgroups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemAvailable: {8 * GB // 1024} kB\nSwapFree: {GB // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for folder, values in limits.items():
        (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (root / "sys/fs/cgroup" / folder / name).write_text(value)


def second(limit: str, used: int, cached: int) -> dict[str, str]:
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n",
            "memory.stat": f"anon 1\ninactive_file {cached // 2}\nactive_file {cached // 2}\n"}  # fmt: skip


def first(limit: int, used: int) -> dict[str, str]:
    return {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n",
            "memory.stat": "cache 5\ntotal_inactive_file 0\ntotal_active_file 0\n"}  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "limits", "free"),
    [
        ("0::/\n", {}, 8 * GB),
        ("0::/a/b\n", {"a/b": second("max", GB, 0)}, 8 * GB),
        ("0::/a/b\n", {"a/b": second(str(5 * GB), 2 * GB, 0)}, 3 * GB),
        ("0::/a/b\n", {"a/b": second(str(5 * GB), 4 * GB, 3 * GB)}, 4 * GB),  # files' pages can be dropped
        ("0::/a/b\n", {"a": second(str(5 * GB), 2 * GB, 0), "a/b": second("max", GB, 0)}, 3 * GB),
        ("0::/host/only\n", {".": second(str(4 * GB), GB, 0)}, 3 * GB),  # a container that sees its own part
        ("0::/a\n", {"a": second(str(90 * GB), GB, 0)}, 8 * GB),
        ("3:cpu:/a\n2:memory:/a\n0::/\n", {"memory/a": first(6 * GB, GB)}, 5 * GB),
        ("2:memory:/a\n0::/\n", {"memory/a": first(2**63 - 4096, GB), "memory": first(2**63 - 4096, GB)}, 8 * GB),
        ("2:memory:/a\n", {"memory/a": first(GB, 2 * GB)}, 0),
    ],
    ids=["none", "no limit", "limit", "files", "around", "container", "above", "first", "first, no limit", "beyond"],
)
def test_the_nearest_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, limits: dict[str, dict[str, str]], free: int
) -> None:
    system(tmp_path, groups, limits)
    monkeypatch.setattr(host_memory, "ROOT", tmp_path)
    assert host_memory.room_for_files() == pytest.approx(free, abs=2048)
    assert host_memory.free_memory() == pytest.approx(free + GB, abs=4096)


def test_the_machine_is_as_large_as_its_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system(tmp_path, "0::/a\n", {"a": second(str(2**20), 0, 0)})
    monkeypatch.setattr(host_memory, "ROOT", tmp_path)
    assert host_memory.machine_memory() == 2**20
    with pytest.raises(mtp_spec.MTPSpecError, match=r"this machine has 0\.0 GB"):
        mtp_spec.load(max_batch=64, device="cpu", measure=False).generate([[1], [2]], max_new_tokens=2)


def test_systems_that_do_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "ROOT", tmp_path)
    assert host_memory.free_memory() is None
    assert host_memory.room_for_files() == host_memory.machine_memory()


# weights


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make(tmp_path_factory.mktemp("foresight") / "wide")


@pytest.fixture(scope="module")
def fp8(wide: Path) -> Path:
    run_job(cast_job(wide, "fp8"), wide.parent / "fp8")
    return wide.parent / "fp8"


@pytest.fixture(scope="module")
def divided(fp8: Path) -> Path:
    run_job(ranks_job(fp8, 2), fp8.parent / "divided")
    return fp8.parent / "divided"


@engine
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype", "weights"),
    [("wide", None, None), ("fp8", None, None), ("divided", None, None), ("fp8", torch.bfloat16, None),
     ("wide", torch.float16, None), ("wide", torch.bfloat16, None), ("wide", None, "fp8")],
)  # fmt: skip
def test_a_footprint_is_what_loading_takes(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, mapped: bool, name: str,
    dtype: torch.dtype | None, weights: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(cpu_checkpoint, "MAPPED_BYTES", 0 if mapped else 2**30)
    checkpoint = with_weights(open_checkpoint(request.getfixturevalue(name)), weights)
    model, found = load_cpu_model(checkpoint, dtype), footprint(checkpoint, dtype)
    kept, scales = model.checkpoint_slots(), model.scales()
    assert found.total == sum(weight.nbytes for weight in (*kept.values(), *scales.values()))
    # what lies in a file is a view of all of its bytes
    whole = {info.file.stat().st_size for info in checkpoint.tensors.values()}
    own = [name for name, weight in kept.items() if weight.untyped_storage().nbytes() not in whole]
    expected = sum(kept[n].nbytes + (scales[n + "_scale_inv"].nbytes if n + "_scale_inv" in scales else 0) for n in own)
    assert found.own == (expected if mapped else found.total)


@engine
@pytest.mark.parametrize("name", ["wide", "fp8"])
def test_a_step_reads_what_the_bench_counts(request: pytest.FixtureRequest, name: str) -> None:
    for folder in (DEMO, request.getfixturevalue(name)):
        checkpoint = open_checkpoint(folder)
        step, model, config = step_bytes(checkpoint), load_cpu_model(checkpoint), checkpoint.config
        assert isinstance(model, CPUModel)
        layers = config.num_hidden_layers - config.first_k_dense_replace
        assert step.total == pytest.approx(pass_bytes(model, "1 row", layers * config.num_experts_per_tok), rel=0.01)
        assert step.total < sum(step.kept.values()) < footprint(checkpoint).total


def test_what_memory_does_not_hold() -> None:
    step = StepBytes({torch.float8_e4m3fn: 30}, chosen=20, kept={torch.float8_e4m3fn: 210}, experts=200)
    assert [step.missing(room) for room in (0, 10, 110, 210, 500)] == [30, 30, 10, 0, 0]


# before loading


def loads(folder: Path, read: list[int], **options: object) -> mtp_spec.LM:
    return mtp_spec.load(folder, measure=False, progress=lambda done, _: read.append(done), **options)


@engine
def test_copies_that_do_not_fit_are_refused_and_files_are_not(
    fp8: Path, divided: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_checkpoint, "MAPPED_BYTES", 0)
    needed = footprint(open_checkpoint(fp8), torch.bfloat16)
    joined = footprint(open_checkpoint(divided)).own
    monkeypatch.setattr(host_memory, "free_memory", lambda: min(needed.own, joined) - 1)
    read: list[int] = []
    with pytest.raises(mtp_spec.MTPSpecError, match=r"GB in bfloat16 and .* are free: leave dtype out"):
        loads(fp8, read, dtype="bfloat16")
    with pytest.raises(mtp_spec.MTPSpecError, match=r"GB outside their files and .*mtp-spec convert --to-hf"):
        loads(divided, read)
    assert read == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loads(fp8, read)  # as stored, in the files
    assert read
    monkeypatch.setattr(host_memory, "free_memory", lambda: needed.own)
    loads(fp8, read, dtype="bfloat16")


@engine
def test_mapped_weights_beyond_the_memory_are_warned_of_once_with_a_speed(
    fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_checkpoint, "MAPPED_BYTES", 0)
    whole = footprint(open_checkpoint(fp8)).total
    monkeypatch.setattr(host_memory, "room_for_files", lambda: whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = loads(fp8, []).generate([5, 6, 7], max_new_tokens=5, seed=1).token_ids
    monkeypatch.setattr(host_memory, "room_for_files", lambda: whole - 1)
    with pytest.warns(UserWarning, match=r"do not fit in the .* at best .* tokens/s .* Use a machine") as told:
        lm = loads(fp8, [])
    assert len(told) == 1
    assert told[0].filename == __file__
    assert "\n" not in str(told[0].message)
    assert lm.generate([5, 6, 7], max_new_tokens=5, seed=1).token_ids == expected


# speed


@engine
def test_a_speed_is_bytes_over_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(DEMO)
    step = step_bytes(checkpoint)
    rates = {torch.float8_e4m3fn: 2e9, torch.bfloat16: 8e9}
    monkeypatch.setattr(foresight, "engine_rate", lambda kind, *_: rates[kind])
    monkeypatch.setattr(host_memory, "room_for_files", lambda: None)
    found = foresee(checkpoint)
    sizes = {kind: step.kinds[kind] for kind in rates}
    seconds = sum(size / rates[kind] for kind, size in sizes.items()) * step.total / sum(sizes.values())
    assert found.tokens_per_second == pytest.approx(1 / seconds)
    assert found.rates == {"FP8": 2e9, "bfloat16": 8e9}
    assert found.missing == 0
    room = footprint(checkpoint).total // 2
    monkeypatch.setattr(host_memory, "room_for_files", lambda: room)
    monkeypatch.setattr(foresight, "disk_rate", lambda _: 1e8)
    short = foresee(checkpoint)
    assert 0 < short.missing == step.missing(room)
    assert short.tokens_per_second == pytest.approx(1 / (seconds + short.missing / 1e8))
    assert "from the disk at 0.1 GB/s" in str(short)
    monkeypatch.setattr(foresight, "disk_rate", lambda _: None)
    assert foresee(checkpoint).tokens_per_second is None
    assert str(foresee(checkpoint)).startswith("as slow as the disk")


@engine
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1000, 10**6])
def test_rates_of_every_kind_are_measured(kind: torch.dtype, size: int) -> None:
    assert engine_rate(kind, size, 200) > 0


def test_a_disk_is_measured(tmp_path: Path) -> None:
    for size in (1, 4097, 2**24 + 5):
        (tmp_path / "file").write_bytes(b"x" * size)
        rate = disk_rate(tmp_path / "file")
        assert rate is None or rate > 0
        assert (tmp_path / "file").read_bytes() == b"x" * size


@engine
def test_inspect_tells_it(fp8: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    main(["inspect", str(fp8), "--json"])
    told = json.loads(capsys.readouterr().out)["cpu_engine"]
    assert told["step"] == step_bytes(open_checkpoint(fp8)).total
    assert told["tokens_per_second"] > 0
    main(["inspect", str(fp8)])
    assert "tokens/s of one text without speculation" in words(capsys)
    monkeypatch.setattr(host_memory, "free_memory", lambda: 1000)
    main(["inspect", str(fp8)])
    assert "load refuses it: the weights take" in words(capsys)


def test_inspect_foresees_nothing_by_torch(by_torch: None, fp8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(fp8), "--json"])
    assert json.loads(capsys.readouterr().out)["cpu_engine"] is None
    main(["inspect", str(fp8)])
    assert "tokens/s" not in words(capsys)


def words(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.replace("│", " ").split())
