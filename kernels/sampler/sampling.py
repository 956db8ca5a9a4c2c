"""Sampling on the device: logits to tokens without waiting for the host, so that a step fits one CUDA graph.

The rules are those of `mtp_spec.sampling.Sampler`: logit bias, repetition, presence and frequency penalty, temperature,
top-k, top-p, min-p, then argmax of the scaled row plus Gumbel noise, which is `mtp_spec.sampling.gumbel`: a function of
seed, position and token. At temperature 0 the noise and the truncation are absent. The lowest index wins among equals.

Settings are in tensors, so a captured step reads their current values; which stages exist at all (`Stages`) is fixed at
capture. Top-k and top-p search for their threshold four bits at a time over the bits of the logits: eight short
launches each, all stretches of the vocabulary at once, sums in float64 and in a fixed order.

Legend: `M` rows, `V` vocabulary, `R` requests, `B` best tokens per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_spec.kernels.checks import expect
from mtp_spec.kernels.launching import late, runs_triton
from mtp_spec.kernels.sampler.reference import gumbel_reference, sample_reference
from mtp_spec.kernels.sampler.settings import COLUMNS, Sampled, Settings, Stages

try:
    import triton

    from mtp_spec.kernels.sampler import kernels
except ImportError:  # no Triton for this platform: the references remain
    triton = None

WAYS = 16
SHIFTS = range(28, -1, -4)


def sample(
    logits: Tensor,
    request: Tensor,
    position: Tensor,
    settings: Settings,
    stages: Stages,
    best: int = 1,
    path: Tensor | None = None,
    keep: bool = False,
) -> Sampled:
    """Returns the `best` tokens of every row; CPU tensors use the reference, except in Triton's interpreter.

    Args:
        logits: `[M, V]` float32 or bfloat16.
        request: `[M]` int32, the request whose settings apply.
        position: `[M]` int64, absolute position of the token to draw.
        path: `[M, depth]` int32, tokens drafted since `settings.seen` was updated; -1 for none.
        keep: also return the processed rows, which acceptance rules compare.
    """
    _check(logits, request, position, settings, stages, path, best)
    if not runs_triton(logits):
        return sample_reference(logits, request, position, settings, stages, best, path, keep)
    rows, vocabulary = logits.shape
    device, stretch = logits.device, stretch_of(vocabulary)
    stretches = -(-vocabulary // stretch)
    wide = triton.next_power_of_2(stretches)
    work = torch.empty(rows, vocabulary, dtype=torch.float32, device=device)
    highest = torch.empty(rows, stretches, dtype=torch.float32, device=device)
    depth = 0 if path is None else path.shape[1]
    grid = (rows, stretches)
    kernels._penalise_kernel[grid](
        logits, request, settings.values, _or(settings.bias, work), _or(settings.seen, request), _or(path, request),
        work, highest, vocabulary, STRETCH=stretch, BIAS=stages.bias, PENALTY=stages.penalty, DEPTH=depth,
        **late(work),
    )  # fmt: skip
    edge, ties = _search(work, highest, request, settings, stages, stretch)
    best_value = torch.empty(rows, stretches, best, dtype=torch.float32, device=device)
    best_token = torch.empty(rows, stretches, best, dtype=torch.int32, device=device)
    kernels._draw_kernel[grid](
        work, highest, request, settings.values, settings.seed, position, edge, ties, best_value, best_token,
        vocabulary, stretches, STRETCH=stretch, STRETCHES=wide, BEST=best,
        SEARCHED=stages.top_k or stages.top_p, MIN_P=stages.min_p, NOISE=stages.noise, KEEP=keep,
        num_warps=8,
        **late(work),
    )  # fmt: skip
    tokens = torch.empty(rows, best, dtype=torch.int32, device=device)
    scores = torch.empty(rows, best, dtype=torch.float32, device=device)
    failed = torch.empty(rows, dtype=torch.int32, device=device)
    kernels._pick_kernel[(rows,)](
        best_value, best_token, highest, tokens, scores, failed, stretches,
        STRETCHES=wide, BEST=best, WIDE=triton.next_power_of_2(stretches * best),
        **late(work),
    )  # fmt: skip
    return Sampled(tokens, scores, failed, work if keep else None)


def gumbel(seed: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """Returns noise `[M, V]` float32 for seeds and positions `[M]` int64."""
    if not runs_triton(seed):
        return torch.stack([
            gumbel_reference(int(s), int(p), vocabulary) for s, p in zip(seed, position, strict=True)
        ])  # fmt: skip
    stretch = stretch_of(vocabulary)
    out = torch.empty(seed.shape[0], vocabulary, dtype=torch.float32, device=seed.device)
    kernels._gumbel_kernel[(seed.shape[0], -(-vocabulary // stretch))](
        seed, position, out, vocabulary, STRETCH=stretch, **late(out)
    )
    return out


def stretch_of(vocabulary: int) -> int:
    """Returns tokens per program; part of top-p's arithmetic, so chosen by the vocabulary alone."""
    return 1024 if vocabulary <= 1 << 15 else 4096


def _search(
    work: Tensor, highest: Tensor, request: Tensor, settings: Settings, stages: Stages, stretch: int
) -> tuple[Tensor, Tensor]:
    """Returns the cut of each row, `[M, 2]` int64, and elements exactly at it before each stretch, `[M, S]` int32."""
    (rows, vocabulary), stretches = work.shape, highest.shape[1]
    device, wide = work.device, triton.next_power_of_2(highest.shape[1])
    edge = torch.empty(rows, 2, dtype=torch.int64, device=device)
    ties = torch.empty(rows, stretches, dtype=torch.int32, device=device)
    for mass in (False, True):
        if not (stages.top_p if mass else stages.top_k):
            continue
        cut = mass and stages.top_k
        sums = torch.empty(2, rows, stretches, WAYS, dtype=torch.float64, device=device)
        counts = torch.empty(2, rows, stretches, WAYS, dtype=torch.int32, device=device)
        state = torch.empty(2, rows, 3, dtype=torch.float64, device=device)
        for step, shift in enumerate(SHIFTS):
            old, new = (step + 1) % 2, step % 2
            kernels._search_kernel[(rows, stretches)](
                work, highest, request, settings.values, sums[old], counts[old], state[old],
                sums[new], counts[new], state[new], edge, vocabulary, stretches, shift,
                STRETCH=stretch, CHUNK=256, STRETCHES=wide, FIRST=step == 0, MASS=mass, CUT=cut, num_warps=8,
                **late(work),
            )  # fmt: skip
        kernels._edge_kernel[(rows,)](
            sums[new], counts[new], state[new], request, settings.values, edge, ties, vocabulary, stretches,
            STRETCHES=wide, MASS=mass, CUT=cut, **late(work),
        )  # fmt: skip
    return edge, ties


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    return unused if tensor is None else tensor


def _check(
    logits: Tensor, request: Tensor, position: Tensor, settings: Settings, stages: Stages, path: Tensor | None,
    best: int,
) -> None:  # fmt: skip
    expect("logits", logits, (None, None), (torch.float32, torch.bfloat16))
    rows, vocabulary = logits.shape
    if best > vocabulary:
        raise ValueError(f"best={best}: a row has {vocabulary} tokens")
    expect("request", request, (rows,), torch.int32, beside=logits)
    expect("position", position, (rows,), torch.int64, beside=logits)
    expect("settings.values", settings.values, (None, COLUMNS), torch.float64, beside=logits)
    requests = settings.values.shape[0]
    expect("settings.seed", settings.seed, (requests,), torch.int64, beside=logits)
    if path is not None:
        expect("path", path, (rows, None), torch.int32, beside=logits)
    for name, wanted, table in (("bias", stages.bias, settings.bias), ("seen", stages.penalty, settings.seen)):
        if wanted and table is None:
            raise ValueError(f"settings.{name} is missing: [{requests}, {vocabulary}] is expected")
        if wanted and table is not None:
            expect(f"settings.{name}", table, (requests, vocabulary), beside=logits)
