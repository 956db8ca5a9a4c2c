"""The prompts of a command line: one as an argument, one from standard input, or a file of several."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mtp_spec.console import standard_input
from mtp_spec.errors import OptionError

# options without use in a chat: `mtp-spec generate --interactive` rejects them, and `mtp-spec chat` has these values
NOT_IN_CHAT = {
    "prompt": None,
    "prompts": None,
    "input_file": None,
    "json": False,
    "raw": False,
    "n": 1,
    "trace": None,
    "acceptance": None,
    "logprobs": None,
    "max_batch": 1,
}


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Adds the options that give prompts, those of DeepSeek's generate.py included."""
    parser.add_argument("prompt", nargs="?", help="the prompt; - reads it from standard input")
    parser.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help='one {"prompt": ...} or string a line')
    parser.add_argument("--input-file", type=Path, metavar="FILE", help="one prompt a line, as it stands")
    parser.add_argument("--interactive", action="store_true", help="start a chat, as mtp-spec chat does")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Returns the prompts that were given.

    Raises:
        OptionError: none or several of the options are given, or a file cannot be read.
    """
    if sum(value is not None for value in (args.prompt, args.prompts, args.input_file)) != 1:
        raise OptionError(
            "give one prompt (- for standard input), --prompts FILE.jsonl, --input-file FILE, or --interactive"
        )
    if args.prompt is not None:
        return [standard_input() if args.prompt == "-" else args.prompt]
    option, file = ("--prompts", args.prompts) if args.input_file is None else ("--input-file", args.input_file)
    lines = [(line.strip(), number) for number, line in enumerate(_lines(option, file), start=1)]
    prompts = [line if option == "--input-file" else _prompt(line, number) for line, number in lines if line]
    if not prompts:
        raise OptionError(f"{option} {file} holds no prompt: give one a line")
    return prompts


def check_interactive(args: argparse.Namespace) -> None:
    """Rejects options that have no use together with --interactive."""
    given: dict[str, Any] = vars(args)
    for name, without in NOT_IN_CHAT.items():
        if given[name] != without:
            shown = "a prompt" if name == "prompt" else f"--{name.replace('_', '-')}"
            raise OptionError(f"--interactive excludes {shown}: the chat asks for prompts and prints answers")


def _lines(option: str, file: Path) -> list[str]:
    try:
        if not file.is_file():
            raise OptionError(f"{option} {file}: there is no such file")
        return file.read_text(encoding="utf-8-sig").split("\n")  # other line ends may be part of a prompt
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{option} {file} cannot be read: {error}") from error


def _prompt(line: str, number: int) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"--prompts line {number} is not JSON: {error}") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise OptionError(f'--prompts line {number}: give a string or {{"prompt": string}}')
    return prompt
