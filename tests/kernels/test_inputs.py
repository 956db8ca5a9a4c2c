"""Wrong arguments of the kernels' wrappers: each is refused with what was given and what is expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtp_spec.kernels import commit, fp8, gemm, mla, moe, quant, sampler
from mtp_spec.kernels.mla import Layout, new_caches

A, A_SCALE = fp8.act_quant(torch.randn(3, 256))
W, W_SCALE = fp8.weight_quant(torch.randn(128, 256))
X, NORM = torch.randn(3, 256).bfloat16(), torch.ones(256).bfloat16()
GATE_UP, DOWN = torch.zeros(4, 256, 256).to(fp8.E4M3), torch.zeros(4, 256, 128).to(fp8.E4M3)
EXPERTS = moe.Experts(GATE_UP, torch.ones(4, 2, 2), DOWN, torch.ones(4, 2, 1))
CHOSEN = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
CACHES = new_caches(1, 64, 0, Layout(32, 16), "cpu")
LOGITS, ZERO = torch.randn(2, 50), torch.zeros(2, dtype=torch.int32)
VALUES = torch.tensor([sampler.settings_row()], dtype=torch.float64)
SETTINGS = sampler.Settings(VALUES, torch.zeros(1, dtype=torch.int64))


def _sample(logits: torch.Tensor = LOGITS, request: torch.Tensor = ZERO, **more: Any) -> object:
    return sampler.sample(logits, request, ZERO.long(), SETTINGS, sampler.Stages(), **more)


def _accept(**changed: torch.Tensor) -> object:
    given = {
        "drawn": ZERO, "failed": ZERO, "ids": ZERO.long(), "parents": ZERO - 1, "path": torch.zeros(1, 3).long(),
        "tokens": torch.zeros(1, 3).long(), "record": torch.zeros(1, commit.record_size(3), dtype=torch.int32),
    }  # fmt: skip
    return commit.accept(**(given | changed))


def _keep(**changed: torch.Tensor) -> object:
    given = {
        "outputs": X[:1], "tokens": ZERO.long()[None], "length": ZERO[:1], "hidden": X[None], "ring": X[None].clone(),
        "ring_tokens": torch.zeros(1, 3).long(),
    }  # fmt: skip
    return commit.keep(**(given | changed))


def _commit(*layers: int, pages: torch.Tensor | None = None) -> object:
    caches = new_caches(4, 64, 0, Layout(32, 16), "cpu")
    path, record = torch.zeros(1, 3).long(), torch.zeros(1, commit.record_size(3), dtype=torch.int32)
    return commit.commit([caches[layer] for layer in layers], ZERO[:1], path, record, pages)


def _attend(pages: torch.Tensor) -> object:
    head = mla.Head(16, 32, 16, 32, 32, 0.1)
    plan = mla.Plan(ZERO[:1], ZERO[:1], ZERO[:1], None, 0, pages=pages)
    return mla.attend(torch.zeros(1, 16, 48).bfloat16(), new_caches(1, 128, 0, head.layout(), "cpu")[0], plan, head)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "scales in another dtype": (lambda: gemm.fp8_gemm(A, A_SCALE.double(), W, W_SCALE), "a_scale is .* float64"),
    "scales of another size": (lambda: gemm.fp8_gemm(A, A_SCALE, W, W_SCALE[:, :1]), "w_scale is .1, 1."),
    "an output of another size": (lambda: gemm.fp8_gemm(A, A_SCALE, W, W_SCALE, torch.empty(3, 64)), "out is .3, 64."),
    "inner sizes": (lambda: gemm.bf16_gemm(X, torch.zeros(4, 128).bfloat16()), "differ in their inner size"),
    "a transposed operand": (lambda: gemm.bf16_gemm(X.T.contiguous().T, X), "a is .*not contiguous"),
    "a residual in another dtype": (lambda: quant.rms_norm(X, NORM, 1e-6, X.float()), "residual is .* float32"),
    "a norm of another size": (lambda: quant.rms_norm_quant(X, NORM[:128], 1e-6), "weight is .128."),
    "an odd pair of gate and up": (lambda: quant.silu_mul_quant(X[:, :255].contiguous()), "gate and up of one size"),
    "a vector": (lambda: quant.quant(X[0]), "x is .256."),
    "experts' numbers as int64": (lambda: moe.experts(X, CHOSEN[0].long(), CHOSEN[1], EXPERTS), "indices is .* int64"),
    "too few channels": (lambda: moe.experts(X[:, :128].contiguous(), *CHOSEN, EXPERTS), "x is .3, 128."),
    "requests as int64": (lambda: _sample(request=ZERO.long()), "request is .* int64"),
    "logits in float64": (lambda: _sample(LOGITS.double()), "logits is .* float64"),
    "more tokens than there are": (lambda: _sample(best=51), "best=51"),
    "parents of too many rows": (lambda: _accept(parents=torch.zeros(5, dtype=torch.int32)), "ids is .2."),
    "a ring of another width": (lambda: _keep(ring=X[None, :, :128].contiguous()), "ring is .1, 3, 128."),
    "more tokens than the ring": (lambda: _keep(ring_tokens=torch.zeros(1, 4).long()), "ring_tokens is .1, 4."),
    "a record of another size": (lambda: _accept(record=torch.zeros(1, 4, dtype=torch.int32)), "record is .1, 4."),
    "records of fewer texts": (lambda: _accept(path=torch.zeros(2, 3).long(), parents=ZERO[:1]), "tokens is .1, 3."),
    "caches at unequal distances": (lambda: _commit(3, 1, 2), "unequal distances"),
    "pages of fewer texts": (lambda: _commit(1, 2, 3, pages=torch.zeros(2, 1).int()), "pages is .2, 1."),
    "numbers of pages as int32": (lambda: commit.clean(CACHES, ZERO), "pages is .* int32"),
    "too few pages": (lambda: _attend(torch.zeros(1, 1).int()), "pages is .1, 1."),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()
