"""Prompt sets on disk: each in its own fields, and what is wrong with a file is said with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mtp_spec.bench.acceptance.questions import read_questions
from mtp_spec.errors import OptionError
from mtp_spec.sampling.seeds import derived_seed

SPEC_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Shorter."], "reference": []},
    {"question_id": 161, "category": "translation", "turns": ["Translate German to English: Hallo"]},
]
GSM8K = [{"question": "A robe takes 2 bolts. How many?", "answer": "It takes <<2=2>>2.\n#### 2"}]
HUMANEVAL = [{"task_id": "HumanEval/0", "prompt": "def one():\n", "entry_point": "one",
              "canonical_solution": "    return 1\n", "test": "def check(candidate): ..."}]  # fmt: skip
MESSAGES = [{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}]


def write(folder: Path, records: list[Any], name: str = "question.jsonl") -> str:
    file, text = folder / name, "\n".join(map(json.dumps, records)) + "\n\n"
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(file)


def test_spec_bench_and_mt_bench_share_their_fields(tmp_path: Path) -> None:
    spec = read_questions(write(tmp_path, SPEC_BENCH), None, None)
    assert spec.kind == "spec-bench"
    assert [q.category for q in spec.questions] == ["mt_bench", "translation"]
    assert spec.questions[0].turns == ("Write a poem.", "Shorter.")
    mt = read_questions(write(tmp_path, SPEC_BENCH[:1]), None, None)
    assert (mt.kind, mt.questions[0].category) == ("mt-bench", "writing")
    forced = read_questions(write(tmp_path, SPEC_BENCH), "mt-bench", None)
    assert [q.category for q in forced.questions] == ["writing", "translation"]


@pytest.mark.parametrize(
    ("records", "name", "kind", "category", "turn"),
    [
        (GSM8K, "test.jsonl", "gsm8k", "gsm8k", GSM8K[0]["question"]),
        (HUMANEVAL, "HumanEval.jsonl.gz", "humaneval", "humaneval", "def one():\n"),
        (HUMANEVAL, "HumanEval.jsonl", "humaneval", "humaneval", "def one():\n"),
        ([{"prompt": "Hi", "category": "talk"}], "mine.jsonl", "jsonl", "talk", "Hi"),
        (["Hi"], "mine.jsonl", "jsonl", "mine", "Hi"),
        (MESSAGES, "mine.jsonl", "messages", "mine", "Hi"),
    ],
)
def test_kinds_are_told_by_their_fields(
    records: list[Any], name: str, kind: str, category: str, turn: str, tmp_path: Path
) -> None:
    found = read_questions(write(tmp_path, records, name), None, None)
    assert (found.name, found.kind) == (name, kind)
    (question,) = found.questions
    assert (question.category, question.turns) == (category, (turn,))
    assert question.before == (({"role": "system", "content": "Be brief."},) if records is MESSAGES else ())


def test_plain_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("First\n\n  Second\u2028line  \n")
    assert [q.turns for q in read_questions(str(file), None, None).questions] == [("First",), ("Second\u2028line",)]
    (tmp_path / "notes").write_text("{broken\n")
    assert read_questions(str(tmp_path / "notes"), "text", None).questions[0].turns == ("{broken",)


def test_a_number_chooses_at_random_and_repeats_with_other_seeds(tmp_path: Path) -> None:
    file = write(tmp_path, [{"prompt": f"Number {i}"} for i in range(5)])
    whole, some, more = (read_questions(file, None, count) for count in (None, 3, 7))
    assert [q.turns[0] for q in whole.questions] == [f"Number {i}" for i in range(5)]
    assert some.questions == more.questions[:3]
    assert len({q.turns for q in more.questions}) == 5
    assert [q.seed for q in more.questions] == [derived_seed(0, i) for i in range(7)]
    assert [q.seed for q in whole.questions] == [q.seed for q in more.questions][:5]
    assert len({whole.digest, some.digest, more.digest}) == 3
    assert len(read_questions("bundled", None, None).questions) == 60


@pytest.mark.parametrize(
    ("records", "kind", "message"),
    [
        ([{"text": "Hi"}], None, "line 1 has the fields text, which no known set has"),
        ([*GSM8K, {"question": "Why?"}], None, "line 2 lacks answer, which gsm8k has"),
        (GSM8K, "humaneval", "line 1 lacks entry_point, prompt, task_id"),
        ([{"prompt": ""}], None, "line 1 has an empty prompt"),
        ([{"prompt": 3}], None, "line 1 prompt must be a string"),
        ([[1]], None, "line 1 holds neither an object nor a string"),
        ([{"category": "qa", "turns": []}], None, "line 1 turns must be a list"),
        ([{"messages": [{"role": "user"}]}], None, "line 1 messages hold"),
        ([{"messages": [{"role": "assistant", "content": "Hi"}]}], None, "the last of messages must be the user's"),
        ([], None, "is empty"),
    ],
)
def test_what_is_wrong_with_a_line(records: list[Any], kind: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        read_questions(write(tmp_path, records), kind, None)


def test_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such file"):
        read_questions(str(tmp_path / "none.jsonl"), None, None)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Hi"}\n\n{"prompt": \n')
    with pytest.raises(OptionError, match=r"bad.jsonl line 3 is not JSON .* --set-kind text"):
        read_questions(str(tmp_path / "bad.jsonl"), None, None)
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(OptionError, match="cannot be read"):
        read_questions(str(tmp_path / "bad.jsonl.gz"), None, None)


def test_the_suite_of_edits_has_documents(tmp_path: Path) -> None:
    edits = read_questions("edits", None, None)
    assert edits.name == "edits"
    kinds = [question.category for question in edits.questions]
    assert sorted(set(kinds)) == ["document", "edit", "table"]
    assert all(bool(question.references) == (question.category != "table") for question in edits.questions)
    records = [{"prompt": "Hi", "references": ["Hello", "there"]}]
    (question,) = read_questions(write(tmp_path, records, "mine.jsonl"), None, None).questions
    assert question.references == ("Hello", "there")
    for wrong in ("Hello", [1]):
        with pytest.raises(OptionError, match="references"):
            read_questions(write(tmp_path, [{"prompt": "Hi", "references": wrong}]), None, None)
