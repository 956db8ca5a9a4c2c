"""Sampling in NumPy and plain torch, the reference for every kernel of `sampler`."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mtp_spec.kernels.sampler.settings import IN_PROMPT, Sampled, Settings, Stages

MASK = (1 << 64) - 1


def sample_reference(
    logits: Tensor, request: Tensor, position: Tensor, settings: Settings, stages: Stages, best: int = 1,
    path: Tensor | None = None, keep: bool = False,
) -> Sampled:  # fmt: skip
    """`sample` in plain torch, one row at a time."""
    rows, kept = [], []
    for row in range(logits.shape[0]):
        of = int(request[row])
        drafted = None if path is None else path[row]
        scores = _reference_row(logits[row].float(), of, settings, stages, drafted)
        kept.append(scores)
        if stages.noise and settings.values[of, 0] > 0 and torch.isfinite(scores.max()):
            noise = gumbel_reference(int(settings.seed[of]), int(position[row]), len(scores))
            scores = scores + noise.to(scores.device)
        failed = not bool(torch.isfinite(scores.max()))  # the maximum of a row with NaN is NaN
        value, token = scores.sort(descending=True, stable=True)
        value, token = value[:best], token[:best]
        token = torch.where(value > -math.inf, token, token[0])
        rows.append((torch.zeros_like(token) if failed else token, value, failed))
    tokens, values, bad = zip(*rows, strict=True)
    flags = torch.tensor(bad, dtype=torch.int32, device=logits.device)
    return Sampled(torch.stack(tokens).int(), torch.stack(values), flags, torch.stack(kept) if keep else None)


def _reference_row(row: Tensor, of: int, settings: Settings, stages: Stages, path: Tensor | None) -> Tensor:
    temperature, top_k, top_p, log_min_p, repetition, presence, frequency, _ = settings.values[of].tolist()
    if stages.bias and settings.bias is not None:
        row = row + settings.bias[of]
    if stages.penalty and settings.seen is not None:
        known = settings.seen[of].clone()
        for token in [] if path is None else path[path >= 0].tolist():
            known[token] += 1
        count = known & (IN_PROMPT - 1)
        repeated = torch.where(row > 0, row / repetition, row * repetition)
        row = torch.where((known > 0) & (repetition != 1.0), repeated, row)
        row = torch.where(count > 0, row - (presence + frequency * count.double()).float(), row)
    if not stages.noise or temperature == 0 or not torch.isfinite(row.max()):
        return row
    row = (row - row.max()) / max(np.float32(temperature), np.finfo(np.float32).tiny)
    if stages.top_k and 0 < top_k < len(row):
        dropped = row.argsort(descending=True, stable=True)[int(top_k) :]
        row = row.index_fill(0, dropped, -math.inf)
    if stages.top_p and top_p < 1:
        order = row.argsort(descending=True, stable=True)
        mass = row[order].exp().double().cumsum(0)
        keep = int(torch.searchsorted(mass, top_p * mass[-1])) + 1
        row = row.index_fill(0, order[keep:], -math.inf)
    if stages.min_p:
        row = row.masked_fill(row < np.float32(log_min_p), -math.inf)
    return row


def gumbel_reference(seed: int, position: int, vocabulary: int) -> Tensor:
    """A second `mtp_spec.sampling.gumbel`, since kernels do not import the library above them. Tests compare both."""
    mask = (1 << 64) - 1
    counter = np.array([0, position & mask, 0, 0], dtype=np.uint64)
    generator = np.random.Philox(key=np.array([seed & mask, 0], dtype=np.uint64), counter=counter)
    words = generator.random_raw(-(-vocabulary // 2)).astype("<u8").view("<u4")[:vocabulary]
    uniform = np.minimum((words.astype(np.float64) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    return torch.from_numpy((-np.log(-np.log(1.0 - uniform))).astype(np.float32))


def uniforms_reference(seed: int, first: int, count: int) -> Tensor:
    """`uniforms` with NumPy, which increments the counter before it generates."""
    counter = np.array([first // 4, 0, 0, 0], dtype=np.uint64)
    generator = np.random.Philox(key=np.array([seed & MASK, 1], dtype=np.uint64), counter=counter)
    words = generator.random_raw(first % 4 + count)[first % 4 :]
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)
