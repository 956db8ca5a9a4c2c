"""`train` and `mtp-spec train`, from a file of lines to modules that draft."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mtp_spec
import worded
from device_models import checkpoint
from mtp_spec.cli.main import main
from mtp_spec.errors import MTPSpecError
from mtp_spec.model.cuda.checkpoint import load_device_model
from mtp_spec.model.rope import rope_table
from mtp_spec.model.training import ModulesForward
from mtp_spec.training import loop
from mtp_spec.training.backbone import Backbone, States
from mtp_spec.training.card import verdict
from mtp_spec.training.heldout import Comparison, Texts, compare
from mtp_spec.training.modules import new_modules
from mtp_spec.training.options import TrainOptions
from mtp_spec.training.team import Team
from mtp_spec.training.texts import Corpus
from together import together

PROMPTS = Path(str(files("mtp_spec.configs") / "prompts.jsonl"))


def test_a_random_module_learns_to_draft_on_two_cores(tmp_path: Path) -> None:
    """The bundled model without its module: from nothing to more than 0.3 at depth 1, on held-out prompts."""
    entries = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    some = worded.lines(tmp_path / "prompts.jsonl", [{"prompt": one["prompt"]} for one in entries[:56]])
    made = mtp_spec.train(
        None, tmp_path / "head", prompts=some, depth=1, loss="kl", steps=36, batch_tokens=512, answer_tokens=64,
        max_tokens=160, held_out=0.1, check_tokens=48, check_temperatures=(0.0,), temperatures=(0.0,), batch=16,
        check_every=1000,
    )  # fmt: skip
    first, *_, last = [line for line in made.log if line.get("held_out")]
    assert first["greedy"][0] < 0.1
    assert last["greedy"][0] > 0.3
    assert made.accepted[0].rates[0] > 0.3
    # what was measured is what users get
    lm = mtp_spec.load(mtp=made.folder, measure=False)
    assert lm.config.module(0).intermediate_size == lm.config.intermediate_size
    out = lm.generate("Tell me a story about a fox", max_new_tokens=24, seed=1, speculation=3)
    same = mtp_spec.load(measure=False).generate("Tell me a story about a fox", max_new_tokens=24, seed=1)
    assert out.token_ids == same.token_ids
    assert out.stats.accepted > 0
    # it was measured against the module that the bundled model ships, which is better
    assert not made.better
    assert "Not better than the checkpoint's own modules: lost on all at temperature 0.0" in made.verdict
    assert made.verdict in (made.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "a dense block of 64"),
        ({"width": 24, "modules": 2, "max_tokens": 1024}, "a dense block of 24"),
        ({"block": "moe", "optimiser": "muon", "loss": "tv:0.9,ce:0.1"}, "experts"),
    ],
)
def test_a_model_without_modules_gets_some(
    plain: Path, lines: Path, tmp_path: Path, options: dict[str, Any], kind: str
) -> None:
    before = {file.name: file.read_bytes() for file in plain.iterdir()}
    made = mtp_spec.train(plain, tmp_path / "head", texts=lines, **{**worded.FEW, **options})
    assert {file.name: file.read_bytes() for file in plain.iterdir()} == before
    lm = mtp_spec.load(plain, mtp=made.folder, measure=False)
    assert len(lm.model.mtp) == options.get("modules", 1)
    assert str(lm.config.module(0)) == kind
    steps = [line["loss"] for line in made.log if "held_out" not in line]
    assert len(steps) == 6
    assert min(steps[3:]) < steps[0]
    assert sorted(file.name for file in made.folder.iterdir()) == [
        "README.md", "loss.png", "mtp.json", "mtp.safetensors", "train.json"
    ]  # fmt: skip
    assert not (tmp_path / "head.part").exists()
    tensors = load_file(made.folder / "mtp.safetensors")
    assert all(name.startswith("model.layers.3.") or options.get("modules") == 2 for name in tensors)
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if ".mlp.gate." in name else torch.bfloat16), name
    said = json.loads((made.folder / "mtp.json").read_text())
    assert said["options"]["depth"] == 2
    assert said["options"]["max_tokens"] == min(options.get("max_tokens", 80), 256)  # the model's limit
    assert said["data"]["domains"] == ["a", "b"]
    assert {(one["domain"], one["temperature"]) for one in said["after"]} == {
        (domain, temperature) for domain in "ab" for temperature in (0.0, 0.8)
    }
    assert all(one["rates"] == [] for one in said["before"])  # plain decoding
    text = lm.generate([5, 6, 7], max_new_tokens=12, seed=2, speculation=3).token_ids
    assert text == mtp_spec.load(plain, measure=False).generate([5, 6, 7], max_new_tokens=12, seed=2).token_ids


def test_shipped_modules_go_on_learning(v3: Path, lines: Path, tmp_path: Path) -> None:
    made = mtp_spec.train(v3, tmp_path / "head", texts=lines, start="shipped", rate=1e-9, **worded.FEW)
    lm, own = mtp_spec.load(v3, mtp=made.folder, measure=False), mtp_spec.load(v3, measure=False)
    ids = list(range(20))
    same = torch.nn.functional.cosine_similarity(lm.score(ids).mtp_logits[0, :-1], own.score(ids).mtp_logits[0, :-1])
    assert float(same.min()) > 0.99  # with no rate to speak of, they are what they were, in bfloat16


def test_answers_are_the_models_own(v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a seed and temperature for each prompt: alone as beside others, and kept when a run goes on."""
    entries = [{"prompt": worded.words(6, number), "category": "ab"[number % 2]} for number in range(20)]
    prompts = worded.lines(tmp_path / "prompts.jsonl", entries)
    monkeypatch.setattr(loop.Trainer, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        mtp_spec.train(
            v3, tmp_path / "head", prompts=prompts, seed=5, temperatures=(0.0, 1.0), answer_tokens=9, **worded.FEW
        )
    corpus, lm = Corpus(tmp_path / "head.part" / "texts", 0.25), mtp_spec.load(v3, measure=False)
    assert len(corpus.texts) == 20
    for text in corpus.texts:
        ids = corpus.ids(text).tolist()
        alone = lm.generate(ids[: text.prompt], max_new_tokens=9, temperature=float(text.line % 2), seed=5 + text.line)
        assert ids == lm.encode(entries[text.line]["prompt"]) + alone.token_ids
    corpus.close()


def test_prompts_without_room_for_an_answer_are_told(v3: Path, tmp_path: Path) -> None:
    """Some are left out, which is said; if all are, the error says why."""
    said, few = list[str](), {**worded.FEW, "answer_tokens": 9}
    long = [{"prompt": worded.words(80 + number, number)} for number in range(3)]
    short = [{"prompt": worded.words(6, number)} for number in range(12)]
    prompts = worded.lines(tmp_path / "prompts.jsonl", [*short, *long])
    mtp_spec.train(v3, tmp_path / "head", prompts=prompts, progress=said.append, **few)
    assert "3 lines have a prompt that leaves no room in max_tokens=80, or nothing to learn: left out" in said
    assert any(line.startswith("12 texts, ") for line in said)
    with pytest.raises(MTPSpecError, match="no text to train on: each line has a prompt that leaves no room in max_to"):
        mtp_spec.train(v3, tmp_path / "none", prompts=worded.lines(prompts, long), **few)


def test_a_host_by_another_name_or_without_the_engine(
    v3: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch hidden states have the 16 bits of the stored weights, beside modules and a head in float32."""
    few = {**worded.FEW, "steps": 2}
    made = [mtp_spec.train(v3, tmp_path / str(at), texts=lines, device=device, **few)
            for at, device in enumerate(("cpu", "cpu:0", torch.device("cpu")))]  # fmt: skip
    assert made[0].log == made[1].log == made[2].log
    assert (made[0].folder / "mtp.safetensors").stat().st_mode & 0o444 == 0o444  # others may draft with them
    monkeypatch.setenv("MTP_SPEC_CPU", "torch")
    for dtype in (None, "bfloat16", "float32"):
        by_torch = mtp_spec.train(v3, tmp_path / f"torch-{dtype}", texts=lines, dtype=dtype, **few)
        assert by_torch.log[0]["loss"] == pytest.approx(made[0].log[0]["loss"], rel=1e-2)


SCRIPT = """
import sys, json, mtp_spec
from mtp_spec.training import loop
model, out, texts, few = sys.argv[1:]
run, one = loop.Trainer.run, loop.Trainer.one
def told(self):
    print("step", self.step, flush=True)
    return one(self)
loop.Trainer.one = told
mtp_spec.train(model, out, texts=texts, **json.loads(few))
"""


def test_a_killed_run_goes_on_to_the_same_bits(v3: Path, lines: Path, tmp_path: Path) -> None:
    """kill -9 between two saved states: the same losses and weights as in one go."""
    few = {**worded.FEW, "steps": 7, "block": "moe", "check_temperatures": [0.0]}
    whole = mtp_spec.train(v3, tmp_path / "whole", texts=lines, **few)
    arguments = [sys.executable, "-c", SCRIPT, str(v3), str(tmp_path / "killed"), str(lines), json.dumps(few)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.strip() == "step 5":
                run.send_signal(signal.SIGKILL)
                break
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    state = tmp_path / "killed.part" / "state.pt"
    assert torch.load(state)["step"] == 4
    with pytest.raises(MTPSpecError, match="belongs to a run with other options"):
        mtp_spec.train(v3, tmp_path / "killed", texts=lines, **{**few, "seed": 1})
    saved = state.read_bytes()
    state.write_bytes(saved[:999])
    with pytest.raises(MTPSpecError, match=r"state\.pt cannot be read .* delete it to train from the first step"):
        mtp_spec.train(v3, tmp_path / "killed", texts=lines, **few)
    state.write_bytes(saved)
    again = mtp_spec.train(v3, tmp_path / "killed", texts=lines, **few)
    assert again.log == whole.log
    for name, tensor in load_file(whole.folder / "mtp.safetensors").items():
        assert torch.equal(tensor, load_file(again.folder / "mtp.safetensors")[name]), name
    assert again.accepted == whole.accepted


def test_held_out_texts_may_have_a_file_of_their_own(plain: Path, lines: Path, tmp_path: Path) -> None:
    """A text to train on that begins like a held-out one is held out, too."""
    held = worded.texts(tmp_path / "held.jsonl", count=3)
    made = mtp_spec.train(plain, tmp_path / "head", texts=lines, **{**worded.FEW, "held_out": held, "steps": 1})
    said = json.loads((made.folder / "mtp.json").read_text())["data"]
    assert (said["texts"], said["held out"], said["left out"]) == (24, 3, 3)


def test_settings_of_the_caller_change_nothing(v3: Path, lines: Path, tmp_path: Path) -> None:
    few = {**worded.FEW, "steps": 3, "check_temperatures": (0.0,)}
    one = mtp_spec.train(v3, tmp_path / "one", texts=lines, **few)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            other = mtp_spec.train(v3, tmp_path / "other", texts=lines, **few)
    finally:
        torch.set_default_dtype(torch.float32)
    assert one.log == other.log


def comparison(domain: str, before: float, after: float, low: float = 1.1) -> Comparison:
    return Comparison(domain, 0.0, before, after, low, 1.5)


def test_a_head_that_lost_a_domain_is_not_called_better() -> None:
    gained = comparison("a", 2.0, 2.5)
    assert verdict([gained, comparison("all domains", 2.0, 2.4)], True)[0]
    better, said = verdict([gained, comparison("b", 2.0, 1.9), comparison("all domains", 2.0, 2.4)], True)
    assert not better
    assert said == "Not better than the checkpoint's own modules: lost on b at temperature 0.0 (2.000 -> 1.900)."
    better, said = verdict([gained, comparison("all domains", 2.0, 2.01, 0.9)], False)
    assert not better
    assert "within the noise" in said
    better, said = verdict([comparison("a", 0.0, 0.0), gained], False)
    assert not better
    assert said.startswith("Nothing was measured on a at temperature 0.0: ")


def test_comparisons_are_of_sums_and_their_intervals_cover_them() -> None:
    before = [Texts("a", 0.0, (10, 30), (10, 10), ()), Texts("b", 0.0, (20,), (10,), ())]
    after = [Texts("b", 0.0, (30,), (10,), (0.5,)), Texts("a", 0.0, (20, 60), (10, 10), (0.5,))]
    one, other, whole = compare(before, after)
    assert (one.before, one.after, one.low, one.high) == (2.0, 4.0, 2.0, 2.0)
    assert (other.before, other.after) == (2.0, 3.0)
    assert whole.domain == "all domains"
    assert [whole.before, whole.after] == pytest.approx([2.0, 110 / 30])
    assert whole.low <= whole.after / whole.before <= whole.high


def test_command_line(plain: Path, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [f"--{name.replace('_', '-')}={value}" for name, value in worded.FEW.items()]
    main(["train", str(plain), str(tmp_path / "head"), "--texts", str(lines), "--check-temperatures", "0.5", *few])
    out = capsys.readouterr().out
    assert "memory beside the model" in out
    assert "step 6/6" in out
    assert "accepted by depth" in out
    main(["generate", "w1 w2", "--model", str(plain), "--mtp", str(tmp_path / "head"), "--depth", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["stats"]["drafted"] > 0
    asked = worded.lines(tmp_path / "asked.jsonl", [{"prompt": worded.words(5, 1)}])
    few = ["--depths", "1", "--temperatures", "0", "--max-new-tokens", "6", "--raw", "--json", str(tmp_path / "b.json")]
    main(["bench", "acceptance", "--model", str(plain), "--mtp", str(tmp_path / "head"), "--set", str(asked), *few])
    assert json.loads((tmp_path / "b.json").read_text())["options"]["mtp"] == str(tmp_path / "head")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["train", str(plain), str(tmp_path / "other"), "--texts", str(lines), "--from", "shipped"])
    assert "--from 'shipped': " in capsys.readouterr().err


@pytest.mark.parametrize("block", ["dense", "moe"])
def test_on_the_kernels_products_have_16_bits_and_weights_32(tmp_path: Path, block: str) -> None:
    """As on a GPU, by the references: FP8 main model, its bfloat16 embedding and head, float32 masters."""
    folder = checkpoint(tmp_path, "v3")
    model = load_device_model(folder, "cpu")
    corpus = Corpus(tmp_path / "texts", 0.2)
    for line in range(8):
        ids = [(7 * at + line) % 90 for at in range(12 + line)]
        corpus.add("texts", line, ids, [(1, len(ids))], "a")
    options = TrainOptions(texts=folder / "config.json", depth=2, steps=12, batch_tokens=64, rate=3e-3)
    modules = new_modules(model.config, 48 if block == "dense" else None, 1, 0, "cpu")
    table = rope_table(model.config, 64, "cpu")
    forward = ModulesForward(list(modules), model.embed_tokens, model.lm_head, lambda length: table)
    states = States(Backbone(model), corpus, tmp_path / "states.bin", 10**6)
    before, said = {name: tensor.clone() for name, tensor in modules.state_dict().items()}, list[str]()
    trainer = loop.Trainer.of(options, forward, modules, corpus, states, Team("cpu"))
    trainer.run(tmp_path / "state.pt", said.append)
    assert {parameter.dtype for parameter in modules.parameters()} == {torch.float32}
    losses = [line["loss"] for line in trainer.log if not line.get("held_out")]
    assert len(losses) == 12
    assert losses[-1] < 0.9 * losses[0]
    assert "step 12/12" in said[-1]
    modules.load_state_dict(before)
    again = loop.Trainer.of(options, forward, modules, corpus, states, Team("cpu"))
    for load in forward.load:
        if load is not None:
            load.zero_()
    with torch.autocast("cpu", enabled=False):  # a caller's, inside of which torch keeps weights that were rounded
        again.run(tmp_path / "again.pt", said.append)
    assert again.log == trainer.log


def test_two_processes_train_what_one_does(v3: Path, lines: Path, tmp_path: Path) -> None:
    """Each on its part of every batch, with gradients summed; the batch of a single text leaves one without any.

    An error of the first process is the other's, too.
    """
    few = {**worded.FEW, "block": "moe", "steps": 10, "batch_tokens": 130, "check_temperatures": [0.0]}
    alone = mtp_spec.train(v3, tmp_path / "alone", texts=lines, **few)
    bad = worded.texts(tmp_path / "one.jsonl", count=1)
    good = tmp_path / "texts.jsonl"
    good.write_bytes(lines.read_bytes())
    (refused, one), (likewise, other) = together(v3, json.dumps(few), bad, good)
    assert "leaves no text to train on" in refused
    assert likewise == f"the first process ended with OptionError: {refused}"
    assert one == other  # the first process's result on both
    assert one[1] == pytest.approx([line["loss"] for line in alone.log], rel=1e-4)
    both = load_file(tmp_path / "texts.jsonl.head" / "mtp.safetensors")
    for name, tensor in load_file(alone.folder / "mtp.safetensors").items():
        torch.testing.assert_close(both[name].float(), tensor.float(), rtol=0.02, atol=0.02)
    assert json.loads((tmp_path / "texts.jsonl.head" / "mtp.json").read_text())["training"]["processes"] == 2
    assert not (tmp_path / "texts.jsonl.head.part").exists()
