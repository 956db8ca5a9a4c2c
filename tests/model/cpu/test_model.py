"""Models on the CPU engine: logits as transformers computes them, and rows whose bits nothing around them changes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import small
import tiny
from cpu_models import (
    KINDS,
    STORED,
    all_equal,
    chain,
    copy_of,
    digest,
    ids_of,
    mtp_prompt,
    of_checkpoint,
    path_to,
    prompt,
    random_model,
    random_tree,
    scenario,
    use,
    wide,
)
from mtp_spec.analysis.scoring import score_ids
from mtp_spec.kernels.cpu.engine import SWITCH, levels, library, why_not
from mtp_spec.kernels.fp8 import weight_dequant, weight_quant
from mtp_spec.model.attention import JointPlan, plan_drafts, plan_rows
from mtp_spec.model.cache import PAGE, LatentCache
from mtp_spec.model.checkpoint.folder import load_checkpoint, open_checkpoint
from mtp_spec.model.cpu.checkpoint import load_cpu_model
from mtp_spec.model.cpu.model import SCALE, CPUModel
from mtp_spec.model.cpu.room import LINE, zeros
from mtp_spec.model.errors import CheckpointError
from places import SUPPORT

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
IDS = [(37 * i + 11) % 96 for i in range(60)]
TOLERANCE = 1e-4  # of the largest logit
# every kind of model in two kinds of storage, every kind of storage in several models
PAIRS = [(kind, STORED[(i + turn) % len(STORED)]) for i, kind in enumerate(KINDS) for turn in (0, 1)]


@pytest.fixture
def threads() -> Iterator[None]:
    """What a test sets is set back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# against transformers


@pytest.fixture(scope="module", params=list(tiny.KINDS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    return tiny.make(tmp_path_factory.mktemp("tiny") / "model", request.param, seed=3)


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_logits_as_transformers(made: tiny.Tiny, stored: torch.dtype) -> None:
    checkpoint = open_checkpoint(made.folder)
    model = of_checkpoint(checkpoint.config, small.tensors(made.folder), stored)
    weights = wide(model._weights)
    _put(made.main, weights, "")
    ids = torch.tensor([IDS])
    got = score_ids(model, IDS)
    with torch.no_grad():
        _close(got.logits, made.main(ids).logits[0])
        assert len(got.mtp_logits) == (0 if made.mtp is None else len(model.mtp))
        if made.mtp is None:
            return
        _put(made.mtp, weights, f"model.layers.{checkpoint.config.num_hidden_layers}.")
        hidden = made.main.model(ids).last_hidden_state
        for depth in range(1, len(model.mtp) + 1):
            count, positions = len(IDS) - depth, torch.arange(depth, len(IDS))[None]
            hidden = made.mtp.forward_layer(depth - 1, hidden[:, :count], positions, None, input_ids=ids[:, depth:])
            _close(got.mtp_logits[depth - 1, :count], made.mtp.shared_head(hidden)[0])


def _put(module: Any, weights: dict[str, Tensor], prefix: str) -> None:
    """Gives transformers' module the weights of a checkpoint; `prefix` of its first module, if it is one of those."""
    first = int(prefix.split(".")[2]) if prefix else 0
    with torch.no_grad():
        for name, slot in module.state_dict().items():
            if prefix and not name.startswith("layers."):
                continue
            experts = name.removesuffix("gate_up_proj").removesuffix("down_proj")
            if experts.endswith("mlp.experts.") and experts != name:
                parts = ("gate", "up") if name.endswith("gate_up_proj") else ("down",)
                for e in range(len(slot)):
                    found = [tiny.stored_names({f"{experts}{e}.{part}_proj.weight": slot[e]}, first) for part in parts]
                    slot[e].copy_(torch.cat([weights[next(iter(one))] for one in found]))
                continue
            (known,) = tiny.stored_names({name: slot}, first)
            slot.copy_(weights[known])


def _close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_files_as_their_tensors(tmp_path: Path, dtype: torch.dtype | None) -> None:
    folder = small.make_fp8(tmp_path / "fp8")
    for name in ("fp8", "fp8-bf16"):
        checkpoint = open_checkpoint(folder.with_name(name))
        model, ids = load_cpu_model(checkpoint, dtype), ids_of(40, 1, 256)
        got = score_ids(model, ids)
        expected = score_ids(load_checkpoint(folder.with_name(name), dtype=torch.float32), ids)
        assert (got.logits - expected.logits).norm() / expected.logits.norm() < (1e-5 if dtype is None else 2e-2)
        whole = {key: value.contiguous() for key, value in small.tensors(folder.with_name(name)).items()}
        if dtype in (None, torch.float32):
            again = score_ids(CPUModel(checkpoint.config, whole), ids)
            assert torch.equal(got.logits, again.logits)
            assert torch.equal(got.mtp_logits.nan_to_num(), again.mtp_logits.nan_to_num())


# rows in company


@pytest.mark.parametrize(("kind", "stored"), PAIRS, ids=str)
def test_rows_alone_as_in_a_line(kind: str, stored: torch.dtype) -> None:
    model = random_model(kind, stored)
    cache, _ = prompt(model, ids_of(70))
    ids, own, alone = ids_of(64, 1), copy_of(model, cache), list[Tensor]()
    for token in ids:
        alone.append(model.rows([token], own, [-1]))
        own.commit([0])
    expected = torch.cat(alone)
    for count in (2, 3, 4, 5, 8, 11, 12, 13, 16, 17, 31, 64):
        line = copy_of(model, cache)
        got = model.rows(ids[:count], line, chain(count))
        assert torch.equal(got, expected[:count])
        for ours, theirs in zip(line.slots, own.slots, strict=True):
            assert torch.equal(ours[: 70 + count], theirs[: 70 + count])
        assert torch.equal(model.logits(got), torch.cat([model.logits(row[None]) for row in expected[:count]]))
    assert torch.equal(model.draft_logits(expected), torch.cat([model.draft_logits(row[None]) for row in expected]))


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize(("count", "context"), [(3, 0), (7, 63), (16, 64), (17, 1), (40, 130), (64, 65)])
def test_rows_alone_as_in_a_tree(stored: torch.dtype, count: int, context: int) -> None:
    for number, kind in enumerate(KINDS):
        model = random_model(kind, stored)
        cache = prompt(model, ids_of(context))[0] if context else model.new_cache(80)
        parents, ids = random_tree(count, count + number), ids_of(count, 1)
        tree = copy_of(model, cache)
        got = model.rows(ids, tree, parents)
        for node in range(count):
            path, own = path_to(node, parents), copy_of(model, cache)
            line = model.rows([ids[n] for n in path], own, chain(len(path)))
            assert torch.equal(got[node], line[-1])
        path = path_to(count - 1, parents)
        tree.commit(path)  # the slots that a tree leaves are those of the line
        own = copy_of(model, cache)
        model.rows([ids[n] for n in path], own, chain(len(path)))
        for ours, theirs in zip(tree.slots, own.slots, strict=True):
            assert torch.equal(ours[: tree.length], theirs[: tree.length])


@pytest.mark.parametrize(("kind", "stored"), PAIRS, ids=str)
def test_rows_alone_as_with_other_sequences(kind: str, stored: torch.dtype) -> None:
    model = random_model(kind, stored)
    caches = [prompt(model, ids_of(length, length))[0] for length in (70, 1, 33, 128)]
    for counts in ((1, 1, 1, 1), (5, 1, 3, 2), (16, 17, 1, 30)):
        parents, ids = [random_tree(count, count) for count in counts], [ids_of(count, count) for count in counts]
        own = [copy_of(model, cache) for cache in caches]
        parts = [(cache, plan_rows(model.table(cache.capacity), cache.length, tree))
                 for cache, tree in zip(own, parents, strict=True)]  # fmt: skip
        got = model.joint_rows([token for part in ids for token in part], JointPlan.of(*parts)).split(counts)
        for rows, cache, joint, tree, tokens in zip(got, caches, own, parents, ids, strict=True):
            alone = copy_of(model, cache)
            assert torch.equal(rows, model.rows(tokens, alone, tree))
            last = cache.length + len(tokens)
            assert all(torch.equal(a[:last], b[:last]) for a, b in zip(joint.slots, alone.slots, strict=True))


@pytest.mark.parametrize(("kind", "stored"), PAIRS, ids=str)
@pytest.mark.parametrize("kept", [[], [40], [0, 3, 4, 5, 17, 39], [2, *range(5, 41)]], ids=len)
def test_rows_that_are_kept(kind: str, stored: torch.dtype, kept: list[int]) -> None:
    """Leaving rows out of the last layer changes neither the others nor what is cached of any."""
    model, counts, scored = random_model(kind, stored), (5, 30, 6), kept[-2:]
    caches = [prompt(model, ids_of(length, length))[0] for length in (70, 1, 33)]
    ids, whole = ids_of(sum(counts), 2), [copy_of(model, cache) for cache in caches]

    def plan_of(own: list[LatentCache]) -> JointPlan:
        return JointPlan.of(*((cache, plan_rows(model.table(cache.capacity), cache.length, random_tree(count, count)))
                              for cache, count in zip(own, counts, strict=True)))  # fmt: skip

    hidden, logits = model.scored_rows(ids, plan_of(whole), scored)
    got, got_logits = model.scored_rows(ids, plan_of(caches), scored, kept)
    assert torch.equal(got, hidden[kept])
    assert torch.equal(got_logits, logits)
    for cache, own, count in zip(whole, caches, counts, strict=True):
        last = own.length + count
        assert all(torch.equal(a[:last], b[:last]) for a, b in zip(cache.slots, own.slots, strict=True))


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("module", [0, 1])
def test_modules_rows(stored: torch.dtype, module: int) -> None:
    model, ids = random_model("halves, two modules", stored), ids_of(70)
    _, hidden = prompt(model, ids)
    cache, _ = mtp_prompt(model, module, ids[1:60], hidden[:59])
    table, offset = model.table(200), module + 1
    tokens, given = ids_of(33, 3), torch.cat([hidden[60:], hidden[:23]])
    own, alone = copy_of(model, cache, True), list[Tensor]()
    for token, state in zip(tokens, given, strict=True):
        alone.append(model.mtp_rows(module, [token], state[None], own, plan_rows(table, own.length, [-1], offset)))
        own.commit([0])
    for count in (2, 5, 16, 33):
        line = copy_of(model, cache, True)
        plan = plan_rows(table, line.length, chain(count), offset)
        assert torch.equal(model.mtp_rows(module, tokens[:count], given[:count], line, plan), torch.cat(alone)[:count])
    line = copy_of(model, cache, True)
    joint = JointPlan.of((line, plan_rows(table, line.length, chain(33), offset)))
    kept, logits = model.scored_mtp_rows(module, tokens, given, joint, [32], [1, 32])
    assert torch.equal(kept, torch.cat(alone)[[1, 32]])
    assert torch.equal(logits, model.draft_logits(alone[32], model.config.head_of(module)))
    assert torch.equal(line.slots[0][: own.length], own.slots[0][: own.length])
    parents = random_tree(33, 4)
    got = model.mtp_rows(module, tokens, given, copy_of(model, cache, True), plan_rows(table, 59, parents, offset))
    for node in range(33):
        path, line = path_to(node, parents), copy_of(model, cache, True)
        plan = plan_rows(table, 59, chain(len(path)), offset)
        rows = model.mtp_rows(module, [tokens[n] for n in path], given[path], line, plan)
        assert torch.equal(got[node], rows[-1])
    # a level of drafts: each row sees the committed slots, those of its ancestors, and itself
    drafts = copy_of(model, cache, True)
    model.mtp_rows(module, tokens[:3], given[:3], drafts, plan_drafts(table, 59, 59, 59 + offset, [[], [], []]))
    plan = plan_drafts(table, 62, 59, 60 + offset, [[60], [59], [60], [61]])
    level = model.mtp_rows(module, tokens[3:7], given[3:7], drafts, plan)
    for row, first in enumerate((1, 0, 1, 2)):
        line, path = copy_of(model, cache, True), [first, 3 + row]
        plan = plan_rows(table, 59, chain(2), offset)
        assert torch.equal(level[row], model.mtp_rows(module, [tokens[n] for n in path], given[path], line, plan)[1])


@pytest.mark.parametrize(("kind", "stored"), PAIRS, ids=str)
def test_prompts_in_chunks_of_any_size(kind: str, stored: torch.dtype) -> None:
    model, ids = random_model(kind, stored), ids_of(131)
    cache, hidden = prompt(model, ids)
    modules = [mtp_prompt(model, m, ids[m + 1 :], hidden[: 130 - m]) for m in range(len(model.mtp))]
    for chunk in (1, 2, 3, 7, 16, 17, 64, 65, 130):
        own, got = prompt(model, ids, chunk=chunk)
        assert torch.equal(got, hidden)
        assert all(torch.equal(a[:131], b[:131]) for a, b in zip(own.slots, cache.slots, strict=True))
        for m, (expected, inner) in enumerate(modules):
            own, got = mtp_prompt(model, m, ids[m + 1 :], hidden[: 130 - m], chunk)
            assert torch.equal(got, inner)
            assert torch.equal(own.slots[0][: own.length], expected.slots[0][: own.length])


def test_prompts_of_long_contexts() -> None:
    """Fewer rows are attended at once in memory that was made for a long context: with the same bits."""
    model, other = (random_model("v3", max_position_embeddings=9000) for _ in range(2))
    rows = [(7 * i) % 150 for i in range(40)]

    def read(model: CPUModel, context: int, cuts: tuple[int, ...]) -> Tensor:
        cache, generator, found = model.new_cache(context + len(rows)), torch.Generator().manual_seed(5), list[Tensor]()
        for slots in cache.slots:
            slots.normal_(generator=generator)
        cache.length = context
        for first, end in zip((0, *cuts), (*cuts, len(rows)), strict=True):
            found.append(model.rows(rows[first:end], cache, range(-1, end - first - 1)))
            cache.commit(range(end - first))
        return torch.cat(found)

    assert all_equal(read(model, 8400, ()), read(other, 8400, (1, 14, 31)))
    assert all_equal(read(model, 30, ()), read(random_model("v3", max_position_embeddings=9000), 30, ()))


def test_pages_out_of_order_and_of_many_sequences() -> None:
    model = random_model()
    memory = model.new_layers(9)[: model.config.num_hidden_layers]
    for slots in memory:
        slots.fill_(torch.nan)
    paged = [LatentCache(memory, pages) for pages in ((5, 0, 7), (1, 8, 2))]
    for number, cache in enumerate(paged):
        ids, own = ids_of(150, number), model.new_cache(3 * PAGE)
        for part in (ids[:60], ids[60:100], ids[100:]):
            assert torch.equal(model.rows(part, cache, chain(len(part))), model.rows(part, own, chain(len(part))))
            cache.commit(range(len(part)))
            own.commit(range(len(part)))
        parents = random_tree(30, number)
        assert torch.equal(model.rows(ids[:30], cache, parents), model.rows(ids[:30], own, parents))
    assert all(slots[3 * PAGE : 5 * PAGE].isnan().all() for slots in memory)
    with pytest.raises(ValueError, match="slots"):
        model.rows(ids_of(60), paged[0], chain(60))


# threads and levels


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize(("kind", "stored"), PAIRS, ids=str)
def test_threads_and_levels(monkeypatch: pytest.MonkeyPatch, threads: None, kind: str, stored: torch.dtype,
                            level: str) -> None:  # fmt: skip
    torch.set_num_threads(1)
    expected = scenario(random_model(kind, stored))
    use(monkeypatch, level)
    model = random_model(kind, stored)
    assert library().level == level  # which models made from now on run
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert all_equal(scenario(model), expected)


def test_levels_in_processes_of_their_own() -> None:
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "from cpu_models import digest, random_model, scenario\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "model = random_model(); print(model._engine.level, digest(scenario(model)))"
    )
    expected = digest(scenario(random_model()))
    for level in levels():
        done = subprocess.run([sys.executable, "-c", code, str(SUPPORT), "3"], text=True, check=True,
                              capture_output=True, env={**os.environ, SWITCH: level})  # fmt: skip
        assert done.stdout.split() == [level, expected]


def test_another_model_has_other_numbers() -> None:
    """What all these comparisons compare is not the same whatever is computed."""
    scenarios = [scenario(random_model(stored=stored)) for stored in STORED]
    assert len({digest(parts) for parts in scenarios}) == len(STORED)
    assert all(part.isfinite().all() for parts in scenarios for part in parts)


def test_torchs_default_type_is_not_the_engines() -> None:
    model = random_model()
    expected = scenario(model)
    try:
        for default in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(default)
            again = random_model()
            assert all(one.dtype == torch.float32 for one in scenario(again))
            assert all(torch.equal(a, b) for a, b in zip(scenario(model), expected, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("count", [0, 1, 63, 1000, 1 << 20])
def test_working_memory_begins_with_a_line(count: int) -> None:
    memory = zeros(count)
    assert memory.data_ptr() % LINE == 0 or not count
    assert torch.equal(memory, torch.zeros(count))


def test_embeddings_in_fp8_have_their_scales(tmp_path: Path) -> None:
    folder, plain = small.make_fp8(tmp_path / "model"), tmp_path / "plain"
    weights = small.tensors(folder)
    name = "model.embed_tokens.weight"
    stored, scale = weight_quant(weights[name].float() * 3)
    for copy in [key for key in weights if key.endswith("embed_tokens.weight")]:
        weights[copy], weights[copy + SCALE] = stored, scale
    for file in folder.glob("model*"):
        file.unlink()
    plain.mkdir()
    for file in folder.iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    save_file(weights, folder / "model.safetensors")
    wide_table = weight_dequant(stored, scale, 128, torch.float32)
    others = {key: value for key, value in weights.items() if "embed_tokens" not in key}
    save_file({**others, name: wide_table}, plain / "model.safetensors")
    one, other = (load_cpu_model(open_checkpoint(place)) for place in (folder, plain))
    ids = [(7 * i) % 256 for i in range(9)]
    assert torch.equal(score_ids(one, ids).logits, score_ids(other, ids).logits)


def test_blocks_that_are_not_square_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small.make_fp8(tmp_path / "model"))
    odd = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, fp8_block=(128, 64)))
    with pytest.raises(CheckpointError, match="only square blocks"):
        load_cpu_model(odd)
