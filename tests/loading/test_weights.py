"""`load(weights="fp8")`: the bits of `cast --to fp8` followed by a load, on every engine, with its memory plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mtp_spec
import small
from lms import lm_of
from mtp_spec import host_memory
from mtp_spec.cli.main import main
from mtp_spec.cuda.memory import plan_memory
from mtp_spec.load_checks import load_model
from mtp_spec.model.checkpoint.cast import cast_job
from mtp_spec.model.checkpoint.folder import Checkpoint, load_checkpoint, open_checkpoint, rank_part, read_weights
from mtp_spec.model.checkpoint.jobs import run_job
from mtp_spec.model.cpu.checkpoint import footprint
from mtp_spec.model.cuda.checkpoint import empty_device_model, fp8_obstacle, load_device_model
from mtp_spec.model.distributed.group import Ranks
from mtp_spec.model.transformer import Transformer
from mtp_spec.weights import with_weights

ODD = {"hidden_size": 272, "intermediate_size": 336, "moe_intermediate_size": 176, "q_lora_rank": 80, "v_head_dim": 40}


@pytest.fixture(scope="module", params=["whole blocks", "cut blocks"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bfloat16 folder, and what `cast` makes of it."""
    config = small.CONFIG if request.param == "whole blocks" else replace(small.CONFIG, **ODD)
    wide = small.make(tmp_path_factory.mktemp("weights") / "wide", config)
    run_job(cast_job(wide, "fp8"), wide.with_name("fp8"))
    return wide, wide.with_name("fp8")


def opened(folder: Path) -> Checkpoint:
    return with_weights(open_checkpoint(folder), "fp8")


def test_the_engine_has_the_bits_of_cast(folders: tuple[Path, Path]) -> None:
    wide, fp8 = folders
    cast, loaded = mtp_spec.load(fp8, measure=False), mtp_spec.load(wide, weights="fp8", measure=False)
    ours, theirs = ({**lm.model.checkpoint_slots(), **lm.model.scales()} for lm in (loaded, cast))
    assert small.same(ours, theirs)
    assert any(weight.dtype == torch.float8_e4m3fn for weight in ours.values())
    prompt = list(range(3, 40, 5))
    one, two = (lm.generate(prompt, max_new_tokens=12, seed=0) for lm in (loaded, cast))
    assert one.token_ids == two.token_ids
    assert sum(weight.nbytes for weight in ours.values()) == footprint(opened(wide)).total


def test_torch_has_the_bits_of_cast(folders: tuple[Path, Path]) -> None:
    wide, fp8 = folders
    one, two = (load_checkpoint(source, dtype=torch.bfloat16) for source in (opened(wide), open_checkpoint(fp8)))
    assert small.same(one.checkpoint_slots(), two.checkpoint_slots())


def test_the_kernels_have_the_bits_of_cast(folders: tuple[Path, Path]) -> None:
    wide, fp8 = folders
    assert fp8_obstacle(opened(wide)) is None
    assert fp8_obstacle(open_checkpoint(wide)) is not None
    one, two = load_device_model(opened(wide), "cpu"), load_device_model(open_checkpoint(fp8), "cpu")
    assert small.same(one.checkpoint_slots(), two.checkpoint_slots())
    plans = [plan_memory(empty_device_model(source, "meta"), 200) for source in (opened(wide), open_checkpoint(fp8))]
    assert plans[0] == plans[1]
    lm = lm_of(one, None, 200)
    assert lm.generate([3, 4, 5], max_new_tokens=6, seed=0, speculation=2).token_ids


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_the_bits_of_cast(folders: tuple[Path, Path], rank: int) -> None:
    wide, fp8 = folders
    ranks = Ranks(rank, 2)
    with torch.device("meta"):
        slots = Transformer(open_checkpoint(fp8).config, torch.bfloat16, "meta", ranks).checkpoint_slots()
    read: list[dict[str, Any]] = [
        {name: rest for name, *rest in read_weights(rank_part(source, slots, ranks), None)}
        for source in (opened(wide), open_checkpoint(fp8))
    ]
    assert read[0].keys() == read[1].keys() == slots.keys()
    for name, (first, value, scale) in read[0].items():
        other = read[1][name]
        assert first == other[0]
        assert small.same({name: value}, {name: other[1]})
        assert (scale is None) == (other[2] is None)
        assert scale is None or torch.equal(scale, other[2])


def test_it_is_streamed(folders: tuple[Path, Path]) -> None:
    """Each matrix is narrowed before the next is asked for."""
    source, alive = opened(folders[0]), []
    for name, _, value, scale in read_weights(source, None):
        alive.append(value.dtype == torch.float8_e4m3fn)
        assert (name in source.narrowed) == (value.dtype == torch.float8_e4m3fn) == (scale is not None)
    assert any(alive)


def test_folders_in_fp8_stay_as_they_are(folders: tuple[Path, Path]) -> None:
    checkpoint = open_checkpoint(folders[1])
    assert with_weights(checkpoint, "fp8") is checkpoint


def test_one_error_for_each_mistake(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(mtp_spec.OptionError, match="weights='int4': allowed are 'fp8'"):
        mtp_spec.load(folders[0], weights="int4")
    broken = small.make(tmp_path / "broken")
    name = "model.layers.1.self_attn.o_proj.weight"
    for file in broken.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][3, 5] = torch.inf
            save_file(tensors, file)
    with pytest.raises(mtp_spec.CheckpointError, match=f"{name} holds NaN or infinity"):
        mtp_spec.load(broken, weights="fp8")
    monkeypatch.setattr(host_memory, "free_memory", lambda: 1000)
    with pytest.raises(mtp_spec.MTPSpecError, match=r"GB in FP8 and 0\.0 GB of memory are free"):
        load_model(folders[0], None, "cpu", 64, None, None, weights="fp8")


def test_command_line(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for arguments in ([str(folders[0]), "--weights", "fp8"], [str(folders[1])]):
        main(["inspect", *arguments])
        shown = capsys.readouterr().out
        texts.append("".join(line.split("│")[2].strip() for line in shown.splitlines() if "MB in FP8" in line))
    assert texts[0] == texts[1] != ""
    main(["inspect", str(folders[0])])
    assert 'weights="fp8"' in " ".join(capsys.readouterr().out.replace("│", " ").split())
    with pytest.raises(SystemExit):
        main(["inspect", str(folders[0] / "config.json"), "--weights", "fp8"])
    assert "--weights" in capsys.readouterr().err
