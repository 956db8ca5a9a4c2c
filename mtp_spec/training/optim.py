"""The optimiser: Muon (Jordan et al., 2024) for matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Returns about the nearest semi-orthogonal matrices of g `[N, R, C]`, by a quintic iteration in bfloat16."""
    x = g.bfloat16() if g.is_cuda else g
    wide = x.shape[-2] > x.shape[-1]
    x = x.mT if wide else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if wide else x).to(g.dtype)


class Optimiser:
    """Muon for matrices and AdamW for everything else, or AdamW for all.

    Muon's iteration costs as much as some thousand tokens of training, whatever the batch: it pays on a GPU, in large
    batches. Matrices of equal shape go through it together.

    Args:
        named: the parameters to train, with their names.
        lr: of Muon; 0 leaves all parameters to AdamW.
        decay: Muon's decoupled weight decay, in units of lr.
        adam_lr: of AdamW.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], lr: float, decay: float, adam_lr: float) -> None:
        self.lr, self.decay, self.adam_lr, self.momentum = lr, decay, adam_lr, 0.95
        self.groups: dict[torch.Size, list[nn.Parameter]] = {}
        others: list[nn.Parameter] = []
        for name, p in named:
            if not lr or p.dim() < 2 or any(part in name for part in ("embed_tokens", "lm_head", "gate.weight")):
                others.append(p)
            else:
                self.groups.setdefault(p.shape, []).append(p)
        self.momenta = {shape: [torch.zeros_like(p) for p in params] for shape, params in self.groups.items()}
        # fused, it counts steps and reads its rate on the device
        fused = all(p.is_cuda for p in others) or None
        self.adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)

    @torch.no_grad()
    def step(self, scale: float | Tensor) -> None:
        """Updates with learning rates times `scale`, and clears the gradients.

        Args:
            scale: a number, or a scalar on a GPU: with that the step can be captured, for rates of every size.
        """
        capturing = isinstance(scale, Tensor) and scale.is_cuda and torch.cuda.is_current_stream_capturing()
        for group in self.adam.param_groups:
            group["lr"] = scale * self.adam_lr
            group["capturable"] = capturing
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        lr = self.lr * scale
        for shape, params in self.groups.items():
            grads = [p.grad for p in params if p.grad is not None]
            momentum = self.momenta[shape]
            torch._foreach_lerp_(momentum, grads, 1 - self.momentum)
            ahead = torch.stack(torch._foreach_lerp(grads, momentum, self.momentum))  # Nesterov
            update = newton_schulz(ahead.flatten(0, -3)).view(len(params), *shape)
            torch._foreach_mul_(list[Tensor](params), 1 - lr * self.decay)
            rate = lr * max(1.0, shape[-2] / shape[-1]) ** 0.5
            if isinstance(rate, Tensor):
                torch._foreach_sub_(list[Tensor](params), list((update * rate).unbind()))
            else:
                torch._foreach_add_(list[Tensor](params), list(update.unbind()), alpha=-rate)
            for p in params:
                p.grad = None

    def state(self) -> dict[str, Any]:
        """Returns everything that the next step depends on besides parameters and gradients."""
        return {"momenta": list(self.momenta.values()), "adam": self.adam.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes the state that `state` returned, not its rates and its kind of arithmetic, into new tensors."""
        for own, saved in zip(self.momenta.values(), state["momenta"], strict=True):
            torch._foreach_copy_(own, saved)
        self.adam.load_state_dict({**state["adam"], "param_groups": self.adam.state_dict()["param_groups"]})
