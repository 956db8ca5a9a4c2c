"""`bench cpu-peers` without the peers: what it refuses, how it talks with another Python, what its table says."""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from mtp_spec.bench import cpu
from mtp_spec.bench.peers import process, steps, texts
from mtp_spec.bench.peers.gguf_worker import _e4m3
from mtp_spec.bench.peers.process import Peer, PeerError
from mtp_spec.bench.peers.texts import Timed
from mtp_spec.cli.main import build_parser, main
from mtp_spec.errors import MTPSpecError, OptionError

HERE = sys.executable


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(texts, "run_job", never)
    monkeypatch.setattr(steps, "run_job", never)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "cpu-peers", *arguments])
    assert ended.value.code
    return " ".join((str(ended.value.code) + capsys.readouterr().err).split())


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --vllm-python or --llama-python"),
        (["--vllm-python", HERE, "--llama-python", HERE], "one of the two at a time"),
        (["--vllm-python", "/nowhere/python"], "--vllm-python /nowhere/python: cannot be started"),
        (["--llama-python", "/nowhere/python"], "pip install llama-cpp-python gguf numpy"),
        (["--vllm-python", "/bin/true"], "is no Python"),
        (["--vllm-python", HERE, "--folder", "/nowhere"], "--folder /nowhere is no folder"),
        (["--vllm-python", HERE, "--vllm-preload", "/nowhere/libx.so"], "/nowhere/libx.so is no file"),
        (["--vllm-python", HERE, "--depths", "99"], "a chain has at most"),
        (["--vllm-python", HERE, "--threads", "0"], "give numbers of 1 or more"),
    ],
)
def test_refused_before_work(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refusal(capsys, *arguments)


@pytest.mark.usefixtures("no_work")
def test_a_python_without_the_peer_is_told_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtp_spec.bench.peers import command

    monkeypatch.setattr(command, "VLLM", {"json": "a", "no_such_peer": "no-such-peer"})
    said = refusal(capsys, "--vllm-python", HERE)
    assert f"--vllm-python {HERE}: has no no_such_peer; python -m venv PEER" in said
    assert "has no json" not in said


def test_a_model_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def asked(*more: str) -> Namespace:
        return build_parser().parse_args(
            ["bench", "cpu-peers", "--llama-python", HERE, "--folder", str(tmp_path), *more]
        )

    full = steps.published_config()
    for experts in (full.num_experts_per_tok - 1, full.n_routed_experts + 1):
        with pytest.raises(OptionError, match=f"--experts {experts}: 4 to 64"):
            steps.shape(asked("--experts", str(experts)))
    monkeypatch.setattr(cpu, "free_memory", lambda: 10**15)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Namespace(free=10**15))
    assert steps.shape(asked("--experts", "8")).n_routed_experts == 8
    monkeypatch.setattr(cpu, "free_memory", lambda: 10**9)
    with pytest.raises(OptionError, match=r"the pair of models needs .* GB, memory has 1\.0 left"):
        steps.shape(asked())


def program(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    monkeypatch.setattr(process, "HERE", folder)
    (folder / "worker.py").write_text("import json, os, sys\n" + text)
    return "worker.py"


def test_a_peer_answers_and_knows_nothing_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    text = (
        "print(json.dumps({'asked': json.loads(sys.argv[1]), 'path': os.environ.get('PYTHONPATH'),"
        " 'more': os.environ['MORE']}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    print(json.dumps({'twice': 2 * json.loads(line)['x']}), flush=True)\n"
    )
    with Peer(Path(HERE), program(tmp_path, monkeypatch, text), {"a": 1}, {"MORE": "yes"}) as peer:
        assert peer.facts == {"asked": {"a": 1}, "path": None, "more": "yes"}
        assert [peer.ask(x=x) for x in (1, 2)] == [{"twice": 2}, {"twice": 4}]
        running = peer._process
    assert running.returncode == 0


@pytest.mark.parametrize("ready", ["", "print('{}', flush=True)\nsys.stdin.readline()\n"])
def test_a_peer_that_ends_tells_its_last_words(ready: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = program(tmp_path, monkeypatch, ready + "print('the disk is full', file=sys.stderr)\nsys.exit(3)\n")
    with (
        pytest.raises(PeerError, match=r"worker\.py ended with 3:\nthe disk is full"),
        Peer(Path(HERE), name, {}, {}) as peer,
    ):
        peer.ask(x=1)


def test_ratios_are_those_of_each_prompt_and_the_best_is_the_fastest() -> None:
    def written(ids: list[int], per_step: float, *seconds: float) -> list[Timed]:
        return [Timed(ids, one, one / 2, per_step) for one in seconds]

    rows = texts.table({
        "mtp_spec plain": written([1, 2, 3, 4], 1.0, 4.0, 4.0, 4.0),
        "vLLM plain": written([1, 2, 9, 4], 1.0, 8.0, 16.0, 12.0),
        "vLLM MTP 1": written([1, 2, 3, 4], 1.5, 8.0, 8.0, 8.0),
        "vLLM MTP 2": written([1, 2, 3, 4], 2.5, 6.0, 6.0, 60.0),
    }, 1)  # fmt: skip
    assert [row[texts.OVER_PLAIN] for row in rows] == [3.0, 1.0, 1.5, 8 / 6]
    assert [row["by CPU time"] for row in rows] == [3.0, 1.0, 1.5, 8 / 6]
    assert [row[texts.OVER_MTP] for row in rows] == [1.5, 0.75, 0.75, 1.0]
    assert [row["tokens a step"] for row in rows] == [1.0, 1.0, 1.5, 2.5]
    assert [row["first as ours"] for row in rows] == [4, 2, 4, 4]
    assert rows[0]["tokens/s"] == 1.0
    with pytest.raises(MTPSpecError, match=r"its first 2\.0 tokens in common with ours in the mean"):
        texts.check_same(rows)
    said = texts.note(rows, 1, {"vllm": "0.1", "torch": "2"})
    assert "our plain is 3.00 times vLLM's plain; our best (mtp_spec plain) is 1.50 times its best MTP" in said


def test_a_way_that_ends_early_is_an_error() -> None:
    ways: dict[str, texts.Way] = {"vLLM plain": lambda ids, tokens: Timed(ids, 1.0, 1.0, 1.0)}
    assert texts._in_turn(ways, 0, [1, 2], 2)["vLLM plain"].ids == [1, 2]
    with pytest.raises(MTPSpecError, match="vLLM plain wrote 2 of 3 tokens"):
        texts._in_turn(ways, 0, [1, 2], 3)


def test_steps_are_compared_round_by_round() -> None:
    def rounds(*seconds: float) -> list[steps.Steps]:
        return [{"seconds": [one, one, 99.0], "cpu": [one / 2, 0.0, 99.0]} for one in seconds]

    taken = {steps.OURS: rounds(1.0, 2.0, 1.0), steps.THEIRS: rounds(3.0, 2.0, 2.0)}
    own, theirs = steps.table(taken, {steps.OURS: 4e9, steps.THEIRS: 6e9}, 2)
    assert (own["times llama.cpp"], own["by CPU time"], own["tokens/s"], own["GB/s"]) == (2.0, 2.0, 1.0, 4.0)
    assert (theirs["times llama.cpp"], theirs["tokens/s"], theirs["GB/s"]) == (1.0, 0.5, 3.0)


def test_e4m3_is_torchs() -> None:
    import torch

    codes = torch.arange(256, dtype=torch.uint8)
    known = codes.view(torch.float8_e4m3fn).float().tolist()
    for code, value in enumerate(known):
        if value == value:  # not NaN
            assert _e4m3(code) == value, code


def test_the_document_is_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mtp_spec.bench.common import Report
    from mtp_spec.bench.peers import command

    monkeypatch.setattr(command, "check_python", lambda *_: None)
    monkeypatch.setattr(command, "texts", lambda args: Report("t", [{"way": "x", "n": args.prompts}], {"vLLM": "v"}))
    main(["bench", "cpu-peers", "--vllm-python", "x", "--prompts", "3", "--json", str(tmp_path / "d.json")])
    document = json.loads((tmp_path / "d.json").read_text())
    assert document["rows"] == [{"way": "x", "n": 3}]
    assert document["vLLM"] == "v"
    assert document["options"]["depths"] == [1, 2, 3]
    assert document["benchmark"] == "cpu-peers"
    assert {"processor", "cores", "torch", "command"} <= set(document)
