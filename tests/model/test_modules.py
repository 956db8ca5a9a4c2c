"""MTP modules as folders have them: dense blocks, files outside the index, embeddings and heads of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mtp_spec
import small
from lms import lm_of
from mtp_spec.analysis.scoring import score_ids
from mtp_spec.cli.main import main
from mtp_spec.model.checkpoint.cast import cast_job
from mtp_spec.model.checkpoint.convert import hf_job, ranks_job
from mtp_spec.model.checkpoint.export import export_job
from mtp_spec.model.checkpoint.folder import load_checkpoint, open_checkpoint, save_checkpoint
from mtp_spec.model.checkpoint.jobs import run_job
from mtp_spec.model.config import ModelConfig, ModuleShape
from mtp_spec.model.cuda.checkpoint import load_device_model
from mtp_spec.model.transformer import Transformer

SIZES: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 4,
    "n_shared_experts": 1, "kv_lora_rank": 32, "q_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "first_k_dense_replace": 1, "max_position_embeddings": 512,
}  # fmt: skip
KINDS: dict[str, tuple[ModuleShape, ...]] = {
    "dense": (ModuleShape(intermediate_size=384),),
    "own embedding": (ModuleShape(own_embedding=True),),
    "own head": (ModuleShape(own_head=True),),
    "dense with its own head, then experts": (ModuleShape(intermediate_size=256, own_head=True), ModuleShape()),
    "experts, then dense with both": (
        ModuleShape(), ModuleShape(intermediate_size=128, own_embedding=True, own_head=True),
    ),
}  # fmt: skip
IDS = [(37 * i + 5) % 160 for i in range(24)]


def make(folder: Path, modules: tuple[ModuleShape, ...]) -> Path:
    """Writes a random folder whose modules are these."""
    config = ModelConfig(**SIZES, modules=modules, num_nextn_predict_layers=len(modules))
    model, generator = Transformer(config, torch.float32), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, slot in model.checkpoint_slots().items():
            values = torch.randn(slot.shape, generator=generator)
            slot.copy_(1 + 0.1 * values if "norm" in name else values * slot.shape[-1] ** -0.5)
    save_checkpoint(model, folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})


def put(folder: Path, name: str, value: Tensor) -> None:
    """Adds a tensor to the last file and to the index."""
    file = max(folder.glob("model-*.safetensors"))
    save_file({**load_file(file), name: value}, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    given = json.loads(index.read_text())
    given["weight_map"][name] = file.name
    index.write_text(json.dumps(given))


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("modules") / "model", KINDS[request.param])


@pytest.mark.filterwarnings("ignore:.*has its own")
def test_every_kind_is_found_and_runs(folder: Path) -> None:
    found = open_checkpoint(folder)
    assert len(found.config.modules) == found.config.num_nextn_predict_layers
    assert any(str(shape) != "experts" for shape in found.config.modules)
    engine = mtp_spec.load(folder, measure=False)
    wide = lm_of(load_checkpoint(folder, dtype=torch.float32), None, 300)
    ours, theirs = engine.score(IDS), wide.score(IDS)
    for one, other in ((ours.logits, theirs.logits), (ours.mtp_logits, theirs.mtp_logits)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)
    for lm in (engine, wide):
        plain = lm.generate(IDS[:5], max_new_tokens=20, seed=0, temperature=0.7, speculation=None)
        for shape in (1, 3, mtp_spec.Speculation(branching=(2, 2))):
            drafted = lm.generate(IDS[:5], max_new_tokens=20, seed=0, temperature=0.7, speculation=shape)
            assert drafted.token_ids == plain.token_ids
            assert drafted.stats.drafted > 0


@pytest.mark.filterwarnings("ignore:.*has its own")
def test_kernels_agree(folder: Path) -> None:
    run_job(cast_job(folder, "fp8"), folder.with_name(folder.name + "-fp8"))
    fp8 = folder.with_name(folder.name + "-fp8")
    wide = score_ids(load_checkpoint(fp8, dtype=torch.float32), IDS)
    got = score_ids(load_device_model(fp8, "cpu"), IDS)
    for depth, (one, other) in enumerate(zip(got.mtp_logits, wide.mtp_logits, strict=True), start=1):
        assert (one - other)[:-depth].norm() / other[:-depth].norm() < 0.15
    lm = lm_of(load_device_model(fp8, "cpu"), None, 200)
    plain = lm.generate(IDS[:5], max_new_tokens=12, seed=0, speculation=None)
    assert lm.generate(IDS[:5], max_new_tokens=12, seed=0, speculation=3).token_ids == plain.token_ids


@pytest.mark.filterwarnings("ignore:.*has its own")
def test_files_of_ranks_have_the_same_modules(folder: Path, tmp_path: Path) -> None:
    run_job(ranks_job(folder, 2), tmp_path / "two")
    run_job(hf_job(tmp_path / "two"), tmp_path / "again")
    found = open_checkpoint(folder).config
    for made in ("two", "again"):
        assert open_checkpoint(tmp_path / made).config == found
    slots = [load_checkpoint(one, dtype=torch.float32).checkpoint_slots() for one in (folder, tmp_path / "two")]
    assert small.same(*slots)


@pytest.mark.filterwarnings("ignore:.*has its own")
def test_drafts_come_from_the_modules_own(tmp_path: Path) -> None:
    """A head of its own that only says one token makes that token every draft."""
    folder = make(tmp_path / "model", (ModuleShape(own_head=True),))

    def one_token(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("shared_head.head.weight"):
                tensors[name].zero_()
                tensors[name][7] = 1000 * torch.randn(128)

    edit(folder, one_token)
    for lm in (mtp_spec.load(folder, measure=False), mtp_spec.load(folder, measure=False, draft_vocabulary=20)):
        model = lm.model
        hidden = torch.ones(1, 128)
        own = model.draft_logits(hidden, model.config.head_of(0))
        assert (own[0, :20] == 0).sum() == 19
        assert (model.draft_logits(hidden)[0, :20] != 0).all()
        assert torch.equal(model.module_logits(0, hidden) != 0, torch.arange(160)[None] == 7)


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_copies_are_compared(tmp_path: Path, copy: str) -> None:
    folder, name = make(tmp_path / "model", (ModuleShape(),)), f"model.layers.2.{copy}.weight"
    original = small.tensors(folder)["model.embed_tokens.weight" if "embed" in copy else "lm_head.weight"]
    put(folder, name, original)
    assert open_checkpoint(folder).config.modules == ()
    assert open_checkpoint(folder).notes == ()
    plain = mtp_spec.load(folder, measure=False).generate(IDS[:5], max_new_tokens=20, seed=0, speculation=None)
    original[-1, -1] += 1  # the last number alone
    put(folder, name, original)
    with pytest.warns(UserWarning, match=f"has its own {'embedding' if 'embed' in copy else 'head'}"):
        lm = mtp_spec.load(folder, measure=False)
    assert lm.generate(IDS[:5], max_new_tokens=20, seed=0, speculation=None).token_ids == plain.token_ids
    assert lm.generate(IDS[:5], max_new_tokens=20, seed=0, speculation=2).token_ids == plain.token_ids
    run_job(export_job(folder), tmp_path / "exported")
    assert torch.equal(small.tensors(tmp_path / "exported")[name], original)
    put(folder, name, original[:-1].clone())
    with pytest.raises(mtp_spec.CheckpointError, match=r"is \[159, 128\] instead of \[160, 128\]"):
        mtp_spec.load(folder)


@pytest.mark.parametrize("file", ["mtp-1-of-1.safetensors", "mtp.safetensors", "model-mtp.safetensors"])
def test_a_file_that_the_index_does_not_name(tmp_path: Path, file: str) -> None:
    folder = make(tmp_path / "model", (ModuleShape(intermediate_size=256),))
    whole, moved = small.tensors(folder), {}
    edit(folder, lambda tensors: [moved.update({n: tensors.pop(n)}) for n in list(tensors) if ".layers.2." in n])
    index = folder / "model.safetensors.index.json"
    given = json.loads(index.read_text())
    given["weight_map"] = {name: where for name, where in given["weight_map"].items() if name not in moved}
    index.write_text(json.dumps(given))
    assert open_checkpoint(folder).config.num_nextn_predict_layers == 0
    save_file({**moved, "model.norm.weight": torch.zeros(128)}, folder / file)  # the index has another of these
    with pytest.warns(UserWarning, match=rf"{file} is not in model\.safetensors\.index\.json"):
        lm = mtp_spec.load(folder, measure=False)
    assert len(lm.model.mtp) == 1
    assert torch.equal(lm.model.norm, whole["model.norm.weight"])
    run_job(cast_job(folder, "fp8"), tmp_path / "fp8")
    assert open_checkpoint(tmp_path / "fp8").config.num_nextn_predict_layers == 1
    (folder / file).write_bytes((folder / file).read_bytes()[:-9])
    with pytest.raises(mtp_spec.CheckpointError, match="truncated"):
        mtp_spec.load(folder)


def test_an_mtp_file_with_other_names_is_not_lost_silently(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", (ModuleShape(),))
    save_file({"mtp.0.enorm.weight": torch.ones(128)}, folder / "mtp.safetensors")
    save_file({"anything": torch.ones(128)}, folder / "consolidated.safetensors")
    with pytest.warns(UserWarning, match=r"mtp\.safetensors is not in .* left aside: .*mtp\.0\.enorm\.weight") as told:
        assert len(mtp_spec.load(folder, measure=False).model.mtp) == 1
    assert not any("consolidated" in str(one.message) for one in told)


def test_two_such_files(tmp_path: Path) -> None:
    """The second is left aside and named for what it is."""
    folder = make(tmp_path / "model", (ModuleShape(),))
    index = folder / "model.safetensors.index.json"
    given, whole = json.loads(index.read_text()), small.tensors(folder)
    given["weight_map"] = {name: file for name, file in given["weight_map"].items() if ".layers.2." not in name}
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.2." in name])
    index.write_text(json.dumps(given))
    for file in ("mtp-a.safetensors", "mtp-b.safetensors"):
        save_file({name: tensor for name, tensor in whole.items() if ".layers.2." in name}, folder / file)
    notes = open_checkpoint(folder).notes
    assert len(notes) == 2
    assert "mtp-a.safetensors is not in" in notes[0]
    assert "mtp-b.safetensors" in notes[1]
    assert "another such file has its MTP modules" in notes[1]


@pytest.mark.filterwarnings("ignore:.*has its own")
@pytest.mark.parametrize("few", [None, 20])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_damaged_head_of_its_own(tmp_path: Path, value: float, few: int | None) -> None:
    """The engine drafts from the head in FP8, whose codes do not say so."""
    folder = make(tmp_path / "model", (ModuleShape(own_head=True),))
    put(folder, "model.layers.2.shared_head.head.weight", torch.full((160, 128), value))
    lm = mtp_spec.load(folder, measure=False, draft_vocabulary=few)
    plain = lm.generate(IDS[:5], max_new_tokens=9, seed=0, speculation=None)
    with pytest.warns(UserWarning, match="MTP module 1 .*gives NaN or infinity"):
        drafted = lm.generate(IDS[:5], max_new_tokens=9, seed=0, speculation=2)
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats.drafted == 0
    assert drafted.stats.dropped > 0


def test_more_modules_than_the_config_counts(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", (ModuleShape(intermediate_size=256), ModuleShape()))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    with pytest.warns(UserWarning, match="counts 0 MTP modules and the files have 2"):
        assert len(mtp_spec.load(folder, measure=False).model.mtp) == 2
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 3}))
    with pytest.raises(mtp_spec.CheckpointError, match=r"missing: model\.layers\.4"):
        mtp_spec.load(folder)


def test_inspect_says_what_modules_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "model", KINDS["dense with its own head, then experts"])
    main(["inspect", str(folder), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["mtp_modules"] == ["a dense block of 256, its own head", "experts"]
    assert any("its own head" in note for note in said["notes"])
    main(["inspect", str(folder)])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "1: a dense block of 256, its own head; 2: experts" in shown
    shutil.rmtree(folder)
    main(["inspect", str(make(folder, (ModuleShape(),))), "--json"])
    assert json.loads(capsys.readouterr().out)["mtp_modules"] == ["experts"]
