"""Block-scaled FP8: quantisation, its inverse, and the product, against float64."""

from __future__ import annotations

import pytest
import torch

from mtp_spec.kernels.fp8 import E4M3, act_quant, fp8_gemm, weight_dequant, weight_quant, widen
from mtp_spec.kernels.fp8_cpu import dequantise, quantise

SHAPES = [(1, 128), (63, 576), (129, 300), (128, 128), (200, 1), (5, 10944)]
# e4m3 has three bits of mantissa: half a step is 1/16 of a value
HALF_STEP = 1 / 16


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_weights_come_back_within_half_a_step(shape: tuple[int, int], scale: float) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * scale
    quantised, scales = weight_quant(weight)
    assert quantised.dtype == torch.float8_e4m3fn
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    back = weight_dequant(quantised, scales, dtype=torch.float32)
    steps = scales.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    # below the smallest normal number steps are equal: 2^-9 of the scale
    assert ((back - weight).abs() <= HALF_STEP * weight.abs() + steps * 2**-10).all()


def test_quantising_what_was_quantised_changes_nothing() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    quantised, scales = weight_quant(weight)
    back = weight_dequant(quantised, scales, dtype=torch.float32)
    again, _ = weight_quant(back)
    assert torch.equal(weight_dequant(*weight_quant(back), dtype=torch.float32), back)
    assert torch.equal(again.float(), quantised.float())


@pytest.mark.parametrize("shape", [*SHAPES, (300, 20000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_processor_widens_every_number_as_the_reference_does(shape: tuple[int, int], dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).repeat(-(-shape[0] * shape[1] // 256))  # NaN and subnormal ones too
    weight = every[: shape[0] * shape[1]].view(shape).view(torch.float8_e4m3fn)
    weight[-1, -1] = 1.0
    scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), generator=torch.Generator().manual_seed(0))
    scales[0, 0] = 3e36
    expected = weight_dequant(weight, scales, dtype=dtype)
    assert torch.equal(dequantise(weight, scales, dtype=dtype).nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    finite = torch.where(weight.float().isnan(), 0.0, weight.float()).to(torch.float8_e4m3fn)
    out = torch.empty(shape, dtype=dtype)
    dequantise(finite, scales, out=out)
    assert torch.equal(out, weight_dequant(finite, scales, dtype=dtype))
    with pytest.raises(ValueError, match="expected"):
        dequantise(weight, scales[:, :0])


@pytest.mark.parametrize("flush", [False, True])
def test_bits_are_the_references_with_zeros_signs_and_where_subnormal_numbers_are_flushed(flush: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(129 * 2).view(129, 512)
    weight = torch.where(codes % 128 == 127, 128, codes).view(torch.float8_e4m3fn)
    scales = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    expected = weight_dequant(weight, scales)
    torch.set_flush_denormal(flush)
    try:
        got = dequantise(weight, scales)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("powers", [False, True])
def test_a_processor_quantises_as_the_reference_does(shape: tuple[int, int], scale: float, powers: bool) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * scale
    weight[:, : shape[1] // 2] = 0
    before = weight.clone()
    (numbers, scales), expected = quantise(weight, power_of_two=powers), weight_quant(weight, power_of_two=powers)
    assert torch.equal(numbers.view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(scales, expected[1])
    assert torch.equal(weight, before)
    weight[-1, -1] = float("inf") if powers else float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantise(weight)


def test_a_block_of_zeros_stays_zero() -> None:
    weight = torch.zeros(256, 256)
    weight[128:, 128:] = 1
    back = weight_dequant(*weight_quant(weight), dtype=torch.float32)
    assert torch.equal(back, weight)
    quantised, scales = act_quant(torch.zeros(3, 256))
    assert torch.isfinite(scales).all()
    assert not quantised.float().any()


@pytest.mark.parametrize("rows", [1, 63, 129])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (576, 300), (130, 1408)])
def test_the_product_is_that_of_the_quantised_numbers(rows: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    a, a_scales = act_quant(torch.randn(rows, k, generator=generator))
    b, b_scales = weight_quant(torch.randn(n, k, generator=generator))
    wide = a_scales.repeat_interleave(128, 1)[:, :k].double() * a.double()
    expected = wide @ weight_dequant(b, b_scales, dtype=torch.float32).double().T
    got = fp8_gemm(a, a_scales, b, b_scales).double()
    assert got.shape == (rows, n)
    assert (got - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_deepseeks_call_forms() -> None:
    from mtp_spec import kernels

    x, w = torch.randn(2, 3, 256), torch.randn(130, 256)
    a, a_s = kernels.act_quant(x)
    assert (a.shape, a_s.shape) == (x.shape, (2, 3, 2))
    b, b_s = weight_quant(w)
    out = kernels.fp8_gemm(a, a_s, b, b_s)
    assert (out.shape, out.dtype) == ((2, 3, 130), torch.get_default_dtype())
    wide = kernels.weight_dequant(b, b_s, dtype=torch.float32)
    expected = (a.float().unflatten(-1, (2, 128)) * a_s.unsqueeze(-1)).flatten(-2) @ wide.T
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    powers = kernels.act_quant(x, scale_fmt="ue8m0")[1].log2()
    assert torch.equal(powers, powers.round())


def test_every_byte_is_widened_as_torch_does() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(E4M3)
    expected = every.float()
    assert expected.isnan().sum() == 2
    torch.testing.assert_close(widen(every.view(16, 16)).flatten(), expected, rtol=0, atol=0, equal_nan=True)
    strided = every.view(16, 16)[:, ::2]
    torch.testing.assert_close(widen(strided), strided.float(), rtol=0, atol=0, equal_nan=True)
