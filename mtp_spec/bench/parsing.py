"""Types of the benchmarks' options: comma lists, checked before anything is loaded."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import TypeVar

from mtp_spec.bench.experts import Mix
from mtp_spec.errors import OptionError
from mtp_spec.shapes import named_shape
from mtp_spec.speculation import ACCEPTANCE_RULES, MAX_DEPTH, Speculation

Number = TypeVar("Number", int, float)


def new_file(text: str) -> Path:
    """Returns a file that can be written: a benchmark of an hour must not fail at its end."""
    file = Path(text)
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: give a file")
    above = next(folder for folder in file.absolute().parents if folder.exists())  # those below are made
    try:
        with TemporaryFile(dir=above):
            return file
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written ({error}): give another place") from error


def numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers, such as 0.5,1") from None


def chances(text: str) -> list[float]:
    """Returns probabilities."""
    values = numbers(text)
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: give probabilities from 0 to 1")
    return values


def chance(text: str) -> float:
    """Returns a probability."""
    return _single(chances(text), text)


def pair(text: str) -> tuple[float, float]:
    """Returns two positive numbers."""
    values = numbers(text)
    if len(values) != 2 or min(values) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give two numbers above 0, such as 10,50")
    return values[0], values[1]


def integers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give integers, such as 1,4") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of 1 or more")
    return values


def count(text: str) -> int:
    return _single(integers(text), text)


def _single(values: Sequence[Number], text: str) -> Number:
    if len(values) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give one number")
    return values[0]


def drafters(text: str) -> list[tuple[str, ...]]:
    """Returns combinations of drafters, such as "mtp,text,mtp+text"."""
    try:
        found = [tuple(part.split("+")) for part in text.split(",")]
        for names in found:
            Speculation(drafters=names)
        return found
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def products(text: str) -> list[str]:
    """Returns matrices' names, such as 4096x7168 or "4096x7168 bf16"."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if re.fullmatch(r"[1-9]\d*x[1-9]\d*( bf16)?", name) is None:
            raise argparse.ArgumentTypeError(f"{name!r}: give NxK, such as 4096x7168 or '4096x7168 bf16'")
    return names


def mixes(text: str) -> list[str]:
    """Returns the names of MoE layers, such as 7168x2048:8/64 or "2048x1536:4/64 bf16"."""
    try:
        return [Mix.of(name).name for name in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def shape_file(text: str) -> Path:
    try:
        return named_shape(Path(text))
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def depths(text: str) -> list[int]:
    values = integers(text)
    if max(values) > MAX_DEPTH:
        raise argparse.ArgumentTypeError(f"{text!r}: a chain has at most {MAX_DEPTH} drafts")
    return values


def trees(text: str) -> list[tuple[int, ...]]:
    """Returns branchings from such as 3x2x1,2x2."""
    try:
        found = [tuple(int(width) for width in part.split("x")) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give trees as children by depth, such as 3x2x1,2x2x2") from None
    try:
        return [Speculation(branching=tree).branching for tree in found]
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def vocabulary(text: str) -> int | str:
    """Returns a number of tokens, or a file."""
    return int(text) if text.isdigit() else text


def vocabularies(text: str) -> list[int | str | None]:
    return [None if part == "all" else vocabulary(part) for part in text.split(",")]


def rules(text: str) -> list[str]:
    return some_of(ACCEPTANCE_RULES, list(ACCEPTANCE_RULES) if text == "all" else text.split(","), "all")


def chosen(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Returns the type of a list of some of these names."""
    return lambda text: some_of(allowed, text.split(","))


def some_of(allowed: Sequence[str], names: list[str], *also: str) -> list[str]:
    for name in names:
        if name not in allowed:
            raise argparse.ArgumentTypeError(f"{name!r}: allowed are {', '.join([*also, *allowed])}")
    return names
