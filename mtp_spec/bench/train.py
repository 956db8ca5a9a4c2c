"""`bench train`: a training step of a model's first MTP module, the main model frozen.

What examples/train_demo/train.py does a step in its second run: the main model's hidden states and distribution, the
module reused on its own output against them, gradients, and an update of the module's weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from mtp_spec.bench import parsing
from mtp_spec.bench.common import Report, Row
from mtp_spec.bench.options import JSON, MODEL, Benchmark, Option, Switch
from mtp_spec.errors import OptionError
from mtp_spec.load_checks import check_device
from mtp_spec.memory import check_host
from mtp_spec.model.checkpoint.folder import load_checkpoint, open_checkpoint
from mtp_spec.model.training import TrainingForward, distil_loss
from mtp_spec.model.transformer import Transformer

LEARNING_RATE = 1e-3
PARTS = ("frozen main model", "module, forward", "module, backward", "update")


def train(args: argparse.Namespace) -> Report:
    """Times training steps of a model's first MTP module on random tokens, part by part; the main model is frozen.

    Weights are float32, products bfloat16 on a GPU and float32 on a CPU. Every step trains on the same batch, so the
    loss of the last one, which is told, must be below that of the first.
    """
    device = args.device
    check_device(device)
    depths = args.depths
    if args.context <= depths:
        raise OptionError(f"--context {args.context}: give more tokens than the {depths} that --depths takes")
    checkpoint = open_checkpoint(args.model or Path(str(files("mtp_spec.configs") / "demo")))
    if not checkpoint.config.num_nextn_predict_layers:
        raise OptionError(f"{args.model} has no MTP module to train")
    if args.context > checkpoint.config.max_position_embeddings:
        raise OptionError(f"--context {args.context}: the model's limit is {checkpoint.config.max_position_embeddings}")
    if device == "cpu":
        check_host(checkpoint.config, torch.float32)
    model = load_checkpoint(checkpoint, dtype=torch.float32, device=device)
    step = Step(model, args.batch, args.context, depths, args.compile)
    for _ in range(2):  # warm-up: allocates memory and compiles code
        step.run()
    taken: list[list[float]] = [step.run() for _ in range(args.repeats)]
    whole, tokens = median(map(sum, taken)), args.batch * args.context
    parts = zip(PARTS, (median(part) for part in zip(*taken, strict=True)), strict=True)
    rows: list[Row] = [
        {"part": name, "ms": 1e3 * seconds, "share": seconds / whole, "tokens a second": tokens / seconds}
        for name, seconds in [*parts, ("a step", whole)]
    ]
    facts = {
        "device": device,
        "batch": args.batch,
        "context": args.context,
        "depths": depths,
        "compiled": args.compile,
        "trained parameters": sum(p.numel() for p in step.trained),
        "loss first": step.losses[0],
        "loss last": step.losses[-1],
        "steps ms": [[1e3 * seconds for seconds in parts] for parts in taken],
    }
    note = (
        f"the loss went from {step.losses[0]:.3f} to {step.losses[-1]:.3f} in {len(step.losses)} steps on one "
        "batch of random tokens"
    )
    title = f"Training steps of {args.batch} rows of {args.context} tokens, the module reused to depth {depths}"
    return Report(title, rows, facts, failed=not step.losses[-1] < step.losses[0], notes=[note])


BENCHMARK = Benchmark(
    name="train",
    help="a training step of the MTP module, the main model frozen",
    run=train,
    options=(
        MODEL,
        JSON,
        Option("--device", "cpu (default) or cuda", default="cpu"),
        Option("--batch", "rows a step (2)", type=parsing.count, default=2, metavar="N"),
        Option("--context", "tokens a row (128)", type=parsing.count, default=128, metavar="N"),
        Option("--depths", "the module is reused to (4)", type=parsing.count, default=4, metavar="N"),
        Option("--repeats", "steps that are timed (7)", type=parsing.count, default=7),
        Switch("--compile", "compile the loss, as the trainer does"),
    ),
)


class Step:
    """Repeated training steps on the same batch.

    Args:
        model: float32; its first MTP module is trained, everything else frozen.
        batch: number of rows.
        context: tokens of each row.
        depths: depth to which the module is reused on its own output.
        compiled: whether to use torch.compile, as the trainer does.
    Attributes:
        trained: the module's parameters.
        losses: loss of each step so far.
    """

    def __init__(self, model: Transformer, batch: int, context: int, depths: int, compiled: bool) -> None:
        model.requires_grad_(False)
        model.mtp[0].requires_grad_(True)
        self.forward, self.device = TrainingForward(model), model.device
        self.trained = [parameter for parameter in model.mtp.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, LEARNING_RATE, fused=model.device.type == "cuda")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (batch, context), generator=generator)
        self.ids, self.weights = ids.to(model.device), torch.ones(batch, context, device=model.device)
        self.depth_weights = (1 / depths,) * depths
        self.loss: Callable[..., Tensor] = torch.compile(distil_loss, dynamic=False) if compiled else distil_loss
        self.losses: list[float] = []

    def run(self) -> list[float]:
        """Runs a step; returns the seconds of each of PARTS."""
        marks = [self._now()]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            with torch.no_grad():
                hidden = self.forward.hidden(self.ids)
                target = self.forward.logits(hidden).float().log_softmax(-1)
            marks.append(self._now())
            loss = self.loss(self.forward, self.ids, self.weights, hidden, target, self.depth_weights)
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        self.optimiser.step()
        self.optimiser.zero_grad()
        marks.append(self._now())
        self.losses.append(loss.item())
        return [after - before for before, after in pairwise(marks)]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
