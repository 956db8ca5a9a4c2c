"""Input parsing shared by the command line and the chat."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from mtp_spec.errors import OptionError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage that argparse puts before it fills a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"mtp-spec: {message}; {self.prog} --help shows what is allowed\n")


def standard_input() -> str:
    """Returns all of standard input, stripped.

    Raises:
        OptionError: it is closed.
    """
    if sys.stdin is None:
        raise OptionError("standard input is closed: give the prompt on the command line")
    return sys.stdin.read().strip()


def template_arguments(texts: Iterable[str], option: str = "--template ") -> dict[str, Any]:
    """Returns a template's arguments from strings such as enable_thinking=false; a value that is not JSON is a string.

    Raises:
        OptionError: a string has no name or no value.
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
