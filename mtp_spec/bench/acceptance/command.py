"""`bench acceptance` from its options to its files."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

import mtp_spec
from mtp_spec.api import LM
from mtp_spec.bench import parsing
from mtp_spec.bench.acceptance.cells import PLAIN, Group, sweep
from mtp_spec.bench.acceptance.journal import Journal, Text
from mtp_spec.bench.acceptance.metrics import cell_metrics
from mtp_spec.bench.acceptance.page import page
from mtp_spec.bench.acceptance.plots import draw, need_matplotlib, png
from mtp_spec.bench.acceptance.questions import BUNDLED, CHATS, EDITS, KINDS, QuestionSet, read_questions
from mtp_spec.bench.acceptance.report import csv_text, screen, table_rows
from mtp_spec.bench.acceptance.running import Runner, check_model
from mtp_spec.bench.common import Report, Row, document, machine, write
from mtp_spec.bench.options import JSON, LOADED, Benchmark, Option, OptionGroup, Switch
from mtp_spec.errors import OptionError
from mtp_spec.progress import step_progress
from mtp_spec.speculation import ACCEPTANCE_RULES

# options that do not affect results
OUTPUTS = ("json", "csv", "html", "png", "resume", "command")


def acceptance(args: argparse.Namespace) -> None:
    """Reports tokens per verify step, acceptance by depth, speed-up and parity against own plain decoding.

    Every text is kept in a journal beside the first output file until the run is complete.
    """
    output = args.json or args.csv or args.html
    if args.resume and output is None:
        raise OptionError("--resume needs --json, --csv or --html: the journal lies beside it")
    for option, file in (("--html", args.html), ("--png", args.png)):
        if file is not None:
            need_matplotlib(option)
    if args.suite == EDITS and args.set != BUNDLED:
        raise OptionError(f"--suite {EDITS} and --set {args.set} are two sets: give one of them")
    questions = read_questions(EDITS if args.suite == EDITS else args.set, args.set_kind, args.prompts)
    groups, left_out = sweep(args)
    models = _Models(args)
    check_model(models.load(groups[0].vocabulary), groups, args)
    run = _identity(models.lm, questions, args)
    file = None if output is None else output.with_name(output.name + ".journal")
    with Journal(file, run, args.resume) as journal:
        runner = Runner(models.load, questions.questions, journal, args)
        try:
            with step_progress(sys.stderr.isatty(), "texts") as progress:
                runner.run(groups, progress)
        except KeyboardInterrupt:
            _stopped(journal, groups, questions)
            raise
    report = _report(groups, questions, runner, args)
    report.facts |= {"left_out": left_out}
    console = Console()
    console.print(screen(report.title, report.facts["details"]))
    for name, reason in {**left_out, **runner.absent}.items():
        console.print(f"not measured: {name}: {reason}", markup=False)
    for path, content in _files(document(report, models.lm, args), args).items():
        write(path, content)
        console.print(f"written to {path}", markup=False, soft_wrap=True)
    journal.remove()


BENCHMARK = Benchmark(
    name="acceptance",
    help="tokens per step, acceptance and speed-up over shapes, rules, contexts",
    run=acceptance,
    options=(
        *LOADED,
        OptionGroup(
            "prompts",
            Option(
                "--set",
                "questions: Spec-Bench, MT-Bench, GSM8K, HumanEval, lines of JSON or text, .gz too "
                "(default: bundled held-out prompts)",
                default=BUNDLED,
                metavar="FILE",
            ),
            Option(
                "--suite",
                "bundled questions: chats, or edits, whose answers repeat a document or themselves; "
                "edits compare drafters (chats)",
                choices=(CHATS, EDITS),
                default=CHATS,
            ),
            Option("--set-kind", f"{', '.join(KINDS)} (default: by fields)", choices=KINDS, metavar="KIND"),
            Option("--prompts", "so many, chosen at random (60; of a file: all)", type=int, metavar="N"),
            Switch("--raw", "continue prompts instead of answering them as a chat"),
            Option("--max-new-tokens", "tokens a text (128)", type=parsing.count, default=128),
        ),
        OptionGroup(
            "cells: every combination of these lists",
            Option("--depths", "chains (1,2,3,4,5)", type=parsing.depths, metavar="K,K,..."),
            Option("--trees", "children by depth (2x1x1,3x2x1,2x2x2x1)", type=parsing.trees, metavar="NxN,..."),
            Switch("--auto", 'the default speculation, "auto"'),
            Option(
                "--rules",
                f"acceptance rules: all, or some of {', '.join(ACCEPTANCE_RULES)}",
                type=parsing.rules,
                metavar="RULE,...",
            ),
            Option(
                "--drafters",
                "who drafts: mtp, text, mtp+text (the default of the shape)",
                type=parsing.drafters,
                metavar="NAME+NAME,...",
            ),
            Option("--temperatures", "(0,0.8; of edits: 0)", type=parsing.numbers, metavar="T,T,..."),
            Option(
                "--contexts",
                "cut or pad prompts to so many tokens (default: as they are)",
                type=parsing.integers,
                default=[None],
                metavar="N,N,...",
            ),
            Option("--batch", "texts written side by side (1)", type=parsing.integers, default=[1], metavar="N,N,..."),
            Option(
                "--draft-vocabulary",
                "draft only the first N tokens, or those in a file of ids",
                type=parsing.vocabularies,
                default=[None],
                metavar="N|FILE|all,...",
            ),
            Switch("--transformers", "also transformers' generate, plain and use_mtp"),
            Switch(
                "--bound", "also how often a first draft could be accepted at most; takes time, so speed-up is not told"
            ),
        ),
        OptionGroup(
            "output, beside the table",
            JSON,
            Option("--csv", "write one line a cell", type=parsing.new_file, metavar="FILE"),
            Option(
                "--html", "write one page with plots (needs mtp-spec[plots])", type=parsing.new_file, metavar="FILE"
            ),
            Option("--png", "write the plots (needs mtp-spec[plots])", type=Path, metavar="FOLDER"),
            Switch("--resume", "go on where an interrupted run with these files stopped"),
        ),
    ),
)


class _Models:
    """The model of the group that is being measured; one at a time."""

    lm: Any
    _vocabulary: int | str | None = None

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.lm = args, None

    def load(self, vocabulary: int | str | None) -> LM:
        if self.lm is None or vocabulary != self._vocabulary:
            args, self.lm, self._vocabulary = self.args, None, vocabulary
            gc.collect()  # reference cycles keep the model alive, and the next one needs its memory
            self.lm = mtp_spec.load(
                args.model,
                device=args.device,
                dtype=args.dtype,
                weights=args.weights,
                mtp=args.mtp,
                draft_vocabulary=vocabulary,
                cache_dtype=args.cache_dtype,
                max_context=args.max_context,
                max_batch=max(args.batch),
            )
        return self.lm


def _identity(lm: LM, questions: QuestionSet, args: argparse.Namespace) -> Row:
    """Returns everything that texts and times depend on; a journal belongs to one such identity."""
    options = {name: value for name, value in vars(args).items() if name not in (*OUTPUTS, "model", "set", "set_kind")}
    here = {name: value for name, value in machine(lm).items() if name != "date"}
    files = [] if args.mtp is None else sorted(args.mtp.glob("*.safetensors"))
    modules = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {**options, **here, "mtp": modules, "questions": questions.digest}


def _report(groups: list[Group], questions: QuestionSet, runner: Runner, args: argparse.Namespace) -> Report:
    details = _details(runner.journal, groups, questions)
    if not details:
        raise OptionError(
            "no question leaves room for --max-new-tokens in the model's context, their tokens are "
            f"{runner.too_long}: cut them with --contexts"
        )
    count = len(questions.questions)
    title = f"Tokens per step, {count} questions ({questions.name}), up to {args.max_new_tokens} tokens"
    if runner.too_long:
        title += f"; left out as too long for the context: {len(runner.too_long)} (--contexts cuts them)"
    known = {"name": questions.name, "kind": questions.kind, "digest": questions.digest, "questions": count}
    facts = {"set": known, "details": details, "absent": runner.absent, "too_long": runner.too_long}
    return Report(title, table_rows(details), facts)


def _details(journal: Journal, groups: list[Group], questions: QuestionSet) -> dict[str, Row]:
    """Returns the metrics of every cell that has texts and plain ones to compare with."""
    categories = [question.category for question in questions.questions]
    texts: dict[str, dict[tuple[int, int], Text]] = {cell.name: {} for group in groups for cell in group.ways}
    for _, text in sorted(journal.texts.items(), key=lambda item: item[0][1:]):
        if text.cell in texts:
            texts[text.cell][text.question, text.turn] = text
    details, alone = {}, dict[tuple[Any, ...], str]()
    for group in groups:
        plain = next(cell.name for cell in group.ways if cell.draft == PLAIN)
        # batches come in ascending order: a text must be the same in every one
        least = alone.setdefault((group.temperature, group.context, group.vocabulary), plain)
        there = texts[plain].keys() & texts[least].keys()
        for cell in group.ways:
            known = [text for key, text in texts[cell.name].items() if key in there]
            if known:
                metrics = cell_metrics(cell, known, texts[plain], texts[least], categories)
                details[cell.name] = {**metrics, "plain": plain, "same_as": least}
    return details


def _stopped(journal: Journal, groups: list[Group], questions: QuestionSet) -> None:
    console, details = Console(), _details(journal, groups, questions)
    if details:
        console.print(screen("Interrupted: the texts so far", details))
    if journal.file is None:
        console.print("nothing is kept: a journal needs --json, --csv or --html")
    else:
        console.print(
            f"{len(journal.texts)} texts are kept in {journal.file}: the same command with --resume goes on",
            markup=False,
            soft_wrap=True,
        )


def _files(whole: Row, args: argparse.Namespace) -> dict[Path, bytes]:
    files: dict[Path, bytes] = {}
    figures = draw(whole["details"]) if args.html is not None or args.png is not None else {}
    if args.json is not None:
        files[args.json] = (json.dumps(whole, indent=1) + "\n").encode()
    if args.csv is not None:
        files[args.csv] = csv_text(whole["details"]).encode()
    if args.html is not None:
        files[args.html] = page(whole, figures).encode()
    if args.png is not None:
        files |= {args.png / f"{name}.png": png(figure) for name, figure in figures.items()}
    return files
