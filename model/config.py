"""The model's shape, read from any of three JSON dialects that describe DeepSeek models.

Field names are those of the Hugging Face `config.json`. An unknown architecture or an impossible value is refused
here, by name, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.dialects import DENSE, SPARSE, SUPPORTED, translated
from mtp_spec.model.files.formats import POWERS, block_scales, side_format
from mtp_spec.model.files.json_object import read_object

SCORING = ("sigmoid", "softmax")
TOPK_METHODS = ("noaux_tc", "group_limited_greedy", "greedy")
# Several times the largest model's, so that typing errors are told early: experts of all layers; a size, with which the
# bytes of every matrix still fit in 63 bits; any other number, of which torch takes integers of 63 bits
MOST_EXPERTS, MOST_SIZE, MOST = 2**18, 2**20, 1e18
# fields that describe what the files hold, not what a configuration says
FOUND = ("fp8_block", "scale_fmt", "modules")


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """Parameters of YaRN context extension (2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            _require_number(f"rope scaling's {name}", getattr(self, name), 0)
        for name in ("mscale", "mscale_all_dim", "attention_factor"):
            if name != "attention_factor" or self.attention_factor is not None:
                _require_number(f"rope scaling's {name}", getattr(self, name), -MOST)
        _require(isinstance(self.truncate, bool), "rope scaling's truncate", self.truncate, "true or false")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleShape:
    """Structure of an MTP module, found from its tensors.

    Attributes:
        intermediate_size: of a dense block; None if the block has experts.
        own_embedding: whether the module has an embedding that differs from the model's.
        own_head: whether it has a head that differs from the model's.
    """

    intermediate_size: int | None = None
    own_embedding: bool = False
    own_head: bool = False

    def __str__(self) -> str:
        block = "experts" if self.intermediate_size is None else f"a dense block of {self.intermediate_size}"
        own = [name for name, has in (("embedding", self.own_embedding), ("head", self.own_head)) if has]
        return block + (f", its own {' and '.join(own)}" if own else "")


SHARED = ModuleShape()  # DeepSeek's


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a DeepSeek-V2 or V3 model; see the Hugging Face documentation of `config.json` for each field.

    `q_lora_rank` None means queries are projected directly (V2-Lite). `fp8_block` is the block of FP8 weight scales,
    `scale_fmt` "ue8m0" where these, and activations', are powers of two. `modules` are the MTP modules that are not
    like DeepSeek's; see `module`.
    """

    model_type: str = "deepseek_v3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    n_shared_experts: int = 0
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    first_k_dense_replace: int = 0
    num_nextn_predict_layers: int = 0
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: YarnConfig | None = None
    rope_interleave: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    fp8_block: tuple[int, int] | None = None
    scale_fmt: str | None = None
    modules: tuple[ModuleShape, ...] = ()

    def module(self, number: int) -> ModuleShape:
        """Returns the structure of an MTP module."""
        return self.modules[number] if number < len(self.modules) else SHARED

    def head_of(self, module: int) -> int | None:
        """Returns the module whose own head gives a module's logits; None means the model's head."""
        return module if self.module(module).own_head else None

    @property
    def is_v2(self) -> bool:
        """Whether the model is a V2, whose gate never normalises."""
        return self.model_type == "deepseek_v2"

    @property
    def powers_of_two(self) -> bool:
        """Whether activations are quantised with scales that are powers of two."""
        return self.scale_fmt == POWERS

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def has_gate_bias(self) -> bool:
        return self.topk_method == "noaux_tc"

    def __post_init__(self) -> None:
        positive = (
            "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
            "num_attention_heads", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank", "qk_nope_head_dim",
            "qk_rope_head_dim", "v_head_dim", "n_group", "topk_group", "max_position_embeddings",
        )  # fmt: skip
        counts = ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")
        for name in (*positive, *counts):
            low = 0 if name in counts else 1
            _require(self._is_int(name, low), name, getattr(self, name), f"an integer of at least {low}")
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        likely = layers * self.n_routed_experts <= MOST_EXPERTS
        most = f"layers and experts of at most {MOST_EXPERTS:,} in all"
        _require(likely, "num_hidden_layers", self.num_hidden_layers, most)
        rank = self.q_lora_rank
        _require(rank is None or self._is_int("q_lora_rank", 1), "q_lora_rank", rank, "null or at least 1")
        for name in (*positive, *counts, "q_lora_rank"):
            likely = name == "max_position_embeddings" or (getattr(self, name) or 0) <= MOST_SIZE
            _require(likely, name, getattr(self, name), f"at most {MOST_SIZE:,}")
        _require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", self.qk_rope_head_dim, "even")
        _require(self.scoring_func in SCORING, "scoring_func", self.scoring_func, f"one of {SCORING}")
        _require(self.topk_method in TOPK_METHODS, "topk_method", self.topk_method, f"one of {TOPK_METHODS}")
        grouped = self.n_routed_experts % self.n_group == 0
        _require(grouped, "n_group", self.n_group, f"a divisor of n_routed_experts = {self.n_routed_experts}")
        _require(self.topk_group <= self.n_group, "topk_group", self.topk_group, f"at most n_group = {self.n_group}")
        pool = self.n_routed_experts // self.n_group * self.topk_group
        if self.topk_method == "greedy":
            pool = self.n_routed_experts
        _require(self.num_experts_per_tok <= pool, "num_experts_per_tok", self.num_experts_per_tok, f"at most {pool}")
        for name in ("rms_norm_eps", "rope_theta", "routed_scaling_factor"):
            _require_number(name, getattr(self, name), 0)
        turning = self.rope_scaling is None or self.rope_theta > 1
        _require(turning, "rope_theta", self.rope_theta, "above 1 for yarn")
        for name in ("norm_topk_prob", "rope_interleave", "tie_word_embeddings"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        ends = self.eos_token_ids
        _require(all(type(end) is int for end in ends), "eos_token_id", list(ends), "an id or a list of ids")
        block = self.fp8_block
        fits = block is None or (len(block) == 2 and all(type(size) is int and size > 0 for size in block))
        _require(fits, "weight_block_size", block, "two integers of at least 1")

    def _is_int(self, name: str, low: int) -> bool:
        value = getattr(self, name)
        return isinstance(value, int) and not isinstance(value, bool) and value >= low

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> ModelConfig:
        """Returns the shape described by a `config.json` (DeepSeek's or transformers' keys) or DeepSeek's own JSON.

        Raises:
            CheckpointError: another architecture, a missing key, or a value outside its range.
        """
        values = translated(given)
        known = {name: value for name, value in values.items() if name in FIELDS and value is not None}
        known["rope_scaling"] = None if values["rope_scaling"] is None else YarnConfig(**values["rope_scaling"])
        known["fp8_block"], known["scale_fmt"] = block_scales(values)
        dense = {DENSE: ModuleShape(intermediate_size=known.get("intermediate_size")), SPARSE: SHARED}
        known["modules"] = tuple(dense[kind] for kind in values.get("mtp_mlp_layer_types") or () if kind in dense)
        missing = sorted(REQUIRED - known.keys())
        if missing:
            raise CheckpointError(f"config.json lacks {', '.join(missing)}: it does not describe a whole model")
        return cls(**known)

    def to_hf_dict(self) -> dict[str, Any]:
        """Returns a `config.json` in DeepSeek's dialect."""
        out: dict[str, Any] = {"architectures": [SUPPORTED[self.model_type]]}
        for field in fields(self):
            out[field.name] = getattr(self, field.name)
        eos = out.pop("eos_token_ids")
        out["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos) or None
        block, scale_fmt = out.pop("fp8_block"), out.pop("scale_fmt")
        del out["modules"]
        if self.model_type == "glm4_moe_lite":
            dense = self.first_k_dense_replace
            out["mlp_layer_types"] = [DENSE] * dense + [SPARSE] * (self.num_hidden_layers - dense)
        if block is not None:
            out["quantization_config"] = {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": list(block),
                **({"scale_fmt": scale_fmt} if scale_fmt else {}),
            }
        yarn = out.pop("rope_scaling")
        if yarn is not None:
            scaling = {field.name: getattr(yarn, field.name) for field in fields(yarn)}
            out["rope_scaling"] = {"type": "yarn", **{k: v for k, v in scaling.items() if v is not None}}
        out["hidden_act"] = "silu"
        return out


def load_config(path: Path) -> ModelConfig:
    """Returns the config in a folder's `config.json`, or in a JSON file.

    Raises:
        CheckpointError: the file is missing, is not JSON, or describes something else.
    """
    return config_of(*read_config(path))


def read_config(path: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the JSON file's path and contents; arguments and errors as `load_config`.

    A weight format described in a separate file is added as `quantization_config`.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist: give the folder of a DeepSeek-V2/V3 checkpoint")
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise CheckpointError(f"{path} has no config.json: download the checkpoint's whole folder")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be looked into ({error}): give yourself the right to read it") from error
    given = read_object(file)
    if path.is_dir() and not given.get("quantization_config"):
        beside = side_format(path)
        given |= {} if beside is None else {"quantization_config": beside}
    return file, given


def config_of(file: Path, given: Mapping[str, Any]) -> ModelConfig:
    """Returns the config that `read_config` found, with the file's name in errors."""
    try:
        return ModelConfig.from_dict(given)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{file}: a value has the wrong kind ({error})") from error


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise CheckpointError(f"{name} is {value!r}, it must be {allowed}")


def _require_number(name: str, value: object, above: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and above < value < MOST
    _require(number, name, value, f"a number above {above:g} and below {MOST:g}")


FIELDS = frozenset(field.name for field in fields(ModelConfig)) - set(FOUND)
REQUIRED = frozenset(field.name for field in fields(ModelConfig) if field.default is MISSING)
