"""Attention of drafts by its parts is attention over all depths' keys with a mask, gradients included."""

from __future__ import annotations

import pytest
import torch

from mtp_spec.model.draft_attention import draft_attention, draft_attention_reference


@pytest.mark.parametrize("depths", [2, 5])
def test_parts_are_joined_as_one_softmax(depths: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape, scale = (2, 3, 17, 8), 0.7

    def given(size: float = 1.0) -> torch.Tensor:
        return (size * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()

    # some later depths weigh almost all, and some nothing
    q, pairs = given(3.0), [(given(4.0 if depth % 2 else 1.0), given()) for depth in range(depths)]
    outs = [way(q, pairs, scale) for way in (draft_attention, draft_attention_reference)]
    torch.testing.assert_close(*outs)
    tensors = [q, *(tensor for pair in pairs for tensor in pair)]
    gradients = [torch.autograd.grad(out.sin().sum(), tensors) for out in outs]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
def test_parts_are_joined_on_a_gpu() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 300, 4, 192, device="cuda").bfloat16().transpose(1, 2).requires_grad_() for _ in range(7)]
    q, pairs = tensors[0], list(zip(tensors[1::2], tensors[2::2], strict=True))
    found = []
    for way in (draft_attention, draft_attention_reference):
        out = way(q, pairs, 0.1)
        found.append([out, *torch.autograd.grad(out.float().sin().sum(), tensors)])
    for one, other in zip(*found, strict=True):
        assert (one.float() - other.float()).norm() / other.float().norm() < 0.02
