"""What new modules begin as, and when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mtp_spec
import worded
from mtp_spec.model.checkpoint.folder import Checkpoint, open_checkpoint
from mtp_spec.model.transformer import MTPModule
from mtp_spec.training import loop
from mtp_spec.training.modules import read_weight, ready_modules
from mtp_spec.training.options import TrainOptions


def begun(folder: Path, **options: Any) -> tuple[MTPModule, Checkpoint]:
    checkpoint = open_checkpoint(folder)
    (module,) = ready_modules(TrainOptions(texts=folder / "config.json", **options), checkpoint, "cpu")
    assert isinstance(module, MTPModule)
    return module, checkpoint


@pytest.mark.parametrize(("block", "count"), [("moe", None), ("dense", 0)])
def test_a_module_may_begin_as_the_last_layer(v3: Path, block: str, count: int | None) -> None:
    """Norms, attention and, where they are alike, experts; its input is the sum of embedding and hidden state."""
    module, checkpoint = begun(v3, start="last-layer", block=block)
    random, _ = begun(v3, block=block)
    last = f"model.layers.{checkpoint.config.num_hidden_layers - 1}"
    slots, others = module.block.checkpoint_slots(last), random.block.checkpoint_slots(last)
    mlp = [name for name in slots if ".mlp." in name]
    for name in slots:
        expected = others[name] if name in mlp and count == 0 else read_weight(checkpoint, name)
        assert torch.equal(slots[name], expected), name
    width, final = checkpoint.config.hidden_size, read_weight(checkpoint, "model.norm.weight")
    assert torch.equal(module.norm.weight, final)
    hidden, embedding = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))
    stream = hidden * final  # what the last norm makes of a residual stream, up to its length
    read = module.eh_proj(torch.cat((module.enorm(embedding), module.hnorm(stream)), -1)) - module.enorm(embedding)
    assert torch.nn.functional.cosine_similarity(read, hidden).min() > 0.999


def test_training_may_end_by_the_clock(v3: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate falls to nothing by then, and a run that goes on knows how long it has trained."""
    now, rates, whole = [0.0], list[float](), loop.Trainer.schedule

    def clock() -> float:
        now[0] += 0.5
        return now[0]

    monkeypatch.setattr(loop, "perf_counter", clock)
    monkeypatch.setattr(loop.Trainer, "schedule", lambda self: rates.append(whole(self)) or rates[-1])
    few = {**worded.FEW, "steps": 1000, "minutes": 0.2, "check_temperatures": (0.0,), "check_every": 3}
    saved, save = list[int](), loop.Trainer.save

    def stop(self: loop.Trainer, file: Path) -> None:
        save(self, file)
        saved.append(self.step)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        mtp_spec.train(v3, tmp_path / "head", texts=lines, **few)
    made = mtp_spec.train(v3, tmp_path / "head", texts=lines, **few)
    steps = [line["step"] for line in made.log if not line.get("held_out")]
    assert steps == [*range(1, len(steps) + 1)]
    assert 6 < len(steps) < 24  # of half a second and more
    assert max(rates) == rates[3] or max(rates) < 1
    assert rates[-1] < 0.15
    assert rates[-1] == min(rates[3:])
