"""What kernels make of numbers that are none; for interpreted.py, which runs them."""

from __future__ import annotations

import torch

from mtp_spec.kernels import moe
from mtp_spec.kernels.moe import gate, gate_reference


def unsound_gates(routing: moe.Routing, x: torch.Tensor, router: torch.Tensor, bias: torch.Tensor) -> None:
    """A row whose gate is not finite has weights of NaN, and no other row."""
    indices, expected = gate(x, router, bias, routing)
    wrong, bad = x.clone(), [3, 5, 8]
    wrong[bad, 7] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=x.device)
    sound = [row for row in range(len(x)) if row not in bad]
    for kernel in (gate, gate_reference):
        found, weights = kernel(wrong, router, bias, routing)
        assert bool(weights[bad, : routing.chosen].isnan().all()), kernel
        assert int(found.min()) >= 0
        assert int(found.max()) <= routing.experts
        assert torch.equal(found[sound], indices[sound])
        torch.testing.assert_close(weights[sound], expected[sound], rtol=1e-5, atol=1e-6)
    spoilt = bias.clone()
    spoilt[2] = torch.inf
    assert bool(gate(x, router, spoilt, routing)[1][:, : routing.chosen].isnan().all())
