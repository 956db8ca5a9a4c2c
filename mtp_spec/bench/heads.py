"""`bench heads`: MTP modules trained by several recipes on one frozen model, measured on held-out prompts.

All recipes share the texts, the hidden states and the batches of a seed, so that they differ in nothing else. Every
run is in the document as soon as it is measured: the same command trains only what is missing there.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from mtp_spec.api import LM
from mtp_spec.bench import parsing
from mtp_spec.bench.common import Report, Row, bundled_prompts, over, write
from mtp_spec.bench.options import JSON, MODEL, Benchmark, Option, OptionGroup
from mtp_spec.bench.recipes import GIVEN, RECIPES, check, check_places, chosen, made_of, train_options
from mtp_spec.errors import OptionError
from mtp_spec.load_checks import check_device
from mtp_spec.loading import load
from mtp_spec.model.checkpoint.adapter import DESCRIPTION, describe, save_modules
from mtp_spec.model.checkpoint.folder import Checkpoint, open_checkpoint
from mtp_spec.model.checkpoint.writer import as_json
from mtp_spec.model.undisturbed import undisturbed
from mtp_spec.shapes import model_folder
from mtp_spec.training.backbone import Backbone, States, near_bytes
from mtp_spec.training.card import verdict
from mtp_spec.training.collecting import collect
from mtp_spec.training.heldout import Texts, compare, measure
from mtp_spec.training.loop import Trainer
from mtp_spec.training.modules import ready_modules, rounded, shared_weights, slots_of
from mtp_spec.training.run import file_digest, held_prompts
from mtp_spec.training.team import Team
from mtp_spec.training.texts import Corpus

# options that change nothing in a run that is recorded
FREE = ("json", "recipes", "recipe", "seeds", "minutes", "work", "heads", "command", "benchmark", "cache_gigabytes",
        "batch")  # fmt: skip
RESAMPLES = 1000


@undisturbed(inference=False)
def heads(args: argparse.Namespace) -> Report:
    """Trains MTP modules by several recipes and seeds, and measures tokens per step on held-out prompts.

    Texts are generated with the chain's real caches, in batches, at each temperature; intervals are over seeds and
    prompts. A run that was interrupted, or ended by --minutes, goes on when the same command is run again.
    """
    args.device = check_device(args.device)
    if args.json is None:
        raise OptionError("give --json FILE: every run is kept there, and the same command goes on with the rest")
    recipes = chosen(args)
    folder = model_folder(args.model)
    checkpoint = open_checkpoint(folder)
    check(args, recipes, checkpoint)
    warm = [name for name, recipe in recipes.items() if recipe.get("start") == "shipped"]
    if warm and not checkpoint.config.num_nextn_predict_layers:
        raise OptionError(f"--recipes {','.join(warm)}: {folder} has no MTP module to go on with; leave them out")
    record = _record(args, checkpoint)
    check_places(args, recipes, record)
    begin, longest = perf_counter(), 0.0
    kept = tempfile.TemporaryDirectory() if args.work is None else nullcontext(str(args.work))
    with kept as name, torch.enable_grad():
        work = _Work(Path(name), args, folder, checkpoint, recipes)
        if record["shipped"] is None and checkpoint.config.num_nextn_predict_layers:
            record["shipped"] = work.measured("shipped", work.lm)
            _keep(args, record)
        for seed in range(args.seeds):
            for recipe, changes in recipes.items():
                run = f"{recipe} seed {seed}"
                if run in record["runs"]:
                    continue
                start = perf_counter()
                if args.minutes is not None and start - begin + longest > 60 * args.minutes:
                    break
                record["runs"][run] = work.run(run, recipe, changes, seed)
                record["runs"][run]["seconds"] = perf_counter() - start
                longest = max(longest, perf_counter() - start)
                _keep(args, record)
    left = [f"{name} seed {seed}" for seed in range(args.seeds) for name in recipes
            if f"{name} seed {seed}" not in record["runs"]]  # fmt: skip
    notes = [f"left for the next call of the same command: {', '.join(left)}"] if left else []
    notes += [f"{run}, chain {chain}: {said}" for run, chain, said in verdicts(record)]
    rows = table_rows(record, list(recipes))
    return Report("Tokens per step on held-out prompts", rows, record, notes=notes)


BENCHMARK = Benchmark(
    name="heads",
    help="MTP modules trained by several recipes, on held-out prompts",
    run=heads,
    options=(
        MODEL,
        JSON,
        Option("--device", "cpu (default) or cuda", default="cpu"),
        OptionGroup(
            "texts, as for mtp-spec train",
            Option("--texts", "texts to train on", type=Path, metavar="FILE"),
            Option("--prompts", "prompts for the recipes that train on the model's own answers", type=Path,
                   metavar="FILE"),
            Option("--held-out", "prompts to measure on (bundled ones)", type=Path, metavar="FILE"),
            Option("--max-tokens", "longest text (512)", type=parsing.count, default=512, metavar="N"),
            Option("--answer-tokens", "most tokens of an own answer (192)", type=parsing.count, default=192,
                   metavar="N"),
        ),
        OptionGroup(
            "recipes",
            Option("--recipes", f"some of {', '.join(RECIPES)} (all for which there are texts)", metavar="NAME,..."),
            Option("--recipe", "one more: a name, and options of train as block=moe loss=tv,ce:0.1 decay=1 text=own",
                   nargs="+", action="append", default=[], metavar="NAME OPTION=VALUE"),
            Option("--seeds", "runs of each (1)", type=parsing.count, default=1, metavar="N"),
            Option("--steps", "of each run (400)", type=parsing.count, default=400, metavar="N"),
            Option("--depth", "drafts are trained to (5)", type=parsing.count, default=5, metavar="K"),
            Option("--batch-tokens", "tokens of a step (as train)", type=parsing.count, metavar="N"),
            Option("--cache-gigabytes", "of a GPU's memory and of disk for hidden states (8)", type=float, default=8.0,
                   metavar="X"),
        ),
        OptionGroup(
            "measuring",
            Option("--chains", "depths of chains (3,5)", type=parsing.depths, default=[3, 5], metavar="K,K,..."),
            Option("--temperatures", "(0,0.8)", type=parsing.numbers, default=[0.0, 0.8], metavar="T,T,..."),
            Option("--check-prompts", "bundled prompts to measure on (60)", type=parsing.count, default=60,
                   metavar="N"),
            Option("--check-tokens", "most tokens of each text (128)", type=parsing.count, default=128, metavar="N"),
            Option("--batch", "texts generated side by side (16)", type=parsing.count, default=16, metavar="N"),
        ),
        Option("--minutes", "begin no run that would end later, by the longest so far", type=float, metavar="X"),
        Option("--work", "folder that keeps texts and hidden states (a temporary one)", type=Path, metavar="FOLDER"),
        Option("--heads", "folder that keeps the trained modules (heads in that of --work)", type=Path,
               metavar="FOLDER"),
    ),
)  # fmt: skip


class _Work:
    """The frozen model, its texts and hidden states, in a folder.

    Attributes:
        lm: the model with the modules that it ships.
    """

    def __init__(
        self, folder: Path, args: argparse.Namespace, model: Path, checkpoint: Checkpoint, recipes: Mapping[str, Row]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.args, self.model, self.checkpoint = folder, args, model, checkpoint
        self.held = args.held_out or _bundled(folder / "held-out.jsonl", args.check_prompts)
        self.lm = self._load(None)
        backbone = Backbone(self.lm.model)
        self.texts: dict[str, tuple[Corpus, States]] = {}
        room = int(args.cache_gigabytes * 1e9)
        for text in dict.fromkeys(recipe.get("text", GIVEN) for recipe in recipes.values()):
            collect(self.lm, train_options(args, {"text": text}, 0, self.held), folder / text, print).close()
            corpus = Corpus(folder / text, 0.0)
            corpus.close()  # from here on it is only read
            self.texts[text] = corpus, States(backbone, corpus, folder / f"{text}.states", room,
                                              near_bytes(self.lm.model.device))  # fmt: skip
            room -= self.texts[text][1].bytes + self.texts[text][1].near_bytes
            print(f"{text}: {len(corpus.texts):,} texts, {corpus.tokens:,} tokens", flush=True)
        self.prompts = held_prompts(corpus, train_options(args, {"text": text}, 0, self.held))

    def run(self, run: str, recipe: str, changes: Row, seed: int) -> Row:
        """Returns what is kept of a run."""
        options = train_options(self.args, changes, seed, self.held)
        (corpus, states), model = self.texts[changes.get("text", GIVEN)], self.lm.model
        modules = ready_modules(options, self.checkpoint, model.device)
        forward, _ = shared_weights(model, self.checkpoint, modules, options.max_tokens + options.depth)
        trainer = Trainer.of(options, forward, modules, corpus, states, Team(self.args.device))
        begin = perf_counter()
        with self.lm.backend.exclusive():
            trainer.run(self.folder / "state.pt", lambda line: print(f"{run}: {line}", flush=True))
        trained = perf_counter() - begin
        stored = rounded(slots_of(modules, self.checkpoint.config))
        made = self.folder / "made"
        shutil.rmtree(made, ignore_errors=True)  # of a call that ended before it was measured
        about = {"model": describe(self.checkpoint.config, self.checkpoint.tensors), "recipe": changes}
        save_modules(made, stored, {DESCRIPTION: as_json(about)})
        del forward, modules, stored
        texts = self.measured(run, self._load(made))
        kept = self.args.heads or self.folder / "heads"
        kept.mkdir(parents=True, exist_ok=True)
        shutil.move(made, made_of(kept, run))
        gc.collect()  # reference cycles keep the model alive, and the next one needs its memory
        held = [line for line in trainer.log if line.get("held_out")]
        return {"recipe": recipe, "options": changes, "seed": seed, "trained_seconds": trained, "first": held[0],
                "last": held[-1], "texts": texts}  # fmt: skip

    def measured(self, name: str, lm: LM) -> list[Row]:
        """Returns how a model's modules draft, at each chain and temperature, text by text."""
        found, args = list[Row](), self.args
        for chain in args.chains:
            for temperature in args.temperatures:
                begin = perf_counter()
                parts = measure(lm, self.prompts, chain, [temperature], args.check_tokens, 0)
                found += [{"chain": chain, **part.to_json()} for part in parts]
                tokens, steps = (sum(sum(getattr(part, what)) for part in parts) for what in ("tokens", "steps"))
                print(f"{name}: chain {chain} at {temperature:g}: {over(tokens, steps):.3f} tokens per step, "
                      f"{perf_counter() - begin:.0f} s", flush=True)  # fmt: skip
        return found

    def _load(self, mtp: Path | None) -> LM:
        args = self.args
        return load(self.model, mtp=mtp, device=args.device, max_context=args.max_tokens, max_batch=args.batch,
                    measure=False)  # fmt: skip


def table_rows(record: Mapping[str, Any], recipes: Sequence[str]) -> list[Row]:
    """Returns a line for the shipped modules and one for each recipe: tokens per step with their 95 % intervals, and
    their mean over that of the shipped modules."""
    shipped, runs = record["shipped"], record["runs"].values()
    lines = [("shipped", [shipped])] if shipped else []
    lines += [(name, [run["texts"] for run in runs if run["recipe"] == name]) for name in recipes]
    rows: list[Row] = []
    for name, several in lines:
        if not several:
            continue
        row: Row = {"recipe": name, "seeds": len(several)}
        for chain, temperature in dict.fromkeys((one["chain"], one["temperature"]) for one in several[0]):
            counts = [_counts(texts, chain, temperature) for texts in several]
            mean, low, high = interval(counts)
            row[f"chain {chain} at {temperature:g}"] = f"{mean:.3f} ({low:.3f} to {high:.3f})"
            if shipped:
                own = interval([_counts(shipped, chain, temperature)])[0]
                row[f"{chain}/{temperature:g} over shipped"] = mean / own if own else 0.0
        rows.append(row)
    return rows


def verdicts(record: Mapping[str, Any]) -> Iterator[tuple[str, int, str]]:
    """Yields a run, a chain, and whether the run's modules are better there than the shipped ones on every domain."""
    for run, made in record["runs"].items() if record["shipped"] else ():
        for chain in dict.fromkeys(one["chain"] for one in record["shipped"]):
            before, after = ([Texts.from_json(one) for one in texts if one["chain"] == chain]
                             for texts in (record["shipped"], made["texts"]))  # fmt: skip
            yield run, chain, verdict(compare(before, after), True)[1]


def _counts(texts: Sequence[Row], chain: int, temperature: float) -> Any:
    """Returns tokens and steps of each text, `[2, P]`."""
    some = [Texts.from_json(one) for one in texts if (one["chain"], one["temperature"]) == (chain, temperature)]
    return np.array([[count for one in some for count in getattr(one, name)] for name in ("tokens", "steps")])


def interval(counts: Sequence[Any]) -> tuple[float, float, float]:
    """Returns tokens per step of several seeds together, and its 95 % bounds, seeds and prompts resampled.

    Args:
        counts: for each seed tokens and steps of each prompt `[2, P]`.
    """
    whole, random = np.stack(counts).astype(float), np.random.default_rng(0)
    seeds, prompts = len(whole), whole.shape[2]
    picks = random.integers(prompts, size=(RESAMPLES, prompts))
    sums = whole[:, :, picks].sum(-1)  # [seeds, 2, RESAMPLES]
    who = random.integers(seeds, size=(RESAMPLES, seeds))
    taken = sums[who, :, np.arange(RESAMPLES)[:, None]].sum(1)  # [RESAMPLES, 2]
    low, high = np.quantile(over(taken[:, 0], taken[:, 1]), (0.025, 0.975))
    tokens, steps = whole.sum((0, 2))
    return float(over(tokens, steps)), float(low), float(high)


def _bundled(file: Path, count: int) -> Path:
    lines = [{"prompt": one["prompt"], "category": one["category"]} for one in bundled_prompts(count)]
    write(file, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return file


def _record(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns what an earlier call has kept, or an empty record.

    Raises:
        OptionError: the file is another document, or was made with other settings.
    """
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
                if name not in FREE and not callable(value)}  # fmt: skip
    settings["model"] = describe(checkpoint.config, checkpoint.tensors)
    settings["content of files"] = {name: file_digest(file) for name in ("texts", "prompts", "held_out")
                           if (file := getattr(args, name)) is not None}  # fmt: skip
    settings = json.loads(json.dumps(settings))
    if not args.json.exists():
        return {"settings": settings, "shipped": None, "runs": {}}
    try:
        found = json.loads(args.json.read_text(encoding="utf-8"))
        known = {name: found[name] for name in ("settings", "shipped", "runs")}
        if not all(isinstance(known[name], dict) for name in ("settings", "runs")):
            raise TypeError("its settings and runs are no objects")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"--json {args.json}: no document of bench heads ({error!r}); give another file") from error
    if other := sorted(name for name in settings if known["settings"].get(name) != settings[name]):
        raise OptionError(f"--json {args.json} was made with another {', '.join(other)}: give another file")
    return known


def _keep(args: argparse.Namespace, record: Mapping[str, Any]) -> None:
    write(args.json, (json.dumps(record, indent=1) + "\n").encode())
