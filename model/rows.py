"""Verifies the rows of a draft tree, each as plain decoding computes it.

A library's matrix products choose their loops by the number of rows, so a token verified in a tree can differ in its
last bit from the same token decoded alone, and a tie broken the other way changes the text. On the CPU engine and the
GPU kernels, a row's bits do not depend on the other rows. With torch, each row takes a forward pass of its own, which
is exact by construction and costs as much as the decode steps that it replaces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtp_spec.model.attention import JointPlan, plan_rows
from mtp_spec.model.cache import LatentCache
from mtp_spec.model.host import HostModel, Technique


def verify_rows(
    model: HostModel,
    ids: Sequence[int],
    cache: LatentCache,
    parents: Sequence[int],
    technique: Technique,
) -> Tensor:
    """Returns the normed hidden states `[M, D]` of a tree's rows, each as plain decoding computes it."""
    if technique == "batched" or len(ids) == 1:
        return model.rows(ids, cache, parents)
    plan = plan_rows(model.table(cache.capacity), cache.length, parents)
    hidden = []
    for row, token in enumerate(ids):
        hidden.append(model.joint_rows([token], JointPlan.of((cache, plan.row(row)))))
    return torch.cat(hidden)


def row_logits(model: HostModel, hidden: Tensor, technique: Technique) -> Tensor:
    """Returns logits `[M, V]` in the model's dtype, by the same technique."""
    if technique == "batched" or hidden.shape[0] == 1:
        return model.logits(hidden)
    return torch.cat([model.logits(row) for row in hidden.split(1)])
