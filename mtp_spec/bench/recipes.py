"""The recipes of `bench heads`, and what is checked before one is trained."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mtp_spec.bench.common import Row, digest, write
from mtp_spec.errors import MTPSpecError, OptionError
from mtp_spec.model.checkpoint.folder import Checkpoint
from mtp_spec.training.loop import optimiser_numbers
from mtp_spec.training.modules import trained_numbers
from mtp_spec.training.options import TrainOptions
from mtp_spec.training.plan import check_modules
from mtp_spec.training.texts import check_file

GIVEN, OWN, BOTH = "given", "own", "both"
# a recipe: options of `train`, and "text": given texts, the model's own answers, or both
RECIPES: dict[str, Row] = {
    "moe": {"block": "moe"},
    "dense": {"block": "dense"},
    "moe-ce": {"block": "moe", "loss": "ce"},
    "moe-kl": {"block": "moe", "loss": "kl"},
    "moe-tv": {"block": "moe", "loss": "tv:0.9,ce:0.1"},
    "moe-even": {"block": "moe", "decay": 1.0},
    "moe-own": {"block": "moe", "text": OWN},
    "last": {"start": "last-layer", "block": "moe", "text": BOTH},
    "warm": {"start": "shipped"},
    "warm-tv": {"start": "shipped", "loss": "tv:0.9,ce:0.1", "decay": 1.0},
}
NUMBERS: dict[str, Callable[[str], Any]] = {
    "width": int, "modules": int, "depth": int, "steps": int, "decay": float, "rate": float, "minutes": float,
    "answer_passes": int,
}  # fmt: skip
WORDS = ("start", "block", "loss", "optimiser", "text")
IDENTITY = "texts.txt"  # of a work folder: a digest of what its texts depend on


def chosen(args: argparse.Namespace) -> dict[str, Row]:
    """Returns the recipes by name.

    Raises:
        OptionError: an unknown one, or one whose texts are not given.
    """
    there = {GIVEN: args.texts, OWN: args.prompts, BOTH: args.texts and args.prompts}
    if args.recipes is None:
        found = {name: recipe for name, recipe in RECIPES.items() if there[recipe.get("text", GIVEN)] is not None}
    else:
        names = args.recipes.split(",") if args.recipes else []
        if unknown := [name for name in names if name not in RECIPES]:
            raise OptionError(f"--recipes {unknown[0]!r}: give some of {', '.join(RECIPES)}")
        found = {name: RECIPES[name] for name in names}
    for name, *parts in args.recipe:
        if re.fullmatch(r"\w[\w.+-]*", name) is None:
            raise OptionError(f"--recipe {name!r}: give a name of letters, digits and -_.+, which names a folder, too")
        if name in found:
            raise OptionError(f"--recipe {name}: there is a recipe of that name, give it another")
        found[name] = dict(_option(name, part) for part in parts)
    for name, recipe in found.items():
        text = recipe.get("text", GIVEN)
        if there.get(text) is None:
            files_of = {GIVEN: "--texts FILE", OWN: "--prompts FILE", BOTH: "--texts FILE and --prompts FILE"}
            wanted = files_of.get(text, "text=given, own or both")
            raise OptionError(f"recipe {name}: its text is {text!r}; give {wanted}")
    if not found:
        raise OptionError("no recipe: give --texts FILE, or --prompts FILE, or both")
    return found


def check(args: argparse.Namespace, recipes: Mapping[str, Row], checkpoint: Checkpoint) -> None:
    """Rejects files and options that some recipe could not be trained or measured with.

    Raises:
        OptionError, MTPSpecError: there is one; the message names the recipe.
    """
    if args.minutes is not None and not args.minutes > 0:
        raise OptionError(f"--minutes {args.minutes}: give a number above 0, or leave it out for no limit")
    if len(set(args.chains)) < len(args.chains):
        raise OptionError(f"--chains {','.join(map(str, args.chains))}: give each depth once")
    for name, recipe in recipes.items():
        try:
            options = train_options(args, recipe, 0, args.held_out)
            if options.start != "shipped" or checkpoint.config.num_nextn_predict_layers:
                numbers = optimiser_numbers(options, args.device)
                check_modules(trained_numbers(options, checkpoint.config), numbers, torch.device(args.device))
        except MTPSpecError as error:
            raise type(error)(f"recipe {name}: {error}") from error
    for file, kinds in ((args.texts, ("text",)), (args.prompts, ("prompt",)), (args.held_out, ("text", "prompt"))):
        if file is not None:
            check_file(file, kinds)


def train_options(args: argparse.Namespace, recipe: Row, seed: int, held: Path | None) -> TrainOptions:
    """Returns a recipe's options of `train`."""
    text = recipe.get("text", GIVEN)
    changes = {name: value for name, value in recipe.items() if name != "text"}
    return TrainOptions(
        **{
            "texts": None if text == OWN else args.texts, "prompts": None if text == GIVEN else args.prompts,
            **({} if held is None else {"held_out": held}), "seed": seed, "steps": args.steps, "depth": args.depth,
            "batch_tokens": args.batch_tokens, "max_tokens": args.max_tokens, "batch": args.batch,
            "answer_tokens": args.answer_tokens, "check_tokens": args.check_tokens, "check_prompts": 10**6,
            "check_temperatures": tuple(args.temperatures), "check_every": 10**6,
            "cache_gigabytes": args.cache_gigabytes, **changes,
        }
    )  # fmt: skip


def check_places(args: argparse.Namespace, recipes: Mapping[str, Row], record: Mapping[str, Any]) -> None:
    """Rejects a file or folder that cannot be written, or that holds what another comparison made.

    Raises:
        OptionError: there is one.
    """
    kept = args.heads or (args.work and args.work / "heads")
    for name, recipe in recipes.items():
        runs = [run for run in record["runs"].values() if run.get("recipe") == name]
        if any(run.get("options") != recipe for run in runs):
            raise OptionError(f"--json {args.json} has a recipe {name} of other options: give it another name")
    for option, folder in (("work", args.work), ("heads", kept)):
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise OptionError(f"--{option}: {folder} cannot be written ({error}); give another place") from error
    for run in (f"{name} seed {seed}" for seed in range(args.seeds) for name in recipes):
        if kept is not None and run not in record["runs"] and made_of(kept, run).exists():
            raise OptionError(f"{made_of(kept, run)} is there, and its run is not in --json {args.json}: give another "
                              "--heads FOLDER")  # fmt: skip
    if args.work is not None:
        file, identity = args.work / IDENTITY, digest(_texts_of(record["settings"]))
        if file.is_file() and file.read_text(encoding="utf-8", errors="replace") != identity:
            raise OptionError(f"--work {args.work} has texts of other files or settings: give another folder")
        write(file, identity.encode())


def _texts_of(settings: Mapping[str, Any]) -> Row:
    """Returns what texts and their hidden states depend on, whatever device computes them."""
    names = ("model", "content of files", "max_tokens", "answer_tokens")
    return {name: settings[name] for name in (names if settings["held_out"] else (*names, "check_prompts"))}


def made_of(folder: Path, run: str) -> Path:
    return folder / run.replace(" ", "-")


def _option(recipe: str, part: str) -> tuple[str, Any]:
    name, _, value = part.partition("=")
    try:
        if name in WORDS and value:
            return name, value
        return name, NUMBERS[name](value)
    except (KeyError, ValueError):
        raise OptionError(
            f"--recipe {recipe} {part!r}: give OPTION=VALUE with one of {', '.join((*WORDS, *NUMBERS))}"
        ) from None
