"""Texts on ranks: plain and with replayed drafts, and the time to the first token of long prompts.

A token's time is that of a text of many tokens less that of one token, medians: the prompt is in both, and cached.
Steps of a slice are extended by the missing layers' time (`measured`), first tokens by the number of layers: a dense
layer of V3 has as much arithmetic as a MoE layer.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, TypeVar

import torch

import mtp_spec
from mtp_spec.api import LM
from mtp_spec.backends import open_backend
from mtp_spec.bench.common import Row
from mtp_spec.bench.passes import chain_tokens
from mtp_spec.bench.turns import WARM_TOKENS, Written, ours
from mtp_spec.bench.whole.measured import EXTRAPOLATED, MEASURED
from mtp_spec.drafting import Replay
from mtp_spec.kernels.mla import EXPANDED_ROWS
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.speculation import Speculation
from mtp_spec.tree import MODULES

PLAIN = "plain"
SPARE = 256  # slots for what is generated
TEXTS, PROMPTS = 3, 2  # that are timed
FORMS = {"absorbed": 0, "expanded": EXPANDED_ROWS}
T = TypeVar("T")
Layer = Callable[[int], float]  # rows -> milliseconds of the layers that are missing


def with_lm(model: DeviceModel, context: int, work: Callable[[LM], T]) -> T:
    """Returns the result of work with room for a text, whose caches are freed before those of the next are made."""
    lm = LM(open_backend(model, None, context + SPARE), None, context + SPARE)
    try:
        return work(lm)
    finally:
        lm.close()
        del lm
        gc.collect()


def texts(
    lm: LM, context: int, tokens: int, depths: Sequence[int], law: Sequence[float], missing: Layer, kind: str
) -> list[Row]:
    """Times texts of `tokens` tokens after a prompt of `context`, plain and with chains whose drafts are replayed.

    Args:
        law: probability that a draft of depth 1, 2, ... is right if those before it are.
        missing: milliseconds that the layers that are not here would take in a pass of so many rows.
        kind: "measured", or "extrapolated" for a slice.

    Raises:
        MTPSpecError: a chain changed the text.
    """
    prompt = random_prompt(lm, context, 0)
    options: dict[str, Any] = {"temperature": 0.8, "seed": 0, "ignore_eos": True}

    def timed(way: Callable[[list[int], dict[str, Any]], Written]) -> tuple[Written, float]:
        """Returns a text, and the seconds of all its tokens but the first."""
        way(prompt, {**options, "max_new_tokens": WARM_TOKENS})
        short = median(way(prompt, {**options, "max_new_tokens": 1}).seconds for _ in range(TEXTS))
        whole = [way(prompt, {**options, "max_new_tokens": tokens}) for _ in range(TEXTS)]
        return whole[0], median(text.seconds for text in whole) - short

    rows = list[Row]()
    plain, seconds = timed(ours(lm, None))
    rows.append(_row(context, PLAIN, 1, plain, seconds, missing(1), None, kind))
    for depth in depths:
        drafts = Speculation(depth=depth, drafters=(MODULES, Replay(plain.ids, law)))
        text, seconds = timed(ours(lm, drafts))
        if text.ids != plain.ids:
            raise mtp_spec.MTPSpecError(f"a chain of {depth} changed the text after {context} tokens")
        name = f"chain {depth}, replay"
        rows.append(_row(context, name, depth + 1, text, seconds, missing(depth + 1), rows[0]["tokens/s"], kind,
                         chain_tokens(law, depth)))  # fmt: skip
    return rows


def _row(
    context: int, way: str, passed: int, text: Written, seconds: float, missing: float, plain: float | None, kind: str,
    expected: float = 1.0,
) -> Row:  # fmt: skip
    """Returns a line.

    Args:
        plain: plain decoding's tokens a second.
        expected: tokens of a step that the law promises; a short text has more or fewer.
    """
    steps = max(1, text.stats.steps)
    per_step = (len(text.ids) - 1) / steps
    ms = 1e3 * seconds / steps + missing
    rates = " ".join(f"{rate:.2f}" for rate in text.stats.accepted_per_depth["conditional"])
    pace = 1e3 * per_step / ms
    return {
        "context": context,
        "way": way,
        "rows": passed,
        "accepted by depth": rates or "-",
        "tokens/step": per_step,
        "ms/step": ms,
        "tokens/s": pace,
        "tokens/s by the law": 1e3 * expected / ms,
        "times plain": pace / (plain or pace),
        "time": kind,
    }


def first_tokens(
    model: DeviceModel, context: int, forms: Sequence[str], whole: int, settle: Callable[[], None]
) -> list[Row]:
    """Times the first token of new prompts of `context` tokens, drafting on; rank 0's time.

    Args:
        forms: of attention over the prompt, some of `FORMS`.
        whole: number of layers of the whole model.
        settle: waits for the device.
    """
    rows, held = list[Row](), len(model.layers)

    def seconds_of(lm: LM) -> float:
        taken = []
        for number in range(PROMPTS + 1):  # the first compiles
            settle()
            options = {"max_new_tokens": 1, "temperature": 0.8, "seed": 1, "ignore_eos": True}
            taken.append(ours(lm, 1)(random_prompt(lm, context, 1 + number), options).seconds)
        return median(taken[1:])

    for form in forms:
        model.expanded = FORMS[form]
        # the module is a layer too
        seconds = with_lm(model, context, seconds_of) * (whole + 1) / (held + 1)
        rows.append(
            {
                "tokens": context,
                "form": form,
                "first token ms": 1e3 * seconds,
                "tokens/s": context / seconds,
                "time": MEASURED if whole == held else EXTRAPOLATED,
            }
        )
    model.expanded = 0
    return rows


def random_prompt(lm: LM, tokens: int, number: int) -> list[int]:
    """Returns the same random tokens on every rank."""
    generator = torch.Generator().manual_seed(1000 * tokens + number)
    return torch.randint(lm.config.vocab_size, (tokens,), generator=generator).tolist()
