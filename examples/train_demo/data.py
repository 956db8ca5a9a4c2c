"""Text side of the demonstration model's training: tokenizer, chat template, packing.

    python examples/train_demo/data.py CHATS configs/demo packed.npz.xz

CHATS is a folder of `chat-*.jsonl.xz` files, one {"messages": [{"role", "content"}, ...]} a line. Every hundredth
line of each file is held out. An existing tokenizer in configs/demo is kept: ids must stay those of the weights.
"""

from __future__ import annotations

import json
import lzma
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB, MOST_TOKENS = 8192, 1024
SPECIALS = ("bos", "eos", "user", "assistant", "system", "pad")  # ids 0 to 5
BOS, EOS, USER, ASSISTANT, SYSTEM, PAD = range(6)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
Chat = list[dict[str, str]]


def read_chats(folder: Path) -> Iterator[tuple[bool, Chat]]:
    """Yields (held out, messages)."""
    for file in sorted(folder.glob("chat-*.jsonl.xz")):
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                yield number % 100 == 0, json.loads(line)["messages"]


def is_looping(ids: list[int], size: int = 8) -> bool:
    """Whether more than a tenth of the runs of `size` tokens are repeats."""
    runs = Counter(zip(*(ids[k:] for k in range(size)), strict=False))
    return sum(runs.values()) > 1.1 * len(runs) + 1


def train_tokenizer(chats: list[Chat]) -> Tokenizer:
    """Returns a byte-level BPE of VOCAB tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[f"<|{name}|>" for name in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((m["content"] for chat in chats for m in chat), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|>:1 $B:1", special_tokens=[("<|bos|>", BOS)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": f"<|{name}|>" for name in ("bos", "eos", "pad")},
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": TEMPLATE,
    }
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": True, "temperature": 0.7}
    for name, content in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def encode(tokenizer: Tokenizer, chats: list[Chat]) -> Iterator[tuple[list[int], bool]]:
    """Yields each chat's ids as the template spells it, and whether one of its answers loops."""
    for first in range(0, len(chats), 2000):
        part = chats[first : first + 2000]
        contents = [m["content"] for chat in part for m in chat]
        encoded = iter(tokenizer.encode_batch_fast(contents, add_special_tokens=False))
        for chat in part:
            ids, loops = [BOS], False
            for message in chat:
                body, answer = next(encoded).ids, message["role"] == "assistant"
                ids += [SPECIALS.index(message["role"]), *body, *([EOS] if answer else [])]
                loops = loops or (answer and is_looping(body))
            yield ids, loops


def pack(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns all ids end to end (uint16), and where each document begins."""
    starts = np.cumsum([0, *map(len, documents[:-1])], dtype=np.int64)
    return np.concatenate([np.array(ids, dtype=np.uint16) for ids in documents]), starts


def main() -> None:
    source, demo, out = (Path(arg) for arg in sys.argv[1:4])
    chats = list(read_chats(source))
    if not (demo / "tokenizer.json").exists():
        save_tokenizer(train_tokenizer([chat for held_out, chat in chats[::10] if not held_out]), demo)
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    encoded = list(encode(tokenizer, [chat for _, chat in chats]))
    held = [ids for (ids, _), (held_out, _) in zip(encoded, chats, strict=True) if held_out]
    kept = [
        ids
        for (ids, loops), (held_out, _) in zip(encoded, chats, strict=True)
        if not held_out and not loops and len(ids) <= MOST_TOKENS
    ]
    ids, starts = pack(kept)
    val_ids, val_starts = pack(held)
    with lzma.open(out, "wb", preset=1) as file:
        np.savez(file, ids=ids, starts=starts, val_ids=val_ids, val_starts=val_starts)
    print(f"{len(kept)} chats, {len(ids)} tokens; {len(held)} held out; {len(chats) - len(kept) - len(held)} dropped")


if __name__ == "__main__":
    main()
