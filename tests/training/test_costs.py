"""The table of docs/howto/train.md is the arithmetic that the page states."""

from __future__ import annotations

import torch

from mtp_spec.model.config import ModuleShape, load_config
from mtp_spec.model.transformer import MTPModule, Transformer
from places import CONFIGS, ROOT

MODELS = {
    "V2-Lite": "config_16B.json", "Moonlight": "Moonlight-16B-A3B.json", "GLM-4.7-Flash": "GLM-4.7-Flash.json",
    "V3": "config_671B.json",
}  # fmt: skip
DEPTHS = 5


def rows() -> list[str]:
    found = []
    for name, file in MODELS.items():
        config = load_config(CONFIGS / file)
        share = config.num_experts_per_tok / config.n_routed_experts

        def active(slots: dict[str, torch.Tensor], share: float = share) -> float:
            return sum(slot.numel() * (share if ".experts." in key else 1) for key, slot in slots.items())

        slots = Transformer(config, torch.bfloat16, "meta").checkpoint_slots()
        beyond = [f"model.layers.{config.num_hidden_layers}.", "model.embed_tokens."]
        model = active({key: slot for key, slot in slots.items() if not key.startswith(tuple(beyond))})
        head = config.vocab_size * config.hidden_size
        for block, width in (("dense", config.intermediate_size), ("moe", None)):
            own = MTPModule(config, ModuleShape(intermediate_size=width), torch.float32, "meta").checkpoint_slots("x")
            count = sum(slot.numel() for slot in own.values())
            work = 2 * model + 2 * head + DEPTHS * (6 * active(own) + 4 * head)
            found.append(
                f"| {name} | {block} | {count / 1e6:,.0f} M | {16 * count / 1e9:.1f} GB | {2 * count / 1e9:.2f} GB | "
                f"{2 * config.hidden_size / 1e3:.1f} GB | {work / 1e9:.0f} GFLOP |"
            )
    return found


def test_the_table_of_costs() -> None:
    text = (ROOT / "docs" / "howto" / "train.md").read_text()
    table = text.split("<!-- costs -->\n")[1].splitlines()
    assert table[2:] == rows()
