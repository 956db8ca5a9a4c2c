"""`bench rows`: checks that a row's result has the same bits whatever rows are verified with it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from mtp_spec.api import LM
from mtp_spec.bench import parsing
from mtp_spec.bench.common import Report, Row
from mtp_spec.bench.options import ModelBenchmark, Option
from mtp_spec.kernels import mla
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.host import HostModel, Technique
from mtp_spec.model.rows import row_logits, verify_rows

COUNTS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 32, 48, 64)
CONTEXTS = (1, 60, 250, 700)
CHILDREN = (2, 3, 5)


class _Torch:
    """A sequence on the torch path."""

    def __init__(self, model: HostModel, technique: Technique, prefix: Sequence[int], room: int) -> None:
        self.model, self.technique = model, technique
        self.cache = model.new_cache(len(prefix) + 2 * room)
        model.rows(prefix, self.cache, range(-1, len(prefix) - 1))
        self.cache.commit(range(len(prefix)))

    def together(self, ids: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Returns the logits of rows verified in one pass, whose slots are then dropped."""
        hidden = verify_rows(self.model, ids, self.cache, parents, self.technique)
        return row_logits(self.model, hidden, self.technique)

    def decode(self, token: int) -> Tensor:
        """Returns the logits of one more token."""
        logits = self.model.logits(self.model.rows([token], self.cache, [-1]))
        self.cache.commit([0])
        return logits

    def rewind(self, length: int) -> None:
        self.cache.rewind(length)


class _Device:
    """A sequence on the kernels."""

    def __init__(self, model: DeviceModel, prefix: Sequence[int], room: int) -> None:
        self.model = model
        self.caches = model.new_caches(len(prefix) + 2 * room, room)[: len(model.layers)]
        self.length = torch.zeros(1, dtype=torch.int32, device=model.device)
        self._pass(prefix, mla.chain(self.length, len(prefix)))
        self.length.fill_(len(prefix))

    def _pass(self, ids: Sequence[int], plan: mla.Plan) -> Tensor:
        hidden = self.model.rows(torch.tensor(list(ids)).to(self.model.device), self.caches, plan)
        return self.model.logits(hidden)

    def together(self, ids: Sequence[int], parents: Sequence[int]) -> Tensor:
        paths: list[list[int]] = []
        for row, parent in enumerate(parents):
            paths.append([*(paths[parent] if parent >= 0 else []), row])
        if len(paths[-1]) == len(ids):
            return self._pass(ids, mla.chain(self.length, len(ids)))
        most, device = max(map(len, paths)), self.model.device
        table = torch.tensor([path + [-1] * (most - len(path)) for path in paths], dtype=torch.int32).to(device)
        depths = torch.tensor([len(path) - 1 for path in paths], dtype=torch.int32).to(device)
        order = torch.arange(len(ids), dtype=torch.int32, device=device)
        return self._pass(ids, mla.Plan(self.length, depths, order, table, most - 1))

    def decode(self, token: int) -> Tensor:
        logits = self._pass([token], mla.chain(self.length, 1))
        self.length += 1
        return logits

    def rewind(self, length: int) -> None:
        self.length.fill_(length)


@torch.inference_mode()
def rows(lm: LM, args: argparse.Namespace) -> Report:
    """Compares, bit by bit, logits of rows verified together with those of the same rows decoded one by one."""
    threads_before = torch.get_num_threads()
    table: list[Row] = []
    try:
        for threads in args.threads if lm.model.device.type == "cpu" else args.threads[:1]:
            torch.set_num_threads(threads)
            for context in CONTEXTS:
                chains = sum(_chain_is_equal(lm, context, count) for count in COUNTS)
                trees = sum(_tree_is_equal(lm, context, children) for children in CHILDREN)
                table.append(
                    {
                        "threads": threads,
                        "rows": lm.technique,
                        "context": context,
                        "chains equal": chains,
                        "of": len(COUNTS),
                        "trees equal": trees,
                        "of trees": len(CHILDREN),
                    }
                )
    finally:
        torch.set_num_threads(threads_before)
    failed = any(row["chains equal"] < row["of"] or row["trees equal"] < row["of trees"] for row in table)
    return Report(f"Rows bitwise equal to plain decoding, 1 to {COUNTS[-1]} rows", table, failed=failed)


BENCHMARK = ModelBenchmark(
    name="rows",
    help="bitwise equality of verified and decoded rows",
    run=rows,
    options=(Option("--threads", "numbers of threads", type=parsing.integers, default=[1, 2, 3], metavar="N,..."),),
)


def _text(lm: LM, context: int, room: int) -> tuple[_Torch | _Device, list[int]]:
    """Returns a sequence of `context` tokens, and `room` further ones."""
    ids = [(7919 * i + 13 * context) % lm.config.vocab_size for i in range(context + room)]
    if isinstance(lm.model, DeviceModel):
        return _Device(lm.model, ids[:context], room), ids[context:]
    return _Torch(lm.model, lm.technique, ids[:context], room), ids[context:]


def _chain_is_equal(lm: LM, context: int, count: int) -> bool:
    text, ids = _text(lm, context, count)
    together = text.together(ids, range(-1, count - 1))
    return torch.equal(together, torch.cat([text.decode(token) for token in ids]))


def _tree_is_equal(lm: LM, context: int, children: int) -> bool:
    """Whether a root, its children and one grandchild each have the same bits as every path decoded alone."""
    text, ids = _text(lm, context, 1 + 2 * children)
    together = text.together(ids, [-1, *[0] * children, *range(1, children + 1)])
    for child in range(1, children + 1):
        for node in (0, child, child + children):
            if not torch.equal(text.decode(ids[node])[0], together[node]):
                return False
        text.rewind(context)
    return True
