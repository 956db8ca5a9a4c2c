"""Triton kernels without a GPU: under the interpreter, and compiled for sm_90; with one, on it (`pytest -m gpu`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtp_spec.kernels import fp8, gemm, quant
from places import SUPPORT

triton = pytest.importorskip("triton")
V3_SHAPES = [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048), (576, 7168), (2048, 10944)]


@pytest.mark.parametrize("what", ["products", "quantisers", "divergences", "experts", "noise", "sampling", "grouping",
                                  "attention", "pages", "shares", "prompts", "commits", "exchanges",
                                  "incomplete"])  # fmt: skip
def test_interpreted(what: str) -> None:
    # Triton decides at import, so the interpreter has a process of its own
    program = [sys.executable, str(SUPPORT / "interpreted.py"), what]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONSAFEPATH", None)  # its files import one another
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip().endswith("passed"), done.stderr[-3000:]


@pytest.mark.parametrize(
    ("tile", "rows", "splits", "unroll", "call"),
    [(64, 16, 1, 1, 0), (64, 64, 4, 1, 0), (128, 16, 2, 2, 8), (64, 16, 1, 2, 8)],
)
def test_product_compiles_to_fp8_tensor_cores(tile: int, rows: int, splits: int, unroll: int, call: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        "w_desc": f"tensordesc<fp8e4nv[{tile},128]>",
        "w": "*fp8e4nv",
        "a_desc": f"tensordesc<fp8e4nv[{rows},128]>",
        "w_scale": "*fp32",
        "a_scale": "*fp32",
        "out": "*bf16",
        "parts": "*fp32",
        "arrivals": "*i32",
        "m": "i32",
        "n": "i32",
        "k": "i32",
    }
    constants = {"TILE": tile, "ROWS": rows, "SPLITS": splits, "STAGES": 4, "UNROLL": unroll, "AHEAD": 8, "CALL": call,
                 "SCALED": True, "WIDE": False, "PDL": True}  # fmt: skip
    source = ASTSource(gemm._gemm_kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    ptx = compiled.asm["ptx"]
    assert f"m64n{rows}k32.f32.e4m3.e4m3" in ptx
    assert "cp.async.bulk.tensor" in ptx
    # weights are pulled before the wait for the kernel before, nothing is read
    before = ptx[: ptx.index("griddepcontrol.wait")]
    assert "cp.async.bulk.prefetch.L2" in before
    assert ("griddepcontrol.launch_dependents" in before) == (call == 0)
    assert "griddepcontrol.launch_dependents" in ptx
    assert not re.search(r"\b(ld\.global|st\.global|atom|cp\.async\.bulk\.tensor)", before)
    assert not re.search(r"\.local\b", ptx), "registers spill"


def test_wrong_shapes_are_refused() -> None:
    a, a_scale = fp8.act_quant(torch.randn(2, 256))
    w, w_scale = fp8.weight_quant(torch.randn(128, 256))
    for bad, words in (
        ((a[:0], a_scale[:0], w, w_scale), "no rows"),
        ((a.bfloat16(), a_scale, w, w_scale), "both e4m3"),
        ((a[:, :128].contiguous(), a_scale, w, w_scale), "inner size"),
        ((a, a_scale[:, :1].contiguous(), w, w_scale), "a_scale is"),
        ((a, a_scale, w.T.contiguous().T, w_scale), "contiguous"),
    ):
        with pytest.raises(ValueError, match=words):
            gemm.fp8_gemm(*bad)


def test_a_part_of_a_matrix_is_summed_as_the_whole() -> None:
    tuned = json.loads((Path(gemm.__file__).parent / "tuned" / "gemm.json").read_text())
    for name in tuned:
        size, _, kind = name.partition(" ")
        n, k = (int(number) for number in size.split("x"))
        whole = gemm.default_launch(n, k, kind or "fp8")
        assert gemm.default_launch(n, k, kind or "fp8", part=n) == whole
        for ranks in (2, 4, 8):
            assert gemm.default_launch(n, k, kind or "fp8", part=n // ranks).splits == whole.splits


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), V3_SHAPES, ids=str)
def test_product_on_the_gpu(n: int, k: int) -> None:
    w, w_scale = (t.cuda() for t in fp8.weight_quant(torch.randn(n, k)))
    a, a_scale = quant.quant(torch.randn(64, k, device="cuda", dtype=torch.bfloat16))
    whole = gemm.fp8_gemm(a, a_scale, w, w_scale)
    expected = fp8.fp8_gemm(a, a_scale, w, w_scale)
    assert (whole.float() - expected).norm() / expected.norm() < 5e-3
    for rows in (1, 2, 3, 8, 16, 17, 33, 63):
        out = torch.empty(rows, n, dtype=torch.bfloat16, device="cuda")
        gemm.fp8_gemm(a[-rows:].contiguous(), a_scale[-rows:].contiguous(), w, w_scale, out=out)
        assert torch.equal(out, whole[-rows:])


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [576, 1536, 7168])
@pytest.mark.parametrize("power", [False, True])
def test_quantisers_on_the_gpu(channels: int, power: bool) -> None:
    x, other = torch.randn(2, 17, channels).bfloat16().unbind()
    x[3, :128] = 0
    weight = torch.rand(channels).bfloat16() + 0.5
    both = torch.cat((x, other), 1)
    normed = (x, weight, 1e-6, other, power)
    for got, expected in (
        (quant.quant(x.cuda(), power), quant.quant(x, power)),
        (quant.silu_mul_quant(both.cuda(), power), quant.silu_mul_quant(both, power)),
        (quant.rms_norm_quant(x.cuda(), weight.cuda(), 1e-6, other.cuda(), power), quant.rms_norm_quant(*normed)),
    ):
        torch.testing.assert_close(got[1].cpu(), expected[1], rtol=1e-2, atol=0)
        assert (got[0].float().cpu() - expected[0].float()).norm() / expected[0].float().norm() < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["divergences", "experts", "grouping", "prompts", "noise", "sampling", "commits",
                                  "incomplete"])  # fmt: skip
def test_as_interpreted_on_the_gpu(what: str) -> None:
    """The programs that the interpreter runs, on the device."""
    program = [sys.executable, str(SUPPORT / "interpreted.py"), what]
    environment = {**os.environ, "KERNELS_ON": "cuda"}
    environment.pop("PYTHONSAFEPATH", None)  # its files import one another
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip().endswith("passed"), done.stderr[-3000:]
