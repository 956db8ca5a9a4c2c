"""The command line, in this process: what it prints, and one line for every mistake."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from mtp_spec.cli import main

SHORT = ["--max-new-tokens", "12"]


def test_generate_streams_text_and_ends_with_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", "Tell me a story about a fox", *SHORT, "--temperature", "0"])
    out, err = capsys.readouterr()
    assert len(out.split()) > 5
    assert "tokens" in err


def test_no_speculation_and_trees_print_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for options in (["--no-speculation"], ["--depth", "4"], ["--branching", "3,2,1"], []):
        main(["generate", "List three fruits", "--json", "--seed", "9", *SHORT, *options])
        texts.append(json.loads(capsys.readouterr().out))
    assert len({tuple(text["token_ids"]) for text in texts}) == 1
    assert texts[0]["stats"]["drafted"] == 0 < texts[1]["stats"]["drafted"]


def test_n_prints_one_text_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", "List three fruits", "--json", "--n", "2", "--seed", "4", *SHORT])
    both = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["seed"] for one in both] == [4, 5]
    main(["generate", "List three fruits", "--json", "--seed", "5", *SHORT])
    assert json.loads(capsys.readouterr().out)["token_ids"] == both[1]["token_ids"]


def test_prompts_from_a_file_and_from_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "List three fruits"}\n"Name a colour"\n')
    main(["generate", "--prompts", str(file), "--json", *SHORT])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["List three fruits", "Name a colour"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Name a colour"))
    main(["generate", "-", "--json", *SHORT])
    assert json.loads(capsys.readouterr().out)["token_ids"] == lines[1]["token_ids"]


def test_inspect_describes_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect"])
    assert "MTP" in capsys.readouterr().out
    main(["inspect", "--json"])
    json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["generate", "x", "--model", "/no/such/folder"], "/no/such/folder"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--top-p", "0"], "top_p"),
        (["generate", "x", "--max-new-tokens", "0"], "max_new_tokens"),
        (["generate", "x", "--depth", "9"], "depth"),
        (["generate", "x", "--n", "0"], "n=0"),
        (["generate", "x", "--branching", "9,9,9"], "64"),
        (["generate", "x", "--branching", "a"], "branching"),
        (["generate", "x", "--device", "tpu"], "device"),
        (["generate", "x", "--dtype", "int4"], "dtype"),
        (["generate", ""], "empty"),
        (["generate"], "prompt"),
        (["generate", "--prompts", "/no/such/file"], "/no/such/file"),
        (["generate", "x", "--colour", "red"], "--colour"),
        (["inspect", "/no/such/folder"], "/no/such/folder"),
        (["bench", "speed", "--prompts", "0"], "--prompts"),
        (["bench", "speed", "--depths", "9"], "depths"),
        (["bench", "acceptance", "--rules", "all", "--depths", "2"], "--rules"),
        (["bench", "acceptance", "--rules", "majority"], "majority"),
        (["generate", "x", "--acceptance", "majority"], "majority"),
        (["generate", "x", "--acceptance", "block", "--branching", "2"], "block"),
        (["generate", "x", "--depth", "0", "--acceptance", "block"], "--depth 0"),
        (["generate", "x", "--no-speculation", "--acceptance", "block"], "--acceptance"),
        (["generate", "x", "--trace", "1", "--json"], "--trace"),
        (["generate", "x", "--trace", "0"], "steps"),
        (["dance"], "dance"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_one_line_for_every_mistake(arguments: list[str], names: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert names in last
    assert "Traceback" not in last
