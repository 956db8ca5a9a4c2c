"""The loss of drafts: its values and gradients against plain formulas, and what it leaves out."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_spec.errors import OptionError
from mtp_spec.model.config import ModelConfig, ModuleShape
from mtp_spec.model.training import ModulesForward
from mtp_spec.model.transformer import Transformer
from mtp_spec.training import objective
from mtp_spec.training.objective import Objective, draft_loss

CONFIG = ModelConfig(
    vocab_size=13, hidden_size=8, intermediate_size=12, moe_intermediate_size=6, num_hidden_layers=1,
    num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=2, topk_group=1,
    first_k_dense_replace=1, q_lora_rank=6, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=3,
    num_nextn_predict_layers=1, max_position_embeddings=64,
)  # fmt: skip


def random_forward(modules: int = 1, width: int | None = None, own: bool = False) -> ModulesForward:
    shapes = (ModuleShape(intermediate_size=width, own_embedding=own, own_head=own),) * modules
    model = Transformer(replace(CONFIG, num_nextn_predict_layers=modules, modules=shapes), torch.float32).double()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, slot in model.checkpoint_slots().items():
            slot.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name else slot.shape[-1] ** -0.5)
    for weight in (model.embed_tokens, model.lm_head, *(module.head for module in model.mtp)):
        if weight is not None:
            weight.requires_grad_(False)
    return ModulesForward(list(model.mtp), model.embed_tokens, model.lm_head, model.table)


def batch(depth: int, rows: int = 2, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Returns texts of 9 and 6 tokens, of which the first three are a prompt, and padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(CONFIG.vocab_size, (rows, tokens + depth), generator=generator)
    hidden = torch.randn(rows, tokens + depth, CONFIG.hidden_size, dtype=torch.float64, generator=generator)
    weights = torch.zeros(rows, tokens + depth, dtype=torch.float64)
    weights[0, 2 : tokens - 1] = 1
    weights[1, 2:5] = 0.5
    return ids, hidden, weights


def plainly(forward: ModulesForward, loss: Objective, ids: Tensor, hidden: Tensor, weights: Tensor) -> list[Tensor]:
    """Returns loss, weights, greedy matches and overlaps, row by row, from whole logits."""
    depths, total = len(loss.depths), torch.zeros((), dtype=torch.float64)
    rows, greedy, overlap = (torch.zeros(depths, dtype=torch.float64) for _ in range(3))
    for depth, output in forward.drafts(ids, hidden, depths):
        module = min(depth, len(forward.modules)) - 1
        q = F.linear(output, forward.head_of(module)).softmax(-1)
        each = []
        for text, at in product(range(len(ids)), range(output.shape[1])):
            weight = weights[text, at + depth]
            p, own = (hidden[text, at + depth] @ forward.head.T).softmax(-1), q[text, at]
            tv = (p - own).abs().sum() / 2
            kl = (p * (p.log() - own.log())).sum()
            ce = -own[ids[text, at + depth + 1]].log() if weight else 0.0
            each.append(weight * (loss.ce * ce + loss.kl * kl + loss.tv * tv))
            rows[depth - 1] += weight
            greedy[depth - 1] += weight * (p.argmax() == own.argmax())
            overlap[depth - 1] += weight * torch.minimum(p, own).sum().detach()
        total = total + loss.depths[depth - 1] * torch.stack(each).sum() / rows[depth - 1].clone()
    return [total, rows, greedy, overlap]


@pytest.mark.parametrize(("modules", "own"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("parts", ["ce", "kl", "tv", "tv:0.9,ce:0.1", "kl:2,tv,ce:0.5"])
def test_values_and_gradients_are_those_of_the_formula(
    parts: str, modules: int, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With heads that modules share with the model, and with their own."""
    monkeypatch.setitem(objective.CHUNK, "cpu", 3 * CONFIG.vocab_size)  # three rows at a time
    forward, loss = random_forward(modules, own=own), Objective.of(parts, 3, 0.7)
    given = batch(3)
    outcome = draft_loss(forward, loss, *given)
    expected = plainly(forward, loss, *given)
    found = [outcome.loss, outcome.rows, outcome.greedy, outcome.overlap]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    parameters = [p for module in forward.modules for p in module.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected[0], parameters, allow_unused=True)
    gradients = torch.autograd.grad(outcome.loss, parameters, allow_unused=True)
    assert sum(one is not None for one in gradients) > 10
    for one, other in zip(gradients, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("width", [None, 20])
def test_gradients_are_finite_differences(width: int | None) -> None:
    forward, loss = random_forward(width=width), Objective.of("kl,tv,ce", 3, 0.8)
    given = batch(3)
    draft_loss(forward, loss, *given).loss.backward()
    torch.manual_seed(5)
    checked, step = 0, 1e-6
    for name, parameter in forward.modules[0].named_parameters():
        if not parameter.requires_grad:
            continue
        direction = F.normalize(torch.randn(parameter.shape, dtype=torch.float64), dim=None)
        losses = []
        with torch.no_grad():
            for move in (step, -2 * step, step):
                parameter.add_(move * direction)
                losses.append(draft_loss(forward, loss, *given).loss)
        assert parameter.grad is not None, name
        found, expected = float((losses[0] - losses[1]) / (2 * step)), float((parameter.grad * direction).sum())
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-8), name
        checked += abs(expected) > 1e-6
    assert checked > 8


def test_padding_and_prompts_change_nothing() -> None:
    forward, loss = random_forward(), Objective.of("kl,tv,ce", 3, 0.8)
    ids, hidden, weights = batch(3)
    one = draft_loss(forward, loss, ids, hidden, weights).loss
    ids, hidden = ids.clone(), hidden.clone()
    ids[1, 6:], hidden[1, 6:] = 0, 7.0
    torch.testing.assert_close(draft_loss(forward, loss, ids, hidden, weights).loss, one)
    # more padding, and a text of padding alone
    wide = [F.pad(ids, (0, 4, 0, 1)), F.pad(hidden, (0, 0, 0, 4, 0, 1)), F.pad(weights, (0, 4, 0, 1))]
    torch.testing.assert_close(draft_loss(forward, loss, *wide).loss, one)
    # rows that nothing is trained on still are what later ones attend to
    hidden[0, 0] += 1.0
    assert not torch.allclose(draft_loss(forward, loss, ids, hidden, weights).loss, one)


def test_a_perfect_draft_has_no_loss() -> None:
    """Where q is p, KL and TV are zero and have no gradient; every draft is accepted."""
    head = torch.randn(13, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    same = torch.randn(1, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    target, rows, tokens = same[0].detach(), torch.ones(1, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    loss, greedy, overlap = objective._Loss.apply(
        same, target, tokens, rows, torch.ones(1), head, [head], Objective.of("kl,tv", 1, 1.0)
    )
    loss.backward()
    assert same.grad is not None
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert float(same.grad.abs().max()) < 1e-12
    assert [greedy.item(), overlap.item()] == pytest.approx([5, 5])


@pytest.mark.parametrize("loss", ["", "mse", "kl,kl", "tv:0", "ce:-1", "kl:x", "tv:nan", "kl:inf"])
def test_unknown_losses_are_refused(loss: str) -> None:
    with pytest.raises(OptionError, match="give some of ce, kl, tv, each with a positive weight"):
        Objective.of(loss, 3, 0.8)


def test_depths_are_weighted() -> None:
    assert Objective.of("kl", 3, 0.5).depths == pytest.approx((4 / 7, 2 / 7, 1 / 7))
    assert Objective.of("tv:0.9, ce:0.1", 1, 0.5) == Objective(0.1, 0.0, 0.9, (1.0,))
