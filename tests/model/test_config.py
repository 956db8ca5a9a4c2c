"""DeepSeek's own configuration files describe the models that they are named after."""

from __future__ import annotations

import pytest
import torch

from mtp_spec.model.config import load_config
from mtp_spec.model.transformer import Transformer
from places import CONFIGS


# parameters without MTP modules, in billions, as the papers state them (2405.04434, 2412.19437)
@pytest.mark.parametrize(("name", "billions"), [("16B", 15.7), ("236B", 236), ("671B", 671)])
def test_parameter_counts(name: str, billions: float) -> None:
    model = Transformer(load_config(CONFIGS / f"config_{name}.json"), torch.bfloat16, "meta")
    count = sum(slot.numel() for slot in model.checkpoint_slots().values())
    assert count / 1e9 == pytest.approx(billions, rel=0.005)


def test_active_parameters_of_the_largest() -> None:
    config = load_config(CONFIGS / "config_671B.json")
    slots = Transformer(config, torch.bfloat16, "meta").checkpoint_slots()
    routed = sum(slot.numel() for name, slot in slots.items() if ".mlp.experts." in name)
    rest = sum(slot.numel() for slot in slots.values()) - routed - slots["model.embed_tokens.weight"].numel()
    active = rest + routed * config.num_experts_per_tok / config.n_routed_experts
    assert active / 1e9 == pytest.approx(37, rel=0.02)
