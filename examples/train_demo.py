"""Train the bundled demo model: a 45 M DeepSeek-V3 with one MTP module, on one GPU in two short runs.

    python examples/train_demo.py tokenizer --data shared/data              # once, on a CPU
    python examples/train_demo.py main --minutes 7.5 --state /tmp/demo.pt   # main model, MTP at depth 1
    python examples/train_demo.py mtp  --minutes 4 --state /tmp/demo.pt     # freeze to FP8, MTP on its own output

`main` ends its schedule with the time it is given. Both write an FP8 checkpoint in Hugging Face's V3 format.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_demo_data import ASSISTANT, BOS, EOS, USER_WEIGHT, Documents, load_documents, train_tokenizer
from train_demo_model import DemoModel, Shape, generate

START = time.time()
DEPTH_WEIGHTS = (0.4, 0.25, 0.2, 0.15)
LOG: list[dict[str, object]] = []


def say(**facts: object) -> None:
    facts = {k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()}
    LOG.append({"t": round(time.time() - START, 1), **facts})
    print(json.dumps(LOG[-1]), flush=True)


# --- optimiser -------------------------------------------------------------------------------------------------------
def orthogonal(g: Tensor) -> Tensor:
    """Newton-Schulz iteration of Muon on a batch of matrices [N, r, c]."""
    x = g.bfloat16() if g.is_cuda else g
    flip = x.shape[1] > x.shape[2]
    x = x.mT if flip else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if flip else x


class Muon:
    """Muon for matrices of the blocks (stacked by shape), AdamW for the rest."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], lr: float, decay: float, adam_lr: float) -> None:
        self.lr, self.decay, self.adam_lr = lr, decay, adam_lr
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        tables, rest = [], []
        for name, p in named:
            if "embed_tokens" in name or "lm_head" in name:
                tables.append(p)
            elif p.dim() < 2 or "gate.weight" in name:
                rest.append(p)
            else:
                self.groups.setdefault(tuple(p.shape), []).append(p)
        self.state = {s: [torch.zeros_like(p) for p in ps] for s, ps in self.groups.items()}
        parts = [{"params": tables, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
        fused = {"fused": True} if named[0][1].is_cuda else {}
        self.adam = torch.optim.AdamW([p for p in parts if p["params"]], lr=adam_lr, betas=(0.9, 0.95), **fused)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
        lr = self.lr * scale
        for shape, params in self.groups.items():
            grads, momentum = [p.grad for p in params], self.state[shape]
            torch._foreach_lerp_(momentum, grads, 0.05)
            stacked = torch.stack(torch._foreach_lerp(grads, momentum, 0.95)).view(-1, *shape[-2:])
            update = orthogonal(stacked).view(len(params), *shape).to(params[0].dtype)
            torch._foreach_mul_(params, 1 - lr * self.decay)
            torch._foreach_add_(params, list(update.unbind()), alpha=-lr * max(1.0, shape[-2] / shape[-1]) ** 0.5)
        self.zero()

    def zero(self) -> None:
        self.adam.zero_grad(set_to_none=True)
        for params in self.groups.values():
            for p in params:
                p.grad = None


# --- data ------------------------------------------------------------------------------------------------------------
def feeder(docs: Documents, rows: int, width: int, seed: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Batches from two background threads, on the device."""
    ready: queue.Queue[dict[str, Tensor]] = queue.Queue(12)

    def fill(n: int) -> None:
        for batch in docs.batches(rows, width, seed + n):
            ready.put({k: v.pin_memory() if device.type == "cuda" else v for k, v in batch.items()})

    for n in range(2):
        threading.Thread(target=fill, args=(n,), daemon=True).start()
    while True:
        yield {k: v.to(device, non_blocking=True) for k, v in ready.get().items()}


def mask_of(batch: dict[str, Tensor]) -> Tensor:
    doc = batch["doc"]
    causal = torch.ones(doc.shape[1], doc.shape[1], dtype=torch.bool, device=doc.device).tril()
    return ((doc[:, :, None] == doc[:, None, :]) & causal)[:, None]


# --- FP8 and export --------------------------------------------------------------------------------------------------
def is_fp8(name: str, p: Tensor) -> bool:
    return p.dim() >= 2 and not any(part in name for part in ("embed_tokens", "lm_head", "gate.weight"))


def to_fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 weights and the f32 scales of their 128x128 blocks."""
    r, c = w.shape
    padded = F.pad(w.float(), (0, -c % 128, 0, -r % 128))
    blocks = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    scale = blocks.abs().amax((1, 3)).clamp_min(1e-12) / 448
    q = (blocks / scale[:, None, :, None]).view_as(padded)[:r, :c]
    return q.to(torch.float8_e4m3fn).contiguous(), scale


def from_fp8(q: Tensor, scale: Tensor) -> Tensor:
    full = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: q.shape[0], : q.shape[1]]
    return q.float() * full


@torch.no_grad()
def quantise(named: list[tuple[str, nn.Parameter]]) -> None:
    """Round parameters in place to what the exported checkpoint will hold."""
    for name, p in named:
        if is_fp8(name, p):
            for w in p if p.dim() == 3 else [p]:
                w.copy_(from_fp8(*to_fp8(w)))
        else:
            p.copy_(p.to(torch.bfloat16))


def export(model: DemoModel, out: Path) -> None:
    """Shards under 15 MB, their index and config.json."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    last = f"layers.{model.s.num_hidden_layers}"
    for name, value in model.state_dict().items():
        name = name.replace("mtp.block", last).replace("mtp.norm", f"{last}.shared_head.norm").replace("mtp", last)
        name = name if name.startswith("lm_head") else f"model.{name}"
        value = value.detach().cpu()
        pairs = [(name, value)]
        if value.dim() == 3:
            stem, leaf = name.rsplit(".", 1)
            flip = leaf == "down_proj"
            pairs = [(f"{stem}.{e}.{leaf}.weight", w.T if flip else w) for e, w in enumerate(value)]
        for key, w in pairs:
            if is_fp8(key, w):
                tensors[key], tensors[f"{key}_scale_inv"] = to_fp8(w)
            else:
                keep = "e_score_correction_bias" in key
                tensors[key] = (w.float() if keep else w.to(torch.bfloat16)).contiguous()
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for key, w in tensors.items():
        if size + w.nbytes > 14.9e6:
            shards.append({})
            size = 0
        shards[-1][key] = w
        size, total = size + w.nbytes, total + w.nbytes
    out.mkdir(parents=True, exist_ok=True)
    where: dict[str, str] = {}
    for n, shard in enumerate(shards):
        file = f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (out / "config.json").write_text(json.dumps(model.s.to_config(BOS, EOS), indent=2) + "\n")
    say(exported_mb=total / 1e6, shards=len(shards), tensors=len(tensors))
    (out / "loss.json").write_text("\n".join(json.dumps(line) for line in LOG) + "\n")


# --- measuring -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def validate(model: DemoModel, docs: Documents, rows: int, limit: int, autocast: torch.autocast) -> dict[str, float]:
    """Main loss per token of answers and of all text, MTP loss at depth 1."""
    model.eval()
    device = model.norm.weight.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for n, cpu in enumerate(docs.batches(rows, 1024, 0, once=True)):
        if n == limit:
            break
        batch = {k: v.to(device) for k, v in cpu.items()}
        with autocast:
            h, _ = model(batch["ids"], batch["pos"], mask_of(batch))
            logits = model.lm_head(h)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["ids"].roll(-1, 1).flatten(), reduction="none")
        w = batch["w1"].flatten()
        sums += torch.stack([(loss * (w == 1)).sum(), (w == 1).sum(), (loss * (w > 0)).sum(), (w > 0).sum()]).double()
    model.train()
    answers, everything = float(sums[0] / sums[1]), float(sums[2] / sums[3])
    return {"val_answers": answers, "val_all": everything, "perplexity_answers": math.exp(answers)}


def prompts_of(docs: list[list[int]], longest: int = 48) -> list[list[int]]:
    cut = [d[: d.index(ASSISTANT) + 1] for d in docs]
    return [p for p in cut if len(p) <= longest]


def show(model: DemoModel, tokenizer: Path, prompts: list[list[int]], autocast: torch.autocast) -> None:
    from tokenizers import Tokenizer

    tok, device = Tokenizer.from_file(str(tokenizer)), model.norm.weight.device
    model.eval()
    noise = torch.Generator(device).manual_seed(1)
    with autocast:
        texts = generate(model, prompts, 130, torch.full((len(prompts),), 0.7, device=device), EOS, noise)
    for text in texts:
        say(sample=tok.decode(text, skip_special_tokens=False))
    model.train()


# --- the two runs ----------------------------------------------------------------------------------------------------
def train_main(model: DemoModel, docs: Documents, valid: Documents, args: argparse.Namespace) -> None:
    device = model.norm.weight.device
    cuda = device.type == "cuda"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cuda)
    opt = Muon(list(model.named_parameters()), args.lr, 0.1, args.adam_lr)
    bias = [g.e_score_correction_bias for g in model.gates()]
    losses = torch.compile(model.losses) if cuda else model.losses
    flash, begun, step, mean = cuda, time.time(), 0, torch.zeros(2, device=device)
    end = START + 60 * args.minutes
    mark = begun
    for batch in feeder(docs, args.rows, args.width, 0, device):
        if step == 3:
            begun = mark = time.time()
        done = (time.time() - begun) / (end - begun) if step >= 3 else 0.0
        if done >= 1 or step == args.steps:
            break
        layout = batch["cuts"] if flash else mask_of(batch)
        try:
            with autocast:
                total, main, mtp, loads = losses(batch["ids"], batch["pos"], layout, batch["w1"], batch["w2"], 0.3)
            total.backward()
        except RuntimeError as error:
            if not flash or step:
                raise
            say(flash_failed=str(error)[:300])
            flash = False
            opt.zero()
            continue
        opt.step(min(1.0, (step + 1) / 150) * min(1.0, (1 - done) / 0.55))
        with torch.no_grad():
            drift = 0.001 * (loads.mean(1, keepdim=True) - loads).sign()
            torch._foreach_add_(bias, list(drift.unbind()))
            mean += torch.stack([main, mtp])
        step += 1
        if step in (1, 3, 20) or step % 100 == 0:
            since, tokens = (100 if step % 100 == 0 else step), args.rows * args.width
            speed = tokens * (step - 3) / max(1e-9, time.time() - begun) if step > 3 else 0.0
            values = (mean / since).tolist() if step % 100 == 0 else [main.item(), mtp.item()]
            mean.zero_() if step % 100 == 0 else None
            balance = (loads.amax(1) / loads.mean(1)).max().item()
            epochs = step * tokens / len(docs.ids)
            say(step=step, loss=values[0], mtp=values[1], tok_s=int(speed), epochs=epochs, peak_load=balance)
        if time.time() - mark > 75:
            say(step=step, **validate(model, valid, 32, 4, autocast))
            mark = time.time()
    say(step=step, done="main")


def mtp_logits(model: DemoModel, batch: dict[str, Tensor], h: Tensor, depth: int) -> Iterator[Tensor]:
    mask, past, g = mask_of(batch), [], h
    for d in range(1, depth + 1):
        g = model.mtp.step(g, model.embed_tokens(batch["ids"].roll(-d, 1)), batch["pos"] + d, mask, past)
        yield model.lm_head(g)


@torch.no_grad()
def acceptance(model: DemoModel, docs: Documents, autocast: torch.autocast) -> dict[str, object]:
    """Conditional agreement of drafts 1..5 with the main model's argmax, and of coupled-free overlap, along texts."""
    device = model.norm.weight.device
    alive_sum = torch.zeros(6, device=device)
    model.eval()
    for n, cpu in enumerate(docs.batches(16, 512, 0, once=True)):
        if n == 12:
            break
        batch = {k: v.to(device) for k, v in cpu.items()}
        with autocast:
            h, _ = model(batch["ids"], batch["pos"], mask_of(batch))
            best = model.lm_head(h).argmax(-1)
            alive = (batch["w5"] == 1) & (batch["w1"] == 1)
            alive_sum[0] += alive.sum()
            # depth 5 predicts the token 6 ahead; judge by the main model's row 5 ahead
            for d, logits in enumerate(mtp_logits(model, batch, h, 5), 1):
                alive = alive & (logits.argmax(-1) == best.roll(-d, 1))
                alive_sum[d] += alive.sum()
    model.train()
    a = alive_sum.tolist()
    conditional = [round(a[d] / max(1.0, a[d - 1]), 4) for d in range(1, 6)]
    chain = [round(1 + sum(a[1 : d + 1]) / max(1.0, a[0]), 3) for d in (1, 2, 3, 5)]
    return {"conditional": conditional, "tokens_per_step_1_2_3_5": chain}


def train_mtp(model: DemoModel, docs: Documents, raw_valid: list[list[int]], args: argparse.Namespace) -> None:
    """Freeze the FP8 main model; teach the MTP module its own recursion on data and on the model's own texts."""
    device = model.norm.weight.device
    cuda = device.type == "cuda"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cuda)
    main = [(n, p) for n, p in model.named_parameters() if not n.startswith("mtp")]
    mtp = [(n, p) for n, p in model.named_parameters() if n.startswith("mtp")]
    quantise(main)
    for _, p in main:
        p.requires_grad_(False)
    model.mtp.block.dropout = 0.0
    valid = Documents(raw_valid)
    say(fp8=True, **validate(model, valid, 32, 10**6 if cuda else 1, autocast))

    starts = [0, *docs.ends[:-1].tolist()]
    noise = torch.Generator(device).manual_seed(0)
    heats = torch.tensor([0.0, 0.8, 0.0, 0.8, 1.0], device=device)

    def own(prompts: list[list[int]], heat: Tensor) -> list[list[int]]:
        model.eval()
        with autocast:
            texts = generate(model, prompts, args.new, heat, EOS, noise)
        model.train()
        return texts

    checks = prompts_of(raw_valid)[: args.prompts // 4]
    held = {f"T{t}": Documents(own(checks, torch.full((len(checks),), t, device=device))) for t in (0.0, 0.8)}
    for name, texts in held.items():
        say(text=name, before=True, **acceptance(model, texts, autocast))
    written: list[list[int]] = []
    for r in range(args.rounds):
        picks = range(r, len(starts), max(1, len(starts) // args.prompts))
        prompts = prompts_of([docs.ids[starts[i] : docs.ends[i]].tolist() for i in picks])[: args.prompts]
        written += own(prompts, heats[torch.arange(len(prompts), device=device) % 5])
    mixed = Documents(written)
    say(own_texts=len(written), own_tokens=len(mixed.ids))

    opt = Muon(mtp, args.lr, 0.02, args.adam_lr)
    feeds = [feeder(mixed, args.rows, 512, 5, device), feeder(docs, args.rows, 512, 9, device)]
    begun, end, step = time.time(), START + 60 * args.minutes, 0
    while (done := (time.time() - begun) / (end - begun)) < 1 and step != args.steps:
        batch = next(feeds[step % 4 == 3])
        with autocast:
            with torch.no_grad():
                model.eval()
                h, _ = model(batch["ids"], batch["pos"], mask_of(batch))
                model.train()
                target = model.lm_head(h).float().log_softmax(-1)
            total, shown = torch.zeros((), device=device), []
            for d, logits in enumerate(mtp_logits(model, batch, h, 4), 1):
                want = target.roll(-d, 1)
                got = logits.float().log_softmax(-1)
                w = batch[f"w{d}"].clamp_min(0) * (batch[f"w{d}"] > USER_WEIGHT)
                p = want.exp()
                kl = (p * (want - got)).sum(-1)
                far = 0.5 * (p - got.exp()).abs().sum(-1)
                scale = w.sum().clamp_min(1)
                total = total + DEPTH_WEIGHTS[d - 1] * ((kl + far) * w).sum() / scale
                shown.append((far.detach() * w).sum() / scale)
        total.backward()
        opt.step(min(1.0, (step + 1) / 50) * min(1.0, (1 - done) / 0.7))
        step += 1
        if step in (1, 20) or step % 100 == 0:
            say(mtp_step=step, loss=total.item(), tv=[round(x.item(), 4) for x in shown])
    quantise(mtp)
    for name, texts in held.items():
        say(text=name, after=True, **acceptance(model, texts, autocast))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("tokenizer", "main", "mtp"))
    parser.add_argument("--data", type=Path, default=Path("shared/data"))
    parser.add_argument("--folder", type=Path, default=Path("configs/demo"), help="where tokenizer.json is")
    parser.add_argument("--out", type=Path, default=Path("configs/demo"), help="where the checkpoint goes")
    parser.add_argument("--state", type=Path, default=Path("/tmp/demo.pt"))
    parser.add_argument("--minutes", type=float, default=7.5, help="time of the whole phase, packing included")
    parser.add_argument("--steps", type=int, default=-1, help="stop after so many steps")
    parser.add_argument("--rows", type=int, default=56)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=0.015)
    parser.add_argument("--adam-lr", type=float, default=0.002)
    parser.add_argument("--prompts", type=int, default=2048)
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--limit", type=int, default=0, help="chats a file (0 = all), for a smoke run")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, for a smoke run on a CPU")
    args = parser.parse_args()
    if args.phase == "tokenizer":
        train_tokenizer(args.data, args.folder, 8192)
        return
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 128, "moe_intermediate_size": 128}
    model = DemoModel(Shape(**small) if args.tiny else Shape()).to(device)
    docs, raw_valid = load_documents(args.data, args.folder / "tokenizer.json", args.limit)
    say(parameters=sum(p.numel() for p in model.parameters()), device=str(device))
    if args.phase == "main":
        train_main(model, docs, Documents(raw_valid), args)
        torch.save({"model": model.state_dict(), "log": LOG}, args.state)
        export(model, args.out)
    else:
        saved = torch.load(args.state, map_location=device)
        model.load_state_dict(saved["model"])
        LOG[:0] = saved["log"]
        train_mtp(model, docs, raw_valid, args)
        export(model, args.out)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    show(model, args.folder / "tokenizer.json", prompts_of(raw_valid)[:4], autocast)
    (args.out / "loss.json").write_text("\n".join(json.dumps(line) for line in LOG) + "\n")


if __name__ == "__main__":
    main()
