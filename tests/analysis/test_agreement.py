"""The check of MTP modules against their model, and the warning where drafts keep failing."""

from __future__ import annotations

import argparse
import json
import warnings
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import mtp_spec
from mtp_spec.analysis.watch import EVIDENCE, FEW, STEPS, Watch
from mtp_spec.cli.agreement import agreement
from mtp_spec.cli.inspect import run_inspect
from mtp_spec.cli.main import build_parser, main
from mtp_spec.errors import MTPSpecError, OptionError
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.stats import GenerationStats
from small import make


def stats(steps: int, drafted: int, accepted: int) -> GenerationStats:
    """A text of which the first steps drafted one token."""
    made = GenerationStats()
    for step in range(steps):
        ranks = [0] if step < accepted else []
        made.record_step(int(step < drafted), int(step < drafted), ranks, len(ranks) + 1)
    return made


def test_the_bundled_model_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "--agreement", "--json"])
    rates = json.loads(capsys.readouterr().out)["agreement"]
    assert len(rates) == 4
    assert rates[0] > 0.6


def test_untrained_modules_are_found_out(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    assert agreement(mtp_spec.load(folder))[0] < 0.3
    with pytest.raises(MTPSpecError, match=r"first draft is right in .* another model"):
        run_inspect(_inspect(folder))


def _inspect(folder: Path) -> argparse.Namespace:
    return build_parser().parse_args(["inspect", str(folder), "--agreement"])


@pytest.mark.parametrize(
    ("text", "temperature", "pays", "cause"),
    [
        (stats(STEPS, STEPS, 4), 0.7, True, "--agreement"),
        (stats(STEPS, STEPS, 4), 2.0, True, "temperature 2"),
        (stats(STEPS, EVIDENCE, 0), 0.7, True, "0 drafted tokens accepted in 12 steps"),
        (stats(STEPS, STEPS, 4), 0.7, False, "one by one"),
    ],
)
def test_warns_once_and_says_why(text: GenerationStats, temperature: float, pays: bool, cause: str) -> None:
    watch, params = Watch(pays), SamplingParams(temperature=temperature)
    with pytest.warns(UserWarning, match=cause):
        watch.ended(text, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.ended(text, params)


def test_does_not_warn_of_few_steps_or_of_good_drafts() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Watch(True).ended(stats(STEPS - 1, STEPS - 1, 0), SamplingParams())
        Watch(True).ended(stats(STEPS, STEPS, int(STEPS * (FEW - 1.0)) + 1), SamplingParams())


def test_does_not_warn_where_drafts_are_left_out() -> None:
    watch = Watch(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(EVIDENCE - 1):
            watch.ended(stats(STEPS, 1, 0), SamplingParams())
        watch.ended(stats(STEPS, 1, 1), SamplingParams())  # the twelfth is right
        lm = mtp_spec.load()
        for seed in range(3):
            lm.generate("Tell me a story about a fox", max_new_tokens=150, seed=seed, ignore_eos=True)


def test_does_not_warn_of_modules_whose_drafts_stand_beside_right_ones() -> None:
    beside, wrong = GenerationStats(), stats(STEPS, EVIDENCE, 0)
    for _ in range(STEPS):
        beside.record_step(1, 2, [0], 2, ["text"], ["text"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Watch(True).ended(beside, SamplingParams())
    with pytest.warns(UserWarning, match="0 drafted tokens accepted in 12 steps"):
        Watch(True).ended(beside.merge(wrong), SamplingParams())


def test_texts_of_a_model_with_untrained_modules_warn(tmp_path: Path) -> None:
    lm = mtp_spec.load(make(tmp_path / "model"))
    with pytest.warns(UserWarning, match="accepted in"):
        lm.generate([[3, 5 + i] for i in range(9)], max_new_tokens=30, temperature=0.0, speculation=1)


def test_a_configuration_has_no_modules_to_check() -> None:
    config = Path(str(files("mtp_spec.configs") / "config_16B.json"))
    with pytest.raises(OptionError, match="belong to a checkpoint folder"):
        run_inspect(_inspect(config))


def test_a_device_without_agreement_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "--device", "cpu"])
    assert stopped.value.code == 2
    assert "--device cpu belongs to --agreement" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_agreement_on_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "--agreement", "--device", "cuda"])
    assert stopped.value.code == 2
    assert "cuda" in capsys.readouterr().err
