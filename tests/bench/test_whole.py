"""`bench step --whole`: a whole model on ranks, what a slice says of it, and what documents say of other ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

import small
from mtp_spec.bench.passes import Work, chain_tokens, fill, pass_bytes, verify_pass, verify_reads
from mtp_spec.bench.synthetic import with_module
from mtp_spec.bench.whole import prediction, run
from mtp_spec.bench.whole.clock import Clock
from mtp_spec.bench.whole.measured import DRAFT, Passes, Whole, exchanged, unanswered, uneven, verify_name
from mtp_spec.bench.whole.prediction import Cost, Fit, fit_cost, least_squares, predicted, read_documents
from mtp_spec.bench.whole.room import Asked, chosen
from mtp_spec.cli.main import main
from mtp_spec.cuda.memory import plan_memory
from mtp_spec.cuda.state import ROWS, State
from mtp_spec.errors import OptionError
from mtp_spec.model.config import ModelConfig, load_config
from mtp_spec.model.cuda.layers import Mixture
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.distributed.group import ALONE, Ranks

V3 = with_module(load_config(Path(str(files("mtp_spec.configs") / "config_671B.json"))))
SMALL = with_module(replace(small.CONFIG, num_hidden_layers=4))
CARD = int(139.5e9)  # bytes that are free on an H200
SECONDS = 60
FEW = replace(V3, num_hidden_layers=6)  # V3's layers, few enough to be laid out often
COMMAND = ["bench", "step", "--whole", "--contexts", "20", "--max-new-tokens", "5", "--device"]
DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")])]  # fmt: skip


def shape(folder: Path, config: ModelConfig = SMALL) -> list[str]:
    (folder / "shape.json").write_text(json.dumps(config.to_hf_dict()))
    return ["--shape", str(folder / "shape.json")]


def start(arguments: list[str], count: int, folder: Path) -> list[subprocess.Popen[str]]:
    """Starts ranks as a launcher does, but one that does not end them together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
             "OMP_NUM_THREADS": 1}  # fmt: skip
    return [
        subprocess.Popen([sys.executable, "-P", "-m", "mtp_spec", *arguments], text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, cwd=folder, env=os.environ | {name: str(value) for name, value in
                         {**given, "RANK": rank, "LOCAL_RANK": rank}.items()})
        for rank in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_two_ranks_measure_a_slice_which_is_fitted(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "two.json"
    command = [
        *COMMAND,
        device,
        *shape(tmp_path),
        "--layers",
        "1",
        "--rows",
        "1,2",
        "--depths",
        "1",
        "--json",
        str(out),
    ]
    for process in start(command, 2, tmp_path):
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
    found = json.loads(out.read_text())
    assert found["complete"]
    assert (found["ranks"], found["moe layers"], found["exchange"], found["time"]) == (
        2, 1, "library" if device == "cpu" else "rooms", "extrapolated")  # fmt: skip
    names = [verify_name(1), verify_name(2), DRAFT]
    assert [row["pass"] for row in found["rows"]] == [row["pass"] for row in found["limits"]] == names
    assert [row["time"] for row in found["rows"]] == ["extrapolated", "extrapolated", "measured"]
    # four exchanges a layer, one of the logits: of the whole model, three of whose layers are experts'
    assert [row["exchanges"] for row in found["limits"]] == [17, 17, 6]
    plain, chain = found["texts"]
    assert (plain["tokens/step"], plain["times plain"], chain["way"]) == (1.0, 1.0, "chain 1, replay")
    assert chain["tokens/s by the law"] == pytest.approx(1e3 * 1.87 / chain["ms/step"])
    assert [row["form"] for row in found["first tokens"]] == ["absorbed"]
    assert [row["rank"] for row in found["memory"]] == [0, 1]
    assert {row["through"] for row in found["exchange times"]} == {"library", found["exchange"]}
    if device == "cuda":
        assert all(row["launches"] > 0 for row in found["limits"])
        assert all(row["peak / plan"] is not None for row in found["memory"])
    main(["bench", "step", "--fit", str(out), "--json", str(tmp_path / "fit.json")])
    said = capsys.readouterr().out
    assert "16 ranks on 2 hosts: hidden_size 256: fewer blocks of 128 than 16 ranks" in said
    assert "some documents are of slices, extrapolated to all layers" in said
    document = json.loads((tmp_path / "fit.json").read_text())
    assert [(row["ranks"], row["pass"], row["time"]) for row in document["rows"]] == [(2, n, "fitted") for n in names]
    assert [row["measured ms"] for row in document["rows"]] == [row["ms"] for row in found["limits"]]


@pytest.mark.parametrize("device", DEVICES)
def test_a_killed_rank_ends_the_benchmark(device: str, tmp_path: Path) -> None:
    command = [*COMMAND, device, *shape(tmp_path), "--contexts", ",".join(["20"] * 50)]
    first, second = start(command, 2, tmp_path)
    assert first.stderr is not None
    line = ""
    while not line.startswith("passes"):  # others are next, and nothing is left to compile
        line = first.stderr.readline()
        assert line, "the first rank ended"
    time.sleep(1)
    second.kill()
    _, errors = first.communicate(timeout=SECONDS)
    second.communicate()
    assert first.returncode == 2
    said = ("rank 0 of 2 lost the others", "rank 1 of 2 gave no sign of life", "rank 0 of 2 waited 30 s for")
    assert any(one in errors for one in said), errors


@pytest.mark.parametrize(("size", "share"), [(2, 14), (4, 29)])
def test_too_few_ranks_are_told_what_would_fit(size: int, share: int) -> None:
    asked = Asked(V3, 32768 + ROWS)
    with pytest.raises(OptionError) as refused:
        chosen(asked, None, Ranks(0, size), CARD)
    assert f"--whole: each of {size} ranks would need " in str(refused.value)
    assert "139.5 GB are free: start 8 ranks" in str(refused.value)
    assert f"or give --layers {share} (of 58 MoE layers; the others are extrapolated" in str(refused.value)
    assert chosen(asked, share, Ranks(0, size), CARD).num_hidden_layers == 3 + share


def test_eight_ranks_hold_all_layers() -> None:
    asked = Asked(V3, 32768 + ROWS)
    assert chosen(asked, None, Ranks(7, 8), CARD) == V3
    assert asked.enough(CARD) == 8
    with pytest.raises(OptionError, match="--layers 59: the model has 58 MoE layers"):
        chosen(asked, 59, Ranks(0, 8), CARD)
    with pytest.raises(OptionError, match=r"are free: use GPUs with more memory$"):
        chosen(replace(asked, full=SMALL), None, ALONE, 10**9)


def test_no_room_is_one_error_before_anything_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = plan_memory(DeviceModel(replace(SMALL, num_hidden_layers=3), "meta"), 20 + 256 + ROWS).total
    monkeypatch.setattr(run, "free_bytes", lambda device, ranks: free)
    monkeypatch.setattr(run, "fill", lambda model: pytest.fail("weights were made"))
    with pytest.raises(SystemExit):
        main([*COMMAND, "cpu", *shape(tmp_path)])
    assert "start 2 ranks, or give --layers 1 (of 3 MoE layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        (
            ["--whole", "--device", "cpu", "--parts", "layers"],
            "--parts layers: with --whole allowed are passes",
        ),
        (["--parts", "limits"], "--parts limits: without --whole allowed are passes, layers"),
        (["--device", "cpu"], "--device cpu goes with --whole"),
        (["--whole", "--device", "cpu", "--max-new-tokens", "300"], "with --whole 256 or fewer"),
        (["--fit", "nowhere.json"], "--fit nowhere.json: it cannot be read: No such file or directory"),
        (["--fit", __file__], "not a JSON document"),
        (["--between-hosts", "10,0"], "give two numbers above 0"),
        (["--contexts", "1024"], "--contexts has an effect with --whole only"),
        (["--depths", "2"], "--depths has an effect with --whole only"),
        (["--max-new-tokens", "9"], "--max-new-tokens has an effect with --whole only"),
        (["--between-hosts", "10,50"], "--between-hosts has an effect with --whole only, or with --fit"),
        (["--whole", "--context", "9"], "--context has no effect beside --whole"),
        (["--whole", "--fit", "a.json"], "--whole has no effect beside --fit"),
        (["--rows", "2", "--fit", "a.json"], "--rows has no effect beside --fit"),
    ],
)
def test_what_has_no_meaning_is_named(given: list[str], cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "step", *given])
    assert cause in capsys.readouterr().err


def test_ranks_agree_on_what_they_replicate_and_differ_in_their_parts() -> None:
    config = replace(SMALL, hidden_size=384, num_hidden_layers=2)  # parts of one and of two blocks
    parts = [DeviceModel(config, "cpu", ranks=Ranks(rank, 2)) for rank in range(2)]
    for part in parts:
        fill(part)
    whole = DeviceModel(config, "meta").checkpoint_slots()
    alike = 0
    for name, first in parts[0].checkpoint_slots().items():
        second = parts[1].checkpoint_slots()[name]
        numbers = [slot.float().flatten()[:100] for slot in (first, second)]
        if first.shape == whole[name].shape:
            alike += 1
            assert torch.equal(first.float(), second.float()), name
        elif "scale_inv" not in name:
            assert not torch.equal(*numbers), name
        assert all(bool(one.isfinite().all()) for one in numbers)
    assert alike > 10


def test_what_ranks_exchange_is_counted_and_left_out() -> None:
    ranks = Ranks(0, 2)
    model = DeviceModel(SMALL, "cpu", ranks=ranks)
    fill(model)
    work = verify_pass(model, State(model, 60), 10, 3)
    with unanswered():  # alone: with the other rank this would wait for it
        sizes = exchanged(work.run)
        assert work.run().shape == (3, SMALL.vocab_size)
    heads = 3 * SMALL.num_attention_heads * SMALL.v_head_dim
    assert len(sizes) == 4 * SMALL.num_hidden_layers + 1
    assert sizes[-1] == 3 * SMALL.vocab_size * 4
    assert sizes[:2] == [heads + heads // 128 * 4, 3 * SMALL.hidden_size * 2]
    pairs = 3 * (SMALL.num_experts_per_tok + 1)
    assert sizes[-3] == pairs * SMALL.moe_intermediate_size * (1 + 4 / 128)


def test_a_slice_reads_what_the_whole_reads() -> None:
    def passes(config: ModelConfig) -> Whole:
        model = DeviceModel(config, "cpu")
        fill(model)
        one = Passes(model, State(model, 60), 10, SMALL, Clock(ALONE, torch.device("cpu")), 1.0).all([2])[0]
        assert one.held + one.missing == 3
        return one

    def size(work: Work) -> float:
        return pass_bytes(work, [4] * sum(isinstance(getattr(part, "mlp", None), Mixture) for part in work.reads))

    whole, part = passes(SMALL), passes(replace(SMALL, num_hidden_layers=2))
    assert (whole.kind, part.kind) == ("measured", "extrapolated")
    assert part.of(size) == pytest.approx(whole.of(size))
    assert part.of(lambda work: 1.0) == 1 + 2 / 1


def test_the_part_of_a_rank_is_read_in_fewer_bytes() -> None:
    sizes = {}
    for count in (1, 2, 8, 16):
        reads, cached = verify_reads(DeviceModel(V3, "meta", ranks=Ranks(0, count)), 1024, 1)
        sizes[count] = pass_bytes(Work(lambda: None, reads, cached), [9.0] * 58)
    # 37 billion numbers, the replicated ones a few times as many as a rank of 16 has of its own
    assert 35e9 < sizes[1] < 40e9
    assert sizes[1] / 2 < sizes[2] < sizes[1] / 1.8
    assert sizes[8] > sizes[1] / 8
    assert sizes[16] < sizes[8] < sizes[2]


def test_factors_are_found_and_never_negative() -> None:
    assert least_squares([[1, 1, 1], [1, 2, 4]], [5, 8, 14]) == pytest.approx([2, 3])
    assert least_squares([[1, 1, 1], [1, 2, 4]], [5, 4, 2])[1] == 0


def times(cost: Cost, ranks: int, through: str = "rooms") -> list[dict[str, Any]]:
    return [{"ranks": ranks, "through": through, "bytes": size, "us": cost.micro(ranks, size)} for size in run.SWEEP]


def test_the_cost_of_exchanges_is_found_again() -> None:
    cost = Cost(5.0, 0.7, 1 / 300e3)
    found = fit_cost([*times(cost, 2), *times(cost, 4)])
    assert (found.start, found.each, found.byte) == pytest.approx((5.0, 0.7, 1 / 300e3))
    alone = fit_cost(times(cost, 2))
    assert (alone.start, alone.each, alone.byte) == pytest.approx((5.7, 0.0, 1 / 300e3))
    # of 16 ranks' bytes those of 8 come from the other host
    assert cost.between(16, 2, 4000, 12.0, 50.0) == pytest.approx(cost.micro(16, 4000) + 12.0 + 8 * 4000 / 50e3)
    assert cost.between(16, 1, 4000, 12.0, 50.0) == cost.micro(16, 4000)


def documents(counts: list[int], rooms: Cost, library: Cost, factor: float = 1.5) -> list[dict[str, Any]]:
    """Returns documents of a few of V3's layers on a known machine: 4 TB/s, 3 ms of launches, these exchanges."""
    found = []
    for ranks in counts:
        model = DeviceModel(FEW, "meta", ranks=Ranks(0, ranks))
        rows, limits = list[dict[str, Any]](), list[dict[str, Any]]()
        for name in (verify_name(1), verify_name(2), DRAFT):
            layers = 1 if name == DRAFT else 6
            one = prediction.Pass(ranks, 1024, name, 0.0, 0.0, 0.0, 9.0, ())
            size = prediction.rank_bytes(model, one)
            exchanges = [[14336 * one.rows, 4 * layers]]
            spent = factor * 4 * layers * rooms.micro(ranks, 14336 * one.rows / ranks) / 1e3
            alone = 3.0 + size / 4e9
            rows.append({"context": 1024, "pass": name, "GB a rank": size / 1e9, "experts a layer": 9.0})
            limits.append({"context": 1024, "pass": name, "ms": alone + spent, "without exchange ms": alone,
                           "bytes of exchanges": exchanges})  # fmt: skip
        found.append({
            "ranks": ranks, "exchange": "rooms", "read_TB_per_s": 4.0, "config": FEW.to_hf_dict(), "rows": rows,
            "limits": limits, "exchange times": times(rooms, ranks) + times(library, ranks, "library"), "shape": "V3",
            "time": "measured",
        })  # fmt: skip
    return [json.loads(json.dumps(one)) for one in found]


def test_what_two_and_four_ranks_say_of_eight_and_sixteen() -> None:
    rooms, library = Cost(5.0, 0.7, 1 / 300e3), Cost(15.0, 1.0, 1 / 100e3)
    given = documents([2, 4], rooms, library)
    fit = Fit.of(given)
    assert fit.factor == pytest.approx(1.5)
    assert fit.rate[1024, verify_name(1)] == pytest.approx((4e-3 * 1e3, 3.0))
    rows, paces, notes = predicted(given, fit, [0.9], [1], 12.0, 50.0)
    (eight,) = [row for row in documents([8], rooms, library)[0]["limits"] if row["pass"] == verify_name(1)]
    (row,) = [row for row in rows if (row["ranks"], row["hosts"], row["pass"]) == (8, 1, verify_name(1))]
    assert (row["time"], row["measured ms"]) == ("PREDICTED", None)
    assert row["ms"] == pytest.approx(eight["ms"])
    (far,) = [row for row in rows if (row["ranks"], row["hosts"], row["pass"]) == (16, 2, verify_name(1))]
    assert far["exchange ms"] == pytest.approx(1.5 * 24 * library.between(16, 2, 14336 / 16, 12.0, 50.0) / 1e3)
    assert [(row["ranks"], row["hosts"], row["time"]) for row in paces] == [
        (2, 1, "fitted"), (4, 1, "fitted"), (8, 1, "PREDICTED"), (8, 2, "PREDICTED"), (16, 2, "PREDICTED")]  # fmt: skip
    ms = {row["pass"]: row["ms"] for row in rows if (row["ranks"], row["hosts"]) == (8, 1)}
    assert paces[2]["plain tokens/s"] == pytest.approx(1e3 / ms[verify_name(1)])
    assert paces[2]["chain 1, law"] == pytest.approx(1e3 * 1.9 / (ms[verify_name(2)] + ms[DRAFT]))
    assert not notes


def test_one_number_of_ranks_reads_at_the_measured_rate() -> None:
    given = documents([2], Cost(5.0, 0.7, 1 / 300e3), Cost(15.0, 1.0, 1 / 100e3))
    assert Fit.of(given).rate[1024, DRAFT] == pytest.approx((4.0, 3.0))


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda document: {key: value for key, value in document.items() if key != name}


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        (without("limits"), "this one lacks limits"),
        (lambda document: {**document, "exchange times": []}, "this one lacks exchange times"),
        (lambda document: {**document, "ranks": 1}, "one rank exchanges nothing"),
        (lambda document: {**document, "config": SMALL.to_hf_dict()}, "it is of another model than V3"),
        (lambda document: [], "this one lacks ranks"),
    ],
)
def test_documents_that_say_nothing_are_refused(changed: Callable[[Any], Any], cause: str, tmp_path: Path) -> None:
    (given,) = documents([2], Cost(5.0, 0.7, 1 / 300e3), Cost(15.0, 1.0, 1 / 100e3))
    files = [tmp_path / "good.json", tmp_path / "other.json"]
    files[0].write_text(json.dumps(given))
    files[1].write_text(json.dumps(changed(given)))
    assert read_documents(files[:1])
    with pytest.raises(OptionError, match=cause):
        read_documents(files)


def test_the_busiest_rank_with_whole_experts() -> None:
    # of 8 experts on 2 ranks, 3 of 4 are the first one's; the shared expert 8 is everybody's
    assert uneven(8, [[0, 1, 2, 7, 8]], 2) == 1.5
    assert uneven(8, [[0, 4], [0, 1]], 2) == 1.5
    assert uneven(8, [], 2) == 1.0


def test_tokens_of_a_chain_by_its_law() -> None:
    assert chain_tokens([0.9], 1) == pytest.approx(1.9)
    assert chain_tokens([0.9, 0.5], 3) == pytest.approx(1 + 0.9 + 0.45 + 0.225)


def test_defaults_differ_between_a_slice_and_the_whole() -> None:
    from mtp_spec.bench import step

    given = {"parts": None, "rows": None, "acceptance": None, "device": "cuda", "fit": None}
    part, whole = (Namespace(whole=all_of_it, **given) for all_of_it in (False, True))
    for args in (part, whole):
        step._complete(args)
    assert (part.rows, part.acceptance) == ([1, 2, 3, 4, 8, 16], [0.8])
    assert (whole.rows, whole.parts) == ([1, 2, 4, 8], list(run.PARTS))
    assert 0.85 <= whole.acceptance[0] <= 0.9
