"""Trains the bundled model on one GPU, in two runs.

    python examples/train_demo/data.py CHATS configs/demo packed.npz.xz
    python examples/train_demo/train.py main packed.npz.xz RUN1 --minutes 9
    python examples/train_demo/train.py mtp packed.npz.xz RUN2 --model RUN1 --minutes 6

`main` trains the model with its MTP module: Muon, experts balanced without an auxiliary loss (2408.15664),
cross-entropy of answers with the MTP term of the V3 report (2412.19437 eq. 24-25), dropout against repeated text.
`mtp` freezes the main model as FP8 stores it, lets it write texts, and teaches the module the model's own
distribution, recursively to DEPTH (FastMTP, 2509.18362), so that it drafts well at depths it is reused for.
Each run ends its schedule with the time it is given and leaves an FP8 checkpoint in V3's format and a log.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import ASSISTANT, BOS, EOS, PAD, USER
from texts import Rows, write_texts
from torch import Tensor

from mtp_spec.kernels.fp8 import weight_dequant, weight_quant
from mtp_spec.model.checkpoint.folder import load_checkpoint, save_checkpoint
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.training import TrainingForward, distil_loss, joint_loss
from mtp_spec.model.transformer import Transformer
from mtp_spec.training.optim import Optimiser

QUESTION_WEIGHT = 0.05  # of user turns in the loss
DEPTH_WEIGHTS = (0.35, 0.27, 0.21, 0.17)
DEPTH = len(DEPTH_WEIGHTS)
BIAS_STEP = 1e-3
CONFIG = ModelConfig(
    vocab_size=8192,
    hidden_size=384,
    intermediate_size=1024,
    moe_intermediate_size=256,
    num_hidden_layers=10,
    num_attention_heads=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=1.5,
    first_k_dense_replace=1,
    q_lora_rank=256,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    num_nextn_predict_layers=1,
    max_position_embeddings=2048,
    bos_token_id=BOS,
    eos_token_ids=(EOS,),
)
Log = list[dict[str, object]]


def say(log: Log, **facts: object) -> None:
    log.append({k: round(v, 5) if isinstance(v, float) else v for k, v in facts.items()})
    print(json.dumps(log[-1]), flush=True)


def loss_weights(ids: Tensor) -> Tensor:
    """Returns `[B, T]`: 1 for tokens of answers (their end included), QUESTION_WEIGHT for others, 0 for padding."""
    turn = (ids == ASSISTANT).long() - (ids == USER).long() - (ids == BOS).long()
    marks = torch.where(turn != 0, torch.arange(ids.shape[1], device=ids.device), 0).cummax(1).values
    in_answer = turn.gather(1, marks) > 0
    return torch.where(in_answer & (turn == 0), 1.0, QUESTION_WEIGHT) * (ids != PAD)


# model


def initialise(model: Transformer) -> None:
    with torch.no_grad():
        for name, slot in model.checkpoint_slots().items():
            if "norm" in name:
                slot.fill_(1)
            elif slot.dim() == 1:
                slot.zero_()
            elif "embed" in name:
                slot.normal_(std=1.0)
            elif name == "lm_head.weight" or name.endswith("mlp.gate.weight"):
                slot.normal_(std=0.02)
            else:
                slot.normal_(std=0.5 * slot.shape[1] ** -0.5)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    slot.mul_(0.2)


@torch.no_grad()
def round_to_fp8(model: Transformer) -> None:
    """Replaces every matrix that the checkpoint stores in FP8 by what will be read back."""
    for name, slot in model.checkpoint_slots().items():
        if slot.dim() == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")):
            slot.copy_(weight_dequant(*weight_quant(slot), dtype=slot.dtype))


def evaluate(forward: TrainingForward, val: Rows, batch: int, most: int) -> dict[str, object]:
    """Returns the loss of held-out answers a token, each chat read from position 0, and the module's agreement.

    Agreement is with the main model's best token along the true text, given that shallower depths agreed.
    """
    loss, count, hits, tries = 0.0, 0.0, [0.0] * DEPTH, [0.0] * DEPTH
    dropout, forward.dropout = forward.dropout, 0.0
    for ids in val.chats(batch, most):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda):
            first = (ids == BOS).cumsum(1) <= 1
            answer = (loss_weights(ids) == 1.0) & first
            hidden = forward.hidden(ids)
            logits = forward.logits(hidden).float()
            each = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            loss += float((each * answer[:, 1:].flatten()).sum())
            count += float(answer[:, 1:].sum())
            best, rows = logits.argmax(-1), ids.shape[1] - DEPTH
            alive = torch.ones_like(best[:, :rows], dtype=torch.bool)
            for depth, deeper in forward.drafts(ids, hidden, DEPTH):
                alive = alive & answer[:, depth : depth + rows]
                tries[depth - 1] += float(alive.sum())
                alive = alive & (forward.mtp_logits(0, deeper).argmax(-1) == best[:, depth : depth + rows])
                hits[depth - 1] += float(alive.sum())
    forward.dropout = dropout
    rates = [round(h / max(t, 1), 4) for h, t in zip(hits, tries, strict=True)]
    return {"val_loss": loss / count, "perplexity": math.exp(loss / count), "agreement": rates}


# the two runs


def clock(end: float, steps: int | None) -> Iterator[tuple[int, float]]:
    """Yields (step, share of the time passed) until `end` or the steps are up; the first step compiles, share 0."""
    start, step = time.time(), 0
    while (now := time.time()) < end and step != steps:
        start = now if step <= 1 else start
        yield step, (now - start) / (end - start)
        step += 1


def train_main(model: Transformer, rows: Rows, val: Rows, args: argparse.Namespace, log: Log) -> None:
    optimiser = Optimiser(model.named_parameters(), args.lr, 0.1, args.adam_lr)
    forward = TrainingForward(model, args.dropout)
    loss_of = torch.compile(joint_loss, dynamic=False) if args.compile else joint_loss
    device, start, checked = rows.device, time.time(), time.time()
    sums = torch.zeros(2, device=device)
    for step, share in clock(args.end, args.steps):
        ids = rows.batch(args.batch)
        mtp_weight = torch.tensor(0.3 if share < 0.6 else 0.15, device=device)
        with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda):
            loss, own, mtp = loss_of(forward, ids, loss_weights(ids), mtp_weight)
        loss.backward()
        optimiser.step(min(1.0, (step + 1) / 150) * min(1.0, (1 - share) / 0.6 + 0.01))
        sums += torch.stack((own.detach(), mtp.detach()))
        worst = float(forward.balance(BIAS_STEP)) if step % 8 == 0 else 0.0
        if step == 0:
            start = time.time()
        if step in (1, 20) or step % 200 == 0:
            since = 200 if step > 200 else max(1, step)
            rate = step * args.batch * rows.context / (time.time() - start + 1e-9)
            loss_now, mtp_now = (sums / since).tolist() if step % 200 == 0 else (own.item(), mtp.item())
            sums.zero_()
            passes = step * args.batch * rows.context / rows.total
            say(log, step=step, seconds=time.time() - start, loss=loss_now, mtp=mtp_now, tokens_per_s=int(rate),
                passes=passes, worst_load=worst)  # fmt: skip
        if time.time() - checked > args.check_seconds:
            with torch.compiler.set_stance("force_eager"):
                say(log, step=step, **evaluate(forward, val, 168, 384))
            checked = time.time()
    say(log, after="main", **evaluate(forward, val, 168, 384))


def train_mtp(model: Transformer, rows: Rows, val: Rows, args: argparse.Namespace, log: Log) -> None:
    model.requires_grad_(False)
    model.mtp.requires_grad_(True)
    forward = TrainingForward(model)
    say(log, before="mtp", **evaluate(forward, val, 168, 384))
    own, start = write_texts(forward, rows, args.text_seconds, args.texts), time.time()
    say(log, own_texts=len(own.starts), own_tokens=own.total, seconds=start - args.started)
    optimiser = Optimiser(model.mtp.named_parameters(), 0.5 * args.lr, 0.02, 0.5 * args.adam_lr)
    loss_of = torch.compile(distil_loss, dynamic=False) if args.compile else distil_loss
    for step, share in clock(args.end, args.steps):
        ids = (rows if step % 3 == 2 else own).batch(args.batch)
        weights = F.pad(loss_weights(ids)[:, 1:], (0, 1))  # of the token each row is about
        with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda):
            with torch.no_grad():
                hidden = forward.hidden(ids)
                target = forward.logits(hidden).float().log_softmax(-1)
            loss = loss_of(forward, ids, weights, hidden, target, DEPTH_WEIGHTS)
        loss.backward()
        optimiser.step(min(1.0, (step + 1) / 50) * min(1.0, (1 - share) / 0.7 + 0.01))
        if step % 100 < 3:
            say(log, mtp_step=step, seconds=time.time() - start, loss=loss.item(), own_text=step % 3 != 2)
    round_to_fp8(model)
    say(log, after="mtp", **evaluate(forward, val, 168, 384))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=("main", "mtp"))
    parser.add_argument("data", type=Path, help="what data.py packed")
    parser.add_argument("out", type=Path, help="folder for the checkpoint and log.json")
    parser.add_argument("--model", type=Path, help="checkpoint of the run before")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole program")
    parser.add_argument("--reserve", type=float, default=0.25, help="minutes kept for checking and saving")
    parser.add_argument("--steps", type=int, help="stop earlier")
    parser.add_argument("--batch", type=int, default=64, help="rows a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens a row")
    parser.add_argument("--lr", type=float, default=0.015)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--text-seconds", type=float, default=45.0)
    parser.add_argument("--texts", type=int, default=2048, help="texts written at a time")
    parser.add_argument("--check-seconds", type=float, default=100.0)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    args.started, log = time.time(), Log()
    args.end = args.started + 60 * (args.minutes - args.reserve)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    with lzma.open(args.data) as file:
        data = dict(np.load(file))
    rows = Rows(data["ids"], data["starts"], device, args.context, 1)
    val = Rows(data["val_ids"], data["val_starts"], device, args.context, 7)
    options = vars(args) | {k: str(getattr(args, k)) for k in ("data", "out", "model")}
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    say(log, device=name, torch=torch.__version__, options=options, tokens=rows.total)
    if args.run == "main":
        model = Transformer(CONFIG, torch.float32, device)
        initialise(model)
    else:
        model = load_checkpoint(args.model, dtype=torch.float32, device=device)
    model.table(args.context + 64)
    (train_main if args.run == "main" else train_mtp)(model, rows, val, args, log)
    files = {f"{args.run}.json": json.dumps(log, indent=1)}
    save_checkpoint(model.cpu(), args.out, fp8=True, extra_files=files)


if __name__ == "__main__":
    main()
