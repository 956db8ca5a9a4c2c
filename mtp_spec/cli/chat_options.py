"""Options of the command line that go to the chat template: `--template NAME=JSON` and `--tools FILE`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mtp_spec.errors import OptionError


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """Adds them."""
    group = parser.add_argument_group("chat template")
    group.add_argument("--template", action="append", metavar="NAME=JSON",
                       help="an argument of the template, such as enable_thinking=false; may be repeated")  # fmt: skip
    group.add_argument("--tools", type=Path, metavar="FILE.json", help="a list of JSON schemas of what may be called")


def chat_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what was given, as the options of `LM.chat`.

    Raises:
        OptionError: an argument without a name or value, or a file that holds no list.
    """
    options: dict[str, Any] = {"template": template_arguments(args.template)} if args.template else {}
    if args.tools is not None:
        try:
            options["tools"] = json.loads(args.tools.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise OptionError(f"--tools {args.tools} is not a readable JSON file: {error}") from error
        if not isinstance(options["tools"], list):
            raise OptionError(f"--tools {args.tools} holds no list: give a list of JSON schemas")
    return options


def template_arguments(texts: Iterable[str], option: str = "--template ") -> dict[str, Any]:
    """Returns arguments of a template from texts such as enable_thinking=false; what is no JSON is a text.

    Raises:
        OptionError: one without a name or a value.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise OptionError(f"{option}{text}: give NAME=JSON, such as enable_thinking=false")
        try:
            found[name.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            found[name.strip()] = value
    return found
