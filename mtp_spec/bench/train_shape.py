"""`bench train --shape`: steps of `train` at the full size of a published model, whose weights are random.

Texts are random tokens of two lengths, which fill batches of two shapes: the second is launched and captured while the
first one's graph is there, which takes most memory. A step's time does not depend on the numbers, but for how evenly
experts are chosen.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from mtp_spec.bench.common import Report, Row
from mtp_spec.bench.passes import fill
from mtp_spec.errors import OptionError
from mtp_spec.load_checks import check_device
from mtp_spec.model.config import load_config
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.training.backbone import Backbone, States, near_bytes
from mtp_spec.training.batches import Batches, Shapes
from mtp_spec.training.loop import Trainer, optimiser_numbers
from mtp_spec.training.modules import joined, new_modules, trained_numbers, width_of
from mtp_spec.training.options import BLOCKS, TrainOptions
from mtp_spec.training.plan import check_modules, free_bytes, plan_of
from mtp_spec.training.team import Team
from mtp_spec.training.texts import Corpus

FIRST = 8  # least number of steps that are not timed: until both shapes are captured
SHORT = 0.75  # length of half of the texts, of the others'


def train_shape(args: argparse.Namespace) -> Report:
    """Times whole steps, with the main model's passes and with hidden states that are kept, and compares memory with
    the plan that `train` makes."""
    device = args.device = check_device(args.device or "cuda")
    args.dtype = args.dtype or "bfloat16"
    if args.block not in BLOCKS:
        raise OptionError("--shape has random weights and no modules to go on with: give --block dense or moe")
    full = load_config(args.shape)
    config = replace(full, num_nextn_predict_layers=0, fp8_block=None if args.dtype == "bfloat16" else (128, 128))
    if args.context + args.depths + 8 > config.max_position_embeddings:
        raise OptionError(f"--context {args.context}: the model's limit is {config.max_position_embeddings}")
    try:
        slots = DeviceModel(config, "meta").checkpoint_slots()
    except ValueError as error:
        raise OptionError(f"--shape {args.shape}: the kernels cannot run it ({error}); give another one") from error
    size = sum(slot.nbytes for slot in slots.values())
    free = free_bytes(torch.device(device))
    if free is not None and size > free:
        raise OptionError(f"the model takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: give another --shape")
    torch.manual_seed(0)
    model = DeviceModel(config, device)
    fill(model)
    with TemporaryDirectory() as folder, torch.enable_grad():
        return _report(args, model, _corpus(Path(folder), args, config.vocab_size), Path(folder))


def _corpus(folder: Path, args: argparse.Namespace, vocabulary: int) -> Corpus:
    """Returns random texts for the first steps and for those that are timed: as many batches of each length, all full
    where they are padded to shapes, because others are of further shapes, which would be captured in timed steps."""
    corpus, random = Corpus(folder / "texts", 0.0), np.random.default_rng(0)
    shapes, steps = Shapes(_tokens(args), args.depths, args.context), (FIRST + args.repeats + 1) // 2
    for length in (args.context, round(SHORT * args.context)):
        for _ in range(steps * shapes.full(shapes.width(length))):
            ids = random.integers(vocabulary, size=length).tolist()
            corpus.add("texts", len(corpus.texts), ids, [(1, len(ids))], "random")
    corpus.close()
    return corpus


def _tokens(args: argparse.Namespace) -> int:
    """Returns the tokens of a batch, places behind its texts included."""
    tokens: int = args.batch * (args.context + args.depths)
    return tokens


def untimed(batches: Batches, corpus: Corpus) -> int:
    """Returns the steps until batches of both lengths have come twice, which captures them; at least FIRST."""
    seen, last = Counter[int](), 0
    for step in range(batches.count(0)):
        longest = max(corpus.texts[number].length for number in batches.of(step))
        seen[longest] += 1
        if seen[longest] == 2:
            last = step + 1
    return max(FIRST, last)


def _kept(backbone: Backbone, corpus: Corpus) -> States:
    """Returns the corpus's hidden states, all of which are kept in the model's memory.

    Raises:
        OptionError: they would take more of a GPU's memory than `train` keeps there.
    """
    model = backbone.model
    size = corpus.tokens * model.config.hidden_size * 4
    states = States(backbone, corpus, None, size, near_bytes(model.device) if model.device.type == "cuda" else size)
    if states.near_tokens < corpus.tokens:
        raise OptionError(f"hidden states of {states.near_tokens} tokens fit beside the model and {corpus.tokens} are "
                          "trained on: give fewer --repeats or a smaller --batch")  # fmt: skip
    return states


def _report(args: argparse.Namespace, model: DeviceModel, corpus: Corpus, folder: Path) -> Report:
    config, device, memory = model.config, model.device, _Memory(model.device)
    options = TrainOptions(
        texts=Path(__file__), block=args.block, depth=args.depths, optimiser=args.optimiser, steps=10**6,
        batch_tokens=_tokens(args), max_tokens=args.context + args.depths + 1, check_tokens=args.context,
    )  # fmt: skip
    numbers = optimiser_numbers(options, device.type)
    check_modules(trained_numbers(options, config), numbers, device)
    modules = new_modules(config, width_of(options, config), options.modules, options.seed, device)
    forward = joined(config, modules, model.embed_tokens, model.lm_head, args.context + args.depths)
    backbone = Backbone(model)
    states = _kept(backbone, corpus)
    trainer = Trainer.of(options, forward, modules, corpus, states, Team(str(args.device)))
    shape = trainer.largest()
    plan = plan_of(forward, modules, trainer.objective, shape, numbers, [], states,
                   backbone.bytes(shape[0] * shape[1]), trainer.captured is not None)  # fmt: skip
    print(f"batches of {shape[0]} x {shape[1]} tokens; {plan}", flush=True)
    plan.check(device, folder)
    memory.forget()

    def timed(steps: int) -> tuple[float, float]:
        """Returns the seconds of a step, and the tokens of a second."""
        texts = [number for step in range(steps) for number in trainer.batches.of(trainer.step + step)]
        memory.wait()
        begin = time.perf_counter()
        for _ in range(steps):
            trainer.one()
        memory.wait()
        seconds = time.perf_counter() - begin
        return seconds / steps, sum(corpus.texts[number].length for number in texts) / seconds

    whole, first = trainer.batches.count(0), untimed(trainer.batches, corpus)
    timed(first)
    parts = {"a step, with the main model's passes": timed(whole - first), "a step, hidden states kept": timed(whole)}
    trainer.settle()
    rows: list[Row] = [{"part": name, "ms": 1e3 * seconds, "tokens a second": pace}
                       for name, (seconds, pace) in parts.items()]  # fmt: skip
    facts: dict[str, Any] = {
        "shape": args.shape.stem, "dtype": args.dtype, "block": args.block, "optimiser": options.optimiser,
        "depths": args.depths, "batch": list(shape), "graphs": trainer.captured.graphs if trainer.captured else 0,
        "trained parameters": sum(p.numel() for p in modules.parameters() if p.requires_grad),
        "planned GB": plan.memory / 1e9, "plan": str(plan),
        "loss first": trainer.log[0]["loss"], "loss last": trainer.log[-1]["loss"],
    }  # fmt: skip
    notes = memory.told(plan.memory, trainer.captured.most if trainer.captured else 0, facts)
    title = f"Training steps at {args.shape.stem}'s size, {args.block} module, to depth {args.depths}"
    return Report(title, rows, facts, notes=notes)


class _Memory:
    """A GPU's memory beside the model; of a CPU nothing is known.

    Args:
        device: holds the model and nothing else.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._held = device, 0
        if device.type == "cuda":
            self.forget()
            self._held = torch.cuda.memory_reserved(device)
            torch.cuda.reset_peak_memory_stats(device)

    def forget(self) -> None:
        """Gives back what no tensor holds."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def told(self, planned: int, before: int, facts: dict[str, Any]) -> list[str]:
        """Adds to the facts what was used, and returns a sentence on it.

        Args:
            before: bytes that torch held at most before its peaks were reset.
        """
        if self._device.type != "cuda":
            return []
        peak = max(before, torch.cuda.max_memory_reserved(self._device)) - self._held
        facts |= {"model GB": self._held / 1e9, "peak GB": peak / 1e9, "peak over plan": peak / planned}
        return [f"memory beside the model's {self._held / 1e9:.1f} GB: {peak / 1e9:.2f} GB, {peak / planned:.3f} of "
                "the plan"]  # fmt: skip
