"""`load`: from a folder to a model ready to generate."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from mtp_spec.api import LM
from mtp_spec.backends import open_backend
from mtp_spec.distributed.consistency import start_facts
from mtp_spec.errors import OptionError
from mtp_spec.load_checks import (
    check_batch,
    check_device,
    check_ends,
    check_prefill,
    context_limit,
    dtype_of,
    load_model,
)
from mtp_spec.model.checkpoint.folder import open_checkpoint
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.distributed.joining import join_ranks, local_device, open_rooms
from mtp_spec.model.undisturbed import undisturbed
from mtp_spec.progress import Report, byte_progress
from mtp_spec.sampling.defaults import FILE, Defaults
from mtp_spec.shapes import model_folder
from mtp_spec.text import end_ids, open_tokenizer
from mtp_spec.weights import check_weights


@undisturbed(inference=False)
def load(
    path: str | Path | None = None,
    *,
    config: str | Path | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    weights: str | None = None,
    mtp: str | Path | None = None,
    max_context: int | None = None,
    max_batch: int = 1,
    cache_tokens: int | None = None,
    prefill_tokens: int | str | None = "auto",
    draft_vocabulary: int | str | Path | None = None,
    cache_dtype: str | torch.dtype | None = None,
    defaults: str = "library",
    measure: bool = True,
    progress: bool | Report = False,
    parallel: Any = "auto",
) -> LM:
    """Returns a model ready to generate.

    Args:
        path: a Hugging Face folder, or one of per-rank files made by `mtp-spec convert` or DeepSeek's convert.py, for
            any number of ranks; None is the bundled model, as is "demo" where no folder has that name.
        config: a JSON file that describes the model in place of the folder's config.json, in Hugging Face's fields or
            DeepSeek's; folders made by DeepSeek's convert.py need it.
        device: "cpu" or "cuda".
        dtype: "float32", "bfloat16", "float16", "float8_e4m3fn" or the torch dtype. None keeps weights as they are
            stored: on a GPU FP8 checkpoints run on this library's kernels, on a CPU any of these on its engine, with
            float32 arithmetic; there "float32" is the same, and "bfloat16" and "float16" round matrices. If torch
            computes, weights, FP8 included, are converted to this dtype; None is then bfloat16 if it is fast, else
            float32.
        weights: "fp8" converts the matrices of a bfloat16 folder to FP8 with 128x128 scales while reading, with the
            same bits as `mtp-spec cast --to fp8`; None keeps them.
        mtp: a folder whose MTP modules draft in place of the checkpoint's own, such as `mtp-spec train` writes
            (docs/howto/train.md); None uses those of the checkpoint, if it has any.
        max_context: most tokens of prompt and text together; None is the model's own limit.
        max_batch: most sequences that are generated in a batch, for a list of prompts or `LM.submit`.
        cache_tokens: tokens that the batch's cache holds, prompts, generated tokens and drafts included. Requests wait
            for free cache; one that could never fit raises an error. None is `max_batch` times `max_context`.
        prefill_tokens: tokens of a pass over long prompts on a Hopper GPU: "auto" is up to 16,384, or fewer where
            memory is short. The number does not change the text. None reads 256 tokens at a time, as other devices do,
            which rounds differently (docs/howto/gpu.md).
        draft_vocabulary: restricts drafts to the first tokens, given their number, or to ids in a file, one a line; it
            reads less of the head when drafting, and the text does not change. None allows any token.
        cache_dtype: of the latent cache on this library's kernels: "bfloat16", the default, or "float8_e4m3fn", which
            holds nearly twice the tokens but rounds them, so it changes the text (docs/howto/gpu.md).
        defaults: values of generation options that a call does not give: "library", those of `SamplingParams`, or
            "checkpoint", those of the folder's generation_config.json (docs/howto/sampling.md).
        measure: time the passes of a step at the first use of "auto", for a few seconds, and store the times in the
            user's cache directory; False plans from typical times and stores nothing.
        progress: show a bar for the bytes read and for the measurements; or a function that is called with (bytes read,
            bytes in all) instead.
        parallel: which processes share the model: "auto", those that torchrun started together with this one; a
            `torch.distributed` process group; None, this one alone. Each of them must make the same calls
            (docs/howto/parallel.md).

    Raises:
        CheckpointError: the folder is missing, incomplete or not a DeepSeek-V2/V3 model, its tokenizer cannot be read,
            its generation_config.json has values that are not possible and are asked for, or the processes of
            `parallel` cannot divide it.
        RankError: another rank failed, differs or does not answer.
        OptionError: an impossible device, dtype, weights, max_context, max_batch, cache_tokens, prefill_tokens,
            draft_vocabulary, cache_dtype, defaults, config, measure or progress.
        MTPSpecError: weights and caches do not fit in memory. It is the base of the others too.
    """
    if path is not None and not isinstance(path, str | Path):
        raise OptionError(f"path={path!r}: give a folder's name, or None for the bundled model")
    folder = model_folder(path)
    if config is not None and path is None:
        raise OptionError(f"config={config!r} needs a path: the bundled model has its own")
    if mtp is not None and (not isinstance(mtp, str | Path) or mtp == ""):
        raise OptionError(f"mtp={mtp!r}: give the name of a folder with MTP modules, or None for the checkpoint's own")
    if config is not None and not isinstance(config, str | Path):
        raise OptionError(f"config={config!r}: give the name of a JSON file, or None for the folder's config.json")
    config_file = None if config is None else Path(config)
    if not isinstance(progress, bool) and not callable(progress):
        raise OptionError(f"progress={progress!r}: allowed are True, False or a function of (bytes read, bytes in all)")
    if not isinstance(measure, bool):
        raise OptionError(f"measure={measure!r}: allowed are True and False")
    device = check_device(device)
    ranks = join_ranks(parallel, device)
    ranks.rest()
    with ranks.together():
        device = local_device(device, ranks)
        check_batch(max_batch, cache_tokens, device)
        check_prefill(prefill_tokens, device)
        limit = context_limit(config_file or folder, max_context)
        chosen = dtype_of(dtype)
        check_weights(weights)
        checkpoint = open_checkpoint(folder, config_file, None if mtp is None else Path(mtp))
        for note in checkpoint.notes:
            warnings.warn(f"{folder}: {note}", stacklevel=3)
        own = Defaults(folder / FILE, defaults, checkpoint.config.vocab_size)
        tokenizer = open_tokenizer(folder)
        ends = end_ids(folder, checkpoint.config.vocab_size)
        check_ends(tokenizer, checkpoint.config, folder)
    facts = {"max_context": limit, "max_batch": max_batch, "cache_tokens": cache_tokens,
             "prefill_tokens": prefill_tokens, "dtype": chosen,
             "weights of load": weights, "draft_vocabulary": draft_vocabulary, "cache_dtype": cache_dtype,
             "defaults": defaults}  # fmt: skip
    ranks.agree(facts | start_facts(checkpoint, device))
    open_rooms(ranks, device)
    bar = progress is True
    with ranks.together(), byte_progress(bar and ranks.rank == 0) as shown:
        report = progress if callable(progress) else shown
        model = load_model(checkpoint, chosen, device, limit, draft_vocabulary, report, cache_dtype, ranks, max_batch,
                           cache_tokens, weights, prefill_tokens)  # fmt: skip
    if isinstance(model, DeviceModel):  # ranks with less memory read fewer rows in a pass: all must act alike
        model.expanded, model.prefill_tokens = map(min, zip(*ranks.everyone(model.passes), strict=True))
    backend = open_backend(model, tokenizer, limit, max_batch, cache_tokens, measure, bar)
    return LM(backend, tokenizer, limit, max_batch, own, ends)
