"""MTP modules in a folder of their own: `load(mtp=)` and `mtp-spec export --mtp`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mtp_spec
import small
import tiny
from mtp_spec.cli.main import main
from mtp_spec.model.checkpoint.adapter import DESCRIPTION, TENSORS, describe, module_slots, save_modules
from mtp_spec.model.checkpoint.folder import load_checkpoint, open_checkpoint, save_checkpoint
from mtp_spec.model.config import ModuleShape
from mtp_spec.model.transformer import Transformer

IDS = [(37 * i + 11) % 96 for i in range(20)]


def adapter(target: Path, source: Path, base: Path) -> Path:
    """Writes the modules of the folder `source`, said to be for the model in `base`."""
    model = load_checkpoint(source, dtype=torch.float32)
    opened = open_checkpoint(base)
    said = {"model": describe(opened.config, opened.tensors)}
    save_modules(target, module_slots(model.checkpoint_slots(), model.config), {DESCRIPTION: json.dumps(said).encode()})
    return target


def drafts(lm: mtp_spec.LM) -> torch.Tensor:
    return lm.score(IDS).mtp_logits[:, :-2]  # the last rows are NaN


def test_modules_replace_those_of_the_checkpoint(tmp_path: Path) -> None:
    one, other = (tiny.make(tmp_path / str(seed), "v3", seed).folder for seed in (1, 2))
    given = adapter(tmp_path / "modules", other, one)
    plain, swapped = mtp_spec.load(one, measure=False), mtp_spec.load(one, mtp=str(given), measure=False)
    assert torch.equal(plain.score(IDS).logits, swapped.score(IDS).logits)
    assert not torch.equal(drafts(plain), drafts(swapped))
    # the module of the other folder on the hidden states, embedding and head of this one
    whole = load_file(given / TENSORS)
    model = load_checkpoint(one, dtype=torch.float32)
    with torch.no_grad():
        for name, slot in module_slots(model.checkpoint_slots(), model.config).items():
            slot.copy_(whole[name])
    save_checkpoint(model, tmp_path / "joined")
    assert torch.equal(drafts(mtp_spec.load(tmp_path / "joined", measure=False)), drafts(swapped))
    texts = [lm.generate(IDS, max_new_tokens=30, seed=3, speculation=3).token_ids for lm in (plain, swapped)]
    assert texts[0] == texts[1]
    # a whole checkpoint may be given, too, whatever else lies in its folder
    (other / DESCRIPTION).write_text("[]")
    assert torch.equal(drafts(mtp_spec.load(one, mtp=other, measure=False)), drafts(swapped))


@pytest.mark.parametrize("modules", [1, 2])
@pytest.mark.parametrize("width", [None, 40])
def test_a_model_without_modules_gets_some(tmp_path: Path, width: int | None, modules: int) -> None:
    made = tiny.make(tmp_path / "model", "moonlight").folder
    opened = open_checkpoint(made)
    assert not opened.config.num_nextn_predict_layers
    shapes = (ModuleShape(intermediate_size=width),) * modules
    config = replace(opened.config, num_nextn_predict_layers=modules, modules=shapes if width else ())
    model = Transformer(config)
    torch.manual_seed(0)
    slots = module_slots(model.checkpoint_slots(), config)
    with torch.no_grad():
        for name, slot in slots.items():
            slot.normal_(1.0 if "norm" in name else 0.0, 0.2)
    save_modules(
        tmp_path / "modules", slots, {DESCRIPTION: json.dumps({"model": describe(config, opened.tensors)}).encode()}
    )
    main(["export", str(made), str(tmp_path / "whole"), "--mtp", str(tmp_path / "modules")])
    apart = mtp_spec.load(made, mtp=tmp_path / "modules", measure=False)
    assert len(apart.model.mtp) == modules
    assert apart.config.module(0).intermediate_size == width
    whole = mtp_spec.load(tmp_path / "whole", measure=False)
    scores, same = apart.score(IDS), whole.score(IDS)
    assert torch.equal(scores.logits, same.logits)
    torch.testing.assert_close(scores.mtp_logits, same.mtp_logits, rtol=0, atol=0, equal_nan=True)
    plain = mtp_spec.load(made, measure=False)
    said = plain.generate(IDS, max_new_tokens=20, seed=1).token_ids
    assert said == apart.generate(IDS, max_new_tokens=20, seed=1, speculation=3).token_ids


def test_of_an_fp8_model_they_may_be_wider(tmp_path: Path) -> None:
    base = small.make_fp8(tmp_path / "fp8")
    given = adapter(tmp_path / "modules", base, base)
    one, other = mtp_spec.load(base, measure=False), mtp_spec.load(base, mtp=given, measure=False)
    ids = [id % one.config.vocab_size for id in IDS]
    torch.testing.assert_close(
        one.score(ids).mtp_logits, other.score(ids).mtp_logits, rtol=1e-4, atol=1e-4, equal_nan=True
    )


def test_other_weights_are_noted_and_other_shapes_refused(tmp_path: Path) -> None:
    one, other = (tiny.make(tmp_path / str(seed), "v3", seed).folder for seed in (1, 2))
    given = adapter(tmp_path / "modules", other, other)
    with pytest.warns(UserWarning, match="trained on other weights"):
        mtp_spec.load(one, mtp=given, measure=False)
    narrow = tiny.make(tmp_path / "narrow", "v3_no_query_lora").folder
    with pytest.raises(mtp_spec.CheckpointError, match=r"narrow with mtp='.*modules' does not.*q_b_proj"):
        mtp_spec.load(narrow, mtp=given, measure=False)
    said = json.loads((given / DESCRIPTION).read_text())
    said["model"]["hidden_size"] = 64
    (given / DESCRIPTION).write_text(json.dumps(said))
    with pytest.raises(mtp_spec.CheckpointError, match="made for another model: hidden_size 64 instead of 48"):
        mtp_spec.load(one, mtp=given, measure=False)


def test_bad_folders(tmp_path: Path) -> None:
    base = tiny.make(tmp_path / "model", "v3").folder
    given = adapter(tmp_path / "modules", base, base)
    for wrong in (3, ""):
        with pytest.raises(mtp_spec.OptionError, match=rf"mtp={wrong!r}: give the name of a folder"):
            mtp_spec.load(base, mtp=wrong)
    with pytest.raises(mtp_spec.CheckpointError, match="no such folder"):
        mtp_spec.load(base, mtp=tmp_path / "nowhere")
    with pytest.raises(mtp_spec.CheckpointError, match="exists"):
        adapter(given, base, base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(mtp_spec.CheckpointError, match=r"no \*.safetensors"):
        mtp_spec.load(base, mtp=tmp_path / "empty")
    plain = tiny.make(tmp_path / "plain", "v3_no_groups").folder
    save_file({"model.layers.2.x": torch.ones(1)}, tmp_path / "empty" / "x.safetensors")
    with pytest.raises(mtp_spec.CheckpointError, match=r"no tensor of an MTP module.*model.layers.3"):
        mtp_spec.load(plain, mtp=tmp_path / "empty")
    tensors = load_file(given / TENSORS)
    del tensors["model.layers.3.enorm.weight"]
    save_file(tensors, given / TENSORS)
    with pytest.raises(mtp_spec.CheckpointError, match=r"1 missing: model.layers.3.enorm.weight"):
        mtp_spec.load(base, mtp=given)
    with pytest.raises(mtp_spec.CheckpointError, match="has no config"):
        mtp_spec.load(given)
