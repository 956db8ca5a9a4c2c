"""What a generation counts, and how to read it: `python examples/read_statistics.py`."""

from __future__ import annotations

import mtp_spec

lm = mtp_spec.load()
chat = [{"role": "user", "content": "Explain how rain forms"}]
tree = mtp_spec.Speculation(branching=(2, 2, 1))
stats = lm.chat(chat, speculation=tree, max_new_tokens=100, seed=0).stats

print(f"{stats.new_tokens} tokens: 1 from the prefill, {stats.step_tokens} from {stats.steps} verify steps")
print(f"{stats.tokens_per_step:.2f} tokens per step; plain decoding has 1")
print(f"{stats.drafted} drafts proposed, {stats.accepted} accepted; a tree's siblings exclude one another")

rates = stats.accepted_per_depth
for depth, (given, whole) in enumerate(zip(rates["conditional"], rates["unconditional"], strict=True), start=1):
    print(f"depth {depth}: accepted {given:.0%} where the depth before was, {whole:.0%} of the steps that drafted it")
for rank, count in sorted(stats.accepted_by_rank.items()):
    print(f"sibling {rank + 1}: {count} accepted")
for accepted, steps in sorted(stats.histogram.items()):
    print(f"{accepted} accepted {'#' * steps} {steps}")

seconds = stats.seconds
for phase in ("prefill", "draft", "verify", "sample", "other"):
    print(f"{phase:8}{seconds[phase]:7.3f} s {seconds[phase] / seconds['total']:5.0%}")
print(f"{stats.tokens_per_second:.0f} tokens per second")

# sums over several texts, and the same numbers as JSON
both = stats.merge(lm.chat(chat, speculation=tree, max_new_tokens=100, seed=1).stats)
assert both.to_json()["steps"] == both.steps > stats.steps
