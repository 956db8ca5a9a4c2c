"""Teacher-forced logits of a whole text, main model and MTP modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_spec.kernels import mla
from mtp_spec.model.device import DeviceModel
from mtp_spec.model.transformer import Transformer

# rows of a text that pass through the model at once
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


def score_ids(model: Transformer | DeviceModel, ids: Sequence[int]) -> Scores:
    """Returns the scores of token ids."""
    if isinstance(model, DeviceModel):
        return _score_rows(model, ids)
    tokens = torch.tensor([list(ids)], device=model.device)
    count, vocab = tokens.shape[1], model.config.vocab_size
    hidden = model(tokens)
    mtp_logits = torch.full((len(model.mtp), count, vocab), float("nan"))
    deeper = hidden
    for module in range(len(model.mtp)):
        depth = module + 1
        if count <= depth:
            break
        deeper = model.mtp_forward(module, tokens[:, depth:], deeper[:, : count - depth], depth)
        mtp_logits[module, : count - depth] = model.logits(deeper)[0].float().cpu()
    return Scores(model.logits(hidden)[0].float().cpu(), mtp_logits)


def _score_rows(model: DeviceModel, ids: Sequence[int]) -> Scores:
    """The same through the caches, a chunk of rows at a time."""
    tokens, count = torch.tensor(list(ids)).to(model.device), len(ids)
    caches = model.new_caches(count, 0)
    own = caches[: len(model.layers)]
    length = torch.zeros(1, dtype=torch.int32, device=model.device)

    def chunks(rows: Tensor, offset: int) -> Iterator[tuple[slice, mla.Plan]]:
        for first in range(0, len(rows), CHUNK):
            length.fill_(first)
            part = slice(first, min(first + CHUNK, len(rows)))
            yield part, mla.chain(length, part.stop - first, offset)

    hidden = torch.cat([model.rows(tokens[part], own, plan) for part, plan in chunks(tokens, 0)])
    logits = torch.cat([model.logits(rows).cpu() for rows in hidden.split(CHUNK)])
    mtp_logits = torch.full((len(model.mtp), count, model.config.vocab_size), float("nan"))
    for module, cache in enumerate(caches[len(model.layers) :]):
        following = tokens[module + 1 :]
        if not len(following):
            break
        hidden = torch.cat([
            model.mtp_rows(module, following[part], hidden[part], cache, plan)
            for part, plan in chunks(following, module + 1)
        ])  # fmt: skip
        for place, rows in zip(mtp_logits[module, : len(hidden)].split(CHUNK), hidden.split(CHUNK), strict=True):
            place.copy_(model.logits(rows))
    return Scores(logits, mtp_logits)
