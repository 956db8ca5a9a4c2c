"""The table of docs/howto/train.md is the arithmetic that the page states; a plan holds for other batches."""

from __future__ import annotations

import pytest
import torch

from device_models import SIZES
from mtp_spec.model.config import ModelConfig, ModuleShape, load_config
from mtp_spec.model.rope import rope_table
from mtp_spec.model.training import ModulesForward
from mtp_spec.model.transformer import MTPModule, Transformer
from mtp_spec.training.loop import autocast
from mtp_spec.training.modules import new_modules
from mtp_spec.training.objective import Objective, draft_loss
from mtp_spec.training.plan import saved_bytes
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


@pytest.mark.parametrize("width", [None, 2048])
def test_a_step_keeps_what_was_planned(width: int | None) -> None:
    """Weights that are copied in 16 bits count once, however many tokens a batch has."""
    config = ModelConfig(**SIZES)
    modules = new_modules(config, width, 1, 0, "cpu")
    table, head = rope_table(config, 700), torch.randn(config.vocab_size, config.hidden_size).bfloat16()
    forward = ModulesForward(list(modules), head, head, lambda length: table)
    loss = Objective.of("kl,tv", 3, 0.8)
    planned, counted = saved_bytes(forward, loss, (2, 303)), dict[int, int]()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        counted[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(2, 303, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast(forward):
        outcome = draft_loss(forward, loss, ids, torch.zeros(2, 303, config.hidden_size), torch.ones(2, 303))
    weights = {p.untyped_storage().data_ptr() for p in (*modules.parameters(), head)}
    held = sum(size for place, size in counted.items() if place not in weights)
    assert planned == pytest.approx(held, rel=0.03)
    assert outcome.loss.isfinite()
