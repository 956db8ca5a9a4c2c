"""Declarations of benchmarks and their options, from which `mtp_spec.bench.cli` builds the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mtp_spec
from mtp_spec.api import LM
from mtp_spec.bench import parsing
from mtp_spec.bench.common import Report, publish
from mtp_spec.errors import OptionError
from mtp_spec.load_checks import CACHE_DTYPES


class Option:
    """An option, or a positional argument.

    Args:
        name: as typed, such as "--max-context".
        help: what it does, and the default in parentheses.
        settings: anything else that `ArgumentParser.add_argument` takes.
    """

    def __init__(self, name: str, help: str, **settings: Any) -> None:
        self.name, self.help, self.settings = name, help, settings

    def add(self, parser: argparse._ActionsContainer) -> None:
        parser.add_argument(self.name, help=self.help, **self.settings)


class Switch(Option):
    """An option without a value: False unless it is given."""

    def __init__(self, name: str, help: str) -> None:
        super().__init__(name, help, action="store_true")


class OptionGroup:
    """Options under a heading of their own."""

    def __init__(self, title: str, *options: Option) -> None:
        self.title, self.options = title, options

    def add(self, parser: argparse._ActionsContainer) -> None:
        add_options(parser.add_argument_group(self.title), self.options)


def add_options(parser: argparse._ActionsContainer, options: Iterable[Option | OptionGroup]) -> None:
    for option in options:
        option.add(parser)


JSON = Option("--json", "write one JSON document", type=parsing.new_file, metavar="FILE")
MODEL = Option("--model", "checkpoint folder (default: the bundled model)", type=Path, metavar="PATH")
SHAPE = Option(
    "--shape", "a published model or a config.json (671B)", type=parsing.shape_file, default="671B", metavar="NAME"
)
WEIGHTS = Option("--weights", "fp8: make a bfloat16 folder FP8 while it loads", metavar="KIND")
CACHE = (
    Option("--cache-dtype", f"of the latent cache on a GPU: {' or '.join(CACHE_DTYPES)}"),
    Option(
        "--max-context",
        "most tokens of prompt and text (default: the model's own limit)",
        type=parsing.count,
        metavar="N",
    ),
)
DRAFT_VOCABULARY = Option(
    "--draft-vocabulary",
    "draft only the first N tokens, or those in a file of ids; the text stays the same",
    type=parsing.vocabulary,
    metavar="N|FILE",
)
MTP = Option("--mtp", "folder whose MTP modules draft in place of the checkpoint's own", type=Path, metavar="FOLDER")
# options of `load` that determine memory
LOAD = (DRAFT_VOCABULARY, WEIGHTS, *CACHE)
# a model on any device
LOADED = (
    MODEL,
    MTP,
    Option("--device", "cpu or cuda", default="cpu"),
    Option("--dtype", "float32, bfloat16 or float16"),
    WEIGHTS,
    *CACHE,
)


def complete(args: argparse.Namespace, own: Mapping[str, Any], every: Iterable[str], why: str) -> None:
    """Fills in the defaults of one way to run a benchmark, and refuses options that have an effect in other ways only.

    Args:
        own: defaults by name, of options that are None or False unless they are given.
        every: names of the options of all ways.
        why: what the error says of an option that is not one of `own`.

    Raises:
        OptionError: such an option was given.
    """
    for name in every:
        if name not in own and getattr(args, name, None):
            raise OptionError(f"--{name.replace('_', '-')} {why}")
    for name, default in own.items():
        if getattr(args, name, None) is None:
            setattr(args, name, default)


def text_options(prompts: int, tokens: int) -> tuple[Option, Option]:
    """Returns the options for the number and length of texts, with these defaults."""
    return (
        Option("--prompts", f"held-out prompts ({prompts})", type=int, default=prompts),
        Option("--max-new-tokens", f"tokens a text ({tokens})", type=int, default=tokens),
    )


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark that loads what it needs.

    Attributes:
        name: on the command line.
        help: a line in the list of benchmarks; the page of its own begins with `run`'s docstring.
        run: the benchmark; returns the report to publish, or None if it has shown and written its results itself.
        options: of its own page.
    """

    name: str
    help: str
    run: Callable[..., Report | None]
    options: tuple[Option | OptionGroup, ...]

    def add(self, benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        """Adds its page to the command line."""
        parser = benchmarks.add_parser(self.name, help=self.help, description=self.run.__doc__)
        add_options(parser, self.options)

    def execute(self, args: argparse.Namespace) -> None:
        """Runs it, prints and writes its report."""
        report = self.run(args)
        if report is not None:
            publish(report, None, args)


def _check_nothing(args: argparse.Namespace) -> None:
    pass


def _one_text(args: argparse.Namespace) -> int:
    return 1


@dataclass(frozen=True, kw_only=True)
class ModelBenchmark(Benchmark):
    """A benchmark of a loaded model; `options` are those in addition to the model's.

    Attributes:
        check: rejects invalid options before anything is loaded.
        side_by_side: returns its largest batch.
    """

    run: Callable[[LM, argparse.Namespace], Report]
    check: Callable[[argparse.Namespace], None] = _check_nothing
    side_by_side: Callable[[argparse.Namespace], int] = _one_text

    def add(self, benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        parser = benchmarks.add_parser(self.name, help=self.help, description=self.run.__doc__)
        add_options(parser, (*LOADED, DRAFT_VOCABULARY, JSON, *self.options))

    def execute(self, args: argparse.Namespace) -> None:
        self.check(args)
        lm = mtp_spec.load(
            args.model,
            device=args.device,
            dtype=args.dtype,
            weights=args.weights,
            mtp=args.mtp,
            draft_vocabulary=args.draft_vocabulary,
            cache_dtype=args.cache_dtype,
            max_context=args.max_context,
            max_batch=self.side_by_side(args),
        )
        publish(self.run(lm, args), lm, args)
