"""Models of random weights in a published shape, and their passes: what each computes and which bytes it must read."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from mtp_spec.cuda.memory import plan_memory
from mtp_spec.cuda.state import ROWS, State
from mtp_spec.errors import OptionError
from mtp_spec.kernels import mla
from mtp_spec.kernels.moe import layer as mixture
from mtp_spec.kernels.moe import reference, route
from mtp_spec.kernels.sampler import Stages, sample
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.cuda.layers import Dense, Layer, Mixture
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.distributed.group import Ranks

FINITE = 0xBF  # clears e4m3's highest exponent bit: no NaN, magnitudes below 2


def slice_of(full: ModelConfig, context: int, layers: int | None, ranks: Ranks) -> ModelConfig:
    """Returns the largest slice that fits, or one with `layers` MoE layers."""
    (free,) = ranks.first((torch.cuda.mem_get_info()[0],))
    most = full.num_hidden_layers - full.first_k_dense_replace
    for count in range(layers or most, 0, -1):
        config = replace(full, num_hidden_layers=full.first_k_dense_replace + count)
        if plan_memory(DeviceModel(config, "meta", ranks=ranks), context + ROWS).total < free:
            return config
    raise OptionError(f"bench step needs room for one MoE layer: {free / 1e9:.1f} GB are free")


def fill(model: DeviceModel) -> None:
    """Fills in random weights that keep activations of order one, a rank's own part of each matrix.

    Every tensor has a seed of its own: ranks agree on what they replicate however their parts differ in size.
    """
    generator = torch.Generator(model.device)
    alone = model if model.ranks.size == 1 else DeviceModel(model.config, "meta")
    shapes = {name: slot.shape for name, slot in alone.checkpoint_slots().items()}
    for name, slot in model.checkpoint_slots().items():
        part = 0 if slot.shape == shapes[name] else 1 + model.ranks.rank
        generator.manual_seed(zlib.crc32(f"{part} {name}".encode()))
        if name.endswith("_scale_inv"):
            slot.fill_(0.02)  # e4m3 numbers below 2 have a root mean square of about 0.6
        elif slot.dtype == torch.float8_e4m3fn:
            flat = slot.view(torch.uint8)
            flat.random_(0, 256, generator=generator)
            flat &= FINITE
        elif "norm" in name:
            slot.fill_(1.0)
        else:
            slot.normal_(0.0, slot.shape[-1] ** -0.5, generator=generator)
    model.finish()


class Work(NamedTuple):
    """A pass.

    Attributes:
        run: computes it.
        reads: tensors and layers whose weights it reads.
        cached: bytes of the latent cache that it reads.
    """

    run: Callable[[], Any]
    reads: list[Any]
    cached: int


def chain_of(state: State, context: int, m: int, offset: int = 0) -> mla.Plan:
    """Returns a chain of m rows after `context` committed tokens."""
    state.length.fill_(context)
    return mla.chain(state.length, m, offset)


def verify_pass(model: DeviceModel, state: State, context: int, m: int) -> Work:
    """Returns a pass of m rows, logits included."""
    ids = random_ids(model, m)
    plan = chain_of(state, context, m)

    def run() -> Tensor:
        return model.logits(model.rows(ids, state.caches, plan))

    return Work(run, *verify_reads(model, context, m))


def draft_pass(model: DeviceModel, state: State, context: int) -> Work:
    """Returns one draft by the first MTP module, drawn too."""
    device = model.device
    ids = random_ids(model, 1)
    hidden = torch.randn(1, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    request, position = torch.zeros(1, dtype=torch.int32, device=device), torch.full((1,), context, device=device)
    plan = chain_of(state, context, 1, 1)

    def run() -> Tensor:
        out = model.draft_logits(model.mtp_rows(0, ids, hidden, state.mtp_caches[0], plan))
        return sample(out, request, position, state.settings, Stages()).tokens

    return Work(run, *draft_reads(model, context))


def layers_pass(model: DeviceModel, state: State, context: int, m: int, kind: type[Dense] | type[Mixture]) -> Work:
    """Returns m rows through the layers of one kind, each once, so that none is read from the cache."""
    x = torch.randn(m, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16().to(model.device)
    plan, table = chain_of(state, context, m), model.table(state.caches[0].capacity)
    layers = [(layer, cache) for layer, cache in zip(model.layers, state.caches, strict=True)
              if isinstance(layer.mlp, kind)]  # fmt: skip

    def run() -> None:
        total, branch = x, None
        for layer, cache in layers:
            total, branch = layer(total, branch, table, cache, plan)

    return Work(run, [layer for layer, _ in layers], len(layers) * (context + m) * model.layout.row_bytes)


def random_ids(model: DeviceModel, count: int) -> Tensor:
    """Returns the same random tokens on every rank, `[count]` int64."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, model.config.vocab_size, (count,), generator=generator).to(model.device)


def verify_reads(model: DeviceModel, context: int, m: int) -> tuple[list[Any], int]:
    """Returns what a pass of m rows reads: tensors and layers, and bytes of the cache."""
    return [*model.layers, model.lm_head], len(model.layers) * (context + m) * model.layout.row_bytes


def draft_reads(model: DeviceModel, context: int) -> tuple[list[Any], int]:
    """Returns what a draft of the first module reads, likewise."""
    module, head = model.mtp[0], model.draft_head
    assert head is not None
    return [module.eh.weight, module.layer, head.weight], (context + 1) * model.layout.row_bytes


@contextmanager
def routes() -> Iterator[list[Tensor]]:
    """Collects the expert indices of every gate that runs inside the block, shared experts included."""
    found: list[Tensor] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        routed = route(*args, **kwargs)
        found.append(routed.indices)
        return routed

    gate = reference.gate_reference

    def watched_reference(*args: Any) -> Any:
        gated = gate(*args)
        found.append(gated[0])
        return gated

    # the references of the kernels do not use `route`
    with patch.object(mixture, "route", watched), patch.object(reference, "gate_reference", watched_reference):
        yield found


def chosen(work: Work) -> list[list[int]]:
    """Runs a pass; returns the distinct experts that each of its gates chose, shared ones included."""
    with routes() as routed:
        work.run()
        return [indices.unique().tolist() for indices in routed]


def hit(work: Work) -> list[int]:
    """Runs a pass; returns the number of distinct experts that each of its gates chose, shared ones included."""
    return [len(experts) for experts in chosen(work)]


def read_bytes(part: Tensor | Layer, experts: float) -> float:
    """Returns the bytes that a pass reads of a tensor or layer, of which `experts` are chosen."""
    if isinstance(part, Tensor):
        return part.nbytes
    size = sum(t.nbytes for t in (*part.attention.slots("").values(), *part.norms))
    if isinstance(part.mlp, Dense):
        return size + sum(t.nbytes for t in part.mlp.slots("").values())
    held = part.mlp.experts
    whole = sum(t.nbytes for t in held.tensors)
    return size + part.mlp.router.nbytes + whole * experts / held.count


def pass_bytes(work: Work, experts: Sequence[float]) -> float:
    """Returns the bytes that a pass must read on this rank.

    Args:
        experts: chosen in each of its MoE layers, as `hit` counts.
    """
    counts, size = iter(experts), float(work.cached)
    for part in work.reads:
        mixed = isinstance(part, Layer) and isinstance(part.mlp, Mixture)
        size += read_bytes(part, next(counts) if mixed else 0)
    return size


def chain_tokens(chances: Sequence[float], depth: int) -> float:
    """Returns the mean tokens of a step with a chain of drafts.

    Args:
        chances: that a draft of depth 1, 2, ... is accepted if those before it are; the last one counts for deeper
            drafts too.
    """
    tokens = left = 1.0
    for level in range(depth):
        left *= chances[min(level, len(chances) - 1)]
        tokens += left
    return tokens
