"""Training on a GPU: the hidden states, losses and gradients of a CPU, within the rounding of 16 bits."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtp_spec
import worded
from device_models import DEMO, checkpoint
from mtp_spec.model.checkpoint.folder import load_checkpoint, open_checkpoint
from mtp_spec.model.cuda import widened
from mtp_spec.model.cuda.checkpoint import load_device_model
from mtp_spec.model.rope import rope_table
from mtp_spec.model.training import ModulesForward, TrainingForward
from mtp_spec.training.backbone import Backbone, States
from mtp_spec.training.batches import tensors
from mtp_spec.training.captured import CapturedSteps
from mtp_spec.training.loop import Trainer, autocast
from mtp_spec.training.modules import new_modules, ready_modules, shared_weights
from mtp_spec.training.objective import Objective, draft_loss
from mtp_spec.training.options import TrainOptions
from mtp_spec.training.team import Team
from mtp_spec.training.texts import Corpus
from together import together

pytestmark = pytest.mark.gpu
GPU = "cuda"
TEXTS = [[(37 * i + 11 * length) % 90 for i in range(length)] for length in (5, 130, 64)]


def apart(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().float().cpu(), other.detach().float().cpu()
    return float((one - other).norm() / other.norm().clamp_min(1e-12))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("experts", [8, 32])
def test_hidden_states(experts: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few experts, all on all rows, and with many, in one product: as near to float32 as a CPU's 16 bits.

    Where two experts score alike, rounding may choose the other one: such a row of a random model is off by a third,
    the rows that see it by a twentieth. So every text may have some, and most rows of each must be near.
    """
    monkeypatch.setattr(widened, "KEPT", 10**12 if kept else 0)
    folder = checkpoint(tmp_path, "v3", n_routed_experts=experts)
    exact = TrainingForward(load_checkpoint(folder, dtype=torch.float32))
    errors: dict[str, list[Tensor]] = {GPU: [], "cpu": []}
    for device, own in errors.items():
        for ids, hidden in zip(TEXTS, Backbone(load_device_model(folder, device)).hidden(TEXTS), strict=True):
            with torch.no_grad():
                expected = exact.hidden(torch.tensor([ids]))[0]
            own.append((hidden.cpu().float() - expected).norm(dim=-1) / expected.norm(dim=-1))
    assert all(float((rows < 0.1).float().mean()) >= 0.8 for rows in errors[GPU])
    mine, theirs = (float(torch.cat(own).median()) for own in errors.values())
    assert mine < min(0.03, 1.2 * theirs)


def test_hidden_states_of_the_bundled_model() -> None:
    texts = [[(41 * i + length) % 8000 for i in range(length)] for length in (300, 90)]
    for one, other in zip(*(Backbone(load_device_model(DEMO, device)).hidden(texts) for device in (GPU, "cpu")),
                          strict=True):  # fmt: skip
        assert apart(one, other) < 0.05


@pytest.mark.parametrize("near", [0, 70, 1000])
def test_states_are_kept_in_memory_and_on_disk(near: int, tmp_path: Path) -> None:
    """The very numbers that were computed, wherever they were; a batch does not wait for the device."""
    corpus = Corpus(tmp_path / "texts", 0.0)
    for line, ids in enumerate(TEXTS):
        corpus.add("texts", line, ids, [(1, len(ids))], "a")
    own = Backbone(load_device_model(DEMO, GPU))
    row = 2 * own.model.config.hidden_size
    states = States(own, corpus, tmp_path / "states.bin", 1000 * row, near * row)
    computed = own.hidden(TEXTS)
    first = tensors(corpus, states, [0, 1, 2], 3)
    torch.cuda.set_sync_debug_mode("error" if near == 1000 else "default")
    try:
        again = tensors(corpus, states, [0, 1, 2], 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other, hidden in zip(first.hidden, again.hidden, computed, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[: len(hidden)], hidden)
        assert not one[len(hidden) :].any()
    assert torch.equal(again.chosen, again.weights.flatten().nonzero().squeeze(1))
    assert near == 1000 or states.bytes > 0
    corpus.close()


@pytest.mark.parametrize("experts", [None, 8, 32])
@pytest.mark.parametrize("loss", ["kl,tv", "tv:0.9,ce:0.1"])
def test_losses_and_gradients(loss: str, experts: int | None, tmp_path: Path) -> None:
    """Of a dense block, and of few and many experts: float32 on a CPU against 16 bits, kernels and flash attention."""
    folder = checkpoint(tmp_path, "v3", n_routed_experts=experts or 8)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(160, (4, 40), generator=generator)
    hidden = torch.randn(4, 40, 128, generator=generator)
    weights = torch.zeros(4, 40)
    weights[:, 3:33] = 1
    found: list[Any] = []
    for device in (GPU, "cpu"):
        model = load_device_model(folder, device)
        modules = new_modules(model.config, 48 if experts is None else None, 1, 0, device)
        table = rope_table(model.config, 64, device)
        wide = device == "cpu"
        shared = [weight.float() if wide else weight for weight in (model.embed_tokens, model.lm_head)]
        forward = ModulesForward(list(modules), *shared, lambda length, table=table: table)
        with autocast(forward):
            outcome = draft_loss(forward, Objective.of(loss, 4, 0.8), ids.to(device), hidden.to(device),
                                 weights.to(device))  # fmt: skip
        outcome.loss.backward()
        gradients = {name: p.grad for name, p in modules.named_parameters() if p.grad is not None}
        found.append((outcome, gradients))
    (one, mine), (other, theirs) = found
    for name in ("loss", "overlap", "rows"):
        assert apart(getattr(one, name), getattr(other, name)) < 0.02, name
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        assert apart(gradient, theirs[name]) < 0.15, name


@pytest.mark.parametrize("block", ["dense", "moe"])
def test_a_step_does_not_wait_for_the_gpu(block: str, tmp_path: Path) -> None:
    corpus = Corpus(tmp_path / "texts", 0.0)
    for line, ids in enumerate(TEXTS):
        corpus.add("texts", line, ids, [(1, len(ids))], "a")
    options = TrainOptions(texts=tmp_path / "texts" / "index.jsonl", block=block, steps=9, batch_tokens=512)
    model, folder = load_device_model(DEMO, GPU), open_checkpoint(DEMO)
    modules = ready_modules(options, folder, model.device)
    forward, _ = shared_weights(model, folder, modules, 200)
    states = States(Backbone(model), corpus, None, 10**8, 10**8)
    trainer = Trainer.of(options, forward, modules, corpus, states, Team(GPU))
    for _ in range(3 * trainer.batches.count(0)):  # compiles, computes the states, captures
        trainer.one()
    assert trainer.captured is not None
    assert trainer.captured.graphs == trainer.batches.count(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.one()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.settle()
    assert trainer.log[-1]["loss"] < trainer.log[0]["loss"]
    corpus.close()


def test_graphs_of_growing_shapes_share_the_memory_of_the_largest() -> None:
    weight = torch.randn(4096, 4096, device=GPU)

    def work(x: Tensor) -> Tensor:
        kept = [x]
        for _ in range(4):
            kept.append((kept[-1] @ weight).tanh())
        return torch.stack([part.sum() for part in kept])

    def held() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total: int = torch.cuda.mem_get_info()[1]
        return total - torch.cuda.mem_get_info()[0]

    steps, before = CapturedSteps(work, torch.device(GPU)), held()
    for number, rows in enumerate((4096, 4110, 4120, 8000, 4097)):
        given = torch.randn(rows, 4096, device=GPU)
        found = [steps(given).tolist() for _ in range(4)]
        assert all(one == found[0] for one in found)  # launched, captured and replayed
        assert steps.graphs == (1, 2, 3, 1, 2)[number]  # for the longest a larger pool is begun
    largest = 4 * 4096 * 8000
    # four results and a product of the largest, inputs with room for a quarter more, and the libraries' own
    assert held() - before < 5.2 * largest + 1.25 * largest + given.nbytes + 2**27


@pytest.mark.parametrize("options", [{"block": "moe"}, {"block": "dense"}, {"start": "shipped", "loss": "tv,ce:0.1"}])
def test_a_captured_step_has_the_bits_of_a_launched_one(options: dict[str, Any], tmp_path: Path) -> None:
    """Of several shapes, the last one of a pass ragged: launched, captured and replayed, all launched, and in two
    processes' runs, where the second one goes on from the first one's state."""
    corpus = Corpus(tmp_path / "texts", 0.0)
    for line, length in enumerate([5, 130, 64, 40, 41, 90, 128, 17, 100, 23, 77]):
        corpus.add("texts", line, [(37 * i + 11 * length) % 90 for i in range(length)], [(1, length)], "a")
    chosen = TrainOptions(texts=tmp_path / "texts" / "index.jsonl", steps=60, batch_tokens=300, depth=3, **options)
    model, folder = load_device_model(DEMO, GPU), open_checkpoint(DEMO)
    states = States(Backbone(model), corpus, None, 10**8, 10**8)

    def begun() -> Trainer:
        modules = ready_modules(chosen, folder, model.device)
        # angles of just so many positions as texts have
        forward, _ = shared_weights(model, folder, modules, 133)
        return Trainer.of(chosen, forward, modules, corpus, states, Team(GPU))

    found = []
    for mode in ("captured", "launched", "resumed"):
        trainer = begun()
        assert trainer.captured is not None
        trainer.captured.off = mode == "launched"
        a_pass = trainer.batches.count(0)
        for number in range(4 * a_pass):
            if mode == "resumed" and number == a_pass + 2:
                trainer.settle()
                trainer.save(tmp_path / "state")
                trainer = begun()
                trainer.restore(tmp_path / "state")
            trainer.one()
        trainer.settle()
        assert trainer.captured is not None
        assert (trainer.captured.graphs >= 3) == (mode != "launched")
        loads = [load for load in trainer.forward.load if load is not None]
        found.append(([line["loss"] for line in trainer.log], [*trainer.modules.state_dict().values(), *loads]))
    (losses, weights), *others = found
    assert len(losses) >= 12
    for theirs, their_weights in others:
        assert losses == theirs
        assert all(torch.equal(own, other) for own, other in zip(weights, their_weights, strict=True))
    corpus.close()


@pytest.mark.parametrize("options", [{"block": "moe"}, {"block": "dense"}, {"start": "shipped"}])
def test_a_run(options: dict[str, Any], tmp_path: Path) -> None:
    entries = [json.loads(line) for line in (Path(str(files("mtp_spec.configs"))) / "prompts.jsonl").open()]
    some = worded.lines(tmp_path / "prompts.jsonl", [{"prompt": one["prompt"]} for one in entries[:40]])
    made = mtp_spec.train(
        None, tmp_path / "head", prompts=some, device=GPU, steps=30, depth=3, batch_tokens=2048, answer_tokens=48,
        max_tokens=160, held_out=0.1, check_tokens=32, check_temperatures=(0.0,), **options,
    )  # fmt: skip
    first, *_, last = [line["loss"] for line in made.log if line.get("held_out")]
    assert last < (first if "block" in options else 1.1 * first)
    assert len([line for line in made.log if not line.get("held_out")]) == 30


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_what_one_does(tmp_path: Path) -> None:
    """Whose steps are launched and not padded: with texts of one length that fill a shape the batches are the same."""
    lm, given = mtp_spec.load("demo", device=GPU, max_context=128, measure=False), list[str]()
    for line in (Path(str(files("mtp_spec.configs"))) / "prompts.jsonl").open():
        ids = lm.encode(5 * (json.loads(line)["prompt"] + " "))
        some = [lm.decode(ids[first : first + 62]) for first in range(4)]
        given += [text for text in some if len(lm.encode(text)) == 62]
    texts = worded.lines(tmp_path / "texts.jsonl", [{"text": text} for text in given])
    few = {"depth": 2, "steps": 12, "batch_tokens": 512, "held_out": 0.2, "check_prompts": 2, "check_tokens": 8,
           "check_temperatures": [0.0], "block": "dense", "device": GPU}  # fmt: skip
    alone = mtp_spec.train("demo", tmp_path / "alone", texts=texts, **few)
    (one,), (other,) = together("demo", json.dumps(few), texts)
    assert one == other
    assert one[1] == pytest.approx([line["loss"] for line in alone.log], rel=0.02)
