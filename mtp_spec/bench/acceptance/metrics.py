"""Computes the metrics of a cell from its texts and those of plain decoding.

tokens_per_step is committed tokens over verify steps (plain decoding: 1), summed over texts (micro); "macro" is the
mean over questions. mean_acceptance_length is 1 + accepted / steps, as engines report it: a stop cuts nothing off.
Intervals resample questions, not turns, which depend on one another; those of speed-ups resample batches, whose texts
share their time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from mtp_spec.bench.acceptance.cells import Cell
from mtp_spec.bench.acceptance.journal import Text
from mtp_spec.bench.common import Row, interval, over, resampled, spread
from mtp_spec.stats import GenerationStats
from mtp_spec.tree import MODULES

# a row's batch is identified by its first question
BATCH = "first_of_batch"
# prompt tokens: texts are also told by the first of these that they do not exceed
BUCKETS = (128, 512, 2048, 8192, 32768)


def cell_metrics(
    cell: Cell,
    texts: Sequence[Text],
    plain: Mapping[tuple[int, int], Text],
    alone: Mapping[tuple[int, int], Text],
    categories: Sequence[str],
) -> Row:
    """Returns everything about a cell.

    Args:
        texts: of the cell, questions and turns in order.
        plain: (question, turn) -> the text of plain decoding in as large a batch; all are there.
        alone: the texts of plain decoding that texts have to equal.
        categories: of the questions.
    """
    beside = [plain[text.question, text.turn] for text in texts]
    same = [alone[text.question, text.turn].ids for text in texts]
    rows = [
        _text_row(text, other, ids, categories[text.question])
        for text, other, ids in zip(texts, beside, same, strict=True)
    ]
    total = merged(texts)
    plain_steps = sum(total.histogram_by_draft_length.get(0, {}).values())
    timed = all(text.first_depth is None for text in texts)
    result = {
        "axes": {
            "temperature": cell.temperature,
            "draft": cell.draft,
            "rule": cell.rule,
            "context": cell.context,
            "batch": cell.batch,
            "draft_vocabulary": cell.vocabulary,
        },
        **total.to_json(),
        **averages(rows),
        **_aliases(total),
        "tokens_by_source": _sources(total),
        "steps_without_draft": plain_steps / max(1, total.steps),
        "by_category": _split(texts, beside, lambda text: categories[text.question]),
        "by_context": _split(texts, beside, lambda text: bucket(text.stats.prompt_tokens)),
        "cost": _cost(texts, total),
        # computing the bound takes time that is not part of generation
        "times_plain": times_plain(rows) if timed else None,
        "parity": _parity(rows),
        "texts": rows,
    }
    if not timed:
        result["first_depth"] = _first_depth(cell.rule, [text.first_depth for text in texts if text.first_depth])
    return result


def merged(texts: Sequence[Text]) -> GenerationStats:
    """Returns the sums of several texts' statistics."""
    total = GenerationStats()
    for text in texts:
        total = total.merge(text.stats)
    return total


def bucket(prompt_tokens: int) -> str:
    """Returns the range that contains a prompt's length."""
    return next((f"up to {limit}" for limit in BUCKETS if prompt_tokens <= limit), f"over {BUCKETS[-1]}")


def sums(rows: Sequence[Row], *names: str, by: str = "question") -> list[list[float]]:
    """Returns one list a name: its sum for each question, or by another name that rows have."""
    units = sorted({row[by] for row in rows})
    return [[sum(row[name] for row in rows if row[by] == unit) for unit in units] for name in names]


def averages(rows: Sequence[Row]) -> Row:
    """Returns tokens per step, micro and macro, with 95 % intervals."""
    tokens, steps = sums(rows, "step_tokens", "steps")
    each = over(np.asarray(tokens), np.asarray(steps)).tolist()
    return {
        "tokens_per_step": sum(tokens) / max(1, sum(steps)),
        "tokens_per_step_interval": interval(tokens, steps),
        "tokens_per_step_macro": mean(each),
        "tokens_per_step_macro_interval": interval(each, [1.0] * len(each)),
    }


def ratio_of_sums(column: Any) -> Any:
    """Returns plain seconds a token over own, from sums of plain seconds, plain tokens, own seconds, own tokens."""
    return over(over(column[0], column[1]), over(column[2], column[3]))


PACE = ("plain_seconds", "plain_tokens", "seconds", "new_tokens")


def times_plain(rows: Sequence[Row]) -> Row:
    """Returns the speed-up: the median of ratios over texts or batches, and the ratio of sums with its interval."""
    turns: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        turns.setdefault((row[BATCH], row["turn"]), []).append(row)
    ratios = [float(ratio_of_sums([sum(row[name] for row in some) for name in PACE])) for some in turns.values()]
    median, low, high = spread(ratios)
    columns = sums(rows, *PACE, by=BATCH)
    whole = float(ratio_of_sums(np.asarray(columns, dtype=float).sum(1)))
    return {"median": median, "quartiles": (low, high), "ratio": whole, "interval": resampled(columns, ratio_of_sums)}


def _text_row(text: Text, plain: Text, same: list[int], category: str) -> Row:
    stats, planned = text.stats, text.stats.planned
    return {
        "question": text.question,
        "turn": text.turn,
        BATCH: min(text.together, default=text.question),
        "category": category,
        "prompt_tokens": stats.prompt_tokens,
        "new_tokens": len(text.ids),
        "steps": stats.steps,
        "step_tokens": stats.step_tokens,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "seconds": text.seconds,
        "plain_seconds": plain.seconds,
        "plain_tokens": len(plain.ids),
        "same_text": text.ids == same,
        "same_first_tokens": _shared(text.ids, same),
        "expected_tokens_per_step": planned.expected_tokens / planned.steps if planned.steps else None,
    }


def _shared(ids: list[int], others: list[int]) -> int:
    pairs = zip(ids, others, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(others)))


def _aliases(total: GenerationStats) -> Row:
    """Returns the metrics under vLLM's names."""
    counts = total.to_json()
    return {
        "mean_acceptance_length": 1 + total.accepted / max(1, total.steps),
        "draft_acceptance_rate": total.accepted / max(1, total.drafted),
        "acceptance_histogram": counts["histogram"],
        "acceptance_histogram_by_draft_length": counts["histogram_by_draft_length"],
        "num_spec_steps": total.steps,
        "num_draft_tokens": total.drafted,
        "num_accepted_draft_tokens": total.accepted,
    }


def _sources(total: GenerationStats) -> Row:
    """Returns how many tokens the target chose itself, and how many each draft depth or drafter proposed."""
    drafts = {source.removeprefix(f"{MODULES} "): tokens for source, tokens in total.accepted_by_source.items()}
    return {"target": total.steps + total.new_tokens - total.step_tokens, **drafts}


def _split(texts: Sequence[Text], beside: Sequence[Text], key: Callable[[Text], str]) -> Row:
    result = {}
    for name in dict.fromkeys(sorted(map(key, texts))):
        pairs = [(text, other) for text, other in zip(texts, beside, strict=True) if key(text) == name]
        total = merged([text for text, _ in pairs])
        ratios = [p.seconds / len(p.ids) * len(t.ids) / t.seconds for t, p in pairs if t.first_depth is None]
        result[name] = {
            "texts": len(pairs),
            "tokens_per_step": total.tokens_per_step,
            "draft_acceptance_rate": total.accepted / max(1, total.drafted),
            "accepted_per_depth": total.accepted_per_depth,
            "times_plain": spread(ratios)[0] if ratios else None,
        }
    return result


def _cost(texts: Sequence[Text], total: GenerationStats) -> Row:
    """Returns milliseconds of a step by phase, and of whole steps and first tokens."""
    seconds = {name: value for name, value in total.seconds.items() if name not in ("prefill", "total")}
    later = [ms for text in texts for ms in text.step_ms[1:]]
    first = [text.step_ms[0] for text in texts if text.step_ms]
    p50, p99 = np.quantile(later, (0.5, 0.99)).tolist() if later else (None, None)
    return {
        "ms_per_step": {name: 1000 * value / max(1, total.steps) for name, value in seconds.items()},
        "step_ms_p50": p50,
        "step_ms_p99": p99,
        "first_token_ms_p50": spread(first)[0] if first else None,
        "tokens_per_second": sum(len(text.ids) for text in texts) / sum(text.seconds for text in texts),
    }


def _parity(rows: Sequence[Row]) -> Row:
    different = [row["same_first_tokens"] for row in rows if not row["same_text"]]
    return {"same": len(rows) - len(different), "texts": len(rows), "first_differences": different}


def _first_depth(rule: str, each: Sequence[Mapping[str, float]]) -> Row:
    """Returns how often the first depth could be accepted at most, and which part of that was, with its interval.

    For the coupled rule the part is that of its noise drawn again at every step.
    """
    bounds, got = [one["bound"] for one in each], [one["redrawn" if rule == "coupled" else "accepted"] for one in each]
    nodes, accepted = sum(one["nodes"] for one in each), sum(one["accepted"] for one in each)
    if not sum(bounds):
        return {"bound": None, "part": None, "interval": None}
    return {
        "bound": sum(bounds) / nodes,
        "part": sum(got) / sum(bounds),
        "interval": interval(got, bounds),
        "nodes": nodes,
        "accepted": accepted / nodes,
    }
