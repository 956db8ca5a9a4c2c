"""The main model over whole texts at once, for training: its stored weights in 16 bits, multiplied by torch.

Inference takes few rows at a time, with sums in a fixed order and activations in FP8. Training asks for neither: here
every product takes all rows of many texts, attention is in its expanded form, and matrices in FP8 are widened first,
once if they are small, or else a layer at a time in each pass. Hidden states equal those of inference within the
rounding of its activations.

Legend: `B` texts, `T` tokens, `D` hidden size, `M` rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_spec.kernels.fp8 import BLOCK
from mtp_spec.model.cuda.layers import Attention, Dense, Layer, Matrix, Mixture
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.layers import MLP
from mtp_spec.model.moe import MoE
from mtp_spec.model.training import ModulesForward, normed
from mtp_spec.model.transformer import Block

KEPT = 4 * 10**9  # bytes up to which all layers are widened once


class WidenedForward:
    """Computes hidden states of whole texts.

    Args:
        model: not divided among ranks; its MTP modules are not used.
    Attributes:
        bytes: of the widened layers.
    """

    def __init__(self, model: DeviceModel) -> None:
        self.model, count = model, len(model.layers)
        whole = sum(_bytes(self._empty(number, "meta")) for number in range(count))
        self.kept = whole <= KEPT
        # without room for all, layers of a kind take turns in one place
        places = {number: number if self.kept else int(isinstance(layer.mlp, Mixture))
                  for number, layer in enumerate(model.layers)}  # fmt: skip
        blocks: dict[int, Block] = {}
        for number, place in places.items():
            if place not in blocks:
                blocks[place] = self._empty(number, model.device)
        order = list(blocks)
        self._place = {number: order.index(place) for number, place in places.items()}
        self._forward = ModulesForward([], model.embed_tokens, model.lm_head, model.table, before=list(blocks.values()))
        self.bytes = sum(map(_bytes, blocks.values()))
        if self.kept:
            for number, layer in enumerate(model.layers):
                fill(blocks[number], layer)

    def _empty(self, number: int, device: torch.device | str) -> Block:
        config = self.model.config
        dense = config.intermediate_size if number < config.first_k_dense_replace else None
        return Block(config, dense, self.model.activations, device).requires_grad_(False)

    def pass_bytes(self, rows: int) -> int:
        """Returns about how many bytes a pass of so many rows takes besides the layers."""
        config, size = self.model.config, self.model.activations.itemsize
        heads, wide = config.num_attention_heads, max(config.qk_head_dim, config.v_head_dim)
        attention = heads * (5 * wide + config.qk_nope_head_dim) * size + 12 * heads * config.qk_rope_head_dim
        first = config.intermediate_size if config.first_k_dense_replace else 0
        shared = config.n_shared_experts * config.moe_intermediate_size
        pairs = config.num_experts_per_tok * (2 * config.hidden_size + 3 * config.moe_intermediate_size)
        return rows * (4 * config.hidden_size * size + max(attention, 3 * size * first, size * (pairs + 3 * shared)))

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """Returns the normed hidden states `[B, T, D]` of texts ids `[B, T]`, padded at their ends with any tokens."""
        x = F.embedding(ids, self.model.embed_tokens)
        for number, layer in enumerate(self.model.layers):
            if not self.kept:
                fill(self._forward.blocks[self._place[number]], layer)
            x = self._forward.block(self._place[number], x, 0)
        return normed(x, self.model.norm, self.model.config.rms_norm_eps)


@torch.no_grad()
def fill(block: Block, layer: Layer) -> None:
    """Gives a block the weights of a layer, in the block's dtype."""
    block.input_layernorm.weight.copy_(layer.norms[0])
    block.post_attention_layernorm.weight.copy_(layer.norms[1])
    _fill_attention(block, layer.attention)
    if isinstance(block.mlp, MoE):
        assert isinstance(layer.mlp, Mixture)
        _fill_mixture(block.mlp, layer.mlp)
    else:
        assert isinstance(layer.mlp, Dense)
        _fill_dense(block.mlp, layer.mlp)


def _fill_attention(block: Block, own: Attention) -> None:
    mla = block.self_attn
    a = mla.a_proj.weight
    if own.fused:
        _widen(own.a, a)
    else:
        _widen(own.a, a[: own.a_rows])
        _widen(own.kv_a, a[own.a_rows :])
    if mla.q_a_layernorm is not None and own.q_norm is not None:
        mla.q_a_layernorm.weight.copy_(own.q_norm)
        _widen(own.q_b, mla.q_b_proj.weight)
    mla.kv_a_layernorm.weight.copy_(own.kv_norm)
    _widen(own.kv_b, mla.kv_b_proj.weight)
    _widen(own.o, mla.o_proj.weight)


def _fill_dense(mlp: MLP, own: Dense) -> None:
    if own.fused:
        _widen(own.parts[0], mlp.gate_up.weight)
    else:
        for part, half in zip(own.parts, mlp.gate_up.weight.chunk(2), strict=True):
            _widen(part, half)
    _widen(own.down, mlp.down.weight)


def _fill_mixture(mlp: MoE, own: Mixture) -> None:
    mlp.gate.weight.copy_(own.router)
    if mlp.gate.e_score_correction_bias is not None and own.bias is not None:
        mlp.gate.e_score_correction_bias.copy_(own.bias)
    experts, routed = own.experts, slice(own.routed)
    # gate and up are quantised separately
    up, up_scale = experts.gate_up.unflatten(1, (2, -1)), experts.gate_up_scale
    up_scale = None if up_scale is None else up_scale.unflatten(1, (2, -1))
    down, down_scale = experts.down, experts.down_scale
    _wide(up[routed], _some(up_scale, routed), mlp.gate_up.unflatten(1, (2, -1)))
    _wide(down[routed], _some(down_scale, routed), mlp.down)
    if mlp.shared is not None:
        # one MLP of width shared * I here, `shared` experts of width I there
        rest, halves = slice(own.routed, None), mlp.shared.gate_up.weight.unflatten(0, (2, own.shared, -1))
        _wide(up[rest], _some(up_scale, rest), halves.transpose(0, 1))
        columns = mlp.shared.down.weight.unflatten(1, (own.shared, -1))
        _wide(down[rest], _some(down_scale, rest), columns.transpose(0, 1))


def _some(scale: Tensor | None, which: slice) -> Tensor | None:
    return None if scale is None else scale[which]


def _widen(matrix: Matrix, out: Tensor) -> None:
    _wide(matrix.weight, matrix.scale, out)


def _wide(weight: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """Writes weights `[..., N, K]` times their block scales, if they have any, into `out`."""
    if scale is None:
        out.copy_(weight)
        return
    rows, columns = weight.shape[-2:]
    numbers = weight.to(out.dtype)  # e4m3 fits exactly
    if rows % BLOCK or columns % BLOCK:
        each = scale.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
        out.copy_(numbers * each)
        return

    def blocks(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))

    torch.mul(blocks(numbers), scale[..., :, None, :, None], out=blocks(out))


def _bytes(block: Block) -> int:
    return sum(slot.nbytes for slot in [*block.parameters(), *block.buffers()])
