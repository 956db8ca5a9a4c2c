"""Seeds: drawn and reported where none is given, one of its own for every text, and every text had again alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mtp_spec
import tiny
from mtp_spec import Speculation
from mtp_spec.cli.main import main
from mtp_spec.sampling.seeds import LIMIT, MADE_BITS, SAMPLES, derived_seed, fresh_seed, text_seeds

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0}
SHAPES: list[Any] = [None, 3, Speculation(branching=(2, 2))]
PROMPTS = [[4, 2], [5], [4, 2], [9, 8, 7]]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> mtp_spec.LM:
    return mtp_spec.load(tiny.make(tmp_path_factory.mktemp("tiny") / "model", seed=1).folder, max_batch=4)


def test_seeds_that_are_made_are_exact_in_every_json() -> None:
    seeds = {fresh_seed() for _ in range(50)} | {derived_seed(seed, 1) for seed in (0, 7, LIMIT - 1)}
    assert len(seeds) == 53
    assert all(0 <= seed < 2**MADE_BITS for seed in seeds)
    assert all(int(float(seed)) == seed for seed in seeds)


def test_derived_seeds_are_those_that_are_documented() -> None:
    """A text's seed is part of its name: these numbers stay."""
    assert [derived_seed(7, index) for index in range(3)] == [7, 2383985826589610, 8263386607654554]
    assert derived_seed(LIMIT - 1, 0) == LIMIT - 1
    assert derived_seed(7, 1, SAMPLES) not in (7, derived_seed(7, 1))
    generator = np.random.Philox(key=np.array([7, 2], dtype=np.uint64), counter=np.array([0, 5, 0, 0], dtype=np.uint64))
    assert derived_seed(7, 5) == int(generator.random_raw()) >> 11
    assert len({derived_seed(seed, index) for seed in range(100) for index in range(1, 101)}) == 10000


def test_without_a_seed_every_text_draws_its_own_and_tells_it(lm: mtp_spec.LM) -> None:
    stream = lm.stream([4, 2], **OPTIONS)
    list(stream)
    ways = [lm.generate([4, 2], **OPTIONS), stream.result, lm.submit([4, 2], **OPTIONS).result(),
            *lm.generate(PROMPTS[:1], **OPTIONS), *lm.generate([4, 2], n=2, **OPTIONS)]  # fmt: skip
    assert len({out.seed for out in ways}) == len(ways)
    assert len({tuple(out.token_ids) for out in ways}) > 1
    for out in ways:
        for shape in SHAPES:
            assert lm.generate([4, 2], seed=out.seed, speculation=shape, **OPTIONS).token_ids == out.token_ids


@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "chain", "tree"])
def test_a_list_gives_each_text_a_seed_of_its_own(lm: mtp_spec.LM, shape: Any) -> None:
    texts = lm.generate(PROMPTS, seed=7, speculation=shape, **OPTIONS)
    assert [out.seed for out in texts] == [derived_seed(7, index) for index in range(4)]
    assert texts[0].token_ids != texts[2].token_ids  # the same prompt
    for prompt, out in zip(PROMPTS, texts, strict=True):
        assert lm.generate(prompt, seed=out.seed, speculation=None, **OPTIONS).token_ids == out.token_ids
        assert lm.submit(prompt, seed=out.seed, speculation=3, **OPTIONS).result().token_ids == out.token_ids


def test_draws_of_a_call_are_independent(lm: mtp_spec.LM) -> None:
    """With one seed for all, one prompt would have one first token."""
    options: dict[str, Any] = {"max_new_tokens": 1, "temperature": 3.0, "speculation": None}
    for seed in (None, 3):
        firsts = [tuple(out.token_ids) for out in lm.generate([[5, 6]] * 60, seed=seed, **options)]
        assert len(set(firsts)) > 20
        samples = [tuple(out.token_ids) for out in lm.generate([5, 6], n=60, seed=seed, **options)]
        assert len(set(samples)) > 20


def test_samples_of_a_prompt_derive_from_its_seed(lm: mtp_spec.LM) -> None:
    lists = lm.generate(PROMPTS[:2], n=3, seed=7, **OPTIONS)
    assert len({out.seed for samples in lists for out in samples}) == 6
    # the first of each prompt is that of n=1, and each prompt's samples can be had without the others
    assert [samples[0].seed for samples in lists] == [7, derived_seed(7, 1)]
    for prompt, samples in zip(PROMPTS, lists, strict=False):
        alone = lm.generate(prompt, n=3, seed=samples[0].seed, **OPTIONS)
        assert [out.token_ids for out in alone] == [out.token_ids for out in samples]
        assert [out.seed for out in alone] == [out.seed for out in samples]
        for out in samples:
            assert lm.generate(prompt, seed=out.seed, **OPTIONS).token_ids == out.token_ids


@pytest.mark.parametrize("given", [[3, 1, 2, 0], (3, 1, 2, 0), np.array([3, 1, 2, 0]), torch.tensor([3, 1, 2, 0])])
def test_a_list_of_seeds_has_one_for_each(lm: mtp_spec.LM, given: Any) -> None:
    texts = lm.generate(PROMPTS, seed=given, **OPTIONS)
    assert [out.seed for out in texts] == [3, 1, 2, 0]
    assert texts[1].token_ids == lm.generate(PROMPTS[1], seed=1, **OPTIONS).token_ids


def test_a_list_of_seeds_and_samples() -> None:
    assert text_seeds([3, 4], 2, 2) == [[3, derived_seed(3, 1, SAMPLES)], [4, derived_seed(4, 1, SAMPLES)]]
    assert text_seeds([3, 4, 5, 6], 2, 2) == [[3, 4], [5, 6]]
    assert text_seeds([3, 4, 5], 1, 3) == [[3, 4, 5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": [1, 2, 3]}, "seed has 3 numbers: a list gives one for each prompt, here 4"),
        ({"seed": []}, "seed has 0 numbers"),
        ({"seed": [1, 2, 3], "n": 2}, "here 4 or 8, one for each text"),
        ({"seed": [1, 2, None, 4]}, "a list holds integers alone"),
        ({"seed": [1, 2, 3, 1.5]}, r"seed=1\.5"),
        ({"seed": [1, 2, 3, -1]}, "seed=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": LIMIT}, f"seed={LIMIT}"),
        ({"seed": True}, "seed=True"),
        ({"seed": "7"}, "seed='7'"),
        ({"seed": 0.5}, r"seed=0\.5"),
        ({"n": 0}, "n=0"),
        ({"n": 1.5}, r"n=1\.5"),
        ({"n": True}, "n=True"),
    ],
    ids=str,
)
def test_impossible_seeds(lm: mtp_spec.LM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(mtp_spec.OptionError, match=message):
        lm.generate(PROMPTS, **options)


def test_a_list_of_seeds_is_for_a_list_of_prompts(lm: mtp_spec.LM) -> None:
    for call in (lm.generate, lm.stream, lm.submit):
        with pytest.raises(mtp_spec.OptionError, match="a list is for a list of prompts"):
            call([4, 2], seed=[1])


def test_the_command_line_tells_the_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--max-new-tokens", "6", "--raw", "--temperature", "1.5"]
    main(["generate", "The fox", *arguments])
    text, err = capsys.readouterr()
    seed = err.strip().rstrip("]").rpartition("seed ")[2]
    main(["generate", "The fox", "--seed", seed, "--json", *arguments])
    again = json.loads(capsys.readouterr().out)
    assert (again["text"].strip(), again["seed"]) == (text.strip(), int(seed))
    main(["generate", "The fox", "--trace", "1", *arguments])
    assert "[seed " in capsys.readouterr().err
    file = tmp_path / "prompts.jsonl"
    file.write_text('"The fox"\n"The sea"\n')
    for batch in ("1", "3"):
        several = ["--prompts", str(file), "--n", "2", "--seed", "4", "--json", "--max-batch", batch]
        main(["generate", *several, *arguments])
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["seed"] for line in lines] == [seed for own in text_seeds(4, 2, 2) for seed in own]
