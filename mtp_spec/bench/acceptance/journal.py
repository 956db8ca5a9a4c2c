"""The journal that an interrupted run leaves: one line for each text, appended to a file next to the output file.

The first line identifies the run. A run resumes only from a journal of the same model and options, so that a document
never mixes two. An incomplete last line is dropped and its text generated again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mtp_spec.bench.common import Row, digest
from mtp_spec.errors import OptionError
from mtp_spec.stats import GenerationStats

# cell, question, turn
Key = tuple[str, int, int]


@dataclass(slots=True)
class Text:
    """One generated text.

    Attributes:
        cell, question, turn: which one.
        ids: what was generated.
        seconds: wall-clock, prompt included; in a batch an equal share of the time until all were finished.
        step_ms: milliseconds of each step, the first is the prefill; empty in a batch.
        stats: what was counted.
        first_depth: sums of `bench.bound.FirstDepth`, or None.
        together: the questions in the same batch, this one included.
    """

    cell: str
    question: int
    turn: int
    ids: list[int]
    seconds: float
    step_ms: list[float]
    stats: GenerationStats
    first_depth: dict[str, float] | None = None
    together: tuple[int, ...] = ()

    @property
    def key(self) -> Key:
        return self.cell, self.question, self.turn

    def to_line(self) -> str:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return json.dumps({**fields, "stats": self.stats.to_record()}) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Text:
        fields: dict[str, Any] = json.loads(line)
        stats, together = GenerationStats.from_record(fields["stats"]), tuple(fields["together"])
        return cls(**{**fields, "stats": stats, "together": together})


class Journal:
    """The texts of a run, kept in a file as they come; `with` closes it.

    Args:
        file: where; None keeps them in memory only.
        run: what the run measures; the texts of a journal of another run are no use.
        resume: take the texts that the file holds.

    Attributes:
        texts: those there are.

    Raises:
        OptionError: nothing or something else to resume, a damaged line, or texts that would be lost without resume.
    """

    def __init__(self, file: Path | None, run: Row, resume: bool) -> None:
        self.file, self.texts = file, dict[Key, Text]()
        self._out = None
        if file is None:
            return
        lines = _whole_lines(file) if file.is_file() else []
        if resume:
            self._read(file, lines, run)
        elif len(lines) > 1:
            raise OptionError(
                f"{file} holds {len(lines) - 1} texts of an interrupted run: --resume goes on with it; "
                "delete it to begin again"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        self._out = file.open("a", encoding="ascii")
        # a line that was cut short would run into the next one
        self._out.truncate(sum(len(line) + 1 for line in lines) if resume else 0)
        if not resume:
            self._write(json.dumps({"key": digest(run), "run": run}) + "\n")

    def _read(self, file: Path, lines: list[str], run: Row) -> None:
        if not lines:
            raise OptionError(f"--resume: {file} does not exist or is empty; begin without it")
        for number, line in enumerate(lines, start=1):
            try:
                if number == 1:
                    theirs = json.loads(line)
                    continue
                text = Text.from_line(line)
            except (ValueError, TypeError, KeyError) as error:
                raise OptionError(f"{file} line {number} is damaged ({error!r}): delete it to begin again") from error
            self.texts[text.key] = text
        if theirs["key"] != digest(run):
            given = theirs["run"]
            names = [name for name in {**run, **given} if digest(run.get(name)) != digest(given.get(name))]
            raise OptionError(
                f"--resume: {file} is of a run with another {', '.join(names)}; repeat its command, or "
                "delete it to begin again"
            )

    def add(self, text: Text) -> None:
        """Adds a text, which is on disk when this returns."""
        self.texts[text.key] = text
        self._write(text.to_line())

    def _write(self, text: str) -> None:
        if self._out is not None:
            self._out.write(text)
            self._out.flush()

    def remove(self) -> None:
        """Deletes the file, once the document holds everything."""
        if self.file is not None:
            self.file.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._out is not None:
            self._out.close()


def _whole_lines(file: Path) -> list[str]:
    return file.read_text(encoding="ascii").split("\n")[:-1]
