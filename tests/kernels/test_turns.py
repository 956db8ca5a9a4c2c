"""Attention in several turns, where the partial results of all rows do not fit."""

from __future__ import annotations

import pytest
import torch

from mtp_spec.kernels import mla
from mtp_spec.kernels.launching import MULTIPROCESSORS
from mtp_spec.kernels.mla import attention
from mtp_spec.kernels.mla.plan import TILE, split_of


def test_turns_have_tiles_that_fill_the_card() -> None:
    for most in range(1, 600):
        tiles = attention.filling(most)
        assert most / 2 < tiles <= most  # few turns
        waves = -(-tiles // MULTIPROCESSORS)
        assert tiles * max(1, MULTIPROCESSORS // tiles) >= 0.9 * waves * MULTIPROCESSORS, most


@pytest.mark.parametrize(
    ("heads", "rows", "sequences", "context"),
    [(128, 256, 1, 32768), (128, 256, 1, 131072), (128, 1, 64, 65536), (128, 3, 64, 40000), (16, 16, 64, 131072),
     (20, 256, 1, 160000), (128, 16, 4, 1_000_000), (128, 64, 2, 16_000_000)],
)  # fmt: skip
def test_turns_have_every_row_once(heads: int, rows: int, sequences: int, context: int) -> None:
    head = mla.Head(heads, 128, 64, 512, 128, 1.0)
    splits = split_of(context - 1, head.split_ends) + 1
    length = torch.full((sequences,), context - rows, dtype=torch.int32)
    plan = mla.chain(length, rows)
    turns = list(attention._turns(plan, head, splits))
    taken = [row for part, _ in turns for row in range(*part.indices(sequences * rows))]
    assert taken == list(range(sequences * rows))
    assert all(part.rows == len(range(*own.indices(plan.rows))) for own, part in turns)
    for _, part in turns:  # a single row may take more than the limit
        pairs = part.sequences * -(-part.each * head.padded // TILE) * TILE
        assert pairs * splits * head.latent * 2 <= attention.PARTS_BYTES or part.rows == 1
