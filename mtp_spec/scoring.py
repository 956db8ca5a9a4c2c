"""Teacher-forced logits of a whole text, main model and MTP modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_spec.model.transformer import Transformer


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


def score_ids(model: Transformer, ids: Sequence[int]) -> Scores:
    """Returns the scores of token ids."""
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
