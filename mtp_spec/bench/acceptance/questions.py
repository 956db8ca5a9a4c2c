"""Prompt sets: the bundled one, and those that others cite, read from files on disk.

Formats: Spec-Bench (Xia et al., 2401.07851) and MT-Bench (Zheng et al., 2306.05685) `question.jsonl`, GSM8K (Cobbe et
al., 2110.14168), HumanEval (Chen et al., 2107.03374), lines of JSON with a prompt or messages, and plain text.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from mtp_spec.bench.common import bundled_prompts, digest
from mtp_spec.errors import OptionError
from mtp_spec.sampling.seeds import derived_seed

Record = Mapping[str, Any]
BUNDLED, BUNDLED_COUNT = "bundled", 60
CHATS, EDITS = "chats", "edits"  # bundled suites
ROLES = ("system", "user", "assistant")
# the two sets share their fields; Spec-Bench reports these eight kinds as one
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt, or a conversation's user turns.

    Attributes:
        category: results are also reported by category.
        turns: what the user says; each follows the answer to the one before.
        before: messages that come first.
        seed: of the texts.
        references: texts in which the drafter "text" looks too.
    """

    category: str
    turns: tuple[str, ...]
    before: tuple[dict[str, str], ...] = ()
    seed: int = 0
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions of a run.

    Attributes:
        name: the file's name, or "bundled".
        kind: its format.
    """

    name: str
    kind: str
    questions: list[Question]

    @property
    def digest(self) -> str:
        """A digest that identifies the questions."""
        fields = [asdict(question) for question in self.questions]
        return digest([{name: value for name, value in one.items() if name != "references" or value} for one in fields])


def read_questions(file: str, kind: str | None, count: int | None) -> QuestionSet:
    """Returns the questions of a file, or of the bundled set.

    Args:
        file: a path, or "bundled".
        kind: one of `KINDS`; None detects it from the fields.
        count: number of questions in random order, repeated with other seeds past the end; None is the whole file in
            its order, or 60 of the bundled set.

    Raises:
        OptionError: a missing or unreadable file, or a line that is not of its kind; the message names it.
    """
    if count is not None and count < 1:
        raise OptionError(f"--prompts {count}: give 1 or more")
    if file == BUNDLED:
        if kind is not None:
            raise OptionError(f"--set-kind {kind} tells how a file is read: give --set FILE too")
        items = bundled_prompts(BUNDLED_COUNT if count is None else count)
        return QuestionSet(BUNDLED, BUNDLED, [Question(i["category"], (i["prompt"],), seed=i["seed"]) for i in items])
    path = Path(file)
    if file == EDITS:
        with as_file(files("mtp_spec.configs") / "edits.jsonl") as path:
            return replace(read_questions(str(path), kind, count), name=EDITS)
    lines = _lines(path)
    if kind == "text" or (kind is None and path.suffix == ".txt"):
        kind, found = "text", [Question(path.stem, (line.strip(),)) for _, line in lines]
    else:
        records = [(number, _record(path, number, line)) for number, line in lines]
        kind = kind or _kind(path, [record for _, record in records])
        found = [_question(path, number, kind, record) for number, record in records]
    chosen = found if count is None else _choose(found, count)
    return QuestionSet(path.name, kind, [replace(one, seed=derived_seed(0, i)) for i, one in enumerate(chosen)])


def _choose(questions: list[Question], count: int) -> list[Question]:
    shuffled = random.Random(0).sample(questions, len(questions))
    return [shuffled[i % len(shuffled)] for i in range(count)]


def _lines(path: Path) -> list[tuple[int, str]]:
    """Returns the lines that are not blank, with their numbers."""
    if not path.is_file():
        raise OptionError(f"--set {path}: there is no such file; give a path, or {BUNDLED}")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise OptionError(f"--set {path} cannot be read: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise OptionError(f"--set {path} is empty: it must hold one question a line")
    return lines


def _record(path: Path, number: int, line: str) -> Record:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise _bad(path, number, f"is not JSON ({error}); plain text needs --set-kind text") from error
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise _bad(path, number, "holds neither an object nor a string")
    return value


def _kind(path: Path, records: list[Record]) -> str:
    fields = set(records[0])
    for kind, (needed, _) in KINDS.items():
        if needed and needed <= fields:
            if kind == "spec-bench" and all(record.get("category") in MT_BENCH for record in records):
                return "mt-bench"
            return kind
    known = "; ".join(f"{kind}: {', '.join(sorted(needed))}" for kind, (needed, _) in KINDS.items() if needed)
    raise _bad(path, 1, f"has the fields {', '.join(sorted(fields)) or '(none)'}, which no known set has ({known})")


def _question(path: Path, number: int, kind: str, record: Record) -> Question:
    needed, reader = KINDS[kind]
    if missing := sorted(needed - set(record)):
        raise _bad(path, number, f"lacks {', '.join(missing)}, which {kind} has")
    try:
        question = reader(record, path.name.split(".")[0])
    except ValueError as error:
        raise _bad(path, number, str(error)) from error
    if not all(turn.strip() for turn in question.turns):
        raise _bad(path, number, "has an empty prompt")
    return question


def _turns(record: Record, _: str) -> Question:
    turns = record["turns"]
    if not isinstance(turns, list) or not turns:
        raise ValueError("turns must be a list of strings")
    return Question(_text(record, "category"), tuple(_text({"turns": turn}, "turns") for turn in turns))


def _spec_bench(record: Record, name: str) -> Question:
    question = _turns(record, name)
    return replace(question, category="mt_bench") if question.category in MT_BENCH else question


def _field(field: str, category: str | None = None) -> Callable[[Record, str], Question]:
    return lambda record, name: Question(
        category or _category(record, name), (_text(record, field),), references=_references(record)
    )


def _references(record: Record) -> tuple[str, ...]:
    found = record.get("references", [])
    if not isinstance(found, list):
        raise ValueError("references must be a list of strings")
    return tuple(_text({"references": one}, "references") for one in found)


def _messages(record: Record, name: str) -> Question:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError('messages must be a list of {"role", "content"}')
    for message in messages:
        known = isinstance(message, dict) and message.get("role") in ROLES
        if not known or not isinstance(message.get("content"), str):
            raise ValueError(f'messages hold {{"role": one of {", ".join(ROLES)}, "content": text}}, not {message!r}')
    if messages[-1]["role"] != "user":
        raise ValueError("the last of messages must be the user's: the model answers it")
    before = tuple({"role": message["role"], "content": message["content"]} for message in messages[:-1])
    return Question(_category(record, name), (messages[-1]["content"],), before)


def _category(record: Record, name: str) -> str:
    return _text(record, "category") if "category" in record else name


def _text(record: Record, field: str) -> str:
    if not isinstance(record[field], str):
        raise ValueError(f"{field} must be a string, not {record[field]!r}")
    return record[field]


def _bad(path: Path, number: int, what: str) -> OptionError:
    return OptionError(f"--set {path} line {number} {what}")


# kind -> fields that it must have, and how a record is read; the first that fits is taken
KINDS: dict[str, tuple[set[str], Callable[[Record, str], Question]]] = {
    "spec-bench": ({"turns", "category"}, _spec_bench),
    "mt-bench": ({"turns", "category"}, _turns),
    "gsm8k": ({"question", "answer"}, _field("question", "gsm8k")),
    "humaneval": ({"task_id", "prompt", "entry_point"}, _field("prompt", "humaneval")),
    "jsonl": ({"prompt"}, _field("prompt")),
    "messages": ({"messages"}, _messages),
    "text": (set(), _field("prompt")),
}
