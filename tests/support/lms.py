"""Models of tests as `load` would return them."""

from __future__ import annotations

from mtp_spec.api import LM
from mtp_spec.backends import open_backend
from mtp_spec.cpu.backend import HostBackend
from mtp_spec.cuda.backend import DeviceBackend
from mtp_spec.cuda.runtime import DeviceRuntime
from mtp_spec.kernels.mla import Cache
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.host import HostModel
from mtp_spec.results import Generation
from mtp_spec.text import Tokenizer


def lm_of(
    model: HostModel | DeviceModel, tokenizer: Tokenizer | None, context: int, max_batch: int = 1,
    cache_tokens: int | None = None,
) -> LM:  # fmt: skip
    """Returns a library model of what was loaded; step times are typical ones."""
    return LM(open_backend(model, tokenizer, context, max_batch, cache_tokens, False), tokenizer, context, max_batch)


def host(lm: LM) -> HostBackend:
    """Returns the backend of a model on a processor."""
    assert isinstance(lm.backend, HostBackend)
    return lm.backend


def device(lm: LM) -> DeviceBackend:
    """Returns the backend of a model on the GPU's kernels or their references."""
    assert isinstance(lm.backend, DeviceBackend)
    return lm.backend


def runtime(lm: LM) -> DeviceRuntime:
    """Returns the captured work of such a model."""
    return device(lm).runtime


def module_caches(lm: LM) -> list[Cache]:
    """Returns the caches of the MTP modules, in which a model's first text lies from slot 0 on."""
    return device(lm).pool.pages.caches[lm.config.num_hidden_layers :]


def assert_same(one: Generation, alone: Generation) -> None:
    assert one.token_ids == alone.token_ids
    assert one.logprobs == alone.logprobs
    assert one.finish_reason == alone.finish_reason
    assert (one.stats.steps, one.stats.drafted, one.stats.accepted) == (
        alone.stats.steps, alone.stats.drafted, alone.stats.accepted
    )  # fmt: skip
