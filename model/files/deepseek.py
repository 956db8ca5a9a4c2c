"""DeepSeek's per-rank files: tensor names, and which axis of a tensor is divided among ranks.

A folder made for N ranks holds `model{rank}-mp{N}.safetensors`, with the names and shares of DeepSeek-V3's
`inference/convert.py`: routed experts go whole to one rank, vocabulary, heads and inner widths are divided, the rest
is repeated. That program drops the multi-token-prediction layers, and its `generate.py` refuses unknown names, so here
they are in separate files, `mtp{rank}-mp{N}.safetensors`, under `layers.{num_hidden_layers + d}.` by the same rules:
`enorm`, `hnorm`, `eh_proj` and `shared_head.norm` repeated, `embed` and `shared_head.head` divided by vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mtp_spec.model.errors import CheckpointError

# last component but one of a name: Hugging Face's -> (DeepSeek's, axis that is divided)
KEYS: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1),
    "up_proj": ("w3", 0),
    "norm": ("norm", None),
    "lm_head": ("head", 0),
    "head": ("head", 0),
    "enorm": ("enorm", None),
    "hnorm": ("hnorm", None),
    "eh_proj": ("eh_proj", None),
}
HF_KEYS = {name: key for key, (name, _) in KEYS.items() if key != "lm_head"}
MODULES = {"self_attn": "attn", "mlp": "ffn"}
LEAVES = {"weight_scale_inv": "scale", "e_score_correction_bias": "bias"}
FILE = re.compile(r"(model|mtp)(\d+)-mp(\d+)\.safetensors")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a Hugging Face checkpoint goes.

    Attributes:
        name: DeepSeek's name.
        axis: the axis that is divided among ranks, or None.
        expert: number of its routed expert, which goes whole to one rank, or None.
        layer: number of its layer, -1 outside layers.
    """

    name: str
    axis: int | None
    expert: int | None
    layer: int

    def file(self, rank: int, ranks: int, layers: int) -> str:
        """Returns the rank's file for this tensor, in a model of `layers` layers without the MTP modules."""
        return f"{'mtp' if self.layer >= layers else 'model'}{rank}-mp{ranks}.safetensors"


def place(name: str) -> Place:
    """Returns where a tensor goes.

    Raises:
        CheckpointError: DeepSeek's format has no name for it.
    """
    parts = name.removeprefix("model.").split(".")
    if len(parts) < 2 or parts[-2] not in KEYS:
        raise CheckpointError(f"{name} has no name in DeepSeek's format: only DeepSeek V2 and V3 models have")
    parts[-2], axis = KEYS[parts[-2]]
    parts = [MODULES.get(part, part) for part in parts[:-1]] + [LEAVES.get(parts[-1], parts[-1])]
    expert = int(parts[-3]) if "experts" in parts else None
    return Place(".".join(parts), None if expert is not None else axis, expert, layer_of(name))


def hf_name(name: str) -> str:
    """Returns the Hugging Face name of one of DeepSeek's.

    Raises:
        CheckpointError: no such name.
    """
    parts = name.split(".")
    if len(parts) < 2 or parts[-2] not in HF_KEYS:
        raise CheckpointError(f"{name} is no name of DeepSeek's format")
    if parts[:-1] == ["head"]:
        return f"lm_head.{parts[-1]}"
    parts[-2] = HF_KEYS[parts[-2]]
    modules, leaves = ({ours: theirs for theirs, ours in table.items()} for table in (MODULES, LEAVES))
    return ".".join(["model", *(modules.get(part, part) for part in parts[:-1]), leaves.get(parts[-1], parts[-1])])


def layer_of(name: str) -> int:
    """Returns the layer in a tensor's name, -1 if there is none."""
    match = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
    return int(match.group(1)) if match else -1


def rank_files(folder: Path) -> list[list[Path]]:
    """Returns a folder's per-rank files by rank, or an empty list if it holds none.

    Raises:
        CheckpointError: a rank's file is missing, or there are files for different numbers of ranks.
    """
    found = {file.name: match for file in folder.glob("*-mp*.safetensors") if (match := FILE.fullmatch(file.name))}
    if not found:
        return []
    numbers = sorted({int(match.group(3)) for match in found.values()})
    if len(numbers) > 1:
        listed = " and ".join(str(number) for number in numbers)
        raise CheckpointError(f"{folder} holds files for {listed} ranks: keep one set in a folder")
    ranks, kinds = numbers[0], sorted({match.group(1) for match in found.values()} | {"model"})
    files = [[folder / f"{kind}{rank}-mp{ranks}.safetensors" for kind in kinds] for rank in range(ranks)]
    missing = [file.name for group in files for file in group if file.name not in found]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}: copy them, or convert again")
    return files
