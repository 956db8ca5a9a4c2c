"""Examples run as their first lines say; the trainer makes a checkpoint that loads."""

from __future__ import annotations

import json
import lzma
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
import torch

import mtp_spec
from places import ROOT

# runs an example as the fixture `auto_drafts` has it: these two show drafts, which "auto" leaves out where none pays
DRAFTING = ["-c", "import runpy, sys\nfrom mtp_spec.api import LM\nLM.drafts_pay = True\ndel sys.argv[0]\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')"]  # fmt: skip


def run(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONSAFEPATH", None)  # the trainer's files import one another
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def lm() -> mtp_spec.LM:
    return mtp_spec.load()


def test_an_example_runs_as_its_first_line_says() -> None:
    assert " step" in run(ROOT / "examples" / "same_text.py")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("who_wrote_it", "tokens per step instead of 1"),
        ("compare_rules", "coupled"),
        ("logits_processor", "tokens per step"),
        ("json_mode", '"pages"'),
        ("read_statistics", "tokens per second"),
        ("explore_tree", "the target's own token"),
        ("canned_answers", "'canned'"),
    ],
)
def test_short_examples(
    name: str, expected: str, lm: mtp_spec.LM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, so that the model is loaded once."""
    if name == "json_mode":
        pytest.importorskip("llguidance")
    monkeypatch.setattr(mtp_spec, "load", lambda: lm)
    monkeypatch.setattr(sys, "argv", [name, "1"])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    assert expected in capsys.readouterr().out


def test_short_examples_are_short() -> None:
    for file in (ROOT / "examples").glob("*.py"):
        assert len(file.read_text().splitlines()) <= 60, file


def test_a_page_in_the_browser_gets_the_text_as_it_is_written(lm: mtp_spec.LM, tmp_path: Path) -> None:
    command = [sys.executable, *DRAFTING, str(ROOT / "examples" / "stream_web.py"), "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    said = tmp_path / "said.txt"
    with said.open("wb") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        with urlopen(address, timeout=60) as page:
            assert "EventSource" in page.read().decode()
        with urlopen(f"{address}/stream?q=Tell+me+a+story", timeout=60) as leaves:
            leaves.read(10)
        with urlopen(f"{address}/stream?q=Name+a+bird", timeout=60) as stream:
            assert stream.headers["Content-Type"] == "text/event-stream"
            lines = stream.read().decode().splitlines()
    finally:
        server.terminate()
        server.wait(timeout=30)
    assert "Traceback" not in said.read_text()
    assert (lines[-3], lines[-1]) == ("event: end", "")
    seed = json.loads(lines[-2].removeprefix("data: "))["seed"]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-3] if line]
    expected = lm.chat([{"role": "user", "content": "Name a bird"}], max_new_tokens=200, seed=seed)
    assert "".join(event["text"] for event in events) == expected.text
    assert len({event["source"] for event in events}) > 1


def test_a_server_for_many(lm: mtp_spec.LM, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "serve_many.py"), "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    said = tmp_path / "said.txt"
    with said.open("wb") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    questions = ["Name a bird", "Name a fish"]
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        with urlopen(f"{address}/?q=Tell+me+a+story", timeout=60) as leaves:
            leaves.read(10)
        socket.create_connection(("127.0.0.1", urlsplit(address).port)).close()
        streams = [urlopen(f"{address}/?q={question.replace(' ', '+')}", timeout=60) for question in questions]
        answers = [stream.read().decode() for stream in streams]
    finally:
        server.terminate()
        server.wait(timeout=30)
    assert "Traceback" not in said.read_text()
    for question, answer in zip(questions, answers, strict=True):
        *lines, _, end, _ = answer.splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        seed = json.loads(end.removeprefix("data: "))["seed"]
        expected = lm.chat([{"role": "user", "content": question}], max_new_tokens=200, seed=seed)
        assert "".join(event["text"] for event in events) == expected.text


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
    assert "1783 chats" in run(ROOT / "examples" / "train_demo" / "data.py", chats, demo, data)
    small = ["--steps", 1, "--batch", 2, "--context", 32, "--no-compile"]
    train = ROOT / "examples" / "train_demo" / "train.py"
    run(train, "main", data, tmp_path / "one", *small)
    texts = ["--texts", 4, "--text-seconds", 0]
    out = run(train, "mtp", data, tmp_path / "two", "--model", tmp_path / "one", *texts, *small)
    assert '"after": "mtp"' in out
    lm = mtp_spec.load(tmp_path / "two")
    ids = lm.generate([0, 2, 77, 3], max_new_tokens=6, seed=0, speculation=3).token_ids
    assert ids == lm.generate([0, 2, 77, 3], max_new_tokens=6, seed=0, speculation=None).token_ids
    assert json.loads((tmp_path / "two" / "mtp.json").read_text())
    # the second run froze the model: with its modules the first run's folder is the second's
    run(ROOT / "examples" / "train_demo" / "join.py", tmp_path / "one", tmp_path / "two", tmp_path / "three")
    for stored in (tmp_path / "three").glob("model*"):
        assert stored.read_bytes() == (tmp_path / "two" / stored.name).read_bytes()
