"""Compiles every kernel of a captured step without a GPU, for sm_90 or another card. See cuda/test_step.py.

Tensors live on the meta device and launches are replaced by compilation, so that what is compiled is what a step at
these sizes launches; with "ranks=8", on one of eight GPUs that share the model. Prints one JSON line a kernel: tensor
core shapes, shared memory, registers spilled.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from mtp_spec.cuda.pages import STEP_ROWS
from mtp_spec.cuda.prompts import Piece, read_pieces
from mtp_spec.cuda.state import SLACK, State, stages_of
from mtp_spec.cuda.step import Prefill, Step
from mtp_spec.kernels import commit, direct, divergence, exchange, fp8, gemm, launching, mla, quant
from mtp_spec.kernels.mla import KEYS, attention, prompt
from mtp_spec.kernels.moe import grouping, layer, many, router
from mtp_spec.kernels.sampler import sampling, uniform
from mtp_spec.model.config import load_config
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.distributed.group import Ranks
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.speculation import Speculation
from mtp_spec.tree_shape import TreeShape

OPTIONS = ("num_warps", "num_stages", "num_ctas", "launch_pdl", "grid", "warmup")
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
    torch.bool: "i1",
}  # fmt: skip
TOUCHES = r"\b((ld|st|red|atom)\.(global|v\d)|bulk\.tensor)"
# kernels that read what no kernel of a pass writes, before they wait
READS_FIRST = ("_absorb_kernel", "_up_kernel", "attend_kernel")
WRITES = r"\b(st|red|atom)\.(global|v\d)"
done: set[str] = set()
ARCH = int(sys.argv[2]) if len(sys.argv) > 2 else 90
SIZE = next((int(name.partition("=")[2]) for name in sys.argv[4:] if name.startswith("ranks=")), 1)
ONLY = [name for name in sys.argv[4:] if name.endswith("_kernel")]  # kernels; all if none are named
# bytes that a program can have, by compute capability
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


def _compile(kernel: JITFunction[Any], *args: Any, **options: Any) -> None:
    if ONLY and kernel.fn.__name__ not in ONLY:
        return
    passed = {name: value for name, value in options.items() if name not in OPTIONS}
    bound = inspect.signature(kernel.fn).bind(*args, **passed).arguments
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = bound[parameter.name]
        if parameter.is_constexpr:
            constants[parameter.name] = value
            signature[parameter.name] = "constexpr"
        elif type(value).__module__.startswith("triton.experimental.gluon"):
            shape = ",".join(str(size) for size in value.block_shape)
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}[{shape}],{value.layout!r}>"
        elif isinstance(value, TensorDescriptor):
            shape = ",".join(str(size) for size in value.block_shape)
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}[{shape}]>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    name = f"{kernel.fn.__name__} {signature} {constants}"
    if name in done:
        return
    done.add(name)
    # as at a launch: addresses are multiples of 16 bytes
    tensors = [place for place, value in enumerate(bound.values()) if isinstance(value, torch.Tensor)]
    aligned = {(place,): [["tt.divisibility", 16]] for place in tensors}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, aligned)
    with redirect_stdout(StringIO()) as log:  # the assembler's
        compiled = triton.compile(
            source, target=GPUTarget("cuda", ARCH, 32), options={"num_warps": options.get("num_warps", 4)}
        )
    ptx = compiled.asm["ptx"]
    print(json.dumps({
        "kernel": kernel.fn.__name__, "wgmma": sorted(set(re.findall(r"wgmma\.mma_async\S*?\.(m64n\d+k\d+\S*)", ptx))),
        "tma": "cp.async.bulk.tensor" in ptx, "late": _late(kernel.fn.__name__, ptx),
        "shared": compiled.metadata.shared,
        "spilled": max(int(size) for size in re.findall(r"(\d+) bytes spill stores", log.getvalue())),
        "constants": {k: v for k, v in constants.items() if isinstance(v, int)},
    }), flush=True)  # fmt: skip


def _late(name: str, ptx: str) -> bool | None:
    """Whether a kernel waits for the one before it touches memory; None for one that starts after it anyway."""
    if "griddepcontrol" not in ptx:
        return None
    before = ptx[: ptx.index("griddepcontrol.wait")]
    touches = WRITES if name in READS_FIRST else TOUCHES
    return "launch_dependents" in ptx and not re.search(touches, before)


def _let_exchange(size: int) -> None:
    """Makes a rank of `size` exchange through rooms where it can, by the kernel, and else through nothing."""
    places = [torch.empty(count, dtype=kind, device="meta")
              for count, kind in ((size, torch.int64), (exchange.PROGRAMS, torch.int32), (1, torch.int32))]  # fmt: skip
    rooms = exchange.Rooms(0, *places)

    def gathered(self: Ranks, *tensors: torch.Tensor) -> Any:
        if self.size == 1:
            return tensors
        if exchange.fits(tensors):
            return tuple(exchange.exchange(tensors, rooms))
        return tuple(x.new_empty(*x.shape[:-1], size * x.shape[-1]) for x in tensors)

    Ranks.gather_all = gathered  # type: ignore[method-assign]


def main(name: str, kind: str, whole: bool) -> None:
    """Compiles the kernels of a chain, of batches and of prompts; with `whole` those of all rules and caches."""
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # the cache keeps no log
    direct.KINDS = ()  # every launch as Triton makes it
    attention.FEW_TILES = attention.FEW_TILES_LONG = 8  # both ways
    JITFunction.run = lambda self, *args, **options: _compile(self, *args, **options)
    modules: list[Any] = [commit, gemm, attention, prompt, layer, grouping, router, quant, sampling, uniform]
    for module in (*modules, divergence):
        module.runs_triton = lambda _: True
    places: list[Any] = [launching, attention]
    places[0].overlaps = lambda _: ARCH >= 90
    of_hopper: list[Any] = [attention, gemm, many, prompt]
    for module in of_hopper:
        module.on_hopper = lambda _: ARCH == 90
    for place in places:
        place.shared_memory = lambda _: SHARED[ARCH]
    folder = files("mtp_spec.configs")
    if name == "demo":
        config = load_config(Path(str(folder / "demo")))
        config = replace(config, num_hidden_layers=2, num_nextn_predict_layers=2)
    else:
        config = load_config(Path(str(folder / ("config_671B.json" if name == "v3" else f"{name}.json"))))
        config = replace(config, num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=1,
                         fp8_block=(128, 128))  # fmt: skip
    if kind != "fp8":
        config = replace(config, fp8_block=None)
    ranks = Ranks(0, SIZE)
    _let_exchange(SIZE)
    params = SamplingParams(temperature=0.8, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1, logit_bias={1: 1.0})
    chain, tree = Speculation(depth=2), Speculation(branching=(2, 2))
    for packed in (False, True) if whole else (False,):
        dtype = torch.float16 if kind == "fp16" else torch.bfloat16
        model = DeviceModel(config, "meta", packed_cache=packed, ranks=ranks, dtype=dtype, fp8_products=ARCH > 86)
        state = State(model, 1000)
        rules = [(None, "coupled"), (chain, "coupled"), (tree, "coupled"), (tree, "rejection")]
        # a packed cache changes attention alone: of all that reads it, what captured groups run is enough
        for speculation, rule in [] if packed else rules if whole else rules[1:2]:
            shape = TreeShape.of(speculation)
            Step(model, state, shape, stages_of(params), shape.depth + 1 if speculation else 0, rule)()
        Step(model, state, TreeShape.of(None), stages_of(params), extend=4)()
        Prefill(model, state, 256, draft=True).run()
        caches = model.new_caches(1000 + SLACK, STEP_ROWS, 40)
        pages = torch.empty(4, caches[0].capacity // KEYS, dtype=torch.int32, device="meta")
        commit.clean(caches, torch.empty(3, dtype=torch.int64, device="meta"))
        several = State(model, 1000, caches, pages)
        several.live, several.logits = several.length.clone(), torch.empty(64, config.vocab_size, device="meta")
        for speculation in (None, chain, tree) if whole and not packed else (tree,):
            shape = TreeShape.of(speculation)
            Step(model, several, shape, stages_of(params), 4 if speculation else 0)()
        Step(model, several, TreeShape.of(None), stages_of(params), extend=4)()
        if packed == whole and model.expanded_on(model.device):
            model.expanded = mla.EXPANDED_ROWS
            read_pieces(model, several.part(0, 2), [Piece([1] * 900, 64, 700, 64), Piece([1] * 300, 0, 300)], True)
    logits, rows = torch.empty(4, 8192, dtype=torch.bfloat16, device="meta"), torch.empty(4, device="meta")
    divergence.divergence(divergence.targets(logits), logits, rows.long(), rows, 1.0, 1.0, 1.0)
    given = [torch.empty(8, size, dtype=kind, device="meta") for size, kind in ((8192, fp8.E4M3), (64, torch.float32))]
    counts = [torch.empty(1, dtype=torch.int32, device="meta") for _ in range(2)]
    exchange.exchange(given, exchange.Rooms(0, torch.empty(2, dtype=torch.int64, device="meta"), *counts))


if __name__ == "__main__":
    assert tl
    main(sys.argv[1], sys.argv[3] if len(sys.argv) > 3 else "fp8", "whole" in sys.argv)
    print("passed")
