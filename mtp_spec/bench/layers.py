"""`bench kernels --what experts,attention`: the two layers beside the products.

Experts: V3's sizes with 64 experts, top 8, random routing; bytes are those of the experts hit. Attention: one pass over
the latent cache for a chain or a tree, its floor the larger of the cache's bytes and the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_spec.bench.common import Row
from mtp_spec.bench.timing import CACHE_BYTES, graph_time
from mtp_spec.kernels import fp8, mla, moe

EXPERTS, CHOSEN, CHANNELS, INNER = 64, 8, 7168, 2048
ROUTINGS = 4
HEADS, CONTEXTS = (128, 16), (1024, 8192, 32768)
CHECKED = 4


def experts(counts: list[int], rate: float) -> list[Row]:
    """Times a whole MoE layer: gate, choice, experts, weighted sum."""
    blocks, inner_blocks = CHANNELS // fp8.BLOCK, INNER // fp8.BLOCK
    gate_up, down = ((EXPERTS, 2 * INNER, CHANNELS), (EXPERTS, CHANNELS, INNER))
    weights = moe.Experts(
        _random(gate_up), torch.rand(EXPERTS, 2 * inner_blocks, blocks, device="cuda") * 0.02,
        _random(down), torch.rand(EXPERTS, blocks, inner_blocks, device="cuda") * 0.02,
    )  # fmt: skip
    router, bias = torch.randn(EXPERTS, CHANNELS, device="cuda"), torch.zeros(EXPERTS, device="cuda")
    routing = moe.Routing(experts=EXPERTS, chosen=CHOSEN, groups=8, kept_groups=4, scale=2.5)
    inputs = torch.randn(ROUTINGS, max(counts), CHANNELS, device="cuda").bfloat16()
    whole = moe.moe(inputs[0], router, bias, routing, weights)
    expected = moe.moe_reference(inputs[0, :CHECKED], router, bias, routing, weights).float()
    error = float((whole[:CHECKED].float() - expected).norm() / expected.norm())
    rows = []
    for m in counts:
        parts = [x[-m:].contiguous() for x in inputs]

        def run(parts: list[Tensor] = parts) -> None:
            for x in parts:
                moe.moe(x, router, bias, routing, weights)

        micro = graph_time(run) / ROUTINGS
        hit = sum(moe.gate(x, router, bias, routing)[0].unique().numel() for x in parts) / ROUTINGS
        size = hit * 3 * INNER * CHANNELS + router.nbytes
        exact = torch.equal(moe.moe(parts[0], router, bias, routing, weights), whole[-m:])
        name = f"{EXPERTS} of {CHANNELS}x{INNER}, top {CHOSEN}"
        rows.append(_row("experts", name, m, micro, size, rate, error, exact))
    return rows


def attention(counts: list[int], rate: float) -> list[Row]:
    """Times attention over the latent cache for chains and for trees of the same size."""
    rows = []
    for heads in HEADS:
        head = mla.Head(heads, 128, 64, 512, 128, 192**-0.5)
        for context in CONTEXTS:
            copies = max(2, -(-CACHE_BYTES // (context * head.width * 2)))
            caches = mla.new_caches(copies, context + max(counts), max(counts), head.width, "cuda")
            caches[0].store.normal_()
            length = torch.tensor([context - 1], dtype=torch.int32, device="cuda")
            for m in (count for count in counts if count <= 16):
                for kind, plan in (("chain", mla.chain(length, m)), ("tree", _tree(length, m))):
                    if kind == "tree" and m == 1:
                        continue
                    q = torch.randn(m, head.padded, head.width, device="cuda").bfloat16()

                    def run(q: Tensor = q, plan: mla.Plan = plan) -> None:
                        for cache in caches:  # noqa: B023 - called at once
                            mla.attend(q, cache, plan, head)  # noqa: B023

                    micro = graph_time(run) / copies
                    got = mla.attend(q, caches[1], plan, head).float()
                    expected = mla.attend_reference(q, caches[1], plan, head).float()
                    error = float((got - expected).norm() / expected.norm())
                    size = (context + m) * head.width * 2
                    name = f"{heads} heads, {context} tokens, {kind}"
                    rows.append(_row("attention", name, m, micro, size, rate, error, _alone(q, caches[1], plan, head)))
    return rows


def _tree(length: Tensor, m: int) -> mla.Plan:
    """Returns a tree of m rows: the root, then pairs of siblings of which the first has children."""
    paths = [[0]]
    for row in range(1, m):
        parent = max(0, (row - 1) // 2 * 2 - 1)
        paths.append([*paths[parent], row])
    most = max(len(path) for path in paths)
    table = torch.tensor([path + [-1] * (most - len(path)) for path in paths], dtype=torch.int32, device="cuda")
    depths = torch.tensor([len(path) - 1 for path in paths], dtype=torch.int32, device="cuda")
    return mla.Plan(length, depths, torch.arange(m, dtype=torch.int32, device="cuda"), table, most - 1)


def _alone(q: Tensor, cache: mla.Cache, plan: mla.Plan, head: mla.Head) -> bool:
    """Whether the last row has the bits it has when it is decoded alone after its ancestors."""
    together = mla.attend(q, cache, plan, head)[-1:]
    start, depth = int(plan.length), int(plan.depths[-1])
    if plan.ancestors is not None:
        path = plan.ancestors[-1, : depth + 1].long()
        cache.slots[start : start + depth + 1] = cache.slots[start + path].clone()
    return torch.equal(mla.attend(q[-1:], cache, mla.chain(plan.length + depth, 1), head), together)


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(fp8.E4M3)


def _row(
    kernel: str, shape: str, m: int, micro: float, size: float, rate: float, error: float, exact: bool
) -> Row:
    speed = size / micro / 1e6
    return {
        "kernel": kernel, "shape": shape, "M": m, "us": micro, "TB/s": speed, "of copy": speed / rate,
        "torch us": float("nan"), "bf16 us": float("nan"), "error": error, "rows exact": exact, "launch": "",
    }  # fmt: skip
