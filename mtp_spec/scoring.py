"""Teacher-forced logits of a whole text, main model and MTP modules."""

from __future__ import annotations

from collections.abc import Sequence
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
    """The same through the cache, a chunk of rows at a time."""
    tokens, count = torch.tensor(list(ids)).to(model.device), len(ids)
    depth = model.config.num_nextn_predict_layers
    caches = model.new_caches(count, 0)
    length = torch.zeros(1, dtype=torch.int32, device=model.device)
    logits, mtp_logits = [], [torch.full((depth, 0, model.config.vocab_size), float("nan"))]
    for first in range(0, count, CHUNK):
        length.fill_(first)
        chunk = tokens[first : first + CHUNK]
        hidden = model.rows(chunk, caches[: len(model.layers)], mla.chain(length, len(chunk)))
        logits.append(model.logits(hidden).cpu())
        following = tokens[first + 1 : first + 1 + len(chunk)]
        if depth and len(following):
            plan = mla.chain(length, len(following), offset=1)
            out = model.mtp_rows(following, hidden[: len(following)], caches[-1], plan)
            mtp_logits.append(model.logits(out).cpu()[None])
    if depth:
        mtp_logits.append(torch.full((depth, 1, model.config.vocab_size), float("nan")))
    deeper = torch.cat(mtp_logits, 1) if depth else torch.empty(0, count, model.config.vocab_size)
    return Scores(torch.cat(logits), deeper)
