"""`train`: from a checkpoint and a file of texts or prompts to a folder with MTP modules. The file to read first.

The order: load the model, measure its own drafts on held-out prompts, collect texts, train, write the modules, load the
model with them and measure again. Everything until the end lies in `OUT.part`, from which the same call goes on.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from mtp_spec.api import LM
from mtp_spec.errors import MTPSpecError, OptionError
from mtp_spec.load_checks import check_device, context_limit
from mtp_spec.loading import load
from mtp_spec.machine import processor_name
from mtp_spec.model.checkpoint.adapter import DESCRIPTION, describe, save_modules
from mtp_spec.model.checkpoint.folder import Checkpoint, open_checkpoint
from mtp_spec.model.checkpoint.writer import PART, as_json, write_file
from mtp_spec.model.undisturbed import undisturbed
from mtp_spec.shapes import model_folder
from mtp_spec.training.backbone import Backbone, States, near_bytes
from mtp_spec.training.card import card, verdict
from mtp_spec.training.collecting import COMPLETE, collect
from mtp_spec.training.heldout import Comparison, Texts, compare, measure
from mtp_spec.training.loop import Log, Trainer, batch_tokens, optimiser_numbers, optimiser_of
from mtp_spec.training.modules import ready_modules, rounded, shared_weights, slots_of, trained_config, trained_numbers
from mtp_spec.training.options import TrainOptions
from mtp_spec.training.picture import picture
from mtp_spec.training.plan import check_modules, plan_of
from mtp_spec.training.team import Team
from mtp_spec.training.texts import Corpus, check_file

IDENTITY, STATE, BEFORE, AFTER, LOCK = "run.json", "state.pt", "before.json", "after.json", "lock"
BEGUN = {LOCK, IDENTITY + PART}  # what a run that was killed at once may leave
FREE = ("cache_gigabytes", "batch")  # options that need memory or disk, and change no text, state or module
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Trained:
    """What was trained.

    Attributes:
        folder: of the modules, for `load(mtp=)`.
        better: whether no held-out domain lost against what there was before, and all together gained.
        verdict: a sentence that says so, or which domains lost.
        comparisons: tokens per step before and after, by domain and temperature.
        accepted: by domain and temperature, how the new modules did.
        log: loss and acceptance of every step, and on held-out texts.
    """

    folder: Path
    better: bool
    verdict: str
    comparisons: tuple[Comparison, ...]
    accepted: tuple[Texts, ...]
    log: list[dict[str, Any]]


@undisturbed(inference=False)
def train(
    path: str | Path | None = None,
    out: str | Path = "",
    *,
    texts: str | Path | None = None,
    prompts: str | Path | None = None,
    config: str | Path | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    weights: str | None = None,
    progress: bool | Say = False,
    **options: Any,
) -> Trained:
    """Trains MTP modules on a frozen model, and measures them on prompts that were held out.

    A run that was interrupted goes on when it is called again with the same arguments.

    Args:
        path: the model's folder, as for `load`; None is the bundled model.
        out: a new folder for the modules.
        texts: a file of texts to train on, one JSON object a line (docs/howto/train.md).
        prompts: instead or besides, a file of prompts that the model answers itself.
        config, device, dtype, weights: as for `load`; the model computes hidden states as it computes text.
        progress: print what is happening, or a function that is called with each line.
        **options: the fields of `mtp_spec.training.options.TrainOptions`.

    Raises:
        OptionError: an impossible option, a line without a text, or nothing to train on or to measure on.
        CheckpointError: as `load`, or `out` exists.
        MTPSpecError: too little memory or disk, or the loss is no number any more.
    """
    if not isinstance(out, str | Path) or not str(out):
        raise OptionError(f"out={out!r}: give the name of a new folder for the modules")
    for name, file in (("path", path), ("texts", texts), ("prompts", prompts), ("config", config)):
        if file is not None and not isinstance(file, str | Path):
            raise OptionError(f"{name}={file!r}: give the name of a {'folder' if name == 'path' else 'file'}, or None")
    if not isinstance(progress, bool) and not callable(progress):
        raise OptionError(f"progress={progress!r}: allowed are True, False or a function of a line")
    known = set(TrainOptions.__dataclass_fields__)
    if unknown := sorted(set(options) - known):
        raise OptionError(f"{unknown[0]} is no option of training: allowed are {', '.join(sorted(known))}")
    held = options.get("held_out")
    if isinstance(held, str):
        options["held_out"] = Path(held)
    chosen = TrainOptions(
        texts=None if texts is None else Path(texts), prompts=None if prompts is None else Path(prompts), **options
    )
    say: Say = progress if callable(progress) else (print if progress else lambda line: None)
    device = check_device(device)
    folder = model_folder(path)
    described = None if config is None else Path(config)
    model = {"config": described, "device": device, "dtype": dtype, "weights": weights}
    checkpoint = open_checkpoint(folder, described)
    limit = context_limit(described or folder, None)
    if chosen.max_tokens > limit:
        chosen = replace(chosen, max_tokens=limit)
    shipped = checkpoint.config.num_nextn_predict_layers
    if chosen.start == "shipped" and not shipped:
        raise OptionError(f"start='shipped': {folder} has no MTP module to go on with; give start='random'")
    target = Path(out)
    if os.path.lexists(target):  # a name that cannot be is refused where the folder is made
        raise OptionError(f"out={str(out)!r} exists: give a new folder, nothing is overwritten")
    for name, kinds in (("texts", ("text",)), ("prompts", ("prompt",)), ("held_out", ("text", "prompt"))):
        if isinstance(getattr(chosen, name), Path):
            check_file(getattr(chosen, name), kinds)
    team = Team(device)
    if chosen.minutes is not None and team.size > 1:
        raise OptionError(f"minutes={chosen.minutes}: {team.size} processes have no common clock; give steps or epochs")
    numbers = optimiser_numbers(chosen, team.device)
    check_modules(trained_numbers(chosen, checkpoint.config), numbers, torch.device(team.device))
    with _part(target, _identity(chosen, checkpoint, model), team) as part, torch.enable_grad():
        return _Run(chosen, checkpoint, folder, model, target, part, team, say).run()


class _Run:
    """One run, from its folder `part`."""

    def __init__(
        self, options: TrainOptions, checkpoint: Checkpoint, folder: Path, model: dict[str, Any], target: Path,
        part: Path, team: Team, say: Say,
    ) -> None:  # fmt: skip
        self.options, self.checkpoint, self.folder = options, checkpoint, folder
        self.model = {**model, "device": team.device, "parallel": None}
        self.target, self.part, self.team, self.device = target, part, team, team.device
        self.say: Say = (lambda line: None) if team.rank else say

    def run(self) -> Trained:
        """Returns the result, the first process's on all of them."""
        begin = perf_counter()
        stored, log, prompts, before, facts = self._trained()
        gc.collect()  # reference cycles keep the model alive, and the next one needs its memory
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

        def finished() -> Trained:
            after = self._after(stored, prompts)
            facts["training"]["seconds"] = round(perf_counter() - begin, 1)
            return self._written(stored, log, facts, before, after)

        return self.team.first(finished)

    def _trained(self) -> tuple[dict[str, Tensor], Log, dict[str, list[list[int]]], list[Texts], dict[str, Any]]:
        """Returns the modules as they are stored, the log, held-out prompts, how drafts did on them before, and facts
        on texts and training; nothing that holds the model."""
        options, team, texts = self.options, self.team, self.part / "texts"
        lm = self._load(None)
        team.first(lambda: collect(lm, options, texts, self.say).close())
        corpus = Corpus(texts, 0.0)
        corpus.close()  # from here on it is only read
        prompts = held_prompts(corpus, options)
        count, held = sum(map(len, prompts.values())), sum(text.held for text in corpus.texts)
        self.say(f"{len(corpus.texts):,} texts, {corpus.tokens:,} tokens, {held:,} held out; {count} held-out prompts "
                 f"in {len(prompts)} domains")  # fmt: skip
        data = {
            "texts": len(corpus.texts), "tokens": corpus.tokens, "held out": held,
            **json.loads((texts / COMPLETE).read_text()),
            "domains": sorted({text.domain for text in corpus.texts}), "checked prompts": count,
        }  # fmt: skip
        chain = options.depth if self.checkpoint.config.num_nextn_predict_layers else 0
        before = team.first(lambda: self._measured(BEFORE, lm, prompts, chain))
        trainer, peak = self._train(lm, corpus)
        name, rate = optimiser_of(options, self.device)
        training = {
            "modules": _kinds(trainer), "steps": trainer.step, "processes": team.size,
            "batch_tokens": batch_tokens(options, self.device), "optimiser": name, "rate": rate,
            "device": torch.cuda.get_device_name(self.device) if self.device != "cpu" else processor_name(),
            "peak_bytes": peak,
        }  # fmt: skip
        stored = rounded(slots_of(trainer.modules, self.checkpoint.config))
        return stored, trainer.log, prompts, before, {"data": data, "training": training}

    def _after(self, stored: Mapping[str, Tensor], prompts: Mapping[str, list[list[int]]]) -> list[Texts]:
        """Returns how the modules draft, as they are stored and loaded."""
        made = self.part / "modules"
        shutil.rmtree(made, ignore_errors=True)
        about = {"model": describe(self.checkpoint.config, self.checkpoint.tensors)}
        save_modules(made, stored, {DESCRIPTION: as_json(about)})
        return self._measured(AFTER, self._load(made), prompts, self.options.depth)

    def _written(
        self, stored: Mapping[str, Tensor], log: Log, facts: dict[str, Any], before: list[Texts],
        after: list[Texts],
    ) -> Trained:  # fmt: skip
        """Writes the result."""
        comparisons = compare(before, after)
        better, sentence = verdict(comparisons, bool(self.checkpoint.config.num_nextn_predict_layers))
        drawn = picture(log)
        facts = {
            "model": describe(self.checkpoint.config, self.checkpoint.tensors),
            "options": self.options.to_json(),
            **facts,
            "picture": drawn is not None,
            "verdict": {"better": better, "said": sentence},
            "before": [one.to_json() for one in before],
            "after": [one.to_json() for one in after],
        }  # fmt: skip
        written = {
            DESCRIPTION: as_json(facts),
            "README.md": card(facts, after, comparisons, sentence).encode(),
            "train.json": as_json(log),
            **({} if drawn is None else {"loss.png": drawn}),
        }
        save_modules(self.target, stored, written)
        for one in comparisons:
            self.say(f"{one.domain}, temperature {one.temperature}: {one.before:.3f} -> {one.after:.3f} tokens per "
                     f"step ({one.low:.3f} to {one.high:.3f} times)")  # fmt: skip
        self.say(f"{sentence} Written to {self.target}")
        return Trained(self.target, better, sentence, tuple(comparisons), tuple(after), log)

    def _load(self, mtp: Path | None) -> LM:
        most = self.options.max_tokens
        return load(self.folder, mtp=mtp, max_context=most, max_batch=self.options.batch, measure=False, **self.model)

    def _measured(self, name: str, lm: LM, prompts: Mapping[str, list[list[int]]], depth: int) -> list[Texts]:
        """Returns how drafts do, from the file of an earlier attempt if there is one."""
        file, options = self.part / name, self.options
        if file.is_file():
            return [Texts.from_json(values) for values in json.loads(file.read_text())]
        found = measure(lm, prompts, depth, options.check_temperatures, options.check_tokens, options.seed)
        write_file(file, as_json([one.to_json() for one in found]))
        return found

    def _train(self, lm: LM, corpus: Corpus) -> tuple[Trainer, int | None]:
        """Returns the trainer after its last step, and the most bytes that a GPU held."""
        options, config, device = self.options, self.checkpoint.config, lm.model.device
        modules = ready_modules(options, self.checkpoint, device)
        forward, copies = shared_weights(lm.model, self.checkpoint, modules, options.max_tokens + options.depth)
        file = self.part / f"states{self.team.rank}.bin"
        disk = min(int(options.cache_gigabytes * 1e9), corpus.tokens * config.hidden_size * 4)
        backbone = Backbone(lm.model)
        states = States(backbone, corpus, file, disk, near_bytes(device))
        trainer = Trainer.of(options, forward, modules, corpus, states, self.team)
        shape = trainer.largest()
        numbers = optimiser_numbers(options, self.device)
        taken = backbone.bytes(shape[0] * shape[1])
        plan = plan_of(forward, modules, trainer.objective, shape, numbers, copies, states, taken,
                       trainer.captured is not None)  # fmt: skip
        self.say(f"{trainer.steps:,} steps of up to {batch_tokens(options, self.device):,} tokens; {plan}")
        plan.check(device, self.part)
        if (self.part / STATE).is_file():
            try:
                trainer.restore(self.part / STATE)
            except Exception as error:  # of any kind that torch has for a damaged file
                raise MTPSpecError(f"{self.part / STATE} cannot be read ({error}): delete it to train from the first "
                                   "step") from error  # fmt: skip
            self.say(f"going on after step {trainer.step}")
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        with lm.backend.exclusive():
            trainer.run(self.part / STATE, self.say)
        return trainer, torch.cuda.max_memory_allocated(device) if cuda else None


def held_prompts(corpus: Corpus, options: TrainOptions) -> dict[str, list[list[int]]]:
    """Returns the held-out prompts that drafts are measured on, by domain.

    Raises:
        OptionError: none leaves room for an answer.
    """
    found: dict[str, list[list[int]]] = {}
    known = set[tuple[int, ...]]()  # a prompt counts in the domain that comes first, which a file of its own names
    for text in corpus.texts:
        if text.held and text.prompt + options.check_tokens <= options.max_tokens:
            prompt = corpus.ids(text)[: text.prompt].tolist()
            if tuple(prompt) not in known and len(found.setdefault(text.domain, [])) < options.check_prompts:
                found[text.domain].append(prompt)
                known.add(tuple(prompt))
    if not found:
        raise OptionError(
            f"no held-out prompt leaves room for check_tokens={options.check_tokens} in max_tokens="
            f"{options.max_tokens}: give more of these, or fewer of those"
        )
    return {domain: found[domain] for domain in sorted(found)}


def _kinds(trainer: Trainer) -> str:
    config = trained_config(trainer.states.backbone.model.config, trainer.modules)
    return f"{len(trainer.modules)} with {config.module(0)}"


def _identity(options: TrainOptions, checkpoint: Checkpoint, model: Mapping[str, Any]) -> str:
    """Returns a digest of everything that a run's texts and modules depend on: with other values of FREE it goes on."""
    sources = {name: file_digest(file) for name, file in (("texts", options.texts), ("prompts", options.prompts),
               ("held_out", options.held_out)) if isinstance(file, Path)}  # fmt: skip
    names = sorted((name, info.dtype, info.shape) for name, info in checkpoint.tensors.items())
    given = {name: value for name, value in options.to_json().items() if name not in FREE}
    whole = [given, sources, names, describe(checkpoint.config, checkpoint.tensors),
             {name: str(value) for name, value in model.items()}]  # fmt: skip
    return sha256(json.dumps(whole).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """Returns a digest of a file's bytes."""
    found = sha256()
    with file.open("rb") as stream:
        while data := stream.read(2**20):
            found.update(data)
    return found.hexdigest()


@contextmanager
def _part(target: Path, identity: str, team: Team) -> Iterator[Path]:
    """Yields the folder that a run works in, removed when it is complete; the first process keeps it for all.

    Raises:
        OptionError: the folder cannot be made, or holds something else.
        MTPSpecError: another run works in it, or it belongs to a run with other arguments.
    """
    part = target.with_name(target.name + PART)
    if team.rank:
        team.first(lambda: None)
        yield part
        return
    try:
        part.mkdir(parents=True, exist_ok=True)
        if not (part / IDENTITY).is_file() and {file.name for file in part.iterdir()} - BEGUN:
            raise OptionError(f"{part} is no folder of a run, and would be deleted: move it, or give another out")
        opened = (part / LOCK).open("a")
    except (OSError, ValueError) as error:  # a name with a zero byte is a wrong value
        raise OptionError(f"out={str(target)!r}: a folder cannot be made there ({error}); give another one") from error
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MTPSpecError(f"another run writes {part}: wait for it, or stop it") from error
        file = part / IDENTITY
        if file.is_file() and file.read_text() != identity:
            raise MTPSpecError(
                f"{part} belongs to a run with other options, texts or weights: delete it, or give another folder"
            )
        write_file(file, identity.encode())
        team.first(lambda: None)
        try:
            yield part
        except OptionError:  # it takes other options or texts, and then this folder is of no use
            shutil.rmtree(part)
            raise
        shutil.rmtree(part)
