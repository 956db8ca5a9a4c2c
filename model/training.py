"""The training forward pass: weights with gradients over whole sequences, and the losses of MTP modules.

It uses a `Transformer`'s own weights with a different forward pass. Inference takes a few rows at a time, with sums in
a fixed order; here every product takes all rows of a batch at once, attention is in its expanded form, and experts take
the rows that chose them in one product, or all rows where they are few. The logits equal inference's within rounding.

Legend: `B` sequences, `T` tokens, `D` hidden size, `V` vocabulary, `H` heads, `E` experts, `k` of them a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_spec.model.attention import MLA
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.draft_attention import KeysValues, draft_attention
from mtp_spec.model.layers import MLP, RMSNorm, gated_silu
from mtp_spec.model.moe import Gate, MoE
from mtp_spec.model.rope import apply_rope
from mtp_spec.model.transformer import Block, MTPModule, Transformer

MOST_AT_ONCE = 16  # up to so many experts, all of them run on every row


class ModulesForward:
    """MTP modules with gradients, over whole sequences, on the main model's hidden states.

    Args:
        modules: the modules.
        embedding: `[V, D]` of the main model, for modules without their own.
        head: `[V, D]` of the main model, likewise.
        table: returns a rope table of at least so many positions, as `HostModel.table`.
        dropout: of both residual branches of every block; 0 switches it off.
    Attributes:
        blocks: the modules' blocks.
        load: for each block the rows that its experts took in passes with gradients, `[E]`; None without experts.
    """

    def __init__(
        self, modules: Sequence[MTPModule], embedding: Tensor, head: Tensor, table: Callable[[int], Tensor],
        dropout: float = 0.0, before: Sequence[Block] = (),
    ) -> None:  # fmt: skip
        self.modules, self.embedding, self.head = list(modules), embedding, head
        self.table, self.dropout, self._first = table, dropout, len(before)
        self.blocks: list[Block] = [*before, *(module.block for module in modules)]
        self._narrowed: dict[int, tuple[Tensor, Tensor]] | None = None  # experts, while drafts are computed
        self._counted: Tensor | None = None  # rows that count as load, `[M]`, while drafts of a part are computed
        self.load = [
            torch.zeros(block.mlp.experts, dtype=torch.float32, device=embedding.device)
            if isinstance(block.mlp, MoE) else None
            for block in self.blocks
        ]  # fmt: skip

    def mtp_hidden(
        self, module: int, ids: Tensor, hidden: Tensor, offset: int, earlier: list[KeysValues] | None = None
    ) -> Tensor:
        """Returns an MTP module's normed output `[B, T, D]`.

        Args:
            module: number of the module.
            ids: `[B, T]` the token that follows each hidden state at this depth.
            hidden: `[B, T, D]` the main model's normed hidden states, or the previous depth's output.
            offset: position of ids[:, 0].
            earlier: an empty list at the first depth of a module that is reused on its own output; it carries keys and
                values from depth to depth, as the module's cache does when drafting.
        """
        mtp = self.modules[module]
        embedding = F.embedding(ids, self.embedding if mtp.embed_tokens is None else mtp.embed_tokens)
        x: Tensor = mtp.eh_proj(torch.cat((norm(mtp.enorm, embedding), norm(mtp.hnorm, hidden)), -1))
        return norm(mtp.norm, self.block(self._first + module, x, offset, earlier))

    def head_of(self, module: int) -> Tensor:
        """Returns the head `[V, D]` that gives a module's logits: its own if it has one."""
        own = self.modules[module].head
        return self.head if own is None else own

    def mtp_logits(self, module: int, hidden: Tensor) -> Tensor:
        """Returns a module's logits `[B, T, V]`."""
        return F.linear(hidden, self.head_of(module))

    def drafts(
        self, ids: Tensor, hidden: Tensor, depths: int, lengths: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields (depth, outputs `[B, T - depths, D]`) as drafting computes them along the true text.

        Depth d is computed by module d, deeper ones by the last module on its own output, which then sees its own rows
        of the text up to the draft's beginning, and of the draft its ancestors.

        Args:
            ids: `[B, T]` the text.
            hidden: `[B, T, D]` of the main model.
            depths: how deep to draft.
            lengths: `[B]` tokens of the texts, if rows behind them are not to count as load of experts.
        """
        rows, earlier, last = ids.shape[1] - depths, list[KeysValues](), len(self.modules)
        hidden = hidden[:, :rows]
        self._narrowed = {}
        for depth in range(1, depths + 1):
            carried = earlier if depth >= last and depths > last else None
            if lengths is not None:
                places = torch.arange(depth, depth + rows, device=ids.device)
                self._counted = (places < lengths[:, None]).flatten()
            hidden = self.mtp_hidden(min(depth, last) - 1, ids[:, depth : depth + rows], hidden, depth, carried)
            yield depth, hidden
        self._narrowed = self._counted = None

    def feed_forward(self, number: int, x: Tensor) -> Tensor:
        """Returns the output of a block's MLP or experts for rows x `[M, D]`."""
        mlp = self.blocks[number].mlp
        if isinstance(mlp, MLP):
            out: Tensor = mlp(x)
            return out
        weights, indices = chosen_experts(mlp.gate, x)
        load = self.load[number]
        if load is not None and torch.is_grad_enabled():
            with torch.no_grad():
                rows = torch.ones_like(load)[:1] if self._counted is None else self._counted.to(load.dtype)[:, None]
                load += torch.zeros_like(load).index_add(0, indices.flatten(), rows.expand(indices.shape).flatten())
        if mlp.experts <= MOST_AT_ONCE:
            routed = every_expert(mlp, x, weights.new_zeros(len(x), mlp.experts).scatter(1, indices, weights))
        elif x.is_cuda and groups_run(mlp):
            routed = grouped(x, *self._narrow(number, mlp), weights, indices)
        else:
            routed = chosen_only(mlp, x, weights, indices)
        return routed if mlp.shared is None else routed + mlp.shared(x)

    def _narrow(self, number: int, moe: MoE) -> tuple[Tensor, Tensor]:
        """Returns a block's experts in bfloat16, the same tensors for all depths of a draft."""
        kept = {} if self._narrowed is None else self._narrowed
        if number not in kept:
            kept[number] = moe.gate_up.bfloat16(), moe.down.bfloat16()
        return kept[number]

    @torch.no_grad()
    def balance(self, step: float) -> Tensor:
        """Moves each gate's bias towards even load (2408.15664) and forgets the loads.

        Returns:
            The largest expert's load over the mean, a scalar on the device.
        """
        worst = torch.zeros((), device=self.embedding.device)
        for block, load in zip(self.blocks, self.load, strict=True):
            if load is None or not isinstance(block.mlp, MoE):
                continue
            bias = block.mlp.gate.e_score_correction_bias
            if bias is None:
                raise ValueError("this model's gates have no bias to balance the load of experts with")
            bias += step * torch.sign(load.mean() - load)
            worst = torch.maximum(worst, load.max() / load.mean().clamp_min(1))
            load.zero_()
        return worst

    def block(self, number: int, x: Tensor, offset: int, earlier: list[KeysValues] | None = None) -> Tensor:
        """Returns a block's output for the residual stream x `[B, T, D]`; `offset`, `earlier` as for `mtp_hidden`."""
        block, rope = self.blocks[number], self.table(offset + x.shape[1])[offset : offset + x.shape[1], None]
        x = x + self._dropped(expanded_attention(block.self_attn, norm(block.input_layernorm, x), rope, earlier))
        branch = self.feed_forward(number, norm(block.post_attention_layernorm, x).flatten(0, -2)).view_as(x)
        return x + self._dropped(branch)

    def _dropped(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout) if self.dropout else branch


class TrainingForward(ModulesForward):
    """A whole model's weights with gradients, over whole sequences.

    Args:
        model: whose weights they are; the whole model in one process.
        dropout: as for `ModulesForward`.
    Attributes:
        blocks: the model's layers, then one of each MTP module, as a checkpoint counts them.
    Raises:
        ValueError: the model is only one rank's part.
    """

    def __init__(self, model: Transformer, dropout: float = 0.0) -> None:
        if model.ranks.size > 1:
            raise ValueError(f"the model is one of {model.ranks.size} ranks' parts: train it whole, in one process")
        self.model = model
        modules = [module for module in model.mtp if isinstance(module, MTPModule)]
        super().__init__(modules, model.embed_tokens, model.lm_head, model.table, dropout, model.blocks())

    def hidden(self, ids: Tensor) -> Tensor:
        """Returns hidden states after the final norm `[B, T, D]` of ids `[B, T]`."""
        x = F.embedding(ids, self.model.embed_tokens)
        for number in range(self.model.config.num_hidden_layers):
            x = self.block(number, x, 0)
        return norm(self.model.norm, x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the main model's logits `[B, T, V]`."""
        return self.model.logits(hidden)


# layers


def norm(module: RMSNorm, x: Tensor) -> Tensor:
    """Returns `normed` with a module's weight."""
    return normed(x, module.weight, module.eps)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns RMSNorm(x) in x's dtype; torch's kernel for both of one dtype computes in float32 inside."""
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def expanded_attention(mla: MLA, x: Tensor, rope: Tensor, earlier: list[KeysValues] | None = None) -> Tensor:
    """Returns a layer's causal attention `[B, T, D]` over whole sequences x `[B, T, D]`, keys and values by head.

    Args:
        mla: the layer.
        x: its normed input.
        rope: `[T, 1, 2, R]` angles of the rows' positions.
        earlier: keys and values of the shallower depths of a module that drafts on its own output; this depth's are
            appended. Row t sees the first depth's rows up to t, as the tokens committed before a draft, and of every
            later depth only row t, its own ancestor.
    """
    q, latent, k_rope = mla.a_proj(x).split((mla.a_rows, mla.latent, mla.rope_dim), dim=-1)
    if mla.q_a_layernorm is not None:
        q = mla.q_b_proj(norm(mla.q_a_layernorm, q))
    q_nope, q_rope = q.unflatten(-1, (mla.heads, -1)).split((mla.nope, mla.rope_dim), dim=-1)
    k_nope, v = mla.kv_b_proj(norm(mla.kv_a_layernorm, latent)).unflatten(-1, (mla.heads, -1)).split(
        (mla.nope, mla.v_dim), dim=-1
    )  # fmt: skip
    turned = rotated if mla.config.rope_interleave else partial(apply_rope, interleaved=False)
    q = torch.cat((q_nope, turned(q_rope, rope)), dim=-1)
    k_rope = turned(k_rope.unsqueeze(-2), rope)
    k = torch.cat((k_nope, k_rope.expand(*k_nope.shape[:-1], -1)), dim=-1)
    # flash attention needs one head size
    v = F.pad(v, (0, q.shape[-1] - mla.v_dim)) if q.shape[-1] > mla.v_dim else v
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
    if earlier is not None:
        earlier.append((k, v))
    if earlier is not None and len(earlier) > 1:
        out = draft_attention(q, earlier, mla.scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=mla.scale)
    values: Tensor = mla.o_proj(out[..., : mla.v_dim].transpose(-3, -2).flatten(-2))
    return values


def rotated(x: Tensor, table: Tensor) -> Tensor:
    """Returns `apply_rope` for interleaved pairs, as products of complex numbers: one pass over memory, not five."""
    wide = x if x.dtype == torch.float64 else x.float()
    own, other = table.to(wide.dtype).unbind(-2)
    angles = torch.complex(own[..., ::2].contiguous(), other[..., 1::2].contiguous())
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous()) * angles
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def chosen_experts(gate: Gate, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns weights `[M, k]` and experts `[M, k]`, in ascending order, of rows x `[M, D]`.

    In the gate's own dtype, float32, whatever autocast says; `Gate.choose` is inference's form of it.
    """
    config = gate.config
    with torch.autocast(x.device.type, enabled=False):
        logits = F.linear(x.to(gate.weight.dtype), gate.weight)
    scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
    choice = scores if gate.e_score_correction_bias is None else scores + gate.e_score_correction_bias
    indices = _within_groups(choice, config).topk(config.num_experts_per_tok, dim=-1).indices.sort(dim=-1).values
    weights = scores.gather(-1, indices)
    if config.norm_topk_prob and not config.is_v2:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * config.routed_scaling_factor, indices


def _within_groups(choice: Tensor, config: ModelConfig) -> Tensor:
    """Masks the experts outside each row's best `topk_group` groups."""
    if config.topk_method == "greedy" or config.n_group == config.topk_group:
        return choice
    grouped = choice.view(*choice.shape[:-1], config.n_group, -1)
    if config.topk_method == "noaux_tc":
        both = grouped if grouped.shape[-1] == 2 else grouped.topk(2, dim=-1).values
        score, hidden = both.sum(-1), float("-inf")
    else:
        score, hidden = grouped.amax(-1), 0.0
    best = score.topk(config.topk_group, dim=-1).indices
    keep = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
    return grouped.masked_fill(~keep.unsqueeze(-1), hidden).flatten(-2)


def every_expert(moe: MoE, x: Tensor, weights: Tensor) -> Tensor:
    """Returns the weighted sum of experts `[M, D]` for rows x `[M, D]` and weights `[M, E]`, zero if not chosen.

    Every expert on every row as two large products: at the few small experts of a model that is trained on one device
    this beats sorting rows, and it compiles to dense code.
    """
    inner = gated_silu(F.linear(x, moe.gate_up.flatten(0, 1)).unflatten(-1, (moe.experts, -1)))
    inner = inner * weights.unsqueeze(-1).to(inner.dtype)
    return F.linear(inner.flatten(1), moe.down.transpose(0, 1).flatten(1))


def chosen_only(moe: MoE, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Returns the same sum, each expert run on the rows that chose it; weights and indices `[M, k]`."""
    chosen = indices.flatten()
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=moe.experts).tolist()
    parts = x[order // indices.shape[1]].split(counts)
    outs = [F.linear(gated_silu(F.linear(part, moe.gate_up[e])), moe.down[e])
            for e, part in enumerate(parts) if len(part)]  # fmt: skip
    pairs = torch.cat(outs)[order.argsort()].unflatten(0, indices.shape)
    return (pairs * weights.unsqueeze(-1).to(pairs.dtype)).sum(1)


def groups_run(moe: MoE) -> bool:
    """Whether `grouped` computes these experts: torch has its products, in 16 bits, from version 2.10 on."""
    kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else moe.down.dtype
    return hasattr(F, "grouped_mm") and kind == torch.bfloat16 and not (moe.down.shape[1] % 8 or moe.size % 8)


def grouped(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Returns what `chosen_only` does, in two products for all experts, without waiting for the counts.

    The experts' matrices are bfloat16.
    """
    chosen, per_row, experts = indices.flatten(), indices.shape[1], len(gate_up)
    order = chosen.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=x.device).index_add(0, chosen, torch.ones_like(chosen))
    # each expert's rows begin at a multiple of 8, as the products' gradients need; the rows between are zero
    ends = ((counts + 7) // 8 * 8).cumsum(0)
    begins = ends - (counts + 7) // 8 * 8
    before = counts.cumsum(0) - counts
    sorted_experts = chosen[order]
    place = begins[sorted_experts] + torch.arange(len(chosen), device=x.device) - before[sorted_experts]
    narrow = x.bfloat16()
    rows = narrow.new_zeros(len(chosen) + 8 * experts, x.shape[1]).index_copy_(0, place, narrow[order // per_row])
    offsets = ends.int()
    with torch.autocast(x.device.type, enabled=False):
        inner = gated_silu(F.grouped_mm(rows, gate_up.mT, offs=offsets))
        out = F.grouped_mm(inner, down.mT, offs=offsets)
    back = torch.empty_like(place).index_copy(0, order, place)
    pairs = out[back].unflatten(0, indices.shape)
    return (pairs * weights.unsqueeze(-1).to(pairs.dtype)).sum(1)


# losses


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Returns the weighted mean loss of logits `[B, T, V]`, of targets and weights `[B, T]`."""
    loss = F.cross_entropy(_wide(logits).flatten(0, 1), targets.flatten(), reduction="none")
    return (loss * weights.flatten()).sum() / weights.sum()


def joint_loss(
    forward: TrainingForward, ids: Tensor, weights: Tensor, mtp_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss of a model with its first module (V3 report eq. 25), the model's part and the module's.

    Args:
        forward: the model.
        ids: `[B, T]` text.
        weights: `[B, T]` of each token as a target.
        mtp_weight: of the module's part in the sum.
    """
    hidden = forward.hidden(ids[:, :-1])
    own = cross_entropy(forward.logits(hidden), ids[:, 1:], weights[:, 1:])
    deeper = forward.mtp_hidden(0, ids[:, 1:-1], hidden[:, :-1], 1)
    mtp = cross_entropy(forward.mtp_logits(0, deeper), ids[:, 2:], weights[:, 2:])
    return own + mtp_weight * mtp, own, mtp


def distil_loss(
    forward: TrainingForward, ids: Tensor, weights: Tensor, hidden: Tensor, target: Tensor,
    depth_weights: Sequence[float],
) -> Tensor:  # fmt: skip
    """Returns the weighted KL divergence plus total variation between the main model's and first module's predictions.

    Total variation is the loss of acceptance in coupled and rejection sampling (1 - sum min(p, q)); KL has gradients
    everywhere.

    Args:
        forward: the model.
        ids: `[B, T]` text.
        weights: `[B, T]` of the token that row t predicts.
        hidden: `[B, T, D]` of the frozen main model.
        target: `[B, T, V]` its log-probabilities; row t predicts token t + 1.
        depth_weights: of each depth at which the module is used, as in FastMTP (2509.18362).
    """
    depths, losses = len(depth_weights), list[Tensor]()
    rows = ids.shape[1] - depths
    for depth, deeper in forward.drafts(ids, hidden, depths):
        log_q = _wide(forward.mtp_logits(0, deeper)).log_softmax(-1)
        log_p, w = _wide(target[:, depth : depth + rows]), weights[:, depth : depth + rows]
        p = log_p.exp()
        far = (p * (log_p - log_q)).sum(-1) + 0.5 * (p - log_q.exp()).abs().sum(-1)
        losses.append(depth_weights[depth - 1] * (far * w).sum() / w.sum())
    return torch.stack(losses).sum()


def _wide(x: Tensor) -> Tensor:
    """Returns x in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
