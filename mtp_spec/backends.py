"""Chooses the backend that runs a model."""

from __future__ import annotations

from mtp_spec.cpu.backend import HostBackend
from mtp_spec.cuda.backend import DeviceBackend
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.host import HostModel
from mtp_spec.model.transformer import Transformer
from mtp_spec.step import Backend
from mtp_spec.text import Tokenizer


def open_backend(
    model: HostModel | DeviceModel, tokenizer: Tokenizer | None, max_context: int, max_batch: int = 1,
    cache_tokens: int | None = None, measure: bool = True, progress: bool = False,
) -> Backend:  # fmt: skip
    """Returns the backend of a loaded model; other arguments as for `load`.

    Args:
        tokenizer: encodes the text whose steps are timed for "auto"; with None made-up ids are timed.
    """
    if isinstance(model, DeviceModel):
        return DeviceBackend(model, max_context, max_batch, cache_tokens)
    if isinstance(model, Transformer):
        model.requires_grad_(False)
    return HostBackend(model, tokenizer, max_context, max_batch, cache_tokens, measure, progress)
