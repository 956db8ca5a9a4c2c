"""Finds out which characters of a rendered conversation come from the chat template itself.

The template is rendered a second time with its own strings respelled: each visible character is moved to a private
plane of Unicode. Characters that differ between the two texts are the template's; the rest are from messages, tools and
arguments. Markers in these are moved to another private plane. String operations of a template, such as strip, split or
join, preserve this. If the template inspects a string and then takes another branch, more differs, and a rendering with
fewer respelled strings is tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes

from mtp_spec.errors import MTPSpecError
from mtp_spec.text.environment import environment
from mtp_spec.text.messages import LISTS, Conversation, is_written
from mtp_spec.text.template import rendered

PLANE = 0x10000
# planes 15 and 16: of the template, and of markers that must stay text
OWN, BARRED = 15 * PLANE, 16 * PLANE
# filters and functions that do not change characters
KEEPING = ("trim", "string", "safe", "join", "default", "d")
PASSING = ("namespace", "dict", "cycler", "cycle")
# placeholders of format and %
PLACES = re.compile(r"\{[^{}]*\}|%(?:\(\w+\))?[-#0 +]*\d*(?:\.\d+)?[a-zA-Z%]")
PRIVATE = re.compile(f"[{chr(OWN)}-\U0010ffff]")
Mark = Callable[[str], str]
Children = Iterator[tuple[nodes.Node, bool]]


@dataclass(frozen=True, slots=True)
class Provenance:
    """A rendered text in three spellings.

    Attributes:
        text: with the template's characters in plane 15 and markers of messages in plane 16.
        data: the inputs that the template was given for it.
        sure: whether all of the template's own strings were respelled.
    """

    text: str
    data: Conversation
    sure: bool


def provenance(asked: Conversation, text: str, barred: Mark, assistants: Mark) -> Provenance | None:
    """Returns the provenance of a rendered conversation; None if it cannot be determined for this template.

    Args:
        text: the rendered conversation.
        barred: moves markers that must stay text, in tools, arguments and messages, to plane 16.
        assistants: does the same for an assistant's text.
    """
    special = {name: spelled(value, OWN) for name, value in asked.special.items()}
    wanted = PRIVATE.sub("\ue000", text)
    # a template that inspects its own strings works with fewer of them respelled, or not at all
    for everywhere, named in ((True, special), (False, special), (False, dict(asked.special))):
        data = _marked(replace(asked, special=named), barred, assistants)
        try:
            found = rendered(data, _respelled(asked.source, everywhere))
        except MTPSpecError:
            continue
        if _plain(found) == wanted:
            return Provenance(found, data, everywhere)
    return None


def is_own(marker: str) -> bool:
    """Whether the template wrote a marker; a role in the middle of it may come from a message."""
    visible = [c for c in marker if not c.isspace()]
    own = [OWN <= ord(c) < BARRED for c in visible]
    plain = zip(_plain("".join(visible)), own, strict=True)
    signs = [mine for c, mine in plain if not (c.isalnum() or c in "_-")]
    return any(own) and all(signs or own)


def spelled(text: str, plane: int) -> str:
    """Returns a text with its visible characters in another plane."""
    return "".join(c if c.isspace() or ord(c) >= PLANE else chr(plane + ord(c)) for c in text)


def _plain(text: str) -> str:
    return PRIVATE.sub(lambda found: chr(ord(found[0]) % PLANE), text)


def _marked(asked: Conversation, barred: Mark, assistants: Mark) -> Conversation:
    def mark(value: Any, change: Mark) -> Any:
        return _mapped(value, lambda text: change(PRIVATE.sub("\ue000", text)))

    def marked(message: dict[str, Any]) -> dict[str, Any]:
        changes = {name: assistants if is_written(message, name) else barred for name in message}
        fields = {mark(name, barred): mark(value, changes[name]) for name, value in message.items()}
        return {**fields, "role": message["role"]}

    messages = [marked(message) for message in asked.messages]
    return replace(asked, messages=messages, tools=mark(asked.tools, barred), arguments=mark(asked.arguments, barred))


def _mapped(value: Any, change: Mark) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(one, change) for key, one in value.items()}
    return type(value)(_mapped(one, change) for one in value) if isinstance(value, LISTS) else value


@lru_cache(maxsize=32)
def _respelled(source: str, everywhere: bool) -> Template:
    """Returns a template with its own strings in plane 15.

    Args:
        everywhere: also those stored in variables or passed to macros, not only those written directly.
    """
    tree = environment().parse(source)
    macros = {macro.name for macro in tree.find_all(nodes.Macro)} if everywhere else set()
    waiting: list[tuple[nodes.Node, bool]] = [(tree, False)]
    while waiting:
        node, written = waiting.pop()
        if isinstance(node, nodes.TemplateData):
            node.data = spelled(node.data, OWN)
        elif isinstance(node, nodes.Const) and written and isinstance(node.value, str):
            node.value = spelled(node.value, OWN)
        elif everywhere and isinstance(template := _formatted(node), nodes.Const) and isinstance(template.value, str):
            template.value = _spelled_around(template.value)
        waiting += _children(node, written, macros, everywhere)
    return environment().from_string(tree)


def _children(node: nodes.Node, written: bool, macros: set[str], everywhere: bool) -> Children:
    """Yields the children of a node, and whether their text is written unchanged."""
    for child in node.iter_child_nodes():
        yield child, _comes_out(node, child, written, macros, everywhere)


def _comes_out(node: nodes.Node, child: nodes.Node, written: bool, macros: set[str], everywhere: bool) -> bool:
    if isinstance(node, nodes.Output):
        return True
    if isinstance(node, nodes.Add | nodes.Concat | nodes.And | nodes.Or | nodes.List | nodes.Tuple | nodes.Dict):
        return written
    if isinstance(node, nodes.CondExpr):
        return written and child is not node.test
    if isinstance(node, nodes.Filter):
        return written and node.name in KEEPING
    if isinstance(node, nodes.Getitem):
        return written and child is node.node
    if isinstance(node, nodes.Pair | nodes.Keyword):
        return written and child is node.value
    if isinstance(node, nodes.Call):
        called = node.node.name if isinstance(node.node, nodes.Name) else getattr(node.node, "attr", "")
        return everywhere and child is not node.node and (called in macros or called in PASSING)
    if isinstance(node, nodes.Assign):
        return everywhere and child is node.node
    # defaults of a macro's arguments
    return everywhere and isinstance(node, nodes.Macro | nodes.CallBlock) and child in node.defaults


def _formatted(node: nodes.Node) -> nodes.Node | None:
    """Returns the format string of a call of format or of %."""
    if isinstance(node, nodes.Mod):
        return node.left
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "format":
        return node.node.node
    return None


def _spelled_around(text: str) -> str:
    done, pieces = 0, []
    for place in PLACES.finditer(text):
        pieces += [spelled(text[done : place.start()], OWN), place[0]]
        done = place.end()
    return "".join([*pieces, spelled(text[done:], OWN)])
