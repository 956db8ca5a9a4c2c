"""What is typed, pasted and piped: prompt_toolkit with scripted keys, and the command line as a process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from mtp_spec.chat.commands import suggestions
from mtp_spec.chat.loop import _writable
from mtp_spec.chat.reading import TerminalReader, is_open, unquoted
from mtp_spec.chat.screen import Screen

ENTER, ALT_ENTER, TAB, CTRL_C, CTRL_D, UP = "\r", "\x1b\r", "\t", "\x03", "\x04", "\x1b[A"
Typed = Callable[..., list[object]]


@pytest.fixture
def typed(tmp_path: Path) -> Typed:
    """Reads what keys give, `count` times; Ctrl-C is its own class."""

    def play(keys: str, count: int = 1, history: Path | None = None) -> list[object]:
        found: list[object] = []
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            reader = TerminalReader(suggestions, history, pipe, DummyOutput())
            pipe.send_text(keys)
            for _ in range(count):
                try:
                    found.append(reader.read())
                except KeyboardInterrupt:
                    found.append(KeyboardInterrupt)
        return found

    return play


def test_lines(typed: Typed) -> None:
    assert typed(f"hello{ENTER}/seed 3{ENTER}", 2) == ["hello", "/seed 3"]
    assert typed(f"one{ALT_ENTER}two{ENTER}") == ["one\ntwo"]
    assert typed(f'"""one{ENTER}two"""{ENTER}') == ['"""one\ntwo"""']
    assert typed(f"狐狸🦊 é{ENTER}") == ["狐狸🦊 é"]


def test_keys_that_leave(typed: Typed) -> None:
    assert typed(CTRL_D) == [None]
    assert typed(CTRL_C) == [KeyboardInterrupt]
    # what is typed goes first
    assert typed(f"half a line{CTRL_C}{CTRL_C}") == [KeyboardInterrupt]
    assert typed(f"half a line{CTRL_C}other{ENTER}") == ["other"]


def test_a_huge_paste_is_one_question(typed: Typed) -> None:
    paste = "\n".join(f"line {n} of a long log" for n in range(2000))
    assert typed(f"\x1b[200~{paste}\x1b[201~{ENTER}") == [paste]


def test_history_outlives_the_chat(typed: Typed, tmp_path: Path) -> None:
    file = tmp_path / "history"
    typed(f"first{ENTER}", history=file)
    assert typed(f"{UP}{ENTER}", history=file) == ["first"]


def test_completion(typed: Typed) -> None:
    assert typed(f"/par{TAB}{ENTER}") == ["/parity"]
    assert typed(f"/set temp{TAB} 1{ENTER}") == ["/set temperature 1"]
    assert typed(f"no /par{TAB}{ENTER}") == ["no /par"]


def test_paths_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "chat.json").touch()
    monkeypatch.chdir(tmp_path)
    assert list(suggestions("/load fo")) == ["folder/"]
    assert list(suggestions("/load folder/c")) == ["folder/chat.json"]
    assert list(suggestions("/load none/")) == []


@pytest.mark.parametrize(
    ("text", "opened", "plain"),
    [
        ('"""a\n"b"\n"""', False, 'a\n"b"'),
        ('"""a', True, '"""a'),
        ('/system """be\nbrief"""', False, "/system be\nbrief"),
        ('say """this', False, 'say """this'),
        ("  a  ", False, "a"),
        ('""""""', False, ""),
    ],
)
def test_three_quotes(text: str, opened: bool, plain: str) -> None:
    assert is_open(text) == opened
    assert unquoted(text) == plain


def test_a_history_that_cannot_be_written_is_no_reason_to_end(tmp_path: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    page = Screen(Console(file=out), Console(file=err, width=200))
    assert _writable(tmp_path / "new" / "history", page) is not None
    (tmp_path / "file").touch()
    assert _writable(tmp_path / "file" / "history", page) is None
    assert "not kept" in err.getvalue()


def test_a_disk_that_fills_up_later_is_none_either(
    typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(FileHistory, "store_string", full)
    assert typed(f"one{ENTER}two{ENTER}", 2, history=tmp_path / "history") == ["one", "two"]


SEED = ("--seed", "0")


def chat(*options: str, given: str | bytes = "", shell: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `mtp-spec chat` as a process, its output through a shell command if given."""
    command = [sys.executable, "-P", "-m", "mtp_spec", "chat", "--max-new-tokens", "8", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    if shell:
        script = '"$@" | ' + shell + '; echo "${PIPESTATUS[0]}" >&2'
        command = ["bash", "-c", script, "chat", *command]
    sent = given.encode() if isinstance(given, str) else given
    done = subprocess.run(command, input=sent, capture_output=True, check=False, env=environment)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_once_and_scripts_from_a_pipe() -> None:
    one = chat("--once", "List three fruits", *SEED)
    assert one.returncode == 0
    assert len(one.stdout.split()) >= 4
    assert one.stdout.count("\n") >= 1
    assert "tok/s" in one.stderr
    again = chat("--once", "-", *SEED, given="List three fruits\n")
    assert again.stdout == one.stdout
    both = chat(*SEED, given=b"List three fruits\n/quit \xff\n/set stats off\nWhy?\n/exit\nnot asked\n")
    assert both.returncode == 0
    assert both.stdout.startswith(one.stdout)
    assert "/exit?" in both.stderr
    assert both.stderr.count("tok/s") == 1


def test_a_closed_pipe_ends_quietly() -> None:
    done = chat(given="Tell me a story\nAnd then?\nAnd then?\n", shell="head -c 3")
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "141"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--once", ""], "empty"),
        (["--once", "word " * 3000], "shorten it"),
        (["--temperature", "-1", "--once", "x"], "temperature"),
        (["--no-speculation", "--depth", "2", "--once", "x"], "--no-speculation"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_mistakes_on_the_command_line(options: list[str], names: str, capsys: pytest.CaptureFixture[str]) -> None:
    from mtp_spec.cli.main import main

    with pytest.raises(SystemExit) as stopped:
        main(["chat", *options])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert names in last
