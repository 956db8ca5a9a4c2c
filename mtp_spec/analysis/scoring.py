"""Teacher-forced logits of a whole text, main model and MTP modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mtp_spec.kernels import mla
from mtp_spec.model.attention import plan_rows
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.host import HostModel
from mtp_spec.model.undisturbed import undisturbed

# rows of a pass, except of those over long texts' expanded rows
CHUNK = 256


@dataclass(frozen=True, slots=True)
class Scores:
    """Logits of a text of T tokens; D MTP modules, vocabulary V; float32.

    Attributes:
        logits: `[T, V]`; row t predicts token t + 1.
        mtp_logits: `[D, T, V]`; row t of depth d (index d - 1) is computed from the main model's hidden state of
            token t and the true tokens t + 1 .. t + d, and predicts token t + d + 1. Its last d rows lack a token
            and are NaN.
    """

    logits: Tensor
    mtp_logits: Tensor


@undisturbed()
def score_ids(model: HostModel | DeviceModel, ids: Sequence[int]) -> Scores:
    """Returns the scores of token ids, computed as in `generate`: rows over caches, in chunks."""
    return _of_device(model, ids) if isinstance(model, DeviceModel) else _of_host(model, ids)


def _of_host(model: HostModel, ids: Sequence[int]) -> Scores:
    count, table = len(ids), model.table(len(ids) + len(model.mtp))
    cache, parts = model.new_cache(count), list[Tensor]()
    for chunk in _chunks(ids):
        parts.append(model.rows(chunk, cache, range(-1, len(chunk) - 1)))
        cache.commit(range(len(chunk)))
    hidden = torch.cat(parts)
    scores = _empty(model, count)
    _fill(scores.logits, model.logits, hidden)
    for module in range(min(len(model.mtp), count - 1)):
        following, cache = ids[module + 1 :], model.new_mtp_cache(count)
        parts.clear()
        for chunk in _chunks(following):
            plan = plan_rows(table, cache.length, range(-1, len(chunk) - 1), module + 1)
            given = hidden[cache.length : cache.length + len(chunk)]
            parts.append(model.mtp_rows(module, chunk, given, cache, plan))
            cache.commit(range(len(chunk)))
        hidden = torch.cat(parts)
        _fill(scores.mtp_logits[module], partial(model.module_logits, module), hidden)
    return scores


def _of_device(model: DeviceModel, ids: Sequence[int]) -> Scores:
    tokens, count = torch.tensor(list(ids)).to(model.device), len(ids)
    caches = model.new_caches(count, 0)
    own = caches[: len(model.layers)]
    length = torch.zeros(1, dtype=torch.int32, device=model.device)
    expanded = model.expanded_rows(count)

    def chunks(rows: Tensor, offset: int) -> Iterator[tuple[slice, mla.Plan | mla.Spans]]:
        first = 0
        while first < len(rows):
            most = model.prefill_tokens if first < expanded else CHUNK
            part = slice(first, min(first + most, len(rows)))
            length.fill_(first)
            plan = mla.chain(length, part.stop - first, offset)
            if first < expanded:
                yield part, (mla.Span(0, first, plan, min(expanded, part.stop) - first),)
            else:
                yield part, plan
            first = part.stop

    hidden = torch.cat([model.rows(tokens[part], own, plan) for part, plan in chunks(tokens, 0)])
    scores = _empty(model, count)
    _fill(scores.logits, model.logits, hidden)
    for module, cache in enumerate(caches[len(model.layers) :][: count - 1]):
        hidden = torch.cat([
            model.mtp_rows(module, tokens[module + 1 :][part], hidden[part], cache, plan)
            for part, plan in chunks(tokens[module + 1 :], module + 1)
        ])  # fmt: skip
        _fill(scores.mtp_logits[module], partial(model.module_logits, module), hidden)
    return scores


def _chunks(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    return (ids[first : first + CHUNK] for first in range(0, len(ids), CHUNK))


def _empty(model: HostModel | DeviceModel, count: int) -> Scores:
    vocab = model.config.vocab_size
    drafts = torch.full((len(model.mtp), count, vocab), torch.nan, dtype=torch.float32)
    return Scores(torch.empty(count, vocab, dtype=torch.float32), drafts)


def _fill(logits: Tensor, head: Callable[[Tensor], Tensor], hidden: Tensor) -> None:
    """Writes the head's logits of hidden states to the first rows."""
    for place, rows in zip(logits[: len(hidden)].split(CHUNK), hidden.split(CHUNK), strict=True):
        place.copy_(head(rows))
