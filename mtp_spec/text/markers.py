"""Encodes conversations so that only the template produces markers: text in a message never becomes a marker token."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import nodes
from tokenizers import Tokenizer

from mtp_spec.errors import MTPSpecError, PromptError
from mtp_spec.text.environment import environment
from mtp_spec.text.messages import Conversation, is_written, strings
from mtp_spec.text.provenance import BARRED, OWN, is_own, provenance, spelled
from mtp_spec.text.template import rendered

ROLE_NAMES = frozenset(
    ("system", "developer", "user", "human", "assistant", "model", "bot", "gpt", "ai", "tool", "function",
     "observation", "ipython", "environment")
)  # fmt: skip

# conversations that probe what a template writes around messages of others than the assistant, and around tools
PROBE, ANSWER = "xqzv", "xqzw"
_PROBED = {"role": "user", "content": PROBE}
_TOOL = {"type": "function", "function": {"name": PROBE, "description": PROBE, "parameters": {"type": "object",
         "properties": {PROBE: {"type": "string", "description": PROBE}}}}}  # fmt: skip
_CALL = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": {}}}
_RESULT = {"role": "tool", "name": "f", "tool_call_id": "123456789", "content": PROBE}
OTHERS: tuple[tuple[list[Any] | None, list[dict[str, Any]]], ...] = (
    (None, [_PROBED]),
    (None, [{"role": "system", "content": PROBE}, _PROBED]),
    (None, [_PROBED, {"role": "assistant", "content": ANSWER}, _PROBED]),
    ([_TOOL], [_PROBED]),
    (None, [_PROBED, {"role": "assistant", "content": "", "tool_calls": [_CALL]}, _RESULT]),
    # for a template that takes arguments as text
    (None, [_PROBED, {"role": "assistant", "content": "",
                      "tool_calls": [{**_CALL, "function": {"name": "f", "arguments": "{}"}}]}, _RESULT]),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """A marker in a rendered text.

    Attributes:
        start: its first character.
        end: the one after its last.
        stays: whether it is encoded as a marker token.
    """

    token: int
    start: int
    end: int
    stays: bool


class Markers:
    """Finds markers in rendered conversations, and separates those of messages from the template's.

    Args:
        raw: the tokenizer.
    """

    def __init__(self, raw: Tokenizer) -> None:
        self._raw = raw
        self._added = {number: token for number, token in raw.get_added_tokens_decoder().items() if token.content}
        self._marks: dict[tuple[frozenset[int], bool], Callable[[str], str]] = {}
        self._halves: dict[frozenset[int], tuple[frozenset[str], frozenset[str]]] = {}
        self._renamed: dict[frozenset[int], tuple[Tokenizer, dict[int, str]]] = {}
        self._allowed: dict[str, frozenset[int]] = {}

    def ids(self, asked: Conversation, text: str) -> list[int]:
        """Returns the ids of a rendered conversation.

        Raises:
            PromptError: a message holds a marker, and the template or the tokenizer offers no way to keep it text.
        """
        encoding = self._raw.encode(text, add_special_tokens=False)
        ids, markers = list(encoding.ids), self._markers(asked.source)
        places = [(token, *place) for token, place in zip(ids, encoding.offsets, strict=True) if token in markers]
        if not places:
            return ids
        found = self._judged(asked, text, places)
        return ids if all(marker.stays for marker in found) else self._apart(text, found, markers)

    def _markers(self, source: str) -> frozenset[int]:
        """Returns the added tokens that are markers: all except words and blanks that the template does not write."""
        written = literals(source)
        return frozenset(
            number for number, token in self._added.items()
            if token.special or not _is_word(token.content)
            or (token.content in written and not token.content.isspace())
        )  # fmt: skip

    def _judged(self, asked: Conversation, text: str, places: Sequence[tuple[int, int, int]]) -> list[Found]:
        """Returns the markers in a rendered text, each with whether it stays a marker."""
        every, allowed = self._markers(asked.source), self._assistants(asked)
        known = provenance(asked, text, self._marking(every, True), self._marking(every - allowed, False))
        if known is None:
            return [Found(*place, stays=not self._may_come(asked, every, allowed, asked.messages)) for place in places]
        found = []
        for token, start, end in places:
            spelt = known.text[start:end]
            stays = is_own(spelt) or (token in allowed and not any(c >= chr(OWN) for c in spelt))
            if not stays and not any(c >= chr(BARRED) for c in spelt):
                # of unclear origin: formed where texts meet, or written by template code that was not traced
                met = known.sure and _is_word(self._added[token].content)
                stays = not (met or self._may_come(known.data, every, allowed, None if known.sure else asked.messages))
            found.append(Found(token, start, end, stays))
        return found

    def _marking(self, tokens: frozenset[int], parts: bool) -> Callable[[str], str]:
        """Returns a function that moves markers in a message to plane 16.

        Args:
            parts: also move part of a marker at the beginning or end of the text, ignoring blanks.
        """
        if (tokens, parts) in self._marks:
            return self._marks[tokens, parts]
        contents = sorted((self._added[number].content for number in tokens), key=len, reverse=True)
        whole = re.compile("|".join(map(re.escape, contents)) or "(?!)")
        (heads, tails), longest = self._ends(tokens), len(contents[0]) if contents else 0

        def mark(text: str) -> str:
            text = whole.sub(lambda found: spelled(found[0], BARRED), text)
            if self._raw.normalizer is not None:  # it may turn other characters into a marker
                encoding = self._raw.encode(text, add_special_tokens=False)
                for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                    if token in tokens:
                        text = text[:start] + spelled(text[start:end], BARRED) + text[end:]
            if not parts:
                return text
            last, first = len(text.rstrip()), len(text) - len(text.lstrip())
            head = next((n for n in range(min(longest, last), 0, -1) if text[last - n : last] in heads), 0)
            text = text[: last - head] + spelled(text[last - head : last], BARRED) + text[last:]
            tail = next(
                (n for n in range(min(longest, len(text) - first), 0, -1) if text[first : first + n] in tails), 0
            )
            return text[:first] + spelled(text[first : first + tail], BARRED) + text[first + tail :]

        self._marks[tokens, parts] = mark
        return mark

    def _ends(self, tokens: frozenset[int]) -> tuple[frozenset[str], frozenset[str]]:
        if tokens not in self._halves:
            self._halves[tokens] = _parts(self._added[number].content for number in tokens)
        return self._halves[tokens]

    def _may_come(self, asked: Conversation, every: frozenset[int], allowed: frozenset[int], refused: object) -> bool:
        """Whether the template's inputs may form markers, alone or together with adjacent text.

        Args:
            allowed: markers that an assistant's message may hold.
            refused: the messages; given if their markers cannot be told from the template's, which then is an error.
        """
        given = [(text, every) for text in strings([asked.tools or [], dict(asked.arguments)])]
        for message in asked.messages:
            for name, value in message.items():
                here = every - allowed if is_written(message, name) else every
                given += [(text, here) for text in strings([name, value])]
        for text, markers in given:
            if self._raw.normalizer is not None:
                text = self._raw.normalizer.normalize_str(text)
            ids = self._raw.encode(text, add_special_tokens=False).ids
            if not markers.isdisjoint(ids) or _may_join(text, *self._ends(markers)):
                if refused is None:
                    return True
                raise PromptError(
                    f"{text!r:.200} in {refused!r:.200} holds marks of the model's own tokens, and this chat template "
                    "cannot be told apart from its messages: leave them out"
                )
        return False

    def _assistants(self, asked: Conversation) -> frozenset[int]:
        """Returns the markers that an assistant's message may hold: of reasoning and tool calls, not of turns."""
        if asked.source not in self._allowed:
            looked_for = tested(asked.source)
            contents = {token.content: token.special for token in self._added.values()}
            pairs = [c for c in contents if _partner(c) in contents and _name(c) not in ROLE_NAMES]
            wanted = {c for c in pairs if not contents[c] or c in looked_for or _partner(c) in looked_for}
            turns = self._of_others(asked)
            others = {text for one in turns for text in (self._added[one].content, _partner(self._added[one].content))}
            ids = {number for number, token in self._added.items() if token.content in wanted - others}
            self._allowed[asked.source] = frozenset(ids)
        return self._allowed[asked.source]

    def _of_others(self, asked: Conversation) -> frozenset[int]:
        """Returns the markers that the template writes around everything that is not the assistant's.

        They are those next to a user's or system's message or a tool's result, pairs around these or around a tool's
        description, and all between an answer and the next message; all markers if the probes show none of these.
        """
        found, seen = set[int](), False
        for tools, messages in OTHERS:
            try:
                text = rendered(Conversation(asked.source, messages, tools, asked.special, {}, False))
            except MTPSpecError:
                continue
            encoding = self._raw.encode(text, add_special_tokens=False)
            pairs = zip(encoding.ids, encoding.offsets, strict=True)
            places = [(token, *place) for token, place in pairs if token in self._added]
            for probe in re.finditer(PROBE, text, re.IGNORECASE):
                before = [token for token, _, end in places if end <= probe.start()]
                after = [token for token, start, _ in places if start >= probe.end()]
                found |= self._enclosing(before, after)
                # prose before a description may mention any marker
                found.update(() if tools else [*before[-1:], *after[:1]])
                seen = True
            for between in re.finditer(f"{ANSWER}.*{PROBE}", text, re.IGNORECASE | re.DOTALL):
                found.update(token for token, start, _ in places if between.start() < start < between.end())
        return frozenset(found if seen else self._added)

    def _enclosing(self, before: Sequence[int], after: Sequence[int]) -> set[int]:
        """Returns the pairs that are open between two stretches of markers."""
        names = {token.content: number for number, token in self._added.items()}
        found = set[int]()
        for number in {*before}:
            content = self._added[number].content
            closing = names.get(_partner(content) or "")
            if closing is None or content[1] == "/":
                continue
            last = next(token for token in reversed(before) if token in (number, closing))
            first = next((token for token in after if token in (number, closing)), None)
            found |= {number, closing} if (last, first) == (number, closing) else set()
        return found

    def _apart(self, text: str, found: Sequence[Found], markers: frozenset[int]) -> list[int]:
        """Returns the ids of a text in which only the markers that stay are tokens."""
        raw, names = self._other(markers)
        pieces, done = [], 0
        for marker in found:
            if marker.stays:
                content = self._added[marker.token].content
                within = text.find(content, marker.start, marker.end)
                start, end = (marker.start, marker.end) if within < 0 else (within, within + len(content))
                pieces += [text[done:start], names[marker.token]]
                done = end
        ids = list(raw.encode("".join([*pieces, text[done:]]), add_special_tokens=False).ids)
        if [token for token in ids if token in markers] != [marker.token for marker in found if marker.stays]:
            raise PromptError("a message holds a marker that this tokenizer makes of any text like it: leave it out")
        return ids

    def _other(self, markers: frozenset[int]) -> tuple[Tokenizer, dict[int, str]]:
        """Returns the same tokenizer with the markers under unguessable names, and these names."""
        if markers not in self._renamed:
            secret = "".join(chr(ord("a") + number) for byte in secrets.token_bytes(12) for number in divmod(byte, 16))
            names = {number: f"q{secret}{_letters(number)}q" for number in markers}
            by_content = {self._added[number].content: name for number, name in names.items()}
            stored = json.loads(self._raw.to_str())
            for token in stored["added_tokens"]:
                token["content"] = by_content.get(token["content"], token["content"])
            stored["post_processor"] = None
            _rename(stored["model"], by_content)
            raw = Tokenizer.from_str(json.dumps(stored))
            raw.encode_special_tokens = self._raw.encode_special_tokens
            self._renamed[markers] = raw, names
        return self._renamed[markers]


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Renames pieces of a vocabulary, so that no ordinary text produces them."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not ({*pair, "".join(pair)} & names.keys())]


@lru_cache(maxsize=16)
def literals(source: str) -> str:
    """Returns all string literals of a template, separated from one another."""
    tree = environment().parse(source)
    constants = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join([*(node.data for node in tree.find_all(nodes.TemplateData)), *constants])


@lru_cache(maxsize=16)
def tested(source: str) -> frozenset[str]:
    """Returns the strings that a template searches for in others: by `in`, `==`, split and the like."""
    tree = environment().parse(source)
    inside = [node for kind in (nodes.Compare, nodes.Call, nodes.Filter) for node in tree.find_all(kind)]
    found = [const.value for node in inside for const in node.find_all(nodes.Const)]
    return frozenset(text for text in found if isinstance(text, str))


def _is_word(content: str) -> bool:
    return all(c.isalnum() or c.isspace() or c in "_-'" for c in content)


def _partner(content: str) -> str | None:
    """Returns the closing marker of an opening one, `</think>` for `<think>`, or vice versa."""
    if len(content) < 3:
        return None
    return content[0] + (content[2:] if content[1] == "/" else "/" + content[1:])


def _name(content: str) -> str:
    return "".join(c for c in content.lower() if c.isalnum())


def _parts(contents: Iterable[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Returns the prefixes and suffixes of markers that are not plain words; of two halves at least one is none."""
    heads, tails = set[str](), set[str]()
    for content in contents:
        cuts = range(1, len(content))
        heads |= {content[:cut] for cut in cuts if not _is_word(content[:cut])}
        tails |= {content[cut:] for cut in cuts if not _is_word(content[cut:])}
    return frozenset(heads), frozenset(tails)


def _may_join(text: str, heads: frozenset[str], tails: frozenset[str]) -> bool:
    """Whether a text ends or begins with part of a marker, longer than one character, ignoring blanks."""
    end, start, longest = text.rstrip(), text.lstrip(), max(map(len, heads), default=0)
    return any(end[-n:] in heads or start[:n] in tails for n in range(2, longest + 1))


def _letters(number: int) -> str:
    return "".join(chr(ord("a") + int(digit)) for digit in f"{number:08d}")
