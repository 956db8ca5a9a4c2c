"""`bench kernels --what prompts`: attention of a prompt's rows in the expanded form, latents and all.

Beside it torch's `scaled_dot_product_attention` on keys and values that are given, which need not be expanded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_spec.bench.common import Row
from mtp_spec.bench.layers import kernel_row
from mtp_spec.bench.timing import graph_time
from mtp_spec.kernels import fp8, mla
from mtp_spec.kernels.mla import new_caches

# heads, nope and value sizes: DeepSeek-V3, GLM-4.7-Flash, GigaChat3; and tokens before the rows, and rows
HEADS, PLACES = ((128, 128, 128), (20, 192, 256), (32, 128, 192)), ((0, 4096), (0, 8192), (24576, 8192))
CHECKED = 64


def prompts(rate: float) -> list[Row]:
    """Times attention of a pass over a prompt, causal, after the tokens that the cache holds."""
    return [_row(*sizes, *place, rate) for sizes in HEADS for place in PLACES]


def _row(heads: int, nope: int, value: int, held: int, rows: int, rate: float) -> Row:
    head, keys = mla.Head(heads, nope, 64, 512, value, (nope + 64) ** -0.5), held + rows
    cache = new_caches(1, keys, 0, head.layout(), "cuda")[0]
    cache.write(torch.arange(keys, device="cuda"), torch.randn(keys, head.width, device="cuda"))
    kv_b, scale = fp8.weight_quant(torch.randn(heads * (nope + value), 512, device="cuda") / 16)
    q = torch.randn(rows, heads * (nope + 64), device="cuda").bfloat16()
    table = torch.randn(keys + 1, 2, 64, device="cuda")
    plan = mla.chain(torch.full((1,), held, dtype=torch.int32, device="cuda"), rows)
    out = q.new_empty(rows, heads * value)

    def run(first: int = 0) -> Tensor:
        mla.attend_prompt(q[first:].clone(), kv_b, scale, table, cache, plan, held + first, head, out[first:])
        return out[-CHECKED:].clone()

    micro, whole = graph_time(run), run()
    exact = torch.equal(run(rows - CHECKED), whole)
    last = q[-CHECKED:].clone()
    expected = mla.attend_prompt_reference(last, kv_b, scale, table, cache, plan, keys - CHECKED, head).float()
    error = float((whole.float() - expected).norm() / expected.norm())
    pairs = rows * held + rows * (rows + 1) / 2
    operations = 2 * heads * (pairs * (nope + 64 + value) + keys * 512 * (nope + value))
    beside = _torch_time(heads, nope, value, rows) if not held else float("nan")
    name = f"{heads} heads of {nope + 64}/{value}, {keys} tokens"
    size = keys * head.width * 2 / micro / 1e6
    return kernel_row("prompts", name, rows, micro, size, rate, error, exact, "", operations, beside)


def _torch_time(heads: int, nope: int, value: int, rows: int) -> float:
    q, k, v = (torch.randn(1, heads, rows, size, device="cuda").bfloat16() for size in (nope + 64, nope + 64, value))
    return graph_time(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
