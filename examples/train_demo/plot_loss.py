"""Draws the demonstration model's loss curves from its training logs.

`python examples/train_demo/plot_loss.py configs/demo`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main() -> None:
    folder = Path(sys.argv[1])
    first, second = (json.loads((folder / f"{run}.json").read_text()) for run in ("main", "mtp"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    steps = [e for e in first if "loss" in e and e["step"] >= 200]
    left.plot([e["step"] for e in steps], [e["loss"] for e in steps], label="main, training (dropout)")
    left.plot([e["step"] for e in steps], [e["mtp"] for e in steps], label="MTP depth 1, training")
    checks = [e for e in first if "val_loss" in e]
    for entry in checks:
        entry.setdefault("step", steps[-1]["step"])
    left.plot([e["step"] for e in checks], [e["val_loss"] for e in checks], "ko--", label="main, held-out answers")
    left.set(title="Run 1: model and MTP module", xlabel="step of 65,536 tokens", ylabel="loss a token")
    steps = [e for e in second if "mtp_step" in e and "greedy" in e]
    for depth in (1, 3, 5):
        share = [e["greedy"][depth - 1] for e in steps]
        right.plot([e["mtp_step"] for e in steps], share, label=f"depth {depth}")
    right.set(title="MTP module anew, on its own output", xlabel="step", ylabel="drafts equal to the likeliest token")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=80)


if __name__ == "__main__":
    main()
