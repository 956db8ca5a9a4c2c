"""What kernels make of numbers that are none; for interpreted.py, which runs them."""

from __future__ import annotations

import torch

from mtp_spec.kernels import moe
from mtp_spec.kernels.moe_route import gate, gate_reference


def unsound_gates(routing: moe.Routing, x: torch.Tensor, router: torch.Tensor, bias: torch.Tensor) -> None:
    """A row whose gate is not finite has weights of NaN, and no other row."""
    indices, expected = gate(x, router, bias, routing)
    for bad in (float("nan"), float("inf"), -float("inf")):
        wrong = x.clone()
        wrong[3, 7] = bad
        for kernel in (gate, gate_reference):
            found, weights = kernel(wrong, router, bias, routing)
            assert bool(weights[3, : routing.chosen].isnan().all()), (kernel, bad)
            assert int(found.min()) >= 0
            assert int(found.max()) <= routing.experts
            for rows in (slice(0, 3), slice(4, None)):
                assert torch.equal(found[rows], indices[rows])
                torch.testing.assert_close(weights[rows], expected[rows], rtol=1e-5, atol=1e-6)
        spoilt = bias.clone()
        spoilt[2] = bad
        assert bool(gate(x, router, spoilt, routing)[1][:, : routing.chosen].isnan().all())
