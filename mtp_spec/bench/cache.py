"""`bench cache`: what a latent cache in FP8 costs in accuracy, on texts that the model wrote itself."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from mtp_spec.analysis.scoring import Scores, score_ids
from mtp_spec.api import LM
from mtp_spec.bench.common import Report, Row, bundled_prompts, question
from mtp_spec.bench.options import ModelBenchmark, text_options
from mtp_spec.errors import OptionError
from mtp_spec.model.checkpoint.folder import open_checkpoint
from mtp_spec.model.cuda.checkpoint import load_device_model, obstacle
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.shapes import model_folder

# columns of a row of sums
ERROR, SIZE, AGREED, DIVERGENCE, MODULE_AGREED, ROWS, MODULE_ROWS = range(7)


@torch.inference_mode()
def cache(lm: LM, args: argparse.Namespace) -> Report:
    """Compares logits over a bfloat16 and an FP8 cache, teacher-forced on greedy answers to held-out prompts.

    Elsewhere than on a GPU the kernels' references compute, which round as the kernels do, and a third row tells how
    far their FP8 activations are from the torch model: the scale on which to see the cache's share.
    """
    folder = model_folder(args.model)
    model = lm.model if isinstance(lm.model, DeviceModel) else _on_kernels(folder, lm.model.device)
    sums: dict[str, Tensor] = {}
    for item in track(bundled_prompts(args.prompts), "prompts", transient=True):
        ids = question(lm, item["prompt"])
        answer = lm.generate(ids, temperature=0, max_new_tokens=args.max_new_tokens).token_ids
        first, text = len(ids) - 1, [*ids, *answer]
        exact, packed = _scored(model, text, False), _scored(model, text, True)
        pairs = {"FP8 cache against bfloat16 cache": (packed, exact)}
        if model is not lm.model:
            pairs["kernels, bfloat16 cache, against torch"] = exact, lm.score(text)
        for name, pair in pairs.items():
            sums[name] = sums.get(name, torch.zeros(7, dtype=torch.float64)) + _compared(*pair, first)
    layout = model.layers[0].attention.head.layout
    facts = {"bytes a token and layer": {"bfloat16": layout().row_bytes, "float8_e4m3fn": layout(True).row_bytes}}
    return Report("Logits where a token of the answer is predicted", [_row(*item) for item in sums.items()], facts)


BENCHMARK = ModelBenchmark(
    name="cache",
    help="what a latent cache in FP8 costs in accuracy",
    run=cache,
    options=text_options(20, 64),
)


def _on_kernels(folder: Path, device: torch.device) -> DeviceModel:
    checkpoint = open_checkpoint(folder)
    found = obstacle(checkpoint)
    if found is not None:
        raise OptionError(f"bench cache compares caches of the kernels, which do not run {folder}: {found}")
    return load_device_model(checkpoint, device)


def _scored(model: DeviceModel, ids: list[int], packed: bool) -> Scores:
    given = model.packed_cache
    model.packed_cache = packed
    try:
        return score_ids(model, ids)
    finally:
        model.packed_cache = given


def _compared(got: Scores, expected: Scores, first: int) -> Tensor:
    """Returns sums over the rows from `first` on that predict a token of the text, in the columns named above."""
    ours, theirs = got.logits[first:-1].double(), expected.logits[first:-1].double()
    chances = theirs.log_softmax(-1)
    divergence = (chances.exp() * (chances - ours.log_softmax(-1))).sum()
    # the first module's last two rows lack a token, or a true one to predict
    drafts, their_drafts = (scores.mtp_logits[:1, first:-2].argmax(-1).flatten() for scores in (got, expected))
    agreed, drafted = (ours.argmax(-1) == theirs.argmax(-1)).sum(), (drafts == their_drafts).sum()
    error, size = (ours - theirs).square().sum(), theirs.square().sum()
    numbers = (error, size, agreed, divergence, drafted, len(ours), len(drafts))
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64)


def _row(name: str, sums: Tensor) -> Row:
    total, modules = sums[ROWS], sums[MODULE_ROWS].clamp_min(1)
    return {
        "compared": name,
        "tokens": int(total),
        "relative error": float((sums[ERROR] / sums[SIZE]).sqrt()),
        "same greedy token": float(sums[AGREED] / total),
        "KL, nats": float(sums[DIVERGENCE] / total),
        "same greedy draft": float(sums[MODULE_AGREED] / modules),
    }
