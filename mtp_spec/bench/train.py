"""`bench train`: a training step of MTP modules on the frozen main model, as `mtp-spec train` runs it."""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import mtp_spec
from mtp_spec.bench import parsing
from mtp_spec.bench.common import Report, Row
from mtp_spec.bench.options import JSON, MODEL, Benchmark, Option
from mtp_spec.bench.train_shape import train_shape
from mtp_spec.errors import OptionError
from mtp_spec.load_checks import check_device, context_limit
from mtp_spec.model.checkpoint.folder import open_checkpoint
from mtp_spec.shapes import model_folder
from mtp_spec.speculation import MAX_DEPTH
from mtp_spec.training.backbone import Backbone
from mtp_spec.training.captured import CapturedSteps
from mtp_spec.training.loop import autocast, optimiser_for
from mtp_spec.training.modules import ready_modules, shared_weights
from mtp_spec.training.objective import draft_loss
from mtp_spec.training.options import BLOCKS, OPTIMISERS, TrainOptions

PARTS = ("frozen main model", "modules and loss, forward", "modules, backward", "update")
SHIPPED, RATE = "shipped", 2e-4


def train(args: argparse.Namespace) -> Report:
    """Times training steps of MTP modules on random tokens, part by part; the main model is frozen.

    Weights are float32, products bfloat16 on a GPU and float32 on a CPU. Every step trains on the same batch, so the
    loss of the last one, which is told, must be below that of the first. On a GPU `train` replays a step as a CUDA
    graph, which has a line of its own. With --shape: whole steps of `train` beside a published model of random weights.
    """
    if args.context <= args.depths:
        raise OptionError(f"--context {args.context}: give more tokens than the {args.depths} that --depths takes")
    if args.depths > MAX_DEPTH:
        raise OptionError(f"--depths {args.depths}: give at most {MAX_DEPTH}")
    if args.shape is not None:
        if args.model is not None:
            raise OptionError("--model has weights of its own, and --shape random ones: give one of both")
        return train_shape(args)
    if args.dtype is not None:
        raise OptionError(f"--dtype {args.dtype} is of --shape's weights: give it with --shape")
    args.device = check_device(args.device or "cpu")
    folder = model_folder(args.model)
    checkpoint = open_checkpoint(folder)
    if args.block == SHIPPED and not checkpoint.config.num_nextn_predict_layers:
        raise OptionError(f"{folder} has no MTP module to train: give --block dense or moe for a new one")
    if args.context > context_limit(folder, None):
        raise OptionError(f"--context {args.context}: the model's limit is {context_limit(folder, None)}")
    step = Step(folder, args)
    for _ in range(2):  # warm-up: allocates memory and compiles kernels
        step.run()
    taken: list[list[float]] = [step.run() for _ in range(args.repeats)]
    whole, tokens = median(map(sum, taken)), args.batch * args.context
    parts = zip(PARTS, (median(part) for part in zip(*taken, strict=True)), strict=True)
    rows: list[Row] = [
        {"part": name, "ms": 1e3 * seconds, "share": seconds / whole, "tokens a second": tokens / seconds}
        for name, seconds in [*parts, ("a step", whole), *step.captured(args.repeats)]
    ]
    facts = {
        "device": args.device,
        "batch": args.batch,
        "context": args.context,
        "depths": args.depths,
        "block": args.block,
        "optimiser": step.options.optimiser,
        "trained parameters": sum(p.numel() for p in step.modules.parameters()),
        "loss first": step.losses[0],
        "loss last": step.losses[-1],
        "steps ms": [[1e3 * seconds for seconds in parts] for parts in taken],
    }
    note = (
        f"the loss went from {step.losses[0]:.3f} to {step.losses[-1]:.3f} in {len(step.losses)} steps on one "
        "batch of random tokens"
    )
    title = f"Training steps of {args.batch} x {args.context} tokens, {args.block} modules, to depth {args.depths}"
    return Report(title, rows, facts, failed=not step.losses[-1] < step.losses[0], notes=[note])


BENCHMARK = Benchmark(
    name="train",
    help="a training step of the MTP module, the main model frozen",
    run=train,
    options=(
        MODEL,
        JSON,
        Option("--shape", "random weights of this published model, beside which a new module is trained",
               type=parsing.shape_file, metavar="NAME"),
        Option("--dtype", "of --shape's weights: bfloat16 (default) or fp8", choices=("bfloat16", "fp8")),
        Option("--device", "cpu (default) or cuda (default with --shape)"),
        Option(
            "--block", "the checkpoint's modules (default), or a new one", choices=(SHIPPED, *BLOCKS), default=SHIPPED
        ),
        Option("--optimiser", "adamw (default) or muon", choices=OPTIMISERS, default="adamw"),
        Option("--batch", "rows a step (2)", type=parsing.count, default=2, metavar="N"),
        Option("--context", "tokens a row (128)", type=parsing.count, default=128, metavar="N"),
        Option("--depths", "drafts are trained to (4)", type=parsing.count, default=4, metavar="N"),
        Option("--repeats", "steps that are timed (7)", type=parsing.count, default=7),
    ),
)  # fmt: skip


class Step:
    """Repeated training steps on the same batch.

    Attributes:
        modules: what is trained.
        losses: loss of each step so far.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        start, block = ("shipped", "dense") if args.block == SHIPPED else ("random", args.block)
        self.options = TrainOptions(
            texts=folder / "config.json",
            start=start,
            block=block,
            depth=args.depths,
            optimiser=args.optimiser,
            rate=RATE,
        )
        checkpoint = open_checkpoint(folder)
        self.lm = mtp_spec.load(folder, device=args.device, max_context=args.context, measure=False)
        self.modules = ready_modules(self.options, checkpoint, self.lm.model.device)
        most = args.context + args.depths
        self.forward, _ = shared_weights(self.lm.model, checkpoint, self.modules, most)
        self.backbone, self.objective = Backbone(self.lm.model), self.options.objective()
        self.optimiser = optimiser_for(self.options, self.modules, args.device)
        generator = torch.Generator().manual_seed(0)
        texts = torch.randint(checkpoint.config.vocab_size, (args.batch, args.context), generator=generator)
        self.texts, device = texts.tolist(), self.lm.model.device
        self.ids = torch.nn.functional.pad(texts, (0, args.depths)).to(device)
        self.weights = torch.zeros(self.ids.shape, dtype=torch.float32, device=device)
        self.weights[:, : args.context - 1] = 1
        self.losses: list[float] = []

    def run(self) -> list[float]:
        """Runs a step; returns the seconds of each of PARTS."""
        marks = [self._now()]
        hidden = torch.stack(self.backbone.hidden(self.texts))
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, self.ids.shape[1] - hidden.shape[1]))
        marks.append(self._now())
        with autocast(self.forward):
            loss = draft_loss(self.forward, self.objective, self.ids, hidden, self.weights).loss
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        self.optimiser.step(1.0)
        marks.append(self._now())
        self.losses.append(loss.item())
        return [after - before for before, after in pairwise(marks)]

    def captured(self, repeats: int) -> list[tuple[str, float]]:
        """Returns the seconds of a step as `train` runs it on a GPU, with hidden states that are kept; none on a CPU,
        or if it cannot be captured."""
        if not self.weights.is_cuda:
            return []
        hidden = torch.stack(self.backbone.hidden(self.texts))
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, self.ids.shape[1] - hidden.shape[1]))
        chosen = self.weights.flatten().nonzero().squeeze(1)

        def update(ids: Tensor, hidden: Tensor, weights: Tensor, chosen: Tensor, scale: Tensor) -> Tensor:
            with autocast(self.forward):
                loss = draft_loss(self.forward, self.objective, ids, hidden, weights, chosen=chosen).loss
            loss.backward()
            self.optimiser.step(scale)
            return loss.detach()

        steps, taken = CapturedSteps(update, self.weights.device), list[float]()
        for _ in range(2 + repeats):  # launched, captured, replayed
            begin = self._now()
            loss = steps(self.ids, hidden, self.weights, chosen, torch.ones((), device=self.weights.device))
            taken.append(self._now() - begin)
            self.losses.append(loss.item())
        return [("captured step, without the main model", median(taken[2:]))] if steps.graphs else []

    def _now(self) -> float:
        if self.weights.is_cuda:
            torch.cuda.synchronize(self.weights.device)
        return time.perf_counter()
