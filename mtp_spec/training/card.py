"""The model card of trained modules, and the verdict on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtp_spec.training.heldout import WHOLE, Comparison, Texts


def verdict(comparisons: Sequence[Comparison], shipped: bool) -> tuple[bool, str]:
    """Returns whether the new modules may be called better, and the sentence that says so or why not.

    Args:
        comparisons: with the checkpoint's own modules, or with plain decoding if it has none.
        shipped: which of both.
    """
    what = "the checkpoint's own modules" if shipped else "plain decoding"
    lost = [one for one in comparisons if one.lost]
    if lost:
        listed = ", ".join(
            f"{one.domain} at temperature {one.temperature} ({one.before:.3f} -> {one.after:.3f})" for one in lost
        )
        return False, f"Not better than {what}: lost on {listed}."
    if silent := [f"{one.domain} at temperature {one.temperature}" for one in comparisons if not one.before]:
        listed = ", ".join(silent)
        return False, f"Nothing was measured on {listed}: these texts end with their first token. Give other prompts."
    per_temperature = {one.temperature: one for one in comparisons}  # the last of each is the whole
    unsure = [one for one in per_temperature.values() if not one.low > 1]
    if unsure:
        listed = ", ".join(f"{one.temperature} ({one.low:.3f} to {one.high:.3f} times)" for one in unsure)
        return False, f"No domain lost against {what}, but the gain is within the noise at temperature {listed}."
    return True, f"Better than {what} on every held-out domain."


def card(facts: Mapping[str, Any], after: Sequence[Texts], comparisons: Sequence[Comparison], sentence: str) -> str:
    """Returns the card, in Markdown.

    Args:
        facts: what `mtp.json` holds.
        after: how the new modules did.
        comparisons: with what there was before.
        sentence: the verdict.
    """
    options, data, trained = facts["options"], facts["data"], facts["training"]
    depth = options["depth"]
    source = " and ".join(
        ([options["texts"]] if options["texts"] else [])
        + ([f"the model's own answers to {options['prompts']}"] if options["prompts"] else [])
    )
    recipe = (
        f"{trained['steps']:,} steps of up to {trained['batch_tokens']:,} tokens, {trained['optimiser']}, learning "
        f"rate {trained['rate']:g}, from {options['start']} modules; loss {options['loss']}, depths 1 to {depth} by "
        f"the masks and caches of drafting, each weighted {options['decay']} of the one before; seed "
        f"{options['seed']}; {trained['seconds']:.0f} seconds on {trained['device']}."
    )
    lines = [
        "# MTP modules",
        f"{trained['modules']} for a model of {facts['model']['num_hidden_layers']} layers, hidden size "
        f"{facts['model']['hidden_size']}, vocabulary {facts['model']['vocab_size']:,} (`mtp.json` has a digest of its "
        "last norm). Trained with `mtp-spec train`; the model itself was not changed.",
        "",
        f"**{sentence}**",
        "",
        "```python",
        'lm = mtp_spec.load("THE MODEL", mtp="THIS FOLDER")',
        "```",
        "For vLLM, SGLang, LMDeploy and transformers: `mtp-spec export MODEL TARGET --mtp THIS_FOLDER`.",
        "",
        "## Held-out prompts",
        f"{data['checked prompts']} prompts that were not trained on, up to {options['check_tokens']} tokens each, "
        f"chains of {depth}, real caches. The interval (95 %) is of the ratio.",
        "",
        "| domain | temperature | tokens per step before | after | ratio |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {one.domain} | {one.temperature} | {one.before:.3f} | {one.after:.3f} | "
            f"{one.after / max(one.before, 1e-9):.3f} ({one.low:.3f} to {one.high:.3f}) |"
            for one in sorted(comparisons, key=lambda one: (one.temperature, one.domain == WHOLE, one.domain))
        ),
        "",
        "Drafts accepted at each depth, given that the depth before was:",
        "",
        "| domain | temperature | " + " | ".join(str(level + 1) for level in range(depth)) + " |",
        "| --- " * (depth + 2) + "|",
        *(
            f"| {one.domain} | {one.temperature} | "
            + " | ".join(f"{rate:.3f}" for rate in (*one.rates, *[0.0] * depth)[:depth])
            + " |"
            for one in after
        ),
        "",
        "## Data",
        f"{source}: {data['texts']:,} texts, {data['tokens']:,} tokens; {data['held out']:,} held out, by prompt and "
        f"domain ({', '.join(data['domains'])}); {data['left out']:,} left out because they had occurred.",
        "",
        "## Recipe",
        recipe,
    ]
    if facts["picture"]:
        lines += ["", "![loss and acceptance](loss.png)"]
    return "\n".join(lines) + "\n"
