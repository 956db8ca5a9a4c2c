"""Published checkpoints as their configurations describe them, and the table of docs/howto/checkpoints.md.

`python tests/support/published.py` writes the table. Values are those of landscape notes: of some configurations not
every number was seen, which the table says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mtp_spec.cli.estimate import estimate
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.formats import stored_format

ROOT = Path(__file__).parents[2]
PAGE, BEGIN, END = ROOT / "docs" / "howto" / "checkpoints.md", "<!-- published -->", "<!-- /published -->"
INT4 = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|down)_proj.*"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}},
}  # fmt: skip
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


@dataclass(frozen=True)
class Published:
    """A checkpoint.

    Attributes:
        name: as published.  source: a file of configs/, or a type of transformers whose defaults are its shape.
        changes: keys that differ from those.
        seen: how far its configuration is known.
        modules: its MTP modules, in words.
    """

    name: str
    source: str
    changes: dict[str, Any] = field(default_factory=dict)
    seen: str = "known"
    modules: str = "none"

    def given(self) -> dict[str, Any]:
        """Returns its config.json."""
        file = ROOT / "configs" / f"{self.source}.json"
        whole = json.loads(file.read_text()) if file.exists() else AutoConfig.for_model(self.source).to_dict()
        return {**whole, **self.changes}


V3: dict[str, Any] = {"changes": {"num_nextn_predict_layers": 1}, "modules": "1, experts"}
JOYAI_INT4 = json.loads(json.dumps(INT4).replace('"group_size": 32', '"group_size": 64'))
CHECKPOINTS = (
    Published("DeepSeek-V2-Lite, Coder-V2-Lite", "config_16B"),
    Published("DeepSeek-V2, Coder-V2", "config_236B"),
    Published("DeepSeek-V3, V3-0324, R1, R1-0528, Prover-V2", "config_671B", **V3),
    Published("DeepSeek-V3.1, V3.1-Terminus", "config_v3.1", **V3),
    Published("GLM-4.7-Flash", "GLM-4.7-Flash", seen="five sources agree",
              modules="1, experts, copies of embedding and head"),
    Published("GLM-4.7-Flash, NVFP4", "GLM-4.7-Flash",
              {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}},
              "five sources agree", "1, experts"),
    Published("GLM-4.7-Flash, AWQ", "GLM-4.7-Flash",
              {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
              "five sources agree", "dropped by some quantisers"),
    Published("GigaChat3-10B-A1.8B, GigaChat3.1-10B-A1.8B", "GigaChat3-10B-A1.8B",
              seen="26 layers and direct queries from code; the rest unverified, the sum fits", modules="1, experts"),
    Published("JoyAI-LLM-Flash", "JoyAI-LLM-Flash", seen="shapes from two programs; rope unverified",
              modules="1, dense, in mtp-1-of-1.safetensors"),
    Published("JoyAI-LLM-Flash-FP8", "JoyAI-LLM-Flash", {"quantization_config": FP8},
              "shapes from two programs; rope unverified", "1, dense, in mtp-1-of-1.safetensors"),
    Published("JoyAI-LLM-Flash, INT4", "JoyAI-LLM-Flash", {"quantization_config": JOYAI_INT4},
              "INT4 in groups of 64; which matrices, unverified", "1, dense"),
    Published("Moonlight-16B-A3B", "Moonlight-16B-A3B", seen="unverified; parts from training scripts"),
    Published("Kanana-2-30B-A3B (2601; base, instruct, thinking)", "Kanana-2-30B-A3B",
              seen="layers, vocabulary, direct queries; the rest unverified", modules="none found"),
    Published("Kimi-K2-Instruct, -0905", "Kimi-K2", seen="unverified; parts from a report on the folder"),
    Published("Kimi-K2-Thinking", "Kimi-K2", {"quantization_config": INT4}, "unverified"),
    Published("Kimi-K2.5, K2.6, K2.7", "kimi_k25", seen="transformers' class"),
    Published("sarvam-105b", "sarvam-105b", seen="transformers' defaults; YaRN and context unverified"),
    Published("DeepSeek-V3.2, V3.2-Exp", "deepseek_v32", seen="transformers' class", modules="1, with an indexer"),
    Published("GLM-5, 5.1, 5.2, 5.3", "glm_moe_dsa", seen="transformers' class", modules="1, with an indexer"),
    Published("Mistral-Small-4-119B, Leanstral", "mistral4", seen="transformers' class"),
    Published("A.X-K1", "axk1", seen="transformers' class"),
    Published("A.X-K2", "axk2", seen="transformers' class", modules="1"),
    Published("DeepSeek-V4-Flash, V4-Pro", "deepseek_v4", seen="transformers' class", modules="1, or another drafter"),
    Published("LongCat-Flash", "longcat_flash", seen="transformers' class", modules="dense, own names"),
    Published("Kimi-Linear", "kimi_linear", seen="transformers' class"),
    Published("Youtu-LLM-2B", "youtu", seen="transformers' class"),
    Published("Instella-MoE-16B-A3B", "Moonlight-16B-A3B", {"model_type": "instella_moe"}, "from its engine's code"),
)  # fmt: skip


def outcome(checkpoint: Published) -> tuple[str, str]:
    """Returns "accepted" or "refused" and why, as `load` and `inspect` decide."""
    given = checkpoint.given()
    try:
        config = ModelConfig.from_dict(given)
    except CheckpointError as error:
        return "refused", _reason(str(error))
    stored = stored_format(given)
    size = estimate(config, stored=stored).whole / 1e9
    if stored is not None and stored.block is None:
        return "refused", f'{stored.name}: take the bfloat16 folder and `weights="fp8"`; {size:,.0f} GB'
    if config.fp8_block is not None:
        scales = ", scales powers of two" if config.powers_of_two else ""
        return "accepted", f"FP8{scales}; {size:,.0f} GB"
    half = estimate(replace(config, fp8_block=(128, 128))).whole / 1e9
    return "accepted", f'bfloat16; {size:,.0f} GB, {half:,.0f} with `weights="fp8"`'


def _reason(message: str) -> str:
    """Returns what a refusal asks for, without what every refusal says."""
    needs = message.partition("as it is described: ")[2].partition(". Use transformers")[0]
    wanted = [need.partition(" asks for ")[2] for need in needs.split("; ") if " asks for " in need]
    return wanted[0] if wanted else message.partition(":")[0]


def table() -> str:
    """Returns the table in Markdown."""
    heads = ("checkpoint", "", "stored, or what it would need", "MTP modules", "its configuration: how far seen")
    lines = [f"| {' | '.join(heads)} |", "| --- | --- | --- | --- | --- |"]
    for one in CHECKPOINTS:
        decided, why = outcome(one)
        lines.append(f"| {one.name} | {decided} | {why} | {one.modules} | {one.seen} |")
    return "\n".join(lines)


def page() -> str:
    """Returns the page with the table in its place."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
