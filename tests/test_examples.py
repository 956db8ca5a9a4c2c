"""Examples run as their first lines say; the trainer makes a checkpoint that loads."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mtp_spec

ROOT = Path(__file__).parent.parent


def run(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", ["same_text.py", "who_wrote_it.py"])
def test_short_examples(name: str) -> None:
    assert " step" in run(ROOT / "examples" / name)


def test_a_picture_of_a_chat(tmp_path: Path) -> None:
    file = tmp_path / "chat.svg"
    assert " steps" in run(ROOT / "examples" / "chat_picture.py", file)
    picture = file.read_text()
    assert "the&#160;same&#160;without&#160;drafts" in picture
    assert picture.count("&gt;&#160;") == 6


def test_training_from_chats_to_a_checkpoint(tmp_path: Path) -> None:
    chats, demo = tmp_path / "chats", tmp_path / "demo"
    chats.mkdir()
    demo.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (demo / name).write_bytes((ROOT / "configs" / "demo" / name).read_bytes())
    with lzma.open(chats / "chat-00.jsonl.xz", "wt") as file:
        for number in range(1802):
            turns = [("user", f"Count to {number}"), ("assistant", " ".join(map(str, range(30 + number % 7))))]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    data = tmp_path / "packed.npz.xz"
    assert "1783 chats" in run(ROOT / "examples" / "demo_data.py", chats, demo, data)
    small = ["--steps", 2, "--batch", 2, "--context", 32, "--no-compile"]
    train = ROOT / "examples" / "train_demo.py"
    run(train, "main", data, tmp_path / "one", *small)
    texts = ["--texts", 4, "--text-seconds", 0]
    out = run(train, "mtp", data, tmp_path / "two", "--model", tmp_path / "one", *texts, *small)
    assert '"after": "mtp"' in out
    lm = mtp_spec.load(tmp_path / "two")
    ids = lm.generate([0, 2, 77, 3], max_new_tokens=6, speculation=3).token_ids
    assert ids == lm.generate([0, 2, 77, 3], max_new_tokens=6, speculation=None).token_ids
    assert json.loads((tmp_path / "two" / "mtp.json").read_text())
