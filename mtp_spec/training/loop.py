"""The steps of training, and the state from which they go on after a crash.

A step depends on the seed, on its number and on the state alone, so a run that was killed and started again computes
what it would have computed, on a CPU to the bit; but for a schedule that goes by time. Alone on a GPU all batches are
padded to the shapes of captured steps, so that which ones were captured makes no difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from mtp_spec.errors import MTPSpecError
from mtp_spec.model.training import ModulesForward
from mtp_spec.model.transformer import MTPModule
from mtp_spec.training.backbone import States
from mtp_spec.training.batches import Batch, Batches, Shapes, tensors
from mtp_spec.training.captured import CapturedSteps
from mtp_spec.training.objective import Objective, draft_loss
from mtp_spec.training.optim import Optimiser
from mtp_spec.training.options import BATCH_TOKENS, GENTLE, OPTIMISER, RATES, TrainOptions
from mtp_spec.training.team import Team
from mtp_spec.training.texts import ANSWERS, Corpus

WARM_UP = 20  # steps, at most a tenth of all, until the learning rate is whole
DECAY = 0.6  # share of the training over which it falls to nothing, at the end
MUON_DECAY = 0.02  # weight decay, in units of Muon's rate
ADAM_SHARE = 0.13  # AdamW's rate beside Muon, relative to Muon's
BALANCE_EVERY, BALANCE_STEP = 8, 1e-3
SETTLED = {"cpu": 1, "cuda": 16}  # steps after which the log is brought up to date
SAID_SECONDS, SAVED_SECONDS = 5.0, 60.0
CHECKED = 32  # held-out texts that the loss is checked on
Log = list[dict[str, Any]]
Say = Callable[[str], None]


@dataclass(slots=True)
class Trainer:
    """Trains modules.

    Attributes:
        forward: the modules.
        modules: the same, whose parameters are trained.
        steps: in all, at most.
        spent: seconds of training so far.
        log: a line for each step that was noted and each check.
        shapes: of batches on a GPU, if one process trains.
        pending: steps, and what they will add to the log once the device is waited for.
        captured: runs steps there.
    """

    options: TrainOptions
    objective: Objective
    forward: ModulesForward
    modules: nn.ModuleList
    corpus: Corpus
    states: States
    batches: Batches
    optimiser: Optimiser
    steps: int
    log: Log
    team: Team
    shapes: Shapes | None = None
    step: int = 0
    spent: float = 0.0
    pending: list[tuple[int, Tensor]] = field(default_factory=list)
    captured: CapturedSteps | None = None

    @classmethod
    def of(
        cls, options: TrainOptions, forward: ModulesForward, modules: nn.ModuleList, corpus: Corpus, states: States,
        team: Team,
    ) -> Trainer:  # fmt: skip
        numbers = [number for number, text in enumerate(corpus.texts) if not text.held
                   for _ in range(options.answer_passes if text.source == ANSWERS else 1)]  # fmt: skip
        tokens, alone = batch_tokens(options, team.device), forward.embedding.is_cuda and team.size == 1
        longest = max((text.length for text in corpus.texts), default=1)
        shapes = Shapes(tokens, options.depth, longest) if alone else None
        batches = Batches(corpus, numbers, tokens, options.seed, shapes)
        steps = options.steps or max(1, round(options.epochs * batches.count(0)))
        optimiser = optimiser_for(options, modules, team.device)
        made = cls(options, options.objective(), forward, modules, corpus, states, batches, optimiser, steps, [], team,
                   shapes)  # fmt: skip
        if alone:
            made.captured = CapturedSteps(made.update, forward.embedding.device)
        return made

    def largest(self) -> tuple[int, int]:
        """Returns sequences and tokens of the largest batch of the first pass."""
        texts, most = self.corpus.texts, (1, 1)
        for step in range(self.batches.count(0)):
            lengths = [texts[number].length for number in self.batches.of(step)]
            count, width = len(lengths), max(lengths) + self.options.depth
            if self.shapes is not None:
                width = self.shapes.width(max(lengths))
                count = self.shapes.texts(count, width)
            most = max(most, (count, width), key=lambda shape: shape[0] * shape[1])
        return most

    def run(self, state: Path, say: Say) -> None:
        """Runs the remaining steps; the state is saved at each check and each minute.

        Raises:
            MTPSpecError: the loss is no number any more.
        """
        begin, first, tokens = perf_counter(), self.step, 0
        said, saved, before = begin, begin, self.spent
        if not self.step:
            self.check(say)
        while self.share() < 1:
            tokens += self.one()
            self.spent = before + perf_counter() - begin
            last = self.share() >= 1
            checked = last or self.step % self.options.check_every == 0
            now = perf_counter()
            if checked or now - saved > SAVED_SECONDS or now - said > SAID_SECONDS:
                self.settle()
                told = self.log[-1]
                if checked:
                    self.check(say)
                if checked or now - saved > SAVED_SECONDS:
                    self.save(state)
                    saved = perf_counter()
                if last or now - said > SAID_SECONDS:
                    said = perf_counter()
                    seconds = said - begin
                    left = seconds / (self.step - first) * (self.steps - self.step)
                    if self.options.minutes is not None:
                        left = min(left, 60 * self.options.minutes - self.spent)
                    say(f"step {self.step}/{self.steps}  {_figures(told)}  {tokens / seconds:,.0f} tokens/s  "
                        f"{_time(max(0.0, left))} left")  # fmt: skip

    def one(self) -> int:
        """Runs a step; returns its number of tokens."""
        batch = self.batches.of(self.step)
        own = self.team.part(batch)
        given = tensors(self.corpus, self.states, own or batch[:1], self.options.depth, self.shapes)
        if not own:
            given.weights.zero_()
        if self.shapes is None:
            found = self.gradients(given)
            self.optimiser.step(self.schedule())
        else:
            scale = torch.full((), self.schedule(), dtype=torch.float32, device=given.ids.device)
            found = (self.captured or self.update)(*given, scale)
        self.step += 1
        self.pending.append((self.step, found))
        if len(self.pending) == SETTLED[given.ids.device.type]:
            self.settle()
        if self.options.start != "shipped" and self.step % BALANCE_EVERY == 0:
            self._balance()
        return given.ids.numel() * self.team.size

    def update(self, *given: Tensor) -> Tensor:
        """Runs a step on a GPU, which waits for nothing.

        Args:
            given: a batch, and a scalar: the share of the learning rate.
        """
        for parameter in self.modules.parameters():  # a capture that failed may have left some
            parameter.grad = None
        *batch, scale = given
        found = self.gradients(Batch(*batch))
        self.optimiser.step(scale)
        return found

    def gradients(self, batch: Batch) -> Tensor:
        """Leaves a batch's gradients in the modules' parameters; returns loss, greedy matches and overlap `[3, K]`."""
        with autocast(self.forward):
            outcome = draft_loss(self.forward, self.objective, batch.ids, batch.hidden, batch.weights, self.team.sum,
                                 batch.chosen, batch.lengths if self.shapes else None)  # fmt: skip
        outcome.loss.backward()
        self.team.sum_gradients(self.modules.parameters())
        parts = torch.stack([outcome.loss.detach().expand_as(outcome.rows), outcome.greedy, outcome.overlap])
        loss, greedy, overlap = self.team.sum(parts)
        return torch.stack([loss, greedy / outcome.rows, overlap / outcome.rows])

    def settle(self) -> None:
        """Adds the steps to the log that are not there yet, which waits for the device.

        Raises:
            MTPSpecError: a loss is no number.
        """
        if not self.pending:
            return
        numbers, values = zip(*self.pending, strict=True)
        self.pending.clear()
        for number, (loss, greedy, overlap) in zip(numbers, torch.stack(values).tolist(), strict=True):
            if not isfinite(loss[0]):
                raise MTPSpecError(f"step {number}: the loss is {loss[0]}; train again with a smaller rate")
            self.log.append({"step": number, "loss": loss[0], "greedy": greedy, "overlap": overlap})

    def share(self) -> float:
        """Returns how much of the training is done, by steps or by time, whichever is further."""
        timed = 0.0 if self.options.minutes is None else self.spent / (60 * self.options.minutes)
        return max(self.step / self.steps, timed)

    def schedule(self) -> float:
        """Returns the share of the learning rate at the next step."""
        warm = min(WARM_UP, max(1, self.steps // 10))
        return min(1.0, (self.step + 1) / warm) * min(1.0, max(0.0, 1 - self.share()) / DECAY)

    def _balance(self) -> None:
        biased = [module.block.mlp for module in self.modules if isinstance(module, MTPModule)]
        if all(getattr(getattr(mlp, "gate", None), "e_score_correction_bias", None) is not None for mlp in biased):
            for load in self.forward.load:
                if load is not None:
                    load.copy_(self.team.sum(load))
            self.forward.balance(BALANCE_STEP)

    @torch.no_grad()
    def check(self, say: Say) -> None:
        """Notes the loss and acceptance on held-out texts; the first process does it for all."""
        if self.team.rank:
            return
        held = [number for number, text in enumerate(self.corpus.texts) if text.held][:CHECKED]
        whole: list[Tensor] = []
        for first in range(0, len(held), 8):
            ids, hidden, weights, *_ = tensors(self.corpus, self.states, held[first : first + 8], self.options.depth)
            with autocast(self.forward):
                outcome = draft_loss(self.forward, self.objective, ids, hidden, weights)
            whole.append(torch.stack([outcome.rows, outcome.greedy, outcome.overlap, outcome.rows * outcome.loss]))
        rows, greedy, overlap, loss = torch.stack(whole).sum(0)
        rates = {"greedy": (greedy / rows).tolist(), "overlap": (overlap / rows).tolist()}
        self.log.append({"step": self.step, "held_out": True, "loss": (loss.sum() / rows.sum()).item(), **rates})
        say(f"step {self.step}/{self.steps}  held out: {_figures(self.log[-1])}")

    def save(self, file: Path) -> None:
        """Writes the state, which all processes share, under a temporary name and renames it."""
        if self.team.rank:
            return
        part = file.with_name(file.name + ".part")
        values = {
            "step": self.step, "spent": self.spent, "log": self.log, "modules": self.modules.state_dict(),
            "optimiser": self.optimiser.state(), "load": self.forward.load,
        }  # fmt: skip
        with part.open("wb") as stream:
            torch.save(values, stream)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)

    def restore(self, file: Path) -> None:
        """Goes on from a saved state."""
        values = torch.load(file, map_location=self.forward.embedding.device, weights_only=True)
        self.modules.load_state_dict(values["modules"])
        self.optimiser.restore(values["optimiser"])
        for own, saved in zip(self.forward.load, values["load"], strict=True):
            if own is not None:
                own.copy_(saved)
        self.step, self.spent, self.log = values["step"], values["spent"], values["log"]
        if self.captured is not None:
            self.captured.forget()


def batch_tokens(options: TrainOptions, device: str) -> int:
    """Returns the tokens of a step."""
    return options.batch_tokens or BATCH_TOKENS[device.split(":")[0]]


def optimiser_of(options: TrainOptions, device: str) -> tuple[str, float]:
    """Returns the optimiser and its learning rate."""
    name = options.optimiser or OPTIMISER[device.split(":")[0]]
    return name, options.rate or RATES[name] * (GENTLE if options.start == "shipped" else 1)


def optimiser_numbers(options: TrainOptions, device: str) -> int:
    """Returns how many float32 numbers the optimiser keeps for each weight."""
    return 1 if optimiser_of(options, device)[0] == "muon" else 2


def optimiser_for(options: TrainOptions, modules: nn.ModuleList, device: str) -> Optimiser:
    """Returns the optimiser of modules."""
    name, rate = optimiser_of(options, device)
    trained = [(name, parameter) for name, parameter in modules.named_parameters() if parameter.requires_grad]
    if name == "muon":
        return Optimiser(trained, rate, MUON_DECAY, rate * ADAM_SHARE)
    return Optimiser(trained, 0.0, 0.0, rate)


def autocast(forward: ModulesForward) -> torch.autocast:
    """Products in the type of the model's head: 16 bits on a GPU, float32 on a CPU."""
    kind = forward.head.dtype
    wide = kind in (torch.float32, torch.float64)
    torch.clear_autocast_cache()  # inside a caller's autocast it keeps weights as they were before the last step
    return torch.autocast(forward.head.device.type, torch.bfloat16 if wide else kind, enabled=not wide)


def _figures(line: dict[str, Any]) -> str:
    shown = ["/".join(f"{rate:.2f}" for rate in line[name]) for name in ("greedy", "overlap")]
    return f"loss {line['loss']:.3f}  accepted by depth, greedy {shown[0]}, sampled {shown[1]}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
