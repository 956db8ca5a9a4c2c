"""Row invariance: is a row's result bitwise the same alone and beside others, on this machine?

Matrix products choose their loops by the number of rows, so a token verified in a tree can differ in its last bit
from the same token decoded alone, and a tie broken the other way changes the text. `choose_technique` finds the limits
within which each of the model's products does not (`steady`), tries the whole on the loaded weights, and returns how
rows must be computed here:

- "batched": all rows in one pass. bfloat16 through oneDNN is invariant within limits that cost little.
- "single": one row a pass, the same arithmetic as plain decoding by construction. Exact everywhere, but a verify
  pass then costs as much as the decode steps it replaces.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from mtp_spec.model.attention import MLA, JointPlan, RowPlan, plan_rows, probe_by_head
from mtp_spec.model.cache import LatentCache
from mtp_spec.model.layers import Linear, probe_product
from mtp_spec.model.moe import MoE
from mtp_spec.model.steady import LEAST_LIMIT, MOST, PROMPT_LIMIT, Limits
from mtp_spec.model.transformer import Transformer

Technique = Literal["batched", "single"]
PROBE_ROWS = (2, 3, 4, 5, 6, 7, 8, 9, 16, 33)
# what is tried, by the tokens before; the second one's rows cross a context block
PROBES = {1: PROBE_ROWS, 250: (3, 9)}
HEAD_ROWS = 3  # of those, by the head alone
_tried: dict[Hashable, Technique] = {}


def verify_rows(
    model: Transformer,
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
        hidden.append(model.joint_rows([token], JointPlan.of((cache, _row_of(plan, row)))))
    return torch.cat(hidden)


def _row_of(plan: RowPlan, row: int) -> RowPlan:
    """Returns the plan of one row, as plain decoding has it."""
    assert plan.sizes is not None
    size = plan.sizes[row]
    gather = None if plan.gather is None else plan.gather[row : row + 1, :size]
    return RowPlan(plan.start + row, plan.rope[row : row + 1], plan.mask[row : row + 1, ..., :size], gather, (size,))


def row_logits(model: Transformer, hidden: Tensor, technique: Technique) -> Tensor:
    """Returns logits `[M, V]` in the model's dtype, by the same technique."""
    if technique == "batched" or hidden.shape[0] == 1:
        return model.logits(hidden)
    return torch.cat([model.logits(row) for row in hidden.split(1)])


@torch.inference_mode()
def choose_technique(model: Transformer) -> Technique:
    """Returns "batched" if passes of several rows reproduce single rows to the last bit, else "single".

    float32 goes straight to "single": its products use another routine for one row than for several. The order of a sum
    depends on shapes, not on values, so a model of the same shape is not tried again.
    """
    if model.dtype == torch.float32:
        return "single"
    key = (torch.get_num_threads(), model.dtype, model.ranks.size, model.is_packed, repr(model.config))
    if key not in _tried:
        invariant = _limit(model) >= LEAST_LIMIT and all(_is_invariant(model, *probe) for probe in PROBES.items())
        _tried[key] = "batched" if invariant else "single"
    return _tried[key]


@torch.inference_mode()
def cuts_are_free(model: Transformer, chunk: int) -> bool:
    """Returns whether rows are bitwise the same in a pass of `chunk` as in small ones, which `choose_technique` tested.

    Then a prompt's caches do not depend on where its passes begin.
    """
    if _limit(model) < PROMPT_LIMIT:
        return False
    ids = [(104729 * i + 13) % model.config.vocab_size for i in range(chunk)]
    whole, parts = (model.new_cache(chunk) for _ in range(2))
    together = model.rows(ids, whole, range(-1, chunk - 1))
    most = min(chunk, 2 * PROBE_ROWS[-1])
    for first in range(0, most, PROBE_ROWS[-1]):
        part = ids[first : min(first + PROBE_ROWS[-1], most)]
        hidden = model.rows(part, parts, range(-1, len(part) - 1))
        parts.commit(range(len(part)))
        if not torch.equal(hidden, together[first : first + len(part)]):
            return False
    return all(torch.equal(a[:most], b[:most]) for a, b in zip(whole.slots, parts.slots, strict=True))


class RowWays:
    """What holds on this machine, tested once for each of torch's numbers of threads.

    Args:
        technique: what `choose_technique` found for the present number.
    """

    def __init__(self, model: Transformer, technique: Technique) -> None:
        self._model = model
        self._techniques = {torch.get_num_threads(): technique}
        self._free: dict[int, bool] = {}

    @property
    def technique(self) -> Technique:
        """How rows are computed with this number of threads."""
        threads = torch.get_num_threads()
        if threads not in self._techniques:
            self._techniques[threads] = choose_technique(self._model)
        return self._techniques[threads]

    def cuts_are_free(self, chunk: int) -> bool:
        """Whether caches of a prompt do not depend on where passes of up to `chunk` rows begin."""
        threads = torch.get_num_threads()
        if threads not in self._free:
            self._free[threads] = self.technique == "batched" and cuts_are_free(self._model, chunk)
        return self._free[threads]


def _limit(model: Transformer) -> int:
    """Returns the most rows up to which every product of the model has one order of summing."""
    return min((limits.most for limits in _limits(model)), default=MOST)


def _limits(model: Transformer) -> Iterator[Limits]:
    if model.device.type != "cpu":
        return
    yield model.probe_head()
    for module in model.modules():
        if isinstance(module, Linear):
            yield probe_product(module.weight, module.layout)
        elif isinstance(module, MLA):
            yield from map(probe_by_head, module.absorbed())
        elif isinstance(module, MoE) and module.experts:
            yield from module.probe()


def _is_invariant(model: Transformer, context: int, passes: Sequence[int]) -> bool:
    vocab, most = model.config.vocab_size, max(passes)
    ids = [(7919 * i + 11 * context) % vocab for i in range(context + most)]
    cache = model.new_cache(len(ids))
    model.rows(ids[:context], cache, range(-1, context - 1))
    cache.commit(range(context))
    alone = []
    for token in ids[context:]:
        alone.append(model.rows([token], cache, [-1]))
        cache.commit([0])
    expected = torch.cat(alone)
    for rows in passes:
        cache.rewind(context)
        if not torch.equal(model.rows(ids[context : context + rows], cache, range(-1, rows - 1)), expected[:rows]):
            return False
    # a head can take as long as all layers together
    logits = torch.cat([model.logits(row) for row in expected[:HEAD_ROWS].split(1)])
    return all(torch.equal(model.logits(expected[:rows])[:HEAD_ROWS], logits[:rows]) for rows in passes)
