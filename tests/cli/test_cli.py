"""The command line, in this process: what it prints, and one line for every mistake."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mtp_spec
from mtp_spec.cli.main import _options, build_parser, main
from mtp_spec.cli.prompts import read_prompts
from places import CONFIGS

CONFIG = str(CONFIGS / "config_671B.json")
SHORT = ["--max-new-tokens", "12"]


def test_generate_streams_text_and_ends_with_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", "Tell me a story about a fox", *SHORT, "--temperature", "0"])
    out, err = capsys.readouterr()
    assert len(out.split()) > 5
    assert "tokens" in err


def test_standard_error_may_be_closed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    main(["generate", "List three fruits", *SHORT, "--seed", "9"])
    text = capsys.readouterr().out
    monkeypatch.setattr("sys.stderr", None)
    main(["generate", "List three fruits", *SHORT, "--seed", "9"])
    assert capsys.readouterr().out == text


def test_no_speculation_and_trees_print_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for options in (["--no-speculation"], ["--depth", "4"], ["--branching", "3,2,1"], []):
        main(["generate", "List three fruits", "--json", "--seed", "9", *SHORT, *options])
        texts.append(json.loads(capsys.readouterr().out))
    assert len({tuple(text["token_ids"]) for text in texts}) == 1
    assert texts[0]["stats"]["drafted"] == 0 < texts[1]["stats"]["drafted"]


def test_n_prints_texts_that_can_be_had_alone(capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", "List three fruits", "--json", "--n", "2", "--seed", "4", *SHORT])
    both = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert both[0]["seed"] == 4 != both[1]["seed"]
    main(["generate", "List three fruits", "--json", "--seed", str(both[1]["seed"]), *SHORT])
    assert json.loads(capsys.readouterr().out)["token_ids"] == both[1]["token_ids"]


def test_prompts_from_a_file_and_from_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "List three fruits"}\n"Name a colour"\n')
    fixed = ["--json", "--seed", "3", *SHORT]
    main(["generate", "--prompts", str(file), *fixed])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["List three fruits", "Name a colour"]
    main(["generate", "--prompts", str(file), "--n", "2", "--max-batch", "3", *fixed])
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in together[::2]] == ["List three fruits", "Name a colour"]
    assert [line["token_ids"] for line in together[::2]] == [line["token_ids"] for line in lines]
    monkeypatch.setattr("sys.stdin", io.StringIO("Name a colour"))
    main(["generate", "-", "--json", "--seed", str(lines[1]["seed"]), *SHORT])
    assert json.loads(capsys.readouterr().out)["token_ids"] == lines[1]["token_ids"]


def test_references_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "windows.txt"
    file.write_bytes("\ufeffOnce\r\nthere".encode())
    args = build_parser().parse_args(["generate", "x", "--reference", str(file)])
    assert _options(args)["speculation"].references == ("Once\nthere",)


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
        (["generate", "x", "--reference", __file__, "--reference", "/no/file"], "--reference /no/file is not"),
        (["generate", "x", "--reference", sys.executable], f"--reference {sys.executable} is not"),
        (["generate", "x", "--device", "tpu"], "device"),
        (["generate", "x", "--dtype", "int4"], "dtype"),
        (["generate", ""], "empty"),
        (["generate"], "prompt"),
        (["generate", "--prompts", "/no/such/file"], "/no/such/file"),
        (["generate", "x", "--colour", "red"], "--colour"),
        (["inspect", "/no/such/folder"], "/no/such/folder"),
        (["bench", "speed", "--prompts", "0"], "--prompts"),
        (["bench", "speed", "--depths", "9"], "depths"),
        (["bench", "speed", "--depths", "1,,2"], "'1,,2': give integers, such as 1,4"),
        (["bench", "replay", "--prompts", "1,2"], "'1,2': give one number"),
        (["bench", "replay", "--acceptance", "x"], "'x': give numbers, such as 0.5,1"),
        (["bench", "acceptance", "--trees", "2-1"], "--trees"),
        (["bench", "acceptance", "--rules", "majority"], "majority"),
        (["generate", "x", "--acceptance", "majority"], "majority"),
        (["generate", "x", "--acceptance", "block", "--branching", "2"], "block"),
        (["generate", "x", "--depth", "0", "--acceptance", "block"], "--depth 0"),
        (["generate", "x", "--no-speculation", "--acceptance", "block"], "--acceptance"),
        (["generate", "x", "--trace", "1", "--json"], "--trace"),
        (["generate", "x", "--trace", "0"], "--trace 0"),
        (["generate", "x", "--logprobs", "2"], "--logprobs needs --json"),
        (["generate", "x", "--trace", "1", "--logprobs", "2"], "--logprobs needs --json"),
        (["generate", "x", "--temperature", "hot"], "'hot'"),
        (["bench", "speed", "--prompts", "many"], "'many'"),
        (["bench", "same-text", "--json", f"{__file__}/new/a.json"], "new/a.json' cannot be written"),
        (["bench", "kernels", "--json", "/"], "'/' is a folder"),
        (["train", "demo"], "OUT"),
        (["generate", "x", "--max-batch", "2"], "--max-batch needs --json"),
        (["generate", "x", "--max-batch", "0", "--json"], "max_batch=0"),
        (["generate", "x", "--input-file", "y"], "--input-file"),
        (["generate", "--input-file", "/nowhere"], "/nowhere"),
        (["generate", "x", "--config", "y"], "needs a path"),
        (["generate", "--interactive", "--json"], "--json"),
        (["generate", "--interactive", "x"], "a prompt"),
        (["inspect", "--card", "H100"], "--card"),
        (["inspect", CONFIG, "--card", "abacus"], "abacus"),
        (["inspect", CONFIG, "--card", "H100", "--copy-rate", "1"], "--copy-rate"),
        (["inspect", CONFIG, "--copy-rate", "0"], "--copy-rate"),
        (["inspect", CONFIG, "--model-parallel", "3"], "--model-parallel 3"),
        (["inspect", CONFIG, "--checksums"], "--checksums"),
        (["inspect", "--checksums"], "--checksums"),
        (["dance"], "dance"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_one_line_for_every_mistake(arguments: list[str], names: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    *before, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("mtp-spec: ")
    assert names in last
    assert all(line.startswith("[") for line in before)  # whether the chat template was used


def test_deepseeks_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    demo = Path(CONFIG).parent / "demo"
    main(["convert", str(demo), str(tmp_path / "ranks"), "--model-parallel", "2"])
    flags = ["--ckpt-path", str(tmp_path / "ranks"), "--config", str(tmp_path / "ranks" / "model_args.json"),
             "--max-new-tokens", "12", "--temperature", "0.2", "--seed", "0"]  # fmt: skip
    lm = mtp_spec.load(tmp_path / "ranks", config=tmp_path / "ranks" / "model_args.json")
    given: list[tuple[Path, Path]] = []

    def load(path: Path, *, config: Path, **options: object) -> mtp_spec.LM:
        given.append((path, config))
        return lm

    monkeypatch.setattr(mtp_spec, "load", load)
    (tmp_path / "prompts.txt").write_text("List three fruits\n\nTell me a story about a fox\n")
    capsys.readouterr()
    main(["generate", *flags, "--input-file", str(tmp_path / "prompts.txt")])
    answers = capsys.readouterr().out
    assert answers.startswith("Prompt: List three fruits\nCompletion: ")
    assert answers.count("Completion: ") == 2
    messages = [{"role": "user", "content": "List three fruits"}]
    answer = lm.chat(messages, max_new_tokens=12, temperature=0.2, seed=0).text
    assert f"Completion: {answer}\n" in answers
    monkeypatch.setattr("sys.stdin", io.StringIO("List three fruits\n/exit\n"))
    main(["generate", *flags, "--interactive"])
    assert answer.strip() in capsys.readouterr().out
    assert given == [(tmp_path / "ranks", tmp_path / "ranks" / "model_args.json")] * 2
    main(["inspect", str(tmp_path / "ranks"), "--checksums"])
    assert "every tensor agrees" in capsys.readouterr().err
    with (tmp_path / "ranks" / "mtp1-mp2.safetensors").open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"?")
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "ranks"), "--checksums"])
    assert "1 tensors differ" in capsys.readouterr().err


def test_estimates_of_the_largest_model(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", CONFIG, "--json", "--card", "h100", "--model-parallel", "8"])
    many = json.loads(capsys.readouterr().out)
    main(["inspect", CONFIG, "--json"])
    one = json.loads(capsys.readouterr().out)
    # 671 billion numbers, 37 billion active, nearly all of them a byte (2412.19437)
    assert one["weight_bytes"] == one["whole_bytes"] == pytest.approx(671e9, rel=0.01)
    assert one["read_bytes_per_token"] == pytest.approx(37e9, rel=0.03)
    assert one["cache_bytes_per_token"] == 61 * (512 + 64) * 2
    assert one["tokens_per_second_at_best"] is None
    assert one["whole_bytes"] / 8 < many["weight_bytes"] < one["whole_bytes"] / 8 * 1.03
    assert many["tokens_per_second_at_best"] == many["copy_rate_tb_per_s"] * 1e12 / many["read_bytes_per_token"]
    main(["inspect", CONFIG, "--copy-rate", "3"])
    assert "estimate, bytes read over 3.0 TB/s" in " ".join(capsys.readouterr().out.replace("│", "").split())


def test_lines_of_prompts_are_those_of_json(tmp_path: Path) -> None:
    def read(**given: Any) -> list[str]:
        return read_prompts(argparse.Namespace(**{"prompt": None, "prompts": None, "input_file": None, **given}))

    file = tmp_path / "prompts"
    file.write_text('\ufeff{"prompt": "Hi\u2028there\x85"}\r\n\n"second"\n', encoding="utf-8", newline="")
    assert read(prompts=file) == ["Hi\u2028there\x85", "second"]
    file.write_text("\ufeffone\u2028more\r\n\n two\n", encoding="utf-8", newline="")
    assert read(input_file=file) == ["one\u2028more", "two"]
    file.write_text("\n\n")
    for option in ("prompts", "input_file"):
        with pytest.raises(mtp_spec.OptionError, match="holds no prompt"):
            read(**{option: file})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_an_output_that_takes_nothing_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-P", "-m", "mtp_spec", "inspect"], stdout=full, stderr=subprocess.PIPE,
                             text=True, check=False)  # fmt: skip
    assert run.returncode == 2
    assert run.stderr == "mtp-spec: [Errno 28] No space left on device\n"
