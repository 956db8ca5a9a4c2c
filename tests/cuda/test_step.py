"""The FP8 model and its captured steps: on a CPU by the kernels' references, on a GPU (`pytest -m gpu`) as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mtp_spec
from device_models import KINDS, SAMPLING, SHAPES, SIZES, OnceThenAgain, checkpoint, device_lm
from lms import lm_of, module_caches, runtime
from mtp_spec.analysis.scoring import score_ids
from mtp_spec.cpu.draft import Drafter
from mtp_spec.cuda.state import State
from mtp_spec.cuda.step import Prefill
from mtp_spec.errors import MTPSpecError, OptionError
from mtp_spec.kernels import commit, mla, moe
from mtp_spec.model.checkpoint.folder import load_checkpoint, open_checkpoint
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.cuda.checkpoint import fp8_obstacle, load_device_model
from mtp_spec.model.cuda.layers import Mixture, Store
from mtp_spec.model.moe import Gate
from mtp_spec.model.training import chosen_experts
from mtp_spec.speculation import MAX_DEPTH, Speculation
from mtp_spec.tree import ROOT, TokenTree
from mtp_spec.tree_shape import TreeShape
from places import SUPPORT
from short_demo import short_demo


@pytest.mark.parametrize("kind", KINDS)
def test_same_logits_as_the_dequantised_model(tmp_path: Path, kind: str) -> None:
    # apart only by the rounding of activations to FP8 and bfloat16; a wrong scale or order is far off. All experts are
    # chosen, because a random gate's near ties would flip: the choice has a test of its own
    folder = checkpoint(tmp_path, kind, num_experts_per_tok=8, topk_group=KINDS[kind].get("n_group", 4))
    assert fp8_obstacle(open_checkpoint(folder)) is None
    ids = [(37 * i) % 160 for i in range(80)]
    wide = score_ids(load_checkpoint(folder, dtype=torch.float32), ids)
    got = score_ids(load_device_model(folder, "cpu"), ids)
    assert (got.logits - wide.logits).norm() / wide.logits.norm() < 0.12
    assert got.mtp_logits.shape == wide.mtp_logits.shape
    for depth, (theirs, expected) in enumerate(zip(got.mtp_logits, wide.mtp_logits, strict=True), start=1):
        assert theirs[-depth:].isnan().all()
        assert (theirs - expected)[:-depth].norm() / expected[:-depth].norm() < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_same_experts_as_the_gate(kind: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(**{**SIZES, **KINDS[kind]})
    gate = Gate(config, "cpu")
    store = Store(torch.device("cpu"), lambda name: True, router=torch.float32)
    mixture = Mixture(config, store, "model.layers.0.mlp")
    with torch.no_grad():
        gate.weight.normal_()
        mixture.router.copy_(gate.weight)
        if gate.e_score_correction_bias is not None and mixture.bias is not None:
            gate.e_score_correction_bias.normal_(0, 0.2)
            mixture.bias.copy_(gate.e_score_correction_bias)
        x = torch.randn(50, config.hidden_size) * 0.1
        weights, indices = chosen_experts(gate, x)
    got, got_weights = moe.gate(x, mixture.router, mixture.bias, mixture.routing)
    chosen = config.num_experts_per_tok
    assert torch.equal(got[:, :chosen].long(), indices)
    torch.testing.assert_close(got_weights[:, :chosen], weights)
    assert (got_weights[:, chosen:] == 1).all()
    assert got.shape[1] == chosen + config.n_shared_experts


def test_every_place_is_filled(tmp_path: Path) -> None:
    model = load_device_model(checkpoint(tmp_path, "two shared experts"), "cpu")
    clean = load_device_model(tmp_path / "model", "cpu")
    for name, slot in model.checkpoint_slots().items():
        raw = slot.view(torch.uint8) if slot.dtype == torch.float8_e4m3fn else slot
        raw.zero_()
        assert clean.checkpoint_slots()[name].float().abs().max() > 0, name
    experts: list[Any] = [layer.mlp for layer in model.layers[1:]]
    assert all(not t.float().any() for mlp in experts for t in (mlp.experts.gate_up, mlp.experts.down))


@pytest.mark.parametrize("sampling", SAMPLING, ids=lambda s: str(s)[:40])
def test_same_text_whatever_is_drafted(sampling: dict[str, Any]) -> None:
    lm = device_lm(short_demo())
    prompt = lm.encode("One day a fox")
    plain = lm.generate(prompt, max_new_tokens=9, seed=3, speculation=None, **sampling)
    for shape in SHAPES[1:]:
        out = lm.generate(prompt, max_new_tokens=9, seed=3, speculation=shape, **sampling)
        assert (out.token_ids, out.text) == (plain.token_ids, plain.text)
        assert out.stats.new_tokens == 9
        assert out.stats.accepted <= out.stats.drafted


@pytest.mark.parametrize("modules", [1, 2, 3])
def test_modules_hold_the_text_whatever_was_drafted(tmp_path: Path, modules: int) -> None:
    folder = checkpoint(tmp_path, "v3", num_nextn_predict_layers=modules)
    for prompt in ([5], [(37 * i) % 160 for i in range(12)]):
        texts = []
        for shape in SHAPES[::2] if prompt == [5] else SHAPES[::3]:
            lm = device_lm(folder)
            # forbidding most tokens makes random drafts right now and then
            out = lm.generate(prompt, max_new_tokens=24, seed=1, speculation=shape, top_k=4,
                              logit_bias={token: -float("inf") for token in range(6, 160)})  # fmt: skip
            texts.append(out.token_ids)
            if shape is None:
                continue
            assert out.stats.accepted > 0
            got, expected, text = module_caches(lm), State(lm.model, 300), [*prompt, *out.token_ids]
            Prefill(lm.model, expected, len(text), True)(torch.tensor(text), 0)
            for module, (ours, theirs) in enumerate(zip(got, expected.mtp_caches, strict=True)):
                known = len(text) - 1 - module - (MAX_DEPTH + 1)
                torch.testing.assert_close(ours.slots[:known], theirs.slots[:known], rtol=0.02, atol=0.02)
        assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize("modules", [1, 2, 3])
@pytest.mark.parametrize("prompt", [[5], [(37 * i) % 160 for i in range(12)]], ids=["short", "long"])
def test_drafts_as_by_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: int, prompt: list[int]) -> None:
    """The hidden states that predict drafts, where both engines are made to draft and accept the same tokens."""
    folder = checkpoint(tmp_path, "v3", num_nextn_predict_layers=modules, num_experts_per_tok=8, topk_group=4)
    found: dict[str, list[torch.Tensor]] = {"torch": [], "kernels": []}
    grow = Drafter._grow

    def watched(self: Drafter, tree: TokenTree, leaves: list[Any], *rest: Any) -> Any:
        found["torch"].append(torch.cat([leaf.hidden for leaf in leaves]))
        return grow(self, tree, leaves, *rest)

    monkeypatch.setattr(Drafter, "_grow", watched)
    kernels = device_lm(folder)
    logits = kernels.model.draft_logits
    monkeypatch.setattr(kernels.model, "draft_logits",
                        lambda hidden: found["kernels"].append(hidden.float()) or logits(hidden))  # fmt: skip
    wide = lm_of(load_checkpoint(folder, dtype=torch.float32), None, 300)
    for shape, steps in ((Speculation(depth=5), 4), (Speculation(branching=(3, 2, 1)), 3)):
        for lm in (wide, kernels):
            lm.generate(prompt, temperature=0, max_new_tokens=1 + steps * (shape.depth + 1), speculation=shape,
                        logit_bias={7: 1e4, 9: 9e3, 11: 8e3})  # fmt: skip
        levels = steps * shape.depth - shape.depth  # near its limit the loop on a CPU drafts less
        for expected, got in zip(found["torch"][:levels], found["kernels"][:levels], strict=True):
            assert (got - expected).norm() / expected.norm() < 0.15
        found["torch"].clear()
        found["kernels"].clear()


def test_drafts_are_accepted_and_counted() -> None:
    lm = device_lm()
    out = lm.chat([{"role": "user", "content": "Tell me a story about a fox"}], temperature=0, max_new_tokens=24,
                  speculation=3)  # fmt: skip
    assert out.stats.tokens_per_step > 2
    assert out.stats.steps * 3 == out.stats.drafted


def test_stops_logprobs_and_streams_agree() -> None:
    lm = device_lm(short_demo())
    whole = lm.generate("One day a fox", temperature=0, max_new_tokens=11, logprobs=2, speculation=None)
    assert whole.logprobs is not None
    assert [best[0][0] for _, best in whole.logprobs] == whole.token_ids
    word = whole.text.split()[3]
    for speculation in (None, 3):
        options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 11, "speculation": speculation}
        logged = lm.generate("One day a fox", logprobs=2, **options)
        assert logged.logprobs == whole.logprobs
        cut = lm.generate("One day a fox", stop=word, **options)
        assert cut.finish_reason == "stop"
        assert whole.text.startswith(cut.text)
        assert word not in cut.text
        first, second = lm.stream("One day a fox", **options), lm.stream("The king", **options)
        texts = ["", ""]  # two texts at once have a state each
        for a, b in zip(first, second, strict=True):
            texts = [texts[0] + a.text, texts[1] + b.text]
        assert texts == [whole.text, lm.generate("The king", **options).text]


def test_capturing_between_chunks_leaves_the_prompt_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt's second chunk is captured when the first one is already in the cache."""

    folder = checkpoint(tmp_path, "two modules")
    prompt = [(37 * i + i // 7) % 160 for i in range(300)]
    expected = device_lm(folder, context=400)
    plain = device_lm(folder, context=400).generate(prompt, max_new_tokens=6, seed=2, speculation=None)
    assert expected.generate(prompt, max_new_tokens=6, seed=2, speculation=3).token_ids == plain.token_ids
    wanted = module_caches(expected)
    monkeypatch.setattr("mtp_spec.cuda.group.check_room", lambda *_: None)
    monkeypatch.setattr("mtp_spec.cuda.pool.check_room", lambda *_: None)
    for speculation in (None, 3):
        lm = device_lm(folder, context=400)
        runtime(lm).graphs = OnceThenAgain()
        for _ in range(2):
            out = lm.generate(prompt, max_new_tokens=6, seed=2, speculation=speculation)
            assert out.token_ids == plain.token_ids
            for ours, theirs in zip(module_caches(lm), wanted, strict=True) if speculation else ():
                torch.testing.assert_close(ours.slots[:256], theirs.slots[:256], rtol=0.02, atol=0.02)


def test_one_token_and_the_end_of_the_context() -> None:
    lm = device_lm(short_demo(), context=40)
    for prompt in ([5], list(range(10, 49)), list(range(10, 30))):
        plain = lm.generate(prompt, temperature=0, speculation=None)
        assert lm.generate(prompt, temperature=0, speculation=8).token_ids == plain.token_ids
        assert len(prompt) + len(plain.token_ids) <= 40


def test_no_token_left_is_an_error() -> None:
    lm = device_lm(short_demo())
    norm = lm.model.norm.clone()
    lm.model.norm.fill_(float("nan"))
    for speculation in (None, 2):
        with pytest.raises(MTPSpecError, match="no token can be drawn"):
            lm.generate("fox", max_new_tokens=2, speculation=speculation)
    lm.model.norm.copy_(norm)
    options = {"max_new_tokens": 2, "seed": 0}
    assert lm.generate("fox", **options).token_ids == device_lm(short_demo()).generate("fox", **options).token_ids


def test_shape_numbers_nodes_like_the_tree() -> None:
    shape = TreeShape.of(Speculation(branching=(3, 2, 1)))
    tree = TokenTree()
    for node, (parent, rank) in enumerate(zip(shape.parents, shape.ranks, strict=True)):
        assert tree.add(parent, 100 * (parent + 1) + rank, rank) == node
    assert (tree.depths, len(tree), shape.depth) == (list(shape.depths), 15, 3)
    assert [shape.path(n) for n in range(15)] == [tree.path(n) for n in range(15)]
    small = TreeShape.of(Speculation(branching=(4, 3, 2), budget=7))
    assert len(small.parents) == 7
    assert small.depth == 3
    assert small.ranks[0] == 0
    assert small.parents[0] == ROOT


def test_accept_walks_to_the_deepest_match() -> None:
    #        root -> 1: 7, 2: 8;  2 -> 3: 5;  3 -> 4: 6
    ids, parents = torch.tensor([1, 7, 8, 5, 6]), torch.tensor([-1, 0, 0, 2, 3], dtype=torch.int32)
    for drawn, path in (([8, 0, 5, 9, 0], [0, 2, 3]), ([9, 1, 1, 1, 1], [0]), ([8, 0, 5, 6, 4], [0, 2, 3, 4])):
        places, tokens = torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64)
        record, seen = torch.zeros(1, commit.record_size(5), dtype=torch.int32), torch.zeros(1, 10, dtype=torch.int32)
        own = torch.tensor(drawn, dtype=torch.int32)
        commit.accept(own, torch.zeros(5, dtype=torch.int32), ids, parents, places, tokens, record, seen)
        count = len(path)
        assert record[0, :2].tolist() == [count, 0]
        assert places[0].tolist() == path + path[-1:] * (5 - count)
        assert tokens[0, :count].tolist() == [drawn[row] for row in path]
        assert int(seen.sum()) == count
    # a row that failed ends the path, whatever token stands for what it could not draw
    failed = torch.tensor([0, 0, 1, 0, 0], dtype=torch.int32)
    commit.accept(torch.tensor([8, 0, 5, 6, 4]).int(), failed, ids, parents, places, tokens, record)
    assert record[0, :2].tolist() == [2, 1]
    assert places[0].tolist() == [0, 2, 2, 2, 2]


def test_what_cannot_run_says_why(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "v3")
    other = checkpoint(tmp_path / "other", "v3", kv_lora_rank=48)
    assert "power of two" in str(fp8_obstacle(open_checkpoint(other)))
    with pytest.raises(OptionError, match="need an NVIDIA GPU"):
        mtp_spec.load(folder, dtype="float8_e4m3fn")


# all but the first not for their card: they take minutes of the processors that CI has two of
@pytest.mark.parametrize("name", ["v3", *(pytest.param(name, marks=pytest.mark.gpu) for name in (
    "v3 whole", "v3 ranks=2", "v3 ranks=4", "v3 ranks=8", "demo", "config_v3.1", "GLM-4.7-Flash", "GigaChat3-10B-A1.8B",
    "JoyAI-LLM-Flash"))])  # fmt: skip
def test_every_kernel_of_a_step_compiles_for_hopper(name: str) -> None:
    pytest.importorskip("triton")
    shape, *others = name.split()
    program = [sys.executable, str(SUPPORT / "compiled.py"), shape, "90", "fp8", *others]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.stdout.strip().endswith("passed"), done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel["kernel"], []).append(kernel)
        assert kernel["shared"] <= 227 * 1024
        assert kernel["late"] is not False, f"{kernel['kernel']} touches memory before the kernel before it has ended"
    mains = ["_gemm_kernel", "_gate_up_kernel", "_down_kernel", "attend_kernel"]
    for main in [*mains, "_attend_kernel"] if "whole" in others else mains:  # the last one reads a packed cache
        assert all(kernel["wgmma"] and kernel["tma"] for kernel in by_name[main]), main
        assert all(kernel["spilled"] <= _spared(kernel) for kernel in by_name[main]), main
    if shape == "v3":  # the others are too small for passes of many rows
        assert {kernel["constants"]["FEW"] for kernel in by_name["attend_kernel"]} == {False, True}
        for main in ("gemm_kernel", "gate_up_kernel", "down_kernel", "attend_prompt_kernel"):
            assert all(kernel["wgmma"] and kernel["tma"] for kernel in by_name[main]), main
            assert all(kernel["spilled"] <= _spared(kernel) for kernel in by_name[main]), main


@pytest.mark.gpu  # not for its card: it takes minutes of the processors that CI has two of
@pytest.mark.parametrize(
    ("card", "kind", "room"),
    [(80, "bf16", 163), (86, "fp16", 99), (89, "fp8", 99), (90, "bf16", 227), (100, "fp8", 227), (120, "fp8", 99)],
)
def test_every_kernel_of_a_step_compiles_for_other_cards(card: int, kind: str, room: int) -> None:
    """By compute capability, with the KiB of shared memory that a program can have there."""
    pytest.importorskip("triton")
    program = [sys.executable, str(SUPPORT / "compiled.py"), "GLM-4.7-Flash", str(card), kind]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ})
    assert "passed" in done.stdout.splitlines(), done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(kernels) > 20
    assert all(kernel["shared"] <= room * 1024 for kernel in kernels)


def test_products_that_hold_weights_fit_into_little_shared_memory() -> None:
    """The kernels of the test above that use most of it, which is quick enough for CI."""
    pytest.importorskip("triton")
    names = ["_up_kernel", "_absorb_kernel"]
    program = [sys.executable, str(SUPPORT / "compiled.py"), "GLM-4.7-Flash", "89", "fp8", *names]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ})
    assert "passed" in done.stdout.splitlines(), done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {kernel["kernel"] for kernel in kernels} == {*names}
    assert all(kernel["shared"] <= 99 * 1024 and not kernel["spilled"] for kernel in kernels)


def _spared(kernel: dict[str, Any]) -> int:
    """Returns bytes that may be spilled: outside the loop over keys or inner dimensions, which only reads some back.

    Triton 3.6 spills fewer: none, none, 108 and 116. 3.9 calls CUDA 13's assembler with --regAllocOptLevel=2.
    """
    if kernel["kernel"] == "attend_prompt_kernel":
        return 8
    if kernel["kernel"] == "attend_kernel":
        return 256  # addresses, between splits
    if kernel["kernel"] == "_attend_kernel":
        return 512  # of a packed cache: beside the sums of 512 columns
    if kernel["kernel"] == "_down_kernel" and kernel["constants"]["TOKENS"] > 16:
        return 1024  # prefill: the sums of many rows at its end
    return 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["v3", "three modules", "ragged", "no shared expert, three heads", "v2"])
def test_random_checkpoints_on_the_gpu(tmp_path: Path, kind: str) -> None:
    ids = [(37 * i) % 160 for i in range(80)]
    folder = checkpoint(tmp_path, kind, num_experts_per_tok=8, topk_group=KINDS[kind].get("n_group", 4))
    # activations in e4m3 flip where CPU and GPU round otherwise: both are as far from the same model in float32
    exact = mtp_spec.load(folder, dtype="float32").score(ids).logits
    errors = [(score_ids(load_device_model(folder, device), ids).logits - exact).norm() / exact.norm()
              for device in ("cpu", "cuda")]  # fmt: skip
    assert errors[0] < 0.25
    assert errors[1] < 1.2 * errors[0]
    lm = mtp_spec.load(checkpoint(tmp_path / "sparse", kind), device="cuda")
    shapes = SHAPES[::2] if lm.config.num_nextn_predict_layers else (None,)
    texts = [lm.generate(ids[:9], max_new_tokens=40, seed=1, speculation=shape).token_ids for shape in shapes]
    assert all(text == texts[0] for text in texts)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLING, ids=lambda s: str(s)[:40])
def test_same_text_on_the_gpu(sampling: dict[str, Any]) -> None:
    lm = mtp_spec.load(device="cuda")
    for seed, prompt in enumerate(("One day a fox", "List five animals", "The king said", "Rain")):
        texts = [lm.generate(prompt, max_new_tokens=96, seed=seed, speculation=s, **sampling).text for s in SHAPES]
        assert all(text == texts[0] for text in texts)


@pytest.mark.gpu
def test_rows_are_bitwise_equal_on_the_gpu() -> None:
    lm = mtp_spec.load(device="cuda")
    model = lm.model
    ids = torch.randint(0, model.config.vocab_size, (1200,), device="cuda")
    caches = model.new_caches(1300, 0)[: model.config.num_hidden_layers]
    length = torch.zeros(1, dtype=torch.int32, device="cuda")
    for context in (0, 1, 63, 129, 1000):
        length.fill_(0)
        if context:
            model.rows(ids[:context], caches, mla.chain(length, context))
        length.fill_(context)
        whole = model.logits(model.rows(ids[context : context + 64], caches, mla.chain(length, 64)))
        for rows in (1, 2, 3, 5, 8, 16, 17, 33):
            length.fill_(context)
            part = model.logits(model.rows(ids[context : context + rows], caches, mla.chain(length, rows)))
            assert torch.equal(part, whole[:rows])
        for row in range(8):
            length.fill_(context + row)
            one = model.logits(model.rows(ids[context + row :][:1], caches, mla.chain(length, 1)))
            assert torch.equal(one, whole[row : row + 1])
