"""A peer in its own Python: a program that answers each line of JSON with another, and is idle in between."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from mtp_spec.bench.common import Row
from mtp_spec.errors import MTPSpecError, OptionError

HERE = Path(__file__).parent
SHOWN = 40  # last lines of what a peer printed before it failed
# removed from the environment, so that the peer does not use this process's modules
OWN = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "VIRTUAL_ENV", "PYTHONSTARTUP")
FOUND = "import sys; from importlib.util import find_spec; print([n for n in sys.argv[1:] if not find_spec(n)])"


class PeerError(MTPSpecError):
    """A peer ended, or reported that it cannot handle a request."""


def check_python(option: str, python: Path, modules: Mapping[str, str]) -> None:
    """Rejects a path that is not a Python, or one that lacks a module; no module is imported.

    Args:
        option: the option that gave the path.
        modules: module names, and the packages that install them.
    """
    command = [str(python), "-I", "-c", FOUND, *modules]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=_environment({}), check=False)
    except OSError as error:
        raise OptionError(
            f"{option} {python}: cannot be started ({error.strerror}); give the path of a Python, "
            f"such as PEER/bin/python after {_made(modules)}"
        ) from None
    missing = [name for name in modules if repr(name) in done.stdout]
    if done.returncode or not done.stdout.startswith("["):
        raise OptionError(f"{option} {python}: is no Python: {(done.stderr or done.stdout).strip()[-200:]}")
    if missing:
        raise OptionError(f"{option} {python}: has no {' and no '.join(missing)}; {_made(modules)}")


def _made(modules: Mapping[str, str]) -> str:
    return f"python -m venv PEER && PEER/bin/pip install {' '.join(dict.fromkeys(modules.values()))}"


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in OWN} | dict(more)


class Peer:
    """A running program of this folder in another Python; use it in a `with`.

    Args:
        python: of the peer.
        program: file name of the program.
        arguments: of the program, written as JSON.
        environment: variables to add.
    """

    def __init__(self, python: Path, program: str, arguments: Row, environment: Mapping[str, str]) -> None:
        self._name, self._log = program, tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the peer
        command = [str(python), "-I", str(HERE / program), json.dumps(arguments)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment(environment),
        )

    @cached_property
    def facts(self) -> Row:
        """The peer's first line, sent when it is ready; start several peers before reading any, as that takes time."""
        return self._answer()

    def ask(self, **request: Any) -> Row:
        """Returns the answer to a request.

        Raises:
            PeerError: the peer has ended; the message has its last lines.
        """
        assert self._process.stdin is not None
        assert self.facts is not None  # it is ready
        with suppress(BrokenPipeError):  # it has ended: reading reports how
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the program by closing its input, or after a while by force."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> Row:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: Row = json.loads(line)
            return answer
        code = self._process.wait()
        self._log.seek(0)
        last = "\n".join(self._log.read().splitlines()[-SHOWN:])
        raise PeerError(f"{self._name} ended with {code}:\n{last}")
