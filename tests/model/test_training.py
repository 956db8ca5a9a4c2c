"""Training's forward: inference's logits, gradients by finite differences, and a module that learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from mtp_spec.analysis.scoring import score_ids
from mtp_spec.bench.train import PARTS
from mtp_spec.cli.main import main
from mtp_spec.model.attention import plan_drafts, plan_rows
from mtp_spec.model.checkpoint.folder import load_checkpoint
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.distributed.group import Ranks
from mtp_spec.model.moe import Gate, row_products
from mtp_spec.model.training import (
    TrainingForward,
    chosen_experts,
    chosen_only,
    distil_loss,
    every_expert,
    grouped,
    joint_loss,
)
from mtp_spec.model.transformer import Transformer

IDS = [(37 * i + 11) % 96 for i in range(40)]
DEPTHS = (0.5, 0.3, 0.2)
CONFIG = ModelConfig(
    vocab_size=13, hidden_size=8, intermediate_size=12, moe_intermediate_size=6, num_hidden_layers=2,
    num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=2, topk_group=1,
    first_k_dense_replace=1, q_lora_rank=6, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=3,
    num_nextn_predict_layers=1, max_position_embeddings=64,
)  # fmt: skip


def random_model(config: ModelConfig = CONFIG, seed: int = 0) -> Transformer:
    model = Transformer(config, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, slot in model.checkpoint_slots().items():
            values = torch.randn(slot.shape, generator=generator)
            slot.copy_(1 + 0.1 * values if "norm" in name else values * slot.shape[-1] ** -0.5)
    return model


def some_ids(model: Transformer, rows: int, tokens: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


@pytest.fixture(scope="module", params=list(tiny.KINDS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    made = tiny.make(tmp_path_factory.mktemp("tiny") / "model", request.param, seed=3)
    return load_checkpoint(made.folder, dtype=torch.float32)


def test_logits_are_those_of_inference(model: Transformer) -> None:
    forward, expected = TrainingForward(model), score_ids(model, IDS)
    ids = torch.tensor([IDS, IDS[::-1]])  # another row beside it
    hidden = forward.hidden(ids)
    close(forward.logits(hidden)[0], expected.logits)
    for module in range(len(model.mtp)):
        depth = module + 1
        hidden = forward.mtp_hidden(module, ids[:, depth:], hidden[:, : len(IDS) - depth], depth)
        close(forward.mtp_logits(module, hidden)[0], expected.mtp_logits[module, : len(IDS) - depth])


def test_modules_see_what_they_see_when_they_draft(model: Transformer) -> None:
    """Row t of each depth against a draft there: a module's rows of the text, then the draft's own ancestors."""
    if not model.mtp:
        pytest.skip("this kind has no MTP module")
    depths, last, modules = 4, 20, len(model.mtp)
    forward, rows = TrainingForward(model), last + 1
    with torch.inference_mode():
        ids = torch.tensor([IDS])
        hidden = forward.hidden(ids)
        logits = [
            forward.mtp_logits(min(depth, modules) - 1, deeper)[0, last]
            for depth, deeper in forward.drafts(ids, hidden, depths)
        ]
        table, given, theirs, slots = model.table(64), hidden[0, :rows], list[Tensor](), list[int]()
        caches = [model.new_mtp_cache(64) for _ in model.mtp]
        for module, cache in enumerate(caches):  # the text, as far as its next tokens are known
            plan = plan_rows(table, 0, range(-1, rows - module - 1), module + 1)
            given = model.mtp_rows(module, IDS[module + 1 : rows + 1], given[: rows - module], cache, plan)
            cache.commit(range(rows - module))
            if not module:
                output = given[last:]
                theirs.append(model.module_logits(0, output)[0])
        for depth in range(2, depths + 1):
            module = min(depth, modules) - 1
            cache = caches[module]
            slots = slots if depth > modules else []
            start = cache.length + len(slots)
            plan = plan_drafts(table, start, cache.length, last + depth, [tuple(slots)])
            output = model.mtp_rows(module, [IDS[last + depth]], output, cache, plan)
            slots.append(start)
            theirs.append(model.module_logits(module, output)[0])
    close(torch.stack(logits), torch.stack(theirs))


@pytest.mark.parametrize("rows", [1, 50])
def test_many_experts_run_in_one_product(rows: int) -> None:
    """The sums and gradients of one product for each, in bfloat16, with experts that nobody chose."""
    config = replace(CONFIG, n_routed_experts=24, n_group=1, topk_group=1, num_experts_per_tok=3, hidden_size=32,
                     moe_intermediate_size=16)  # fmt: skip
    mlp: Any = random_model(config).bfloat16().blocks()[1].mlp
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(6)).bfloat16()
    indices = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(row))[:3] for row in range(rows)])
    weights = torch.rand(rows, 3, generator=torch.Generator().manual_seed(7))
    results = []
    for together in (False, True):
        given, by = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = grouped(given, mlp.gate_up, mlp.down, by, indices) if together else chosen_only(mlp, given, by, indices)
        results.append((out, *torch.autograd.grad(out.float().sin().sum(), [given, by, mlp.gate_up, mlp.down])))
    for one, other in zip(*results, strict=True):
        assert (one - other).float().norm().item() <= 0.02 * other.float().norm().item()


@pytest.mark.parametrize("rows", [1, 7])
def test_many_experts_run_on_their_own_rows(rows: int) -> None:
    """The same sums and gradients as when every expert runs on every row, with experts that nobody chose."""
    config = replace(CONFIG, n_routed_experts=24, n_group=1, topk_group=1, num_experts_per_tok=3)
    mlp: Any = random_model(config).double().blocks()[1].mlp
    x = torch.randn(rows, CONFIG.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    results = []
    for many in (False, True):
        given = x.clone().requires_grad_()
        weights, indices = chosen_experts(mlp.gate, given)
        if many:
            out = chosen_only(mlp, given, weights, indices)
        else:
            out = every_expert(mlp, given, weights.new_zeros(rows, 24).scatter(1, indices, weights))
        gradients = torch.autograd.grad(out.sin().sum(), [given, mlp.gate_up, mlp.down, mlp.gate.weight])
        results.append((out, *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_gate_chooses_as_inference_does(model: Transformer) -> None:
    for block in TrainingForward(model).blocks:
        gate = getattr(block.mlp, "gate", None)
        if gate is None:
            continue
        x = torch.randn(30, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
        weights, indices = chosen_experts(gate, x)
        expected_weights, expected = gate.choose(x)
        assert indices.tolist() == expected
        torch.testing.assert_close(weights, torch.tensor(expected_weights, dtype=torch.float32))


def chosen_row(scores: list[float], choice: list[float], config: ModelConfig) -> tuple[list[float], list[int]]:
    """Returns a row's weights and experts as the V3 report words it (eq. 12-16), in plain Python."""
    allowed = list(range(len(choice)))
    if config.topk_method != "greedy":
        size = len(choice) // config.n_group
        groups = [range(first, first + size) for first in range(0, len(choice), size)]
        best_of = 2 if config.topk_method == "noaux_tc" else 1
        worth = [sum(sorted(choice[e] for e in group)[-best_of:]) for group in groups]
        best = sorted(range(len(groups)), key=lambda g: -worth[g])[: config.topk_group]
        allowed = sorted(e for g in best for e in groups[g])
    indices = sorted(sorted(allowed, key=lambda e: -choice[e])[: config.num_experts_per_tok])
    total, scale = 0.0, config.routed_scaling_factor
    for expert in indices:  # one by one: Python's sum() rounds otherwise from 3.12 on
        total += scores[expert]
    if config.norm_topk_prob and not config.is_v2:
        scale /= total + 1e-20
    return [scores[e] * scale for e in indices], indices


@pytest.mark.parametrize("method", ["noaux_tc", "group_limited_greedy", "greedy"])
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_the_gate_chooses_each_row_as_the_paper_words_it(scoring: str, method: str) -> None:
    """Bit for bit, with equals among the experts, alone and beside other rows."""
    config = replace(CONFIG, scoring_func=scoring, topk_method=method, n_routed_experts=24, n_group=4, topk_group=2,
                     num_experts_per_tok=5)  # fmt: skip
    gate, x = Gate(config, "cpu"), torch.randn(17, config.hidden_size, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        gate.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
        gate.weight[3::4] = gate.weight[0]
        if gate.e_score_correction_bias is not None:
            gate.e_score_correction_bias.copy_(0.01 * (torch.arange(24) % 3))
    logits = row_products(x, gate.weight).detach().numpy()
    if scoring == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    bias = gate.e_score_correction_bias
    choice = scores if bias is None else scores + bias.numpy()
    expected = [chosen_row(*row, config) for row in zip(scores.tolist(), choice.tolist(), strict=True)]
    weights, indices = gate.choose(x)
    assert list(zip(weights, indices, strict=True)) == expected
    alone = [gate.choose(row[None]) for row in x]
    assert [(own, experts) for (own,), (experts,) in alone] == expected


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("which", ["joint", "distil"])
def test_gradients_are_finite_differences(which: str, scoring: str) -> None:
    """Of every parameter, along a random direction, in float64."""
    model = random_model(replace(CONFIG, scoring_func=scoring)).double()
    forward, ids = TrainingForward(model), some_ids(model, 2, 9)
    weights = torch.rand(ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():  # another model's, so that the loss is not at its lowest
        target = torch.randn(*ids.shape, CONFIG.vocab_size, dtype=torch.float64).log_softmax(-1)

    def loss() -> Tensor:
        if which == "joint":
            return joint_loss(forward, ids, weights, torch.tensor(0.3, dtype=torch.float64))[0]
        return distil_loss(forward, ids, weights, forward.hidden(ids), target, DEPTHS)

    loss().backward()
    checked, step = 0, 1e-6
    for name, parameter in model.named_parameters():
        if parameter.grad is None:  # a final norm that the loss does not pass
            assert which == "distil"
            continue
        direction = torch.randn(parameter.shape, dtype=torch.float64)
        direction /= direction.norm()
        with torch.no_grad():
            parameter.add_(step * direction)
            above = loss()
            parameter.sub_(2 * step * direction)
            below = loss()
            parameter.add_(step * direction)
        found, expected = float((above - below) / (2 * step)), float((parameter.grad * direction).sum())
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-8), name
        checked += abs(expected) > 1e-6
    assert checked > 20


def test_a_module_learns_and_the_frozen_model_stays() -> None:
    model = random_model(replace(CONFIG, vocab_size=32, hidden_size=32, kv_lora_rank=16, q_lora_rank=16), seed=4)
    model.requires_grad_(False)
    model.mtp.requires_grad_(True)
    before = {name: slot.clone() for name, slot in model.checkpoint_slots().items()}
    forward, ids = TrainingForward(model), some_ids(model, 8, 24)
    with torch.no_grad():
        hidden = forward.hidden(ids)
        target = forward.logits(hidden).log_softmax(-1)
    optimiser = torch.optim.AdamW(model.mtp.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = distil_loss(forward, ids, torch.ones(ids.shape), hidden, target, DEPTHS)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    layers = model.config.num_hidden_layers
    changed = {name for name, slot in model.checkpoint_slots().items() if not torch.equal(slot, before[name])}
    assert changed
    assert all(name.startswith(f"model.layers.{layers}.") for name in changed)
    # what was learnt is there for inference
    ours = forward.mtp_logits(0, forward.mtp_hidden(0, ids[:1, 1:], hidden[:1, :-1], 1))[0].detach()
    close(ours, score_ids(model, ids[0].tolist()).mtp_logits[0, :-1])


class Counted(TorchDispatchMode):
    """Counts torch's operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradients", [False, True])
def test_operations_do_not_grow_with_the_batch(gradients: bool) -> None:
    """Also of a frozen model: one product a row made a step a hundred times as long."""
    model = random_model().requires_grad_(gradients)
    forward, counts = TrainingForward(model), []
    for rows, tokens in ((1, 8), (5, 30)):
        ids = some_ids(model, rows, tokens)
        model.table(tokens)
        with torch.set_grad_enabled(gradients), Counted() as counted:
            forward.mtp_hidden(0, ids, forward.hidden(ids), 1)
        counts.append(counted.count)
    assert counts[0] == counts[1]


def test_loads_are_counted_with_gradients_and_balanced() -> None:
    model = random_model()
    forward, ids = TrainingForward(model), some_ids(model, 3, 20)
    with torch.no_grad():
        forward.hidden(ids)
    dense, mixed, module = forward.load
    assert dense is None
    assert mixed is not None
    assert module is not None
    assert mixed.sum() == 0
    gate: Any = model.blocks()[1].mlp.gate
    forward.hidden(ids)
    assert mixed.sum() == 3 * 20 * CONFIG.num_experts_per_tok
    assert module.sum() == 0
    load, before = mixed.clone(), gate.e_score_correction_bias.clone()
    assert float(forward.balance(0.01)) == pytest.approx(float(load.max() / load.mean()))
    assert torch.equal((gate.e_score_correction_bias - before).sign(), (load.mean() - load).sign())
    assert mixed.sum() == 0


def test_balance_needs_a_bias() -> None:
    forward = TrainingForward(random_model(replace(CONFIG, topk_method="greedy", scoring_func="softmax")))
    with pytest.raises(ValueError, match="no bias"):
        forward.balance(0.01)


def test_dropout_is_of_training_alone() -> None:
    model = random_model().requires_grad_(False)
    forward, ids = TrainingForward(model, dropout=0.5), some_ids(model, 2, 10)
    torch.manual_seed(0)
    assert not torch.equal(forward.hidden(ids), forward.hidden(ids))
    scores = score_ids(model, ids[0].tolist())  # inference has none
    forward.dropout = 0.0
    close(forward.logits(forward.hidden(ids))[0], scores.logits)


def test_bfloat16_autocast_is_near() -> None:
    model = random_model().requires_grad_(False)
    forward, ids = TrainingForward(model), some_ids(model, 2, 12)
    exact = forward.logits(forward.hidden(ids))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = forward.logits(forward.hidden(ids))
        gate: Any = model.blocks()[1].mlp.gate
        x = torch.randn(40, CONFIG.hidden_size)
        assert chosen_experts(gate, x)[0].dtype == torch.float32
        assert chosen_experts(gate, x)[1].tolist() == gate.choose(x)[1]
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_a_ranks_part_is_refused() -> None:
    part = Transformer(replace(CONFIG, vocab_size=14), torch.float32, "meta", Ranks(size=2))
    with pytest.raises(ValueError, match="one of 2 ranks' parts"):
        TrainingForward(part)


@pytest.mark.parametrize("block", ["shipped", "dense"])
def test_bench_train(tmp_path: Path, capsys: pytest.CaptureFixture[str], block: str) -> None:
    tiny.make(tmp_path / "model", "v3")
    few = ["--batch", "2", "--context", "16", "--depths", "3", "--repeats", "3", "--block", block]
    main(["bench", "train", "--model", str(tmp_path / "model"), *few, "--json", str(tmp_path / "train.json")])
    document = json.loads((tmp_path / "train.json").read_text())
    *parts, whole = document["rows"]
    assert [row["part"] for row in parts] == list(PARTS)
    assert document["loss last"] < document["loss first"]
    assert len(document["steps ms"]) == 3
    assert whole["tokens a second"] == pytest.approx(2 * 16 / whole["ms"] * 1e3)
    assert "a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("v2", [], "has no MTP module to train: give --block dense or moe"),
        ("v3", ["--context", "4"], "give more tokens than the 4"),
        ("v3", ["--context", "257"], "the model's limit is 256"),
    ],
)
def test_bench_train_refuses_before_it_reads_weights(
    tmp_path: Path, kind: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tiny.make(tmp_path / "model", kind)
    monkeypatch.delattr("mtp_spec.load")
    with pytest.raises(SystemExit):
        main(["bench", "train", "--model", str(tmp_path / "model"), *arguments])
    assert message in capsys.readouterr().err
