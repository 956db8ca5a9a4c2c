"""A model of a pass on other numbers of ranks, fitted to documents of `bench step --whole` (`--fit`). Arithmetic only.

An exchange among S ranks, of which each gives n bytes, takes `start + each (S - 1) + (S - 1) n / rate`: every rank
writes its bytes to all others, and raises a flag at each. A pass takes its launches' time, the bytes that a rank reads
over a rate, and its exchanges. What exchanges cost within passes is more than by themselves, as kernels do not overlap
across them and ranks wait for the slowest: a factor, which is fitted too. Between hosts an exchange goes through NCCL:
what NCCL took on one host, an assumed latency, and the bytes from other hosts over an assumed rate.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mtp_spec.bench.common import Row
from mtp_spec.bench.passes import Work, chain_tokens, draft_reads, pass_bytes, verify_reads
from mtp_spec.bench.whole.measured import DRAFT, verify_name
from mtp_spec.errors import OptionError
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.cuda.layers import Layer, Mixture
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.distributed.group import Ranks
from mtp_spec.model.errors import CheckpointError

ROOMS, LIBRARY = "rooms", "library"
FITTED, PREDICTED = "fitted", "PREDICTED"
TARGETS = ((8, 1), (8, 2), (16, 2))  # ranks, hosts
NEEDED = ("ranks", "exchange", "read_TB_per_s", "config", "rows", "limits", "exchange times")


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of an exchange.

    Attributes:
        start: of any exchange.
        each: for every other rank.
        byte: for each byte from another rank.
    """

    start: float
    each: float
    byte: float

    def micro(self, ranks: int, size: float) -> float:
        """Returns the microseconds among `ranks` ranks, of which each gives `size` bytes."""
        return self.start + (ranks - 1) * (self.each + size * self.byte)

    def between(self, ranks: int, hosts: int, size: float, latency: float, rate: float) -> float:
        """Returns the microseconds if the ranks are on several hosts.

        Args:
            latency: microseconds that the network adds.
            rate: GB/s at which a rank receives from other hosts.
        """
        if hosts == 1:
            return self.micro(ranks, size)
        far = ranks - ranks // hosts
        return self.micro(ranks, size) + latency + far * size / rate / 1e3


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass as a document has it, in milliseconds.

    Attributes:
        ranks: S.
        size: bytes that a rank reads.
        alone: without exchanges.
        exchanges: bytes of all ranks together, and how many such.
    """

    ranks: int
    context: int
    name: str
    size: float
    ms: float
    alone: float
    experts: float
    exchanges: tuple[tuple[int, int], ...]

    @property
    def kind(self) -> tuple[int, str]:
        return self.context, self.name

    @property
    def rows(self) -> int:
        return int(self.name.split(",")[1].split()[0])


def least_squares(columns: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Returns the factors, none negative, of columns whose sum is closest to values, relative to each value."""
    matrix, given = np.array(columns, dtype=float).T, np.array(values, dtype=float)
    matrix, given = matrix / given[:, None], np.ones_like(given)
    count = matrix.shape[1]
    best, least = [0.0] * count, float(given @ given)
    for size in range(1, count + 1):
        for some in combinations(range(count), size):
            part = matrix[:, some]
            if np.linalg.matrix_rank(part) < size:
                continue
            found = np.linalg.lstsq(part, given, rcond=None)[0]
            left = float(((part @ found - given) ** 2).sum())
            if found.min() >= 0 and left < least * (1 - 1e-9):
                least, best = left, [0.0] * count
                for place, factor in zip(some, found, strict=True):
                    best[place] = float(factor)
    return best


def fit_cost(times: Sequence[Row]) -> Cost:
    """Returns the cost of exchanges from times of exchanges by themselves: "ranks", "bytes" of a rank, "us"."""
    several = len({row["ranks"] for row in times}) > 1
    others = [row["ranks"] - 1.0 for row in times]
    columns = [[1.0] * len(times), others, [other * row["bytes"] for other, row in zip(others, times, strict=True)]]
    if not several:  # the start and what each rank adds cannot be told apart
        del columns[1]
    found = least_squares(columns, [row["us"] for row in times])
    return Cost(*found) if several else Cost(found[0], 0.0, found[1])


def read_documents(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Returns documents of `bench step --whole` on two or more ranks, of one model.

    Raises:
        OptionError: a file is none, or they are of different models.
    """
    documents = list[dict[str, Any]]()
    for file in files:
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise OptionError(f"--fit {file}: it cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise OptionError(f"--fit {file}: not a JSON document ({error})") from error
        lacking = [name for name in NEEDED if not isinstance(document, dict) or not document.get(name)]
        if isinstance(document, dict) and document.get("ranks") == 1:
            raise OptionError(f"--fit {file}: one rank exchanges nothing; give runs of two ranks or more")
        if lacking:
            raise OptionError(f"--fit {file}: give documents of bench step --whole --json, with the parts passes, "
                              f"limits and exchanges; this one lacks {', '.join(lacking)}")  # fmt: skip
        if documents and document["config"] != documents[0]["config"]:
            raise OptionError(f"--fit {file}: it is of another model than {documents[0]['shape']}")
        documents.append(document)
    return documents


def passes_of(document: dict[str, Any]) -> list[Pass]:
    """Returns the passes of a document."""
    read = {(row["context"], row["pass"]): row for row in document["rows"]}
    return [
        Pass(document["ranks"], row["context"], row["pass"], 1e9 * read[row["context"], row["pass"]]["GB a rank"],
             row["ms"], row["without exchange ms"], read[row["context"], row["pass"]]["experts a layer"],
             tuple((size, count) for size, count in row["bytes of exchanges"]))
        for row in document["limits"] if (row["context"], row["pass"]) in read
    ]  # fmt: skip


def rank_bytes(model: DeviceModel, one: Pass) -> float:
    """Returns the bytes that a rank with this part of the whole model, which may be on "meta", reads in a pass that
    chooses as many experts as `one`."""
    if one.name == DRAFT:
        reads, cached = draft_reads(model, one.context)
    else:
        reads, cached = verify_reads(model, one.context, one.rows)
    mixed = sum(isinstance(part, Layer) and isinstance(part.mlp, Mixture) for part in reads)
    return pass_bytes(Work(lambda: None, reads, cached), [one.experts] * mixed)


@dataclass(frozen=True, slots=True)
class Fit:
    """What documents say of other numbers of ranks.

    Attributes:
        costs: of exchanges, by what they go through.
        factor: what exchanges cost within a pass, over what they take by themselves.
        through: what the ranks of one host exchange through.
        rate: TB/s of reading in passes, and milliseconds of a pass beside reading and exchanges, by context and name.
        passes: of all documents.
    """

    costs: dict[str, Cost]
    factor: float
    through: str
    rate: dict[tuple[int, str], tuple[float, float]]
    passes: list[Pass]

    @classmethod
    def of(cls, documents: Sequence[dict[str, Any]]) -> Fit:
        """Returns the fit of documents of one model."""
        times = [{**row, "ranks": document["ranks"]} for document in documents for row in document["exchange times"]]
        kinds = {row["through"] for row in times}
        costs = {kind: fit_cost([row for row in times if row["through"] == kind]) for kind in kinds}
        through = LIBRARY if LIBRARY in {document["exchange"] for document in documents} else ROOMS
        passes = [one for document in documents for one in passes_of(document)]
        spent = [one.ms - one.alone for one in passes]
        summed = [_exchange_ms(costs[through], one, one.ranks) for one in passes]
        factor = sum(spent) / sum(summed) if sum(summed) else 1.0
        known = documents[0]["read_TB_per_s"]
        kinds_of_passes = dict.fromkeys(one.kind for one in passes)
        rate = {kind: _reading([one for one in passes if one.kind == kind], known) for kind in kinds_of_passes}
        return cls(costs, max(0.0, factor), through, rate, passes)

    def pass_ms(
        self, one: Pass, size: float, ranks: int, hosts: int = 1, latency: float = 0.0, between: float = 1.0
    ) -> tuple[float, float]:
        """Returns the milliseconds of a pass without exchanges, and of its exchanges.

        Args:
            size: bytes that a rank reads.
            latency, between: as for `Cost.between`.
        """
        rate, beside = self.rate[one.kind]
        kind = self.through if hosts == 1 else LIBRARY
        return beside + size / rate / 1e9, self.factor * _exchange_ms(
            self.costs[kind], one, ranks, hosts, latency, between
        )


def _exchange_ms(
    cost: Cost, one: Pass, ranks: int, hosts: int = 1, latency: float = 0.0, between: float = 1.0
) -> float:
    return sum(
        count * cost.between(ranks, hosts, size / ranks, latency, between) for size, count in one.exchanges
    ) / 1e3  # fmt: skip


def _reading(passes: Sequence[Pass], known: float) -> tuple[float, float]:
    """Returns TB/s and milliseconds beside it of a pass without exchanges; at the rate `known` if all read alike."""
    if len({one.ranks for one in passes}) > 1:
        beside, slope = least_squares([[1.0] * len(passes), [one.size for one in passes]],
                                      [one.alone for one in passes])  # fmt: skip
        if slope > 0:
            return 1 / slope / 1e9, beside
    return known, max(0.0, sum(one.alone - one.size / known / 1e9 for one in passes) / len(passes))


def predicted(
    documents: Sequence[dict[str, Any]], fit: Fit, law: Sequence[float], depths: Sequence[int], latency: float,
    between: float, targets: Sequence[tuple[int, int]] = TARGETS,
) -> tuple[list[Row], list[Row], list[str]]:  # fmt: skip
    """Returns rows of passes, rows of tokens a second, and notes, for the ranks measured and for `targets`.

    Args:
        law: probability that a draft of depth 1, 2, ... is accepted.
        latency, between: microseconds and GB/s between hosts, assumed.
    """
    config = ModelConfig.from_dict(documents[0]["config"])
    first = {one.kind: one for one in fit.passes}
    measured = {(one.ranks, *one.kind): one for one in fit.passes}
    there = sorted({one.ranks for one in fit.passes})
    rows, paces, notes = list[Row](), list[Row](), list[str]()
    for ranks, hosts in dict.fromkeys([*((size, 1) for size in there), *targets]):
        if hosts > 1 and LIBRARY not in fit.costs:
            notes.append(f"{ranks} ranks on {hosts} hosts: the documents have no times of exchanges through NCCL")
            continue
        found = dict[tuple[int, str], float]()
        try:
            model = DeviceModel(config, "meta", ranks=Ranks(0, ranks))
        except CheckpointError as error:
            notes.append(f"{ranks} ranks on {hosts} hosts: {error}")
            continue
        for kind, one in first.items():
            known = measured.get((ranks, *kind)) if hosts == 1 else None
            size = known.size if known else rank_bytes(model, one)
            alone, exchanges = fit.pass_ms(known or one, size, ranks, hosts, latency, between)
            found[kind] = alone + exchanges
            rows.append(
                {
                    "ranks": ranks,
                    "hosts": hosts,
                    "context": one.context,
                    "pass": one.name,
                    "GB a rank": size / 1e9,
                    "without exchange ms": alone,
                    "exchange ms": exchanges,
                    "ms": alone + exchanges,
                    "measured ms": known.ms if known else None,
                    "time": FITTED if known else PREDICTED,
                }
            )
        paces += _paces(found, ranks, hosts, law, depths, hosts == 1 and ranks in there)
    return rows, paces, notes


def _paces(
    ms: dict[tuple[int, str], float], ranks: int, hosts: int, law: Sequence[float], depths: Sequence[int], known: bool
) -> list[Row]:
    """Returns tokens a second by passes alone, sampling and the host left out, plain and with chains."""
    found = list[Row]()
    for context in dict.fromkeys(context for context, _ in ms):
        plain = ms.get((context, verify_name(1)))
        if plain is None:
            continue
        row: Row = {"ranks": ranks, "hosts": hosts, "context": context, "plain tokens/s": 1e3 / plain}
        for depth in depths:
            verify, draft = ms.get((context, verify_name(depth + 1))), ms.get((context, DRAFT))
            taken = None if verify is None or draft is None else verify + depth * draft
            row[f"chain {depth}, law"] = None if taken is None else 1e3 * chain_tokens(law, depth) / taken
        found.append({**row, "time": FITTED if known else PREDICTED})
    return found
