"""`bench prefill`: how long a prompt takes, on a model's shape at full width, or on a CPU (`prompts_cpu`).

On a GPU the model is that of `bench step`: dense layers, some MoE layers, embedding, head and the MTP module, with
random weights. Time to first token is that of `generate` with a draft, so the module's cache is filled too; every
prompt is new, so nothing is shared. Arithmetic is counted once for what the model defines, in the expanded form,
whatever runs: 2 operations per weight and token (of the chosen experts, and no head), and per pair of tokens and head.
"host ms" is how long the host takes to launch a prompt's long passes, which are not captured: where it is about the
whole time, the GPU waits for the host.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mtp_spec.api import LM
from mtp_spec.backends import open_backend
from mtp_spec.bench import parsing, prompts_cpu
from mtp_spec.bench.common import Report, Row
from mtp_spec.bench.options import JSON, MODEL, Benchmark, Option, OptionGroup, Switch, complete
from mtp_spec.bench.passes import fill, slice_of
from mtp_spec.bench.synthetic import with_module
from mtp_spec.bench.timing import kernel_times
from mtp_spec.cuda import prefill as passes
from mtp_spec.cuda.prompts import read_pieces
from mtp_spec.errors import OptionError
from mtp_spec.model.config import ModelConfig, load_config
from mtp_spec.model.cuda.layers import Dense, Layer
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.distributed.group import ALONE

TOKENS = [1024, 4096, 16384, 32768]
FORMS = ("expanded", "absorbed")
SPARE = 256  # slots for what is generated
REPEATS, CPU_REPEATS = 3, 5
LISTED = 20  # kernels in a table

# options of one device, and their defaults
SLICE: dict[str, Any] = {
    "tokens": TOKENS, "repeats": REPEATS, "shape": "671B", "forms": list(FORMS), "dtype": "fp8", "layers": 4,
    "prefill_tokens": None, "kernels": False,
}  # fmt: skip
FOLDER: dict[str, Any] = {
    "tokens": prompts_cpu.TOKENS, "repeats": CPU_REPEATS, "model": None, "transformers": False, "threads": None,
}  # fmt: skip


def prefill(args: argparse.Namespace) -> Report | None:
    """Times the first token of prompts. On a GPU: on a slice of a model at full width; of the forms of attention
    "expanded" is how the library reads long prompts, "absorbed" how it reads short ones, 256 tokens at a time. On a
    CPU: on a model's folder, plain and with the MTP module's cache filled too, beside transformers if asked for."""
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise OptionError("--device cuda: torch finds no CUDA device; leave it out to time prompts on the CPU")
    why = f"belongs to the other device: --device is {args.device}"
    complete(args, SLICE if on_gpu else FOLDER, [*SLICE, *FOLDER], why)
    if not on_gpu:
        prompts_cpu.cpu_prompts(args)
        return None
    args.shape = parsing.shape_file(args.shape) if isinstance(args.shape, str) else args.shape
    return _on_a_gpu(args)


def _on_a_gpu(args: argparse.Namespace) -> Report:
    full = replace(with_module(load_config(args.shape)), fp8_block=(128, 128) if args.dtype == "fp8" else None)
    context = max(args.tokens) + SPARE
    full = replace(full, max_position_embeddings=max(context, full.max_position_embeddings))
    config = slice_of(full, context, args.layers, ALONE)
    model = DeviceModel(config, "cuda")
    torch.manual_seed(0)
    fill(model)
    least, model.least_expanded = model.least_expanded, 0  # shorter prompts show where that number should be
    run, rows, kernels = model.expanded_on("cuda"), list[Row](), dict[str, dict[str, tuple[int, float]]]()
    if args.prefill_tokens is not None:
        model.prefill_tokens = args.prefill_tokens
    notes = [f"the library reads prompts of {least} tokens and more in the expanded form"]
    notes = notes if run else ["this card or shape has no expanded form: prompts are read 256 tokens at a time"]
    for tokens in args.tokens:
        for form in args.forms:
            model.expanded = run if form == "expanded" else 0
            lm = LM(open_backend(model, None, context), None, context)
            seconds, launching = _first_token(lm, tokens, args.repeats)
            operations = _operations(model, tokens)
            rows.append(
                {
                    "tokens": tokens,
                    "form": form,
                    "ms": 1e3 * seconds,
                    "host ms": 1e3 * launching if form == "expanded" and run else None,
                    "tokens/s": tokens / seconds,
                    "TFLOP/s": operations / seconds / 1e12,
                    "peak GB": torch.cuda.max_memory_allocated() / 1e9,
                }
            )
            if args.kernels:
                kernels[f"{tokens:,} tokens, {form}"] = kernel_times(partial(_prompt, lm, tokens))
            del lm
            torch.cuda.empty_cache()
    facts = {
        "shape": args.shape.stem,
        "dtype": args.dtype,
        "dense layers": config.first_k_dense_replace,
        "moe layers": config.num_hidden_layers - config.first_k_dense_replace,
        "prefill_tokens": model.prefill_tokens,
        "GFLOP per token without attention": _operations(model, 1) / 1e9,
        "kernels": kernels,
    }
    title = (
        f"{args.shape.stem} at full width, {args.dtype}, {facts['dense layers']} dense and {facts['moe layers']} MoE "
        "layers and the module: time to first token"
    )
    return Report(title, rows, facts, notes=notes, tables={name: _listed(found) for name, found in kernels.items()})


def _listed(found: dict[str, tuple[int, float]]) -> list[Row]:
    """Returns the kernels that take longest."""
    whole = sum(micro for _, micro in found.values())
    return [{"kernel": name[:70], "launches": count, "ms": micro / 1e3, "share": micro / whole}
            for name, (count, micro) in list(found.items())[:LISTED]]  # fmt: skip


BENCHMARK = Benchmark(
    name="prefill",
    help="time to first token of prompts: a slice at full width on a GPU, or a model on a CPU",
    run=prefill,
    options=(
        JSON,
        Option("--device", "cuda or cpu (cuda where there is one)", choices=("cuda", "cpu")),
        Option(
            "--tokens",
            f"lengths of prompts (GPU: {TOKENS[0]} to {TOKENS[-1]}, CPU: {prompts_cpu.TOKENS[0]} to "
            f"{prompts_cpu.TOKENS[-1]})",
            type=parsing.integers,
            metavar="N,...",
        ),
        Option(
            "--repeats",
            f"prompts of each length, the median of which is taken (GPU: {REPEATS}, CPU: {CPU_REPEATS})",
            type=parsing.count,
        ),
        OptionGroup(
            "on a GPU",
            Option("--shape", "a published model or a config.json (671B)", type=parsing.shape_file, metavar="NAME"),
            Option(
                "--forms", f"of attention: {', '.join(FORMS)} (all)", type=parsing.chosen(FORMS), metavar="NAME,..."
            ),
            Option("--dtype", "of the weights: fp8 or bfloat16 (fp8)", choices=("fp8", "bfloat16")),
            Option("--layers", "MoE layers (4)", type=parsing.count),
            Option("--prefill-tokens", "most tokens in a pass (as load)", type=parsing.count, metavar="N"),
            Switch("--kernels", "also list the kernels that one prompt of each line launches"),
        ),
        OptionGroup(
            "on a CPU",
            MODEL,
            Switch("--transformers", "also time transformers' forward pass, in float32 and bfloat16"),
            Option("--threads", "of both libraries (torch's)", type=parsing.integers, metavar="N,..."),
        ),
    ),
)


def _first_token(lm: LM, tokens: int, repeats: int) -> tuple[float, float]:
    """Returns the median seconds to the first token of new prompts, and of the host in their long passes; the first
    prompt warms up."""
    torch.cuda.reset_peak_memory_stats()
    taken, launching = list[float](), list[float]()

    def timed(*args: Any) -> Tensor:
        start = perf_counter()
        hidden = read_pieces(*args)  # waits for nothing
        launching[-1] += perf_counter() - start
        return hidden

    with patch.object(passes, "read_pieces", timed):
        for _ in range(repeats + 1):
            launching.append(0.0)
            start = perf_counter()
            _prompt(lm, tokens)
            taken.append(perf_counter() - start)
    return median(taken[1:]), median(launching[1:])


def _prompt(lm: LM, tokens: int) -> None:
    prompt: Any = torch.randint(0, lm.config.vocab_size, (tokens,)).tolist()
    lm.generate(prompt, max_new_tokens=1, temperature=0.8, seed=1, speculation=1, ignore_eos=True)


def _operations(model: DeviceModel, tokens: int) -> float:
    """Returns the operations that a prompt takes by the model's definition."""
    config = model.config
    layers = [*model.layers, *(module.layer for module in model.mtp)]
    weights = sum(_active(layer, config) for layer in layers) + sum(module.eh.weight.numel() for module in model.mtp)
    pairs = tokens * (tokens + 1) / 2
    each = config.qk_head_dim + config.v_head_dim
    return 2.0 * weights * tokens + 2.0 * pairs * each * config.num_attention_heads * len(layers)


def _active(layer: Layer, config: ModelConfig) -> int:
    """Returns the number of a layer's weights that a token meets."""
    found = sum(slot.numel() for name, slot in layer.attention.slots("").items() if "weight" in name and slot.ndim == 2
                and not name.endswith("_scale_inv"))  # fmt: skip
    if isinstance(layer.mlp, Dense):
        return found + 3 * config.hidden_size * layer.mlp.inner
    chosen = config.num_experts_per_tok + config.n_shared_experts
    return found + layer.mlp.router.numel() + 3 * config.hidden_size * config.moe_intermediate_size * chosen
