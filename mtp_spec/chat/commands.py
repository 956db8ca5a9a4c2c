"""The chat's commands, `/help` to `/exit`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from mtp_spec.chat import files
from mtp_spec.chat.chat import Chat
from mtp_spec.chat.parity import parity
from mtp_spec.chat.report import statistics
from mtp_spec.chat.settings import NAMES, SHAPES, describe, parse_setting, parse_shape, shape_text, template_text
from mtp_spec.chat.status import counted
from mtp_spec.console import template_arguments
from mtp_spec.errors import OptionError
from mtp_spec.sampling.seeds import LIMIT

# least similarity of two words for a suggestion
SIMILAR = 0.4
SWITCHES = {"colour": "coloured", "stats": "statistics"}
KEYS = """Alt-Enter begins a new line, as does Enter between three quotes. Tab completes commands.
Ctrl-C stops an answer and keeps what is written; once more at an empty prompt, or Ctrl-D, leaves.
A question that begins with / is sent by putting a space before it."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command: called with the chat and the text after the command's name."""

    usage: str
    help: str
    run: Callable[[Chat, str], None]


def run_command(chat: Chat, line: str) -> None:
    """Runs a line that begins with a slash.

    Raises:
        OptionError: the command is unknown, or its argument is invalid.
    """
    name, _, argument = line[1:].partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise OptionError(f"there is no command /{name}: {_hint(name)} (to ask it, put a space before it)")
    command.run(chat, argument.strip())


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=SIMILAR)
    return f"did you mean /{close[0]}?" if close else "/help lists them"


def suggestions(before: str) -> Iterable[str]:
    """Returns the possible words at the cursor, given the line before it."""
    words = before.split(" ")
    if len(words) == 1:
        return [f"/{name}" for name in COMMANDS]
    if len(words) == 2:
        options = {
            "/set": [*NAMES, *SWITCHES],
            "/spec": SHAPES,
            "/help": list(COMMANDS),
            "/seed": ["random"],
            "/system": ["off"],
            "/template": ["off"],
            "/show": ["history"],
        }
        return files.matching(words[1]) if words[0] in ("/save", "/load") else options.get(words[0], ())
    switch = words[0] == "/set" and len(words) == 3 and words[1] in SWITCHES
    return ("on", "off") if switch else ()


def _help(chat: Chat, argument: str) -> None:
    wanted = argument.removeprefix("/")
    if wanted and wanted not in COMMANDS:
        raise OptionError(f"there is no command /{wanted}: {_hint(wanted)}")
    table = Table.grid(padding=(0, 2))
    for name in [wanted] if wanted else COMMANDS:
        table.add_row(COMMANDS[name].usage, COMMANDS[name].help)
    chat.screen.show(table)
    if not argument:
        chat.screen.say(KEYS)


def _set(chat: Chat, argument: str) -> None:
    name, _, value = argument.partition(" ")
    name, value = {"color": "colour"}.get(name, name), value.strip()
    if not name:
        _show(chat, "")
        return
    if name in SWITCHES:
        _switch(chat, name, value)
        return
    if name not in NAMES:
        if name == "logprobs":
            raise OptionError("logprobs are not shown in a chat: mtp-spec generate --logprobs N --json prints them")
        close = difflib.get_close_matches(name, [*NAMES, *SWITCHES], n=1, cutoff=SIMILAR)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join([*NAMES, *SWITCHES])}"
        raise OptionError(f"there is no setting {name!r}: {hint}")
    if not value:
        raise OptionError(f"/set {name} VALUE: a value is missing; off is the default")
    chat.session.set(name, parse_setting(name, value))
    chat.screen.say(f"{name} {value}")


def _switch(chat: Chat, name: str, value: str) -> None:
    if value not in ("on", "off"):
        raise OptionError(f"/set {name} {value}: give on or off")
    if name == "colour" and value == "on" and not chat.screen.can_colour:
        raise OptionError("this output has no colours: it is no colour terminal, or NO_COLOR is set")
    setattr(chat.screen, SWITCHES[name], value == "on")
    if name == "colour" and value == "on":
        chat.screen.show(chat.screen.legend())
    else:
        chat.screen.say(f"{name} {value}")


def _show(chat: Chat, argument: str) -> None:
    if argument == "history":
        for turn in chat.session.turns:
            chat.screen.history(turn.question, turn.answer)
        if not chat.session.turns:
            chat.screen.say("nothing was said yet")
        return
    if argument:
        raise OptionError(f"/show {argument}: give nothing, or history")
    table = Table.grid(padding=(0, 2))
    for name, value in {**describe(chat.session), **_switches(chat)}.items():
        table.add_row(name, value)
    chat.screen.show(table)


def _switches(chat: Chat) -> dict[str, str]:
    return {name: "on" if getattr(chat.screen, field) else "off" for name, field in SWITCHES.items()}


def _clear(chat: Chat, argument: str) -> None:
    turns = chat.session.turns
    if argument and not (argument.isdecimal() and 1 <= int(argument) <= len(turns)):
        raise OptionError(f"/clear {argument}: give nothing, or how many of the {len(turns)} turns to forget")
    count = int(argument) if argument else len(turns)
    del turns[:count]
    chat.screen.say(f"{counted(count, 'turn')} forgotten, {len(turns)} left")


def _regen(chat: Chat, argument: str) -> None:
    session = chat.session
    if not session.turns:
        raise OptionError("/regen: nothing was answered yet")
    if argument:
        session.set("seed", parse_setting("seed", argument))
    elif session.params.greedy:
        chat.screen.say("at temperature 0 the words change only if something else did")
    elif session.params.seed is not None:
        session.set("seed", (session.params.seed + 1) % LIMIT)
    turn, kept = session.turns.pop(), False
    try:
        kept = chat.ask(turn.question)
    finally:
        if not kept:
            session.turns.append(turn)


def _undo(chat: Chat, argument: str) -> None:
    _nothing_after("undo", argument)
    if not chat.session.turns:
        raise OptionError("/undo: nothing was said yet")
    turn = chat.session.turns.pop()
    chat.screen.say(f"forgotten: {files.beginning(turn.question)}")


def _system(chat: Chat, argument: str) -> None:
    if not argument:
        chat.screen.say(chat.session.system or "there is no system message")
        return
    chat.session.system = None if argument == "off" else argument
    chat.screen.say("no system message" if argument == "off" else "from the next answer on")


def _template(chat: Chat, argument: str) -> None:
    session = chat.session
    if argument == "off":
        session.set_template({})
    elif argument:
        changed = template_arguments([argument], "/template ")
        kept = {name: value for name, value in session.template.items() if name not in changed}
        session.set_template(kept if "off" in changed.values() else {**kept, **changed})
    chat.screen.say(f"the chat template is given {template_text(session.template)}")


def _seed(chat: Chat, argument: str) -> None:
    if argument:
        chat.session.set("seed", None if argument == "random" else parse_setting("seed", argument))
    seed = chat.session.params.seed
    chat.screen.say("a fresh seed for each answer, told below it" if seed is None else f"seed {seed}")


def _spec(chat: Chat, argument: str) -> None:
    if argument:
        shape = parse_shape(argument)
        chat.session.lm.speculation_for(shape)
        chat.session.speculation = shape
    chat.screen.say(f"speculation {shape_text(chat.session.speculation)}; the words stay the same")


def _stats(chat: Chat, argument: str) -> None:
    _nothing_after("stats", argument)
    last = next((turn.result.stats for turn in reversed(chat.session.turns) if turn.result is not None), None)
    if not chat.session.totals.new_tokens:
        raise OptionError("/stats: nothing was answered yet")
    chat.screen.show(statistics(last, chat.session.totals))


def _save(chat: Chat, argument: str) -> None:
    chat.screen.say(files.save(chat.session, _path("save", argument)))


def _load(chat: Chat, argument: str) -> None:
    chat.screen.say(files.load(chat.session, _path("load", argument)))


def _path(name: str, argument: str) -> Path:
    if not argument:
        raise OptionError(f"/{name} FILE: a file is missing")
    return Path(argument).expanduser()


def _parity(chat: Chat, argument: str) -> None:
    _nothing_after("parity", argument)
    parity(chat)


def _exit(chat: Chat, argument: str) -> None:
    _nothing_after("exit", argument)
    chat.leaving = True


def _nothing_after(name: str, argument: str) -> None:
    if argument:
        raise OptionError(f"/{name} takes nothing after it, {argument!r} was given")


COMMANDS = {
    "help": Command("/help [COMMAND]", "this list", _help),
    "set": Command("/set NAME VALUE", "a sampling parameter; colour on shows who proposed a token; stats off", _set),
    "show": Command("/show [history]", "model, context and settings, or the conversation", _show),
    "clear": Command("/clear [N]", "forget the conversation, or its N oldest turns", _clear),
    "regen": Command("/regen [SEED]", "answer the last question again, with the next seed or a fresh one", _regen),
    "undo": Command("/undo", "forget the last question and its answer", _undo),
    "system": Command("/system [TEXT|off]", "the system message", _system),
    "template": Command(
        "/template [NAME=JSON|NAME=off|off]", "arguments of the chat template: enable_thinking=false", _template
    ),
    "seed": Command("/seed [N|random]", "same seed and settings, same answers; random is a fresh one for each", _seed),
    "spec": Command("/spec off|K|tree|auto", "what is drafted: nothing, a chain of K, a tree, what pays", _spec),
    "stats": Command("/stats", "what drafting did, last answer and whole chat", _stats),
    "save": Command("/save FILE", "write conversation and settings as JSON", _save),
    "load": Command("/load FILE", "go on with a saved conversation", _load),
    "parity": Command("/parity", "repeat the last answer without drafts: same words, how much slower", _parity),
    "exit": Command("/exit", "leave, as Ctrl-D does", _exit),
}
