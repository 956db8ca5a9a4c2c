"""Options of the command line that go to the chat template: `--template NAME=JSON` and `--tools FILE`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mtp_spec.console import template_arguments
from mtp_spec.errors import OptionError


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = parser.add_argument_group("chat template")
    group.add_argument(
        "--template",
        action="append",
        metavar="NAME=JSON",
        help="an argument of the template, such as enable_thinking=false; may be repeated",
    )
    group.add_argument("--tools", type=Path, metavar="FILE.json", help="a list of JSON schemas of what may be called")


def chat_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the given options, as `LM.chat` takes them.

    Raises:
        OptionError: an argument has no name or value, or a file does not hold a list.
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
