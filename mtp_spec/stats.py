"""Statistics and times of a generation.

Definitions: tokens_per_step = tokens committed by verify steps / verify steps; the first token
comes from the prefill and belongs to no step. A plain decoding step is a verify step without drafts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mtp_spec.tree import MODULES

PHASES = ("prefill", "draft", "verify", "sample")
SUMS = (
    "prompt_tokens", "reused_tokens", "new_tokens", "steps", "drafted", "dropped", "accepted", "step_tokens",
    "overtaken", "total_seconds",
)  # fmt: skip


@dataclass(slots=True)
class Planned:
    """Sums over the steps that a planner chose: expected and measured."""

    steps: int = 0
    expected_tokens: float = 0.0
    expected_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, float]:
        """Tokens per step and per second, expected and measured; zeros without steps."""
        return {
            "steps": self.steps,
            "expected_tokens_per_step": _ratio(self.expected_tokens, self.steps),
            "tokens_per_step": _ratio(self.tokens, self.steps),
            "expected_tokens_per_second": _ratio(self.expected_tokens, self.expected_seconds),
            "tokens_per_second": _ratio(self.tokens, self.seconds),
        }


@dataclass(slots=True, kw_only=True)
class GenerationStats:
    """Counters of one generation, or of several merged.

    Attributes:
        prompt_tokens: tokens of the prompt.
        reused_tokens: of these, the ones whose cache pages an earlier sequence had filled.
        new_tokens: tokens generated, the first one included.
        steps: verify steps.
        drafted: draft tokens proposed (nodes of all trees).
        dropped: draft rows from which nothing was proposed because they held NaN or infinity.
        accepted: draft tokens accepted.
        step_tokens: tokens committed by verify steps.
        accepted_by_rank: sibling rank (0 = best) -> accepted tokens.
        drafted_by_source: name of a drafter -> draft tokens proposed.
        steps_by_source: name of a drafter -> steps with drafts of it.
        overtaken: steps with drafts of the MTP modules in which another drafter's first token was accepted: those of
            the modules were not compared with the text there.
        phase_seconds: phase -> seconds; see ``seconds``.
        total_seconds: wall-clock seconds of the whole generation.
        planned: expected and measured results of the steps that a planner chose, if they shared no pass with others.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    drafted: int = 0
    dropped: int = 0
    accepted: int = 0
    step_tokens: int = 0
    overtaken: int = 0
    accepted_by_rank: Counter[int] = field(default_factory=Counter)
    drafted_by_source: Counter[str] = field(default_factory=Counter)
    steps_by_source: Counter[str] = field(default_factory=Counter)
    phase_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    total_seconds: float = 0.0
    planned: Planned = field(default_factory=Planned)
    # (depth proposed, tokens accepted) -> steps: all statistics by depth are summed from it
    _outcomes: Counter[tuple[int, int]] = field(default_factory=Counter)
    # (drafter, depth) -> tokens accepted
    _origins: Counter[tuple[str, int]] = field(default_factory=Counter)

    def record_prefill(self, prompt_tokens: int) -> None:
        """Count a prompt and the token drawn from its last row."""
        self.prompt_tokens += prompt_tokens
        self.new_tokens += 1

    def record_step(
        self, proposed_depth: int, nodes: int, accepted_path_ranks: Sequence[int], committed: int,
        accepted_path_sources: Sequence[str] = (), others: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Count one verify step.

        Args:
            proposed_depth: depth of the drafted tree; 0 for plain decoding.
            nodes: nodes of the tree.
            accepted_path_ranks: sibling ranks along the accepted path, depth 1 first.
            committed: tokens committed, fewer than accepted + 1 if a stop cut them.
            accepted_path_sources: drafters of the accepted path; by default the MTP modules.
            others: for each node that is not from the MTP modules, its drafter.

        Raises:
            ValueError: more accepted than proposed, or more committed than accepted + 1.
        """
        accepted = len(accepted_path_ranks)
        if not accepted <= proposed_depth <= nodes:
            raise ValueError(f"{accepted} accepted, depth {proposed_depth}, {nodes} nodes: none may exceed the next")
        if not 1 <= committed <= accepted + 1:
            raise ValueError(f"{committed} tokens committed: allowed is 1 to {accepted + 1} with {accepted} accepted")
        self.steps += 1
        self.drafted += nodes
        self.accepted += accepted
        self.step_tokens += committed
        self.new_tokens += committed
        for rank in accepted_path_ranks:
            self.accepted_by_rank[rank] += 1
        for depth, source in enumerate(accepted_path_sources or [MODULES] * accepted, start=1):
            self._origins[source, depth] += 1
        if nodes > len(others):
            self.drafted_by_source[MODULES] += nodes - len(others)
            self.steps_by_source[MODULES] += 1
            self.overtaken += bool(accepted_path_sources) and accepted_path_sources[0] != MODULES
        if others:
            self.drafted_by_source.update(others)
            self.steps_by_source.update(set(others))
        self._outcomes[proposed_depth, accepted] += 1

    def record_plan(self, expected_tokens: float, expected_seconds: float, tokens: int, seconds: float) -> None:
        """Count a step that a planner chose."""
        planned = self.planned
        planned.steps += 1
        planned.expected_tokens += expected_tokens
        planned.expected_seconds += expected_seconds
        planned.tokens += tokens
        planned.seconds += seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside the block to a phase: prefill, draft, verify or sample; or step, which is all but
        prefill together, as in a CUDA graph."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(name, time.perf_counter() - start)

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add time to a phase."""
        self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + seconds

    @property
    def histogram(self) -> Counter[int]:
        """Accepted tokens of a step -> number of steps."""
        return sum(self.histogram_by_draft_length.values(), Counter[int]())

    @property
    def histogram_by_draft_length(self) -> dict[int, Counter[int]]:
        """The same for each depth that steps drafted to; 0 for steps without drafts."""
        found: dict[int, Counter[int]] = {}
        for (drafted, accepted), steps in sorted(self._outcomes.items()):
            found.setdefault(drafted, Counter())[accepted] = steps
        return found

    @property
    def tokens_per_step(self) -> float:
        """Tokens committed by verify steps over verify steps; 0 without steps."""
        return self.step_tokens / self.steps if self.steps else 0.0

    @property
    def accepted_per_depth(self) -> dict[str, list[float]]:
        """Acceptance rates, entry d - 1 for depth d.

        "conditional": accepted d, among steps that proposed depth d and accepted d - 1 (0 if there were none).
        "unconditional": accepted d, among steps that proposed depth d.
        """
        rates: dict[str, list[float]] = {"conditional": [], "unconditional": []}
        for depth in range(1, max((drafted for drafted, _ in self._outcomes), default=0) + 1):
            proposed = [(accepted, steps) for (drafted, accepted), steps in self._outcomes.items() if drafted >= depth]
            steps, reached, passed = (
                sum(steps for accepted, steps in proposed if accepted >= least) for least in (0, depth - 1, depth)
            )
            rates["conditional"].append(_ratio(passed, reached))
            rates["unconditional"].append(_ratio(passed, steps))
        return rates

    @property
    def accepted_by_source(self) -> dict[str, int]:
        """Accepted tokens by source: "mtp 1" for the MTP modules' first depth and so on; other drafters by name."""
        found = {f"{MODULES} {depth}": tokens for depth, tokens in self.accepted_at(MODULES).items()}
        others = sorted({source for source, _ in self._origins} - {MODULES})
        return found | {source: sum(self.accepted_at(source).values()) for source in others}

    def accepted_at(self, source: str) -> dict[int, int]:
        """Returns the accepted tokens of one drafter by depth."""
        return {depth: tokens for (name, depth), tokens in sorted(self._origins.items()) if name == source}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase, the remainder as "other", and "total"."""
        measured = sum(self.phase_seconds.values())
        total = max(self.total_seconds, measured)
        return {**self.phase_seconds, "other": total - measured, "total": total}

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the total time, prefill included; 0 before any time was recorded."""
        return _ratio(self.new_tokens, self.seconds["total"])

    def merge(self, other: GenerationStats) -> GenerationStats:
        """The sums of both; neither is changed."""
        merged = GenerationStats()
        for part in (self, other):
            for name in SUMS:
                setattr(merged, name, getattr(merged, name) + getattr(part, name))
            merged.accepted_by_rank.update(part.accepted_by_rank)
            merged._outcomes.update(part._outcomes)
            merged._origins.update(part._origins)
            merged.drafted_by_source.update(part.drafted_by_source)
            merged.steps_by_source.update(part.steps_by_source)
            for name in (one.name for one in fields(Planned)):
                setattr(merged.planned, name, getattr(merged.planned, name) + getattr(part.planned, name))
            for name, seconds in part.phase_seconds.items():
                merged.phase_seconds[name] = merged.phase_seconds.get(name, 0.0) + seconds
        return merged

    def to_json(self) -> dict[str, Any]:
        """A dictionary that ``json.dumps`` accepts."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "new_tokens": self.new_tokens,
            "steps": self.steps,
            "drafted": self.drafted,
            "dropped": self.dropped,
            "accepted": self.accepted,
            "tokens_per_step": self.tokens_per_step,
            "accepted_per_depth": self.accepted_per_depth,
            "accepted_by_rank": {str(rank): self.accepted_by_rank[rank] for rank in sorted(self.accepted_by_rank)},
            "drafted_by_source": dict(sorted(self.drafted_by_source.items())),
            "accepted_by_source": self.accepted_by_source,
            "steps_by_source": dict(sorted(self.steps_by_source.items())),
            "histogram": {str(count): self.histogram[count] for count in sorted(self.histogram)},
            "histogram_by_draft_length": {
                str(drafted): {str(accepted): steps for accepted, steps in counts.items()}
                for drafted, counts in self.histogram_by_draft_length.items()
            },
            "seconds": self.seconds,
            "planned": self.planned.to_json(),
            "tokens_per_second": self.tokens_per_second,
        }

    def to_record(self) -> dict[str, Any]:
        """Returns all raw counters for `json.dumps`; `from_record` is the inverse."""
        return {
            **{name: getattr(self, name) for name in SUMS},
            "accepted_by_rank": sorted(self.accepted_by_rank.items()),
            "outcomes": [[*outcome, steps] for outcome, steps in sorted(self._outcomes.items())],
            "origins": [[*origin, tokens] for origin, tokens in sorted(self._origins.items())],
            "drafted_by_source": dict(sorted(self.drafted_by_source.items())),
            "steps_by_source": dict(sorted(self.steps_by_source.items())),
            "phase_seconds": self.phase_seconds,
            "planned": asdict(self.planned),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> GenerationStats:
        """Returns the statistics that `to_record` wrote, after a round trip through JSON."""
        known = {name: record[name] for name in SUMS if name in record}  # earlier versions have fewer
        stats = cls(**known, phase_seconds=record["phase_seconds"])
        stats.planned = Planned(**record["planned"])
        stats.accepted_by_rank.update(dict(record["accepted_by_rank"]))
        stats.drafted_by_source.update(record["drafted_by_source"])
        stats.steps_by_source.update(record["steps_by_source"])
        stats._origins.update({(source, depth): tokens for source, depth, tokens in record["origins"]})
        stats._outcomes.update({(drafted, accepted): steps for drafted, accepted, steps in record["outcomes"]})
        return stats


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
