"""transformers' own DeepSeek-V3, plain and with `use_mtp`, on a copy of the weights in our arithmetic's dtype."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mtp_spec.api import LM
from mtp_spec.bench.turns import Generate, Written
from mtp_spec.errors import OptionError
from mtp_spec.load_checks import cpu_has_bfloat16
from mtp_spec.model.checkpoint.folder import load_checkpoint, save_checkpoint
from mtp_spec.model.cpu.model import CPUModel
from mtp_spec.model.transformer import Transformer
from mtp_spec.shapes import model_folder
from mtp_spec.stats import GenerationStats

PLAIN, MTP = "transformers plain", "transformers use_mtp"
# if our arithmetic is float32 and the processor multiplies bfloat16 faster
BFLOAT16 = "transformers plain, bfloat16"


def transformers_ways(lm: LM, folder: Path, args: argparse.Namespace) -> tuple[dict[str, Generate], dict[str, str]]:
    """Returns the ways that run, and the reasons why others do not.

    Args:
        folder: for the copy of the weights; it must outlive the ways.
    """
    loaded, stops = transformers_copy(lm, folder, args), sorted(lm.stop_ids())

    def way(model: Any, **more: Any) -> Generate:
        def generate(ids: list[int], options: dict[str, Any]) -> Written:
            tokens = torch.tensor([ids], device=model.device)
            start = time.perf_counter()
            with torch.inference_mode():
                out = model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    do_sample=False,
                    eos_token_id=stops,
                    pad_token_id=stops[0],
                    max_new_tokens=options["max_new_tokens"],
                    **more,
                )
            return Written(out[0, len(ids) :].tolist(), time.perf_counter() - start, GenerationStats())

        return generate

    dtype = _copied_in(lm)
    model, ways = loaded(dtype), dict[str, Generate]()
    ways[PLAIN] = way(model)
    if dtype == torch.float32 and cpu_has_bfloat16():
        ways[BFLOAT16] = way(loaded(torch.bfloat16))
    try:
        _prepare_mtp(model, lm)
        way(model, use_mtp=True)([0, 2, 400], {"max_new_tokens": 4})
    except Exception as error:  # any exception: versions expect different layouts, or have no support
        import transformers

        return ways, {MTP: f"not in transformers {transformers.__version__}: {error}"[:200]}
    return {**ways, MTP: way(model, use_mtp=True)}, {}


def transformers_copy(lm: LM, folder: Path, args: argparse.Namespace) -> Callable[[torch.dtype], Any]:
    """Returns a function that loads transformers' model in a dtype, on the model's device.

    Args:
        folder: for the copy of the weights; it must outlive the models.

    Raises:
        OptionError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise OptionError("--transformers needs the library: pip install transformers") from None
    ours = lm.model
    if not isinstance(ours, Transformer):  # FP8 there needs kernels from a hub
        source = model_folder(args.model)
        ours = load_checkpoint(source, dtype=_copied_in(lm))
    save_checkpoint(ours, folder / "copy", fp8=False)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    def loaded(dtype: torch.dtype) -> Any:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "copy", dtype=dtype)
        return model.to(lm.model.device).eval()

    return loaded


def _copied_in(lm: LM) -> torch.dtype:
    """Returns the type of the copy: that of our arithmetic."""
    if isinstance(lm.model, Transformer):
        return lm.model.dtype
    return torch.float32 if isinstance(lm.model, CPUModel) else torch.bfloat16


@contextmanager
def counted_steps() -> Iterator[list[tuple[int, int]]]:
    """Yields a list that gets (drafted, accepted) for every pass of `use_mtp`; the first is the prompt's."""
    from transformers.generation import candidate_generator

    kind: Any = candidate_generator.MTPCandidateGenerator
    report, steps = kind.update_candidate_strategy, list[tuple[int, int]]()

    def count(self: Any, ids: Any, scores: Any, matches: Any) -> Any:
        steps.append((scores.shape[1] - 1, int(matches)))
        return report(self, ids, scores, matches)

    kind.update_candidate_strategy = count
    try:
        yield steps
    finally:
        kind.update_candidate_strategy = report


def _prepare_mtp(model: Any, lm: LM) -> None:
    """Makes the MTP modules load, once.

    transformers looks for them under the names that its class ignores when the model itself is loaded: for DeepSeek-V3
    layer 61, whatever the number of layers (5.17 to 5.24). And it would load them again for every text.
    """
    from transformers import modeling_layers

    modules: Any = modeling_layers.MtpModel
    first, count = lm.config.num_hidden_layers, lm.config.num_nextn_predict_layers
    if not count:
        raise OptionError("the checkpoint has no MTP modules")
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{first + i}\." for i in range(count)]
    modules.read_files = getattr(modules, "read_files", modules.from_pretrained)
    loaded = modules.read_files(model, device_map={"": model.device})
    modules.from_pretrained = lambda *_, **__: loaded
