"""`bench plan --grid`: the best fixed plan by grid search, compared with "auto".

Every plan generates from the same held-out prompts, all in turn on each prompt. The first half of the prompts chooses
the best plan, the second half compares it with "auto" and with plain decoding: on the prompts that chose it, the best
of many would look better than it is. Plain decoding is among the plans.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

from mtp_spec.api import LM
from mtp_spec.bench.common import Report, Row, bundled_prompts, median_interval, question, spread
from mtp_spec.bench.turns import Generate, Written, check_kept, in_turn, noise, ours, warm_up
from mtp_spec.progress import step_progress
from mtp_spec.speculation import Speculation

PLAIN, AUTO = "plain", "auto"
DEPTHS = (1, 2, 3, 4, 5, 6)
TREES = ((2,), (2, 1), (2, 1, 1), (2, 2, 1), (3, 1, 1), (2, 1, 1, 1), (3, 2, 1))
# what "auto" must reach, as fractions of the tokens per second of the best fixed plan and of plain decoding
OF_BEST, OF_PLAIN = 0.98, 0.99
# temperature for random prompts
RANDOM_TEMPERATURE = 2.0
Texts = dict[str, list[Written]]


@dataclass(frozen=True, slots=True)
class Setting:
    """Texts of one kind; `adversarial` ones follow random tokens."""

    temperature: float
    adversarial: bool

    @property
    def name(self) -> str:
        return f"{self.temperature:g}" + (", random" if self.adversarial else "")

    def prompts(self, lm: LM, count: int) -> list[tuple[list[int], int]]:
        """Returns ids and seeds."""
        items = bundled_prompts(count, seed=1)
        return [
            (noise(lm, i) if self.adversarial else question(lm, item["prompt"]), item["seed"])
            for i, item in enumerate(items)
        ]


def fixed_plans(depths: Sequence[int] | None, trees: Sequence[tuple[int, ...]] | None) -> dict[str, Speculation]:
    """Returns the plans by name; the default ones if neither is given."""
    if depths is None and trees is None:
        depths, trees = DEPTHS, TREES
    plans = {f"chain {depth}": Speculation(depth=depth) for depth in depths or ()}
    return plans | {f"tree {','.join(map(str, tree))}": Speculation(branching=tree) for tree in trees or ()}


def grid(lm: LM, args: argparse.Namespace) -> Report:
    """Finds the best fixed plan for each temperature and compares "auto" with it."""
    ways = {name: ours(lm, plan) for name, plan in fixed_plans(args.depths, args.trees).items()}
    always = {PLAIN: ours(lm, None), AUTO: ours(lm, AUTO)}
    check_kept(lm, len(ways))
    settings = [Setting(temperature, False) for temperature in args.temperatures]
    settings += [Setting(RANDOM_TEMPERATURE, True)] if args.adversarial else []
    rows, verdicts, unlike, notes = list[Row](), list[Row](), list[Row](), list[str]()
    for setting in settings:
        prompts, options = (
            setting.prompts(lm, args.prompts),
            {"temperature": setting.temperature, "max_new_tokens": args.max_new_tokens},
        )
        half = len(prompts) // 2
        warm_up(lm, {**always, **ways}, [ids for ids, _ in prompts], options)
        chosen = _Turns(always, options, f"temperature {setting.name}")
        best = chosen.search(ways, prompts[:half], args.halving)
        compared = _Turns({**always, best: {**ways, **always}[best]}, options, f"temperature {setting.name}, {best}")
        compared.write({}, prompts[half:])
        for kind, turns in (("choose", chosen), ("compare", compared)):
            rows += [_row(setting, kind, name, turns.texts) for name in turns.texts]
            unlike += [{"temperature": setting.name, "plan": name, "prompts": kind} for name in turns.unlike()]
        verdicts.append(_verdict(setting, best, compared.texts, chosen.texts))
        notes.append(_sentence(verdicts[-1]))
    title = f'Fixed plans and "auto", median over prompts; {args.prompts // 2} choose the best, the others compare'
    facts = {"settings": verdicts, "goals": {"of the best": OF_BEST, "of plain": OF_PLAIN}, "unlike plain": unlike}
    return Report(title, rows, facts, bool(unlike), lm.model.ranks.rank > 0, notes)


class _Turns:
    """Runs several ways to generate over prompts, in turn.

    Args:
        always: ways that a search never drops.
        label: of the progress bar.
    """

    def __init__(self, always: dict[str, Generate], options: dict[str, Any], label: str) -> None:
        self.always, self.options, self.label = always, options, label
        self.texts: Texts = {}

    def search(self, ways: dict[str, Generate], prompts: list[tuple[list[int], int]], halving: bool) -> str:
        """Returns the best of the ways and plain decoding; with halving the slower half is dropped repeatedly."""
        left = dict(ways)
        rounds = min(len(prompts), ceil(log2(len(ways))) or 1) if halving else 1
        for part in _parts(prompts, rounds):
            self.write(left, part)
            order = sorted(left, key=self._median, reverse=True)
            if part[-1] is not prompts[-1]:
                left = {name: left[name] for name in order[: ceil(len(order) / 2)]}
        return max([PLAIN, *left], key=self._median)

    def write(self, ways: dict[str, Generate], prompts: list[tuple[list[int], int]]) -> None:
        """Runs all ways on all prompts."""
        every, done = {**self.always, **ways}, len(self.texts.get(PLAIN, ()))
        with step_progress(sys.stderr.isatty(), self.label) as report:
            for number, (ids, seed) in enumerate(prompts, start=1):
                found = in_turn(every, done + number, ids, {**self.options, "seed": seed})
                for name in every:
                    self.texts.setdefault(name, []).append(found[name])
                if report is not None:
                    report(number, len(prompts))

    def unlike(self) -> list[str]:
        """Returns the ways with a text that differs from plain decoding's."""
        plain = self.texts[PLAIN]
        return [
            name
            for name, texts in self.texts.items()
            if any(own.ids != other.ids for own, other in zip(texts, plain, strict=False))
        ]

    def _median(self, name: str) -> float:
        return float(_times(self.texts, name, PLAIN)["median"])


def _parts(prompts: list[Any], rounds: int) -> Iterator[list[Any]]:
    for turn in range(rounds):
        yield prompts[turn * len(prompts) // rounds : (turn + 1) * len(prompts) // rounds]


def _times(texts: Texts, name: str, other: str) -> Row:
    """Returns tokens per second of one way over another's: the median over pairs of texts, its 95 % interval, the
    quartiles. A way that was dropped has the first prompts only."""
    ratios = [their.pace / own.pace for own, their in zip(texts[name], texts[other], strict=False)]
    median, low, high = spread(ratios)
    return {"median": median, "interval": median_interval(ratios), "quartiles": (low, high)}


def _row(setting: Setting, kind: str, name: str, texts: Texts) -> Row:
    own, times = texts[name], _times(texts, name, PLAIN)
    low, high = times["quartiles"]
    steps = sum(text.stats.steps for text in own)
    return {
        "T": setting.name,
        "to": kind,
        "plan": name,
        "prompts": len(own),
        "tok/s": 1 / spread([text.pace for text in own])[0],
        "x plain": times["median"],
        "quartiles": f"{low:.2f}-{high:.2f}",
        "tok/step": sum(text.stats.step_tokens for text in own) / max(1, steps),
    }


def _verdict(setting: Setting, best: str, compared: Texts, chosen: Texts) -> Row:
    of_best, of_plain = _times(compared, AUTO, best), _times(compared, AUTO, PLAIN)
    return {
        "temperature": setting.temperature,
        "random prompts": setting.adversarial,
        "best": best,
        "auto over the best": of_best,
        "auto over plain": of_plain,
        "best over plain": _times(compared, best, PLAIN),
        "goals met": {"of the best": of_best["median"] >= OF_BEST, "of plain": of_plain["median"] >= OF_PLAIN},
        "prompts that chose": {name: len(texts) for name, texts in chosen.items()},
        "prompts that compare": len(compared[PLAIN]),
        "seconds per token": {
            kind: {name: [text.pace for text in own] for name, own in texts.items()}
            for kind, texts in (("choose", chosen), ("compare", compared))
        },
    }


def _sentence(verdict: Row) -> str:
    parts = []
    for key, goal in (("of the best", OF_BEST), ("of plain", OF_PLAIN)):
        times = verdict[f"auto over {key.removeprefix('of ')}"]
        low, high = times["interval"]
        met = "met" if verdict["goals met"][key] else "missed"
        parts.append(f"{times['median']:.3f} {key} (95 % {low:.2f}-{high:.2f}; goal {goal} {met})")
    kind = "random prompts" if verdict["random prompts"] else "held-out prompts"
    return f'{kind} at temperature {verdict["temperature"]:g}: best is {verdict["best"]}; "auto" {", ".join(parts)}'
