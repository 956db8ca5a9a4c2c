"""The demo's DeepSeek-V3 network for training: dense experts, packed documents, fp32 master weights.

Self-contained (torch only). It computes what `model/` computes at inference, arranged for a GPU that trains:
all experts run on all tokens and unselected ones get weight zero, so the MoE block is three matrix products.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, by the names of DeepSeek's config.json."""

    vocab_size: int = 8192
    hidden_size: int = 384
    intermediate_size: int = 1024
    moe_intermediate_size: int = 256
    num_hidden_layers: int = 10
    first_k_dense_replace: int = 1
    num_attention_heads: int = 8
    q_lora_rank: int = 256
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 64
    v_head_dim: int = 64
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 1.5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048

    def to_config(self, bos: int, eos: int) -> dict[str, object]:
        """config.json in DeepSeek's dialect."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **asdict(self),
            "num_key_value_heads": self.num_attention_heads,
            "num_nextn_predict_layers": 1,
            "moe_layer_freq": 1,
            "ep_size": 1,
            "norm_topk_prob": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "use_cache": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": bos,
            "eos_token_id": eos,
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
            },
        }


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.weight * y).to(x.dtype)


def linear(n_in: int, n_out: int) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=0.5 * n_in**-0.5)
    return layer


def rotate(x: Tensor, pos: Tensor, theta: float) -> Tensor:
    """Interleaved RoPE on x [B, T, H, d] at pos [B, T]."""
    half = x.shape[-1] // 2
    freq = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = pos[..., None].float() * freq
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Tensor) -> Tensor:
    """q, k [B, T, H, 128], v [B, T, H, 64]; layout = document offsets (int32, 1-D) or a boolean mask (4-D)."""
    if layout.dim() == 1:
        b, t, h, d = q.shape
        dv = v.shape[-1]
        flat = [x.to(torch.bfloat16).reshape(b * t, h, d) for x in (q, k, F.pad(v, (0, d - dv)))]
        out = torch.ops.aten._flash_attention_forward(*flat, layout, layout, t, t, 0.0, True, False, scale=d**-0.5)[0]
        return out.view(b, t, h, d)[..., :dv]
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=layout).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head latent attention with query LoRA."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        heads, qk = s.num_attention_heads, s.qk_nope_head_dim + s.qk_rope_head_dim
        self.q_a_proj = linear(s.hidden_size, s.q_lora_rank)
        self.q_a_layernorm = RMSNorm(s.q_lora_rank)
        self.q_b_proj = linear(s.q_lora_rank, heads * qk)
        self.kv_a_proj_with_mqa = linear(s.hidden_size, s.kv_lora_rank + s.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(s.kv_lora_rank)
        self.kv_b_proj = linear(s.kv_lora_rank, heads * (s.qk_nope_head_dim + s.v_head_dim))
        self.o_proj = linear(heads * s.v_head_dim, s.hidden_size)

    def qkv(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, (b, t, _) = self.s, x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(b, t, s.num_attention_heads, -1)
        q_nope, q_rope = q.split([s.qk_nope_head_dim, s.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([s.kv_lora_rank, s.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(b, t, s.num_attention_heads, -1)
        k_nope, v = kv.split([s.qk_nope_head_dim, s.v_head_dim], -1)
        k_rope = rotate(k_rope[:, :, None], pos, s.rope_theta).expand(-1, -1, s.num_attention_heads, -1)
        q = torch.cat([q_nope, rotate(q_rope, pos, s.rope_theta)], -1)
        return q, torch.cat([k_nope, k_rope], -1), v

    def forward(self, x: Tensor, pos: Tensor, layout: Tensor, cache: Cache | None = None) -> Tensor:
        q, k, v = self.qkv(x, pos)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.o_proj(attend(q, k, v, layout).flatten(2))


class Cache:
    """Keys and values of one layer, preallocated."""

    def __init__(self, length: int) -> None:
        self.length, self.used = length, 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k is None or self.v is None:
            self.k = k.new_zeros(k.shape[0], self.length, *k.shape[2:])
            self.v = v.new_zeros(v.shape[0], self.length, *v.shape[2:])
        end = self.used + k.shape[1]
        self.k[:, self.used : end], self.v[:, self.used : end] = k, v
        self.used = end
        return self.k[:, :end], self.v[:, :end]


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, inner), linear(hidden, inner)
        self.down_proj = linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """All routed experts of a layer; down is stored [E, inner, hidden] (transposed when exported)."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        e, f, d = s.n_routed_experts, s.moe_intermediate_size, s.hidden_size
        self.gate_proj = nn.Parameter(torch.randn(e, f, d) * 0.5 * d**-0.5)
        self.up_proj = nn.Parameter(torch.randn(e, f, d) * 0.5 * d**-0.5)
        self.down_proj = nn.Parameter(torch.randn(e, f, d) * 0.5 * f**-0.5)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        inner = F.silu(F.linear(x, self.gate_proj.flatten(0, 1))) * F.linear(x, self.up_proj.flatten(0, 1))
        inner = inner.unflatten(-1, (weights.shape[-1], -1)) * weights[..., None].to(inner.dtype)
        return inner.flatten(-2) @ self.down_proj.flatten(0, 1).to(inner.dtype)


class Gate(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.weight = nn.Parameter(torch.randn(s.n_routed_experts, s.hidden_size) * 0.02)
        self.register_buffer("e_score_correction_bias", torch.zeros(s.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [..., E] (zero for unselected experts) and the load of each expert."""
        s = self.s
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
            with torch.no_grad():
                choice = scores + self.e_score_correction_bias
                groups = choice.unflatten(-1, (s.n_group, -1))
                top = groups.topk(2, -1).values.sum(-1).topk(s.topk_group, -1).indices
                allowed = torch.zeros_like(groups[..., 0]).scatter(-1, top, 1.0) > 0
                choice = groups.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
                picked = torch.zeros_like(scores).scatter(-1, choice.topk(s.num_experts_per_tok, -1).indices, 1.0)
            weights = scores * picked
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * s.routed_scaling_factor
        return weights, picked.flatten(0, -2).sum(0)


class MoE(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate, self.experts = Gate(s), Experts(s)
        self.shared_experts = MLP(s.hidden_size, s.moe_intermediate_size * s.n_shared_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, load = self.gate(x)
        return self.experts(x, weights) + self.shared_experts(x), load


class Block(nn.Module):
    def __init__(self, s: Shape, dense: bool, dropout: float) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(s.hidden_size), RMSNorm(s.hidden_size)
        self.self_attn = Attention(s)
        self.mlp: nn.Module = MLP(s.hidden_size, s.intermediate_size) if dense else MoE(s)
        self.dense, self.dropout = dense, dropout

    def feed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = self.post_attention_layernorm(x)
        y, load = (self.mlp(y), None) if self.dense else self.mlp(y)
        return x + F.dropout(y, self.dropout, self.training), load

    def forward(
        self, x: Tensor, pos: Tensor, layout: Tensor, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        y = self.self_attn(self.input_layernorm(x), pos, layout, cache)
        return self.feed(x + F.dropout(y, self.dropout, self.training))


class Mtp(nn.Module):
    """The MTP module; `step` runs it at any depth with the cache it will have at inference."""

    def __init__(self, s: Shape, dropout: float) -> None:
        super().__init__()
        self.enorm, self.hnorm, self.norm = (RMSNorm(s.hidden_size) for _ in range(3))
        self.eh_proj = linear(2 * s.hidden_size, s.hidden_size)
        self.block = Block(s, False, dropout)

    def enter(self, h: Tensor, embedded: Tensor) -> Tensor:
        return self.eh_proj(torch.cat([self.enorm(embedded).to(h.dtype), self.hnorm(h)], -1))

    def forward(self, h: Tensor, embedded: Tensor, pos: Tensor, layout: Tensor) -> tuple[Tensor, Tensor | None]:
        x, load = self.block(self.enter(h, embedded), pos, layout)
        return self.norm(x), load

    def step(self, h: Tensor, embedded: Tensor, pos: Tensor, mask: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        """One draft depth for every base position at once.

        Depth 1 sees the depth-1 entries up to its own (true hidden states). Depth d > 1 of base i sees the depth-1
        entries up to i, then its own chain's entries of depth 2..d: what a drafter's cache holds at inference.
        """
        x = self.enter(h, embedded)
        attn = self.block.self_attn
        q, k, v = attn.qkv(self.block.input_layernorm(x), pos)
        past.append((k, v))
        if len(past) == 1:
            out = attend(q, k, v, mask)
        else:
            scale = q.shape[-1] ** -0.5
            base = torch.einsum("bihd,bjhd->bhij", q, past[0][0]).float().mul(scale)
            base = base.masked_fill(~mask, float("-inf"))
            own = torch.stack([(q * kk).float().sum(-1).mul(scale).transpose(1, 2) for kk, _ in past[1:]], -1)
            weight = torch.cat([base, own], -1).softmax(-1).to(v.dtype)
            t = base.shape[-1]
            out = torch.einsum("bhij,bjhd->bihd", weight[..., :t], past[0][1])
            for n, (_, vv) in enumerate(past[1:]):
                out = out + weight[..., t + n].transpose(1, 2)[..., None] * vv
        return self.norm(self.block.feed(x + attn.o_proj(out.flatten(2)))[0])


class DemoModel(nn.Module):
    def __init__(self, s: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(s.vocab_size, s.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        layers = [Block(s, i < s.first_k_dense_replace, dropout) for i in range(s.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(s.hidden_size)
        self.lm_head = linear(s.hidden_size, s.vocab_size)
        self.mtp = Mtp(s, dropout)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                    p.mul_(0.3)

    def gates(self) -> list[Gate]:
        return [m for m in self.modules() if isinstance(m, Gate)]

    def forward(
        self, ids: Tensor, pos: Tensor, layout: Tensor, caches: list[Cache] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Normed hidden states and the expert loads of the MoE layers."""
        x, loads = self.embed_tokens(ids), []
        for i, layer in enumerate(self.layers):
            x, load = layer(x, pos, layout, caches[i] if caches else None)
            loads += [] if load is None else [load]
        return self.norm(x), loads

    def losses(
        self, ids: Tensor, pos: Tensor, layout: Tensor, weight1: Tensor, weight2: Tensor, mtp_weight: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Total, main and MTP loss and loads [gates, E]; weightN[b, t] weighs the token N ahead of t."""
        h, loads = self(ids, pos, layout)
        ahead = ids.roll(-1, 1)
        main = cross_entropy(self.lm_head(h), ahead, weight1)
        g, load = self.mtp(h, self.embed_tokens(ahead), pos + 1, layout)
        mtp = cross_entropy(self.lm_head(g), ids.roll(-2, 1), weight2)
        assert load is not None
        return main + mtp_weight * mtp, main.detach(), mtp.detach(), torch.stack([*loads, load])


def cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (loss * weight.flatten()).sum() / weight.sum().clamp_min(1.0)


@torch.no_grad()
def generate(
    model: DemoModel, prompts: list[list[int]], new: int, heat: Tensor, eos: int, generator: torch.Generator
) -> list[list[int]]:
    """Sample `new` tokens after each prompt (left-padded batch, keys and values cached); heat 0 = greedy."""
    device = heat.device
    b, width = len(prompts), max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    pad = torch.tensor([width - len(p) for p in prompts], device=device)
    real = torch.arange(width + new, device=device)[None] >= pad[:, None]
    caches = [Cache(width + new) for _ in model.layers]
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    mask = (causal & real[:, None, :width] | torch.eye(width, dtype=torch.bool, device=device))[:, None]
    out, pos = [], (torch.arange(width, device=device)[None] - pad[:, None]).clamp_min(0)
    for t in range(new):
        h, _ = model(ids, pos, mask, caches)
        logits = model.lm_head(h[:, -1]).float()
        noise = -torch.log(-torch.log(torch.rand(logits.shape, device=device, generator=generator) + 1e-20) + 1e-20)
        ids = (logits + heat[:, None] * noise).argmax(-1, keepdim=True)
        out.append(ids)
        pos = pos[:, -1:] + 1
        mask = real[:, None, None, : width + t + 1]
    rows = torch.cat(out, 1).tolist() if b else []
    return [p + (r[: r.index(eos) + 1] if eos in r else r) for p, r in zip(prompts, rows, strict=True)]
