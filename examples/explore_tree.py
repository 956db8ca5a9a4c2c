"""What was drafted, what both models thought of it, what was accepted: `python examples/explore_tree.py`."""

from __future__ import annotations

from rich.console import Console

import mtp_spec

lm = mtp_spec.load()
chat = [{"role": "user", "content": "Tell me a story about a fox"}]
tree = mtp_spec.Speculation(branching=(3, 2, 1))
explanation = lm.explain(chat, steps=3, seed=3, temperature=0.8, speculation=tree)
Console(width=100).print(explanation)  # rich draws each step as a tree

for number, step in enumerate(explanation.steps, start=1):
    path = [node.text for node in step.nodes if node.accepted]
    print(f"step {number} committed {''.join([*path, step.bonus])!r}: {len(path)} drafts and the target's own token")
    first = [node for node in step.nodes if node.depth == 1]
    best = max(first, key=lambda node: node.draft)
    if not best.accepted:
        print(f"  the draft's favourite was {best.text!r} ({best.draft:.0%}); the target gave it {best.target:.0%}")
