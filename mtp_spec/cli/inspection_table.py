"""A table of a checkpoint's contents, from its config and file headers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mtp_spec.cpu.foresight import foresee
from mtp_spec.cuda.memory import pages_bytes, plan_memory
from mtp_spec.errors import MTPSpecError
from mtp_spec.kernels.cpu import engine
from mtp_spec.kernels.mla import Layout
from mtp_spec.load_checks import CACHE_DTYPES, DraftVocabulary, cache_refused, context_limit, draft_ids, packs_cache
from mtp_spec.memory import check_own
from mtp_spec.model.cache import PAGE, pages_for
from mtp_spec.model.checkpoint.folder import Checkpoint
from mtp_spec.model.checkpoint.summary import CheckpointSummary, opened_or_refused, summed_up
from mtp_spec.model.cpu.checkpoint import footprint
from mtp_spec.model.cuda.checkpoint import empty_device_model, obstacle
from mtp_spec.shapes import model_folder
from mtp_spec.speculation import MAX_NODES
from mtp_spec.weights import runs_as_fp8, with_weights


def show_checkpoint(
    path: Path | None,
    as_json: bool = False,
    console: Console | None = None,
    drafts: DraftVocabulary = None,
    cache_dtype: str | None = None,
    max_context: int | None = None,
    weights: str | None = None,
) -> None:
    """Prints architecture, parameters, dtypes, MTP modules and memory of a folder if loaded with these options."""
    folder = model_folder(path)
    checkpoint, refused = opened_or_refused(folder)
    summary = summed_up(checkpoint, refused)
    limit, packed = context_limit(folder, max_context), packs_cache(cache_dtype)
    read = checkpoint if refused is not None else with_weights(checkpoint, weights)
    on_gpu = _gpu(read, drafts, cache_dtype, limit) if refused is None else "no"
    foreseen = foresee(read) if refused is None and engine.why_not() is None else None
    if as_json:
        print(
            json.dumps(
                {
                    **asdict(summary),
                    "cache_bytes_per_token": cache_bytes(summary, packed),
                    "cpu_engine": None if foreseen is None else asdict(foreseen),
                }
            )
        )
        return
    on_cpu = _cpu(read, summary, limit) if refused is None else "no"
    if foreseen is not None:
        on_cpu = f"{on_cpu}\n{_refusal(read) or foreseen}"
    (console or Console()).print(_table(folder, summary, on_cpu, on_gpu, packed))


def cache_bytes(summary: CheckpointSummary, packed: bool) -> int:
    """Returns the bytes of latent cache per token, main model and MTP modules, in bfloat16 or packed."""
    config = summary.config
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    return layers * Layout(config.kv_lora_rank, config.qk_rope_head_dim, packed).row_bytes


def _gpu(checkpoint: Checkpoint, drafts: DraftVocabulary, cache_dtype: str | None, limit: int) -> str:
    """Returns the memory plan for a context of `limit` tokens, or why the kernels do not run it."""
    config, found = checkpoint.config, obstacle(checkpoint)
    if found is not None:
        if cache_dtype is not None:
            raise cache_refused(cache_dtype, found)
        return f"bfloat16 by torch, not on the kernels: {found}"
    model = empty_device_model(checkpoint, "meta", draft_ids(drafts, config), packs_cache(cache_dtype))
    plan, more = plan_memory(model, limit), [plan_memory(model, limit, texts).total for texts in (2, 3)]
    listed = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in plan.parts().items())
    second, further = more[0] - plan.total, more[1] - more[0]
    page = pages_bytes(model, limit, 1, 1) - pages_bytes(model, limit, 1, 0)
    kind = "FP8" if model.dtype == torch.float8_e4m3fn else str(model.dtype).removeprefix("torch.")
    remedy = '; weights="fp8" halves the matrices' if kind != "FP8" and runs_as_fp8(checkpoint) else ""
    return (f"{plan.total / 1e6:,.0f} MB in {kind} for {limit} tokens: {listed}; load(max_batch=2) "
            f"{second / 1e6:,.0f} MB more, and {further / 1e6:,.0f} with every further text, or with cache_tokens= "
            f"{page / 1e6:,.2f} for every {PAGE} tokens of all{remedy}")  # fmt: skip


def _cpu(checkpoint: Checkpoint, summary: CheckpointSummary, limit: int) -> str:
    """Returns which code runs the model on a CPU, and its memory."""
    obstacle, config = engine.why_not(), summary.config
    item, found = 4, footprint(checkpoint)
    weights = f"{found.total / 1e6:,.0f} MB of weights as stored, read into memory"
    if found.mapped:
        weights = f"{found.mapped / 1e6:,.0f} MB of weights as stored, mapped from the files"
        if found.own:
            weights += f", {found.own / 1e6:,.0f} MB in memory besides"
    if checkpoint.narrowed:
        weights = f"{found.total / 1e6:,.0f} MB of weights, matrices as FP8, read and converted"
    if obstacle is not None:
        item, count = 2, summary.parameters + summary.mtp_parameters
        weights = f"{count * 2 / 1e6:,.0f} MB of weights in bfloat16, twice that in float32"
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    page = PAGE * layers * (config.kv_lora_rank + config.qk_rope_head_dim) * item
    runs = f"the engine ({engine.library().level})" if obstacle is None else f"torch: {obstacle}"
    return (
        f"{runs}; {weights}; caches in pages of {PAGE} tokens, {page:,} bytes each; load(max_batch=N) plans N x "
        f"{pages_for(limit + MAX_NODES + 1)} for {limit} tokens each"
    )


def _refusal(checkpoint: Checkpoint) -> str | None:
    """Returns why the engine cannot load a checkpoint now on this machine, or None."""
    try:
        check_own(footprint(checkpoint).own, bool(checkpoint.narrowed), None)
    except MTPSpecError as error:
        return f"load refuses it: {error}"
    return None


def _modules(summary: CheckpointSummary) -> str:
    """Returns the number of MTP modules and the parts of each."""
    kinds = summary.mtp_modules
    if not kinds:
        return "absent"
    listed = kinds[0] if len(kinds) == 1 else "; ".join(f"{i}: {kind}" for i, kind in enumerate(kinds, start=1))
    return f"present: {len(kinds)} ({summary.mtp_parameters / 1e6:,.1f} M), {listed}"


def _table(folder: Path, summary: CheckpointSummary, on_cpu: str, on_gpu: str, packed: bool) -> Table:
    config = summary.config
    query = "direct queries" if config.q_lora_rank is None else f"query LoRA {config.q_lora_rank}"
    rows = {
        "architecture": f"{config.model_type}: {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads, {query}, latent {config.kv_lora_rank}+{config.qk_rope_head_dim}",
        "experts": f"{config.n_routed_experts} routed, top {config.num_experts_per_tok}, {config.n_shared_experts} "
        f"shared; {config.first_k_dense_replace} dense layers first",
        "parameters": f"{summary.parameters / 1e6:,.1f} M, {summary.active / 1e6:,.1f} M active for a token",
        "MTP modules": _modules(summary),
        "stored": f"{summary.tensors} tensors in {summary.files} files, {summary.bytes / 1e6:,.1f} MB; "
        + ", ".join(f"{count} {dtype}" for dtype, count in sorted(summary.dtypes.items())),
        "context": f"{config.max_position_embeddings} tokens, {cache_bytes(summary, packed):,} bytes of cache a token "
        f"({CACHE_DTYPES[packed]})",
        "on a CPU": on_cpu,
        "on a GPU": on_gpu,
        **({} if summary.refused is None else {"load": f"refused: {summary.refused}"}),
        **({"notes": "\n".join(summary.notes)} if summary.notes else {}),
    }
    table = Table(title=str(folder), show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
