"""Rows of training text, and texts that the model itself writes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from data import ASSISTANT, BOS, EOS
from torch import Tensor

from mtp_spec.model.attention import MLA
from mtp_spec.model.training import TrainingForward

OVERLAP = 0.09  # share of a row that its neighbour may repeat, so that few tokens are left out: rows begin with a chat
TEXT_TOKENS = 320
TEMPERATURES = (0.0, 0.8, 0.0, 0.7, 1.0)


class Rows:
    """Rows of context + 1 tokens that begin with a chat; every pass puts the chats in a new order.

    Args:
        ids: all chats end to end.
        starts: where each begins.
    """

    def __init__(self, ids: np.ndarray, starts: np.ndarray, device: str, context: int, seed: int) -> None:
        if len(ids) <= context + 1:
            raise SystemExit(f"{len(ids)} tokens of text are fewer than a row of {context + 1}: give more chats")
        self.ids = torch.from_numpy(ids.astype(np.int32)).to(device)
        self.starts = torch.from_numpy(starts).to(device)
        self.device, self.context, self.total = device, context, len(ids)
        self.lengths = torch.diff(self.starts, append=torch.tensor([len(ids)], device=device))
        self.random = torch.Generator(device).manual_seed(seed)
        self.offsets = torch.arange(context + 1, device=device)
        self._shuffle()

    def _shuffle(self) -> None:
        order = torch.randperm(len(self.starts), generator=self.random, device=self.device)
        lengths = self.lengths[order]
        begins = lengths.cumsum(0) - lengths
        moved = torch.repeat_interleave(self.starts[order] - begins, lengths)
        self.stream = self.ids[moved + torch.arange(self.total, device=self.device)]
        grid = torch.arange(0, self.total - self.context, int(self.context * (1 - OVERLAP)), device=self.device)
        rows = begins[torch.searchsorted(begins, grid).clamp(max=len(begins) - 1)]
        self.rows, self.next = rows[rows < self.total - self.context], 0

    def batch(self, count: int) -> Tensor:
        """Returns ids `[count, context + 1]`."""
        parts = []
        while count:
            if self.next >= len(self.rows):
                self._shuffle()
            part = self.rows[self.next : self.next + count]
            self.next += len(part)
            count -= len(part)
            parts.append(self.stream[part[:, None] + self.offsets])
        return torch.cat(parts).long()

    def chats(self, batch: int, most: int) -> Iterator[Tensor]:
        """Yields every chat once, at the front of rows `[batch, most]` that go on with the chats after it."""
        starts = self.starts[self.starts <= self.total - most]
        for part in starts.split(batch):
            yield self.ids[part[:, None] + self.offsets[:most]].long()

    def questions(self, count: int, most: int) -> tuple[Tensor, Tensor]:
        """Returns ids `[count, most]` of random chats, and the length `[count]` of each up to its first answer."""
        pick = torch.randint(len(self.starts), (4 * count,), generator=self.random, device=self.device)
        ids = self.ids[(self.starts[pick][:, None] + self.offsets[:most]).clamp(max=self.total - 1)].long()
        found = (ids == ASSISTANT).any(1)
        ids = ids[found][:count]
        return ids, (ids == ASSISTANT).long().argmax(1) + 1


def write_texts(forward: TrainingForward, rows: Rows, seconds: float, count: int) -> Rows:
    """Returns texts that the model wrote in answer to training questions, at TEMPERATURES in turn."""
    parts, start = list[Tensor](), time.time()
    while not parts or time.time() - start < seconds:
        parts += _write(forward, rows, count)
    ids = torch.cat(parts)
    starts = torch.nonzero(ids == BOS).flatten()
    return Rows(ids.cpu().numpy(), starts.cpu().numpy(), rows.device, rows.context, 3)


@torch.no_grad()
def _write(forward: TrainingForward, rows: Rows, count: int) -> list[Tensor]:
    most = min(TEXT_TOKENS, rows.context)
    ids, prompt = rows.questions(count, most)
    count = len(ids)
    heat = torch.tensor(TEMPERATURES, device=ids.device)[torch.arange(count, device=ids.device) % len(TEMPERATURES)]
    config, dtype = forward.model.config, torch.bfloat16 if ids.is_cuda else torch.float32
    width = config.kv_lora_rank + config.qk_rope_head_dim
    cache = [torch.zeros(count, most, width, dtype=dtype, device=ids.device) for _ in forward.model.blocks()]
    done = torch.zeros(count, dtype=torch.bool, device=ids.device)
    length = torch.full((count,), most, device=ids.device)
    for at in range(most - 1):
        with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda):
            logits = _next_logits(forward, ids[:, at], at, cache).float()
        noise = -torch.empty_like(logits).exponential_().log()
        token = (logits + heat[:, None] * noise).argmax(-1)
        written = at + 1 >= prompt
        ids[:, at + 1] = torch.where(written, token, ids[:, at + 1])
        ended = written & ~done & (token == EOS)
        length[ended] = at + 2
        done |= ended
    return [text[:end] for text, end in zip(ids, length.tolist(), strict=True)]


def _next_logits(forward: TrainingForward, ids: Tensor, at: int, cache: list[Tensor]) -> Tensor:
    """Returns `[B, V]` after the tokens ids `[B]` at position `at` of many texts in step."""
    model = forward.model
    rope = model.table(at + 1)[at : at + 1, None]
    x = model.embed_tokens[ids]
    for number, (layer, slots) in enumerate(zip(model.blocks(), cache, strict=True)):
        x = x + _attend(layer.self_attn, layer.input_layernorm(x), rope, slots, at)
        x = x + forward.feed_forward(number, layer.post_attention_layernorm(x))
    return model.logits(model.norm(x))


def _attend(mla: MLA, x: Tensor, rope: Tensor, slots: Tensor, at: int) -> Tensor:
    q_nope, q_rope, row = mla.project(x, rope)
    slots[:, at] = row
    w_uk, w_vu = mla.absorbed()
    q = torch.cat((torch.einsum("bhn,hnc->bhc", q_nope, w_uk), q_rope), dim=-1).to(slots.dtype)
    keys = slots[:, : at + 1]
    weights = (torch.bmm(q, keys.mT).float() * mla.scale).softmax(-1).to(slots.dtype)
    context = torch.bmm(weights, keys[..., : mla.latent])
    out: Tensor = mla.o_proj(torch.einsum("bhc,hcv->bhv", context, w_vu).flatten(1))
    return out
