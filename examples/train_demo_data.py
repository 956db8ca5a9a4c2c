"""Text side of the demo's training: tokenizer, chat template, packing of chats into rows."""

from __future__ import annotations

import json
import lzma
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

SPECIALS = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"]
BOS, EOS, USER, ASSISTANT = 0, 1, 2, 3
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
USER_WEIGHT = 0.05


def chats(path: Path) -> Iterator[list[dict[str, str]]]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["messages"]


def train_tokenizer(data: Path, out: Path, vocab: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts: list[str] = []
    for n, messages in enumerate(chats(sorted(data.glob("chat-*.jsonl.xz"))[0])):
        if n % 100 and n % 2:
            texts += [m["content"] for m in messages]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=SPECIALS, initial_alphabet=alphabet)
    )
    out.mkdir(parents=True, exist_ok=True)
    tok.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": True, "temperature": 0.7}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    print(f"tokenizer: {tok.get_vocab_size()} tokens from {sum(map(len, texts)) / 1e6:.1f} MB")


def loops(ids: list[int]) -> bool:
    """More than a tenth of the 8-grams are repeats."""
    grams = Counter(zip(*(ids[k:] for k in range(8)), strict=False))
    return sum(grams.values()) > 1.1 * len(grams) + 1


def pack_file(job: tuple[Path, Path, int]) -> tuple[list[list[int]], list[list[int]], list[list[int]], int]:
    """Training documents with their answer flags, validation documents, and how many chats were dropped."""
    from tokenizers import Tokenizer

    path, tokenizer, limit = job
    tok = Tokenizer.from_file(str(tokenizer))
    train, flags, valid, dropped = [], [], [], 0
    batch: list[tuple[int, list[dict[str, str]]]] = []

    def flush() -> None:
        nonlocal dropped
        encoded = iter(tok.encode_batch([m["content"] for _, c in batch for m in c], add_special_tokens=False))
        for n, chat in batch:
            ids, flag, bad = [BOS], [0], False
            for message in chat:
                body = next(encoded).ids
                answer = message["role"] == "assistant"
                bad |= answer and loops(body)
                ids += [ASSISTANT, *body, EOS] if answer else [USER, *body]
                flag += [0, *[1] * (len(body) + 1)] if answer else [0] * (len(body) + 1)
            if n % 100 == 0:
                valid.append(ids)
            elif bad or len(ids) > 1024:
                dropped += 1
            else:
                train.append(ids)
                flags.append(flag)
        batch.clear()

    for n, chat in enumerate(chats(path)):
        if limit and n >= limit:
            break
        batch.append((n, chat))
        if len(batch) == 2000:
            flush()
    flush()
    return train, flags, valid, dropped


class Documents:
    """Token ids of many documents in one array, with answer flags."""

    def __init__(self, docs: list[list[int]], flags: list[list[int]] | None = None) -> None:
        self.ids = np.concatenate([np.asarray(d, np.uint16) for d in docs])
        if flags is None:
            flags = [[0] * (d.index(ASSISTANT) + 1) + [1] * (len(d) - d.index(ASSISTANT) - 1) for d in docs]
        self.flags = np.concatenate([np.asarray(f, np.uint8) for f in flags])
        self.ends = np.cumsum([len(d) for d in docs])

    def __len__(self) -> int:
        return len(self.ends)

    def batches(self, rows: int, width: int, seed: int, once: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """Rows that start at a document's start; positions restart, attention and loss stay inside a document.

        w1, w2, ... weigh the tokens 1, 2, ... ahead (0 where they leave the document).
        """
        rng = np.random.default_rng(seed)
        order: list[int] = []
        while True:
            ids, flag = np.zeros((rows, width), np.int64), np.zeros((rows, width), np.float32)
            doc, pos = np.full((rows, width), -1, np.int32), np.zeros((rows, width), np.int64)
            cuts, count = [0], 0
            for r in range(rows):
                at = 0
                while at < width:
                    if not order:
                        if once and count:
                            return
                        order = rng.permutation(len(self)).tolist()
                    end = int(self.ends[d := order.pop()])
                    start = int(self.ends[d - 1]) if d else 0
                    n = min(end - start, width - at)
                    ids[r, at : at + n] = self.ids[start : start + n]
                    flag[r, at : at + n] = self.flags[start : start + n]
                    doc[r, at : at + n], pos[r, at : at + n] = count, np.arange(n)
                    count, at = count + 1, at + n
                    cuts.append(r * width + at)
            out = {"ids": torch.from_numpy(ids), "pos": torch.from_numpy(pos), "doc": torch.from_numpy(doc)}
            cuts += [rows * width] * max(0, 32 * rows + 1 - len(cuts))
            out["cuts"] = torch.tensor(cuts[: 32 * rows] + [rows * width], dtype=torch.int32)
            for ahead in range(1, 6):
                w = np.zeros_like(flag)
                same = doc[:, :-ahead] == doc[:, ahead:]
                w[:, :-ahead] = same * np.where(flag[:, ahead:] > 0, 1.0, USER_WEIGHT)
                out[f"w{ahead}"] = torch.from_numpy(w)
            yield out


def load_documents(data: Path, tokenizer: Path, limit: int = 0) -> tuple[Documents, list[list[int]]]:
    train, flags, valid, dropped = [], [], [], 0
    jobs = [(path, tokenizer, limit) for path in sorted(data.glob("chat-*.jsonl.xz"))]
    with ProcessPoolExecutor() as pool:
        for a, b, c, d in pool.map(pack_file, jobs):
            train, flags, valid, dropped = train + a, flags + b, valid + c, dropped + d
    documents = Documents(train, flags)
    share = documents.flags.mean()
    print(
        f"pack: {len(train)} chats, {len(documents.ids) / 1e6:.2f} M tokens ({share:.0%} in answers), "
        f"{dropped} dropped, {len(valid)} for validation",
        flush=True,
    )
    return documents, valid
