"""Counter-based uniform random numbers on the device: number i of a seed is always the same.

They are those of `numpy.random.Generator(Philox(key=(seed, 1))).random()`, in order (Salmon et al., "Parallel Random
Numbers: As Easy as 1, 2, 3", SC 2011): word i mod 4 of counter 1 + i div 4, its upper 53 bits over 2**53. The noise of
coupled sampling has the key (seed, 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_spec.kernels.checks import expect
from mtp_spec.kernels.launching import late, runs_triton
from mtp_spec.kernels.sampler.reference import uniforms_reference

try:
    import triton
    import triton.language as tl

    from mtp_spec.kernels.launching import follow
    from mtp_spec.kernels.sampler.kernels import _philox_round
except ImportError:  # no Triton for this platform: the reference remains
    triton = None


def uniforms(seed: Tensor, first: Tensor, count: int) -> Tensor:
    """Returns numbers first .. first + count - 1 of a seed, `[count]` float64 in [0, 1).

    Args:
        seed: `[1]` int64, bits of a number from 0 to 2**64 - 1.
        first: `[1]` int64.

    Raises:
        ValueError: another shape or dtype.
    """
    expect("seed", seed, (1,), torch.int64)
    expect("first", first, (1,), torch.int64, beside=seed)
    if not runs_triton(seed):
        return uniforms_reference(int(seed), int(first), count).to(seed.device)
    out = torch.empty(count, dtype=torch.float64, device=seed.device)
    _uniform_kernel[(1,)](seed, first, out, count, WIDE=triton.next_power_of_2(count), **late(out))
    return out


if triton is not None:

    @triton.jit
    def _uniform_kernel(seed, first, out, count, WIDE: tl.constexpr, PDL: tl.constexpr):
        follow(PDL)
        lane = tl.arange(0, WIDE)
        place = tl.load(first) + lane
        block = ((place >> 2) + 1).to(tl.uint64)
        zero = block * 0
        c0, c1, c2, c3 = block, zero, zero, zero
        k0, k1 = zero + tl.load(seed).to(tl.uint64), zero + 1
        for _ in tl.static_range(10):
            c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0, k1)
            k0 += 0x9E3779B97F4A7C15
            k1 += 0xBB67AE8584CAA73B
        word = place & 3
        value = tl.where(word == 0, c0, tl.where(word == 1, c1, tl.where(word == 2, c2, c3)))
        number = (value >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16
        tl.store(out + lane, number, mask=lane < count)
