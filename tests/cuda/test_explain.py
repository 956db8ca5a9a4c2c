"""Explained steps on the GPU model: by the kernels' references on a CPU, on a GPU (`pytest -m gpu`) as they are."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

import mtp_spec
from asked import Steps, Turns
from device_models import FEW, checkpoint, device_lm
from mtp_spec.analysis.explain import Explanation
from mtp_spec.api import LM
from mtp_spec.cli.main import main
from mtp_spec.speculation import Speculation
from short_demo import short_demo

OPTIONS: dict[str, Any] = {"seed": 3, "temperature": 0.9, "top_p": 0.95, "logit_bias": FEW}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return device_lm(checkpoint(tmp_path_factory.mktemp("explain"), "two modules"))


def path_of(explained: Explanation) -> list[int]:
    """The tokens of a text without a tokenizer, whose words are lists of ids."""
    ids = [int(explained.first.strip("[]"))]
    for step in explained.steps:
        accepted = [node for node in step.nodes if node.accepted]
        assert [node.depth for node in accepted] == list(range(1, len(accepted) + 1))
        assert step.root == str(ids[-1:])
        assert all(0 <= node.draft <= 1 and 0 <= node.target <= 1 for node in step.nodes)
        assert all(node.target > 0 for node in accepted)
        assert 0 < step.bonus_target <= 1
        ids += [node.token for node in accepted] + [int(step.bonus.strip("[]"))]
    return ids


@pytest.mark.parametrize(
    "shape", [2, Speculation(branching=(3, 2, 1)), Speculation(branching=(2, 2), acceptance="traversal"),
              Speculation(depth=2, acceptance="rejection"), "auto", None], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("guide", [None, Steps(), Turns()], ids=["free", "rows", "masks"])
def test_the_accepted_path_is_the_text(lm: LM, shape: Any, guide: Any) -> None:
    options = {**OPTIONS, "speculation": shape, "logits_processor": guide}
    explained = lm.explain([3, 1, 4], steps=3, max_new_tokens=40, **options)
    ids = path_of(explained)
    out = lm.generate([3, 1, 4], max_new_tokens=len(ids), **options)
    assert out.token_ids == ids
    nodes = [step.nodes for step in explained.steps]
    assert len(nodes) == 3
    if isinstance(shape, Speculation) and shape.acceptance == "coupled":
        # siblings that the bias leaves nothing for are none
        assert all(len({(node.parent, node.token) for node in own}) == len(own) > 3 for own in nodes)


def test_shares_are_those_of_the_processed_rows(lm: LM) -> None:
    """Siblings of all tokens that the bias leaves have all of the draft's probability."""
    options = {**OPTIONS, "top_p": 1.0, "logit_bias": {token: -float("inf") for token in range(3, 160)}}
    for step in lm.explain([3, 1], steps=2, speculation=Speculation(branching=(3,)), **options).steps:
        assert sum(node.draft for node in step.nodes) == pytest.approx(1.0, abs=1e-5)
        assert sum(node.target for node in step.nodes) == pytest.approx(1.0, abs=1e-5)


def test_a_text_that_ends_while_it_is_explained(lm: LM) -> None:
    explained = lm.explain([3, 1, 4], steps=9, max_new_tokens=4, speculation=2, **OPTIONS)
    out = lm.generate([3, 1, 4], max_new_tokens=4, speculation=2, **OPTIONS)
    assert path_of(explained)[:4] == out.token_ids
    assert len(explained.steps) < 9


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("llguidance") is None, reason="mtp-spec[grammar] is not installed")
def test_explained_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    lm = mtp_spec.load(device="cuda")
    for options in ({}, {"response_format": {"type": "regex", "regex": "(red|quick)( and (red|quick)){9}"}}):
        for shape in (3, Speculation(branching=(3, 2)), "auto"):
            given: dict[str, Any] = {"seed": 1, "temperature": 0.8, "speculation": shape, **options}
            explained = lm.explain("One day a fox was ", steps=4, max_new_tokens=30, **given)
            text = explained.first + "".join(
                "".join(node.text for node in step.nodes if node.accepted) + step.bonus for step in explained.steps
            )
            out = lm.generate("One day a fox was ", max_new_tokens=30, **given)
            assert out.text.replace(" ", "").startswith(text.replace(" ", ""))
    main(["generate", "a fox", "--trace", "1", "--max-new-tokens", "8", "--device", "cuda"])
    assert "step 1" in capsys.readouterr().out


def test_it_names_words() -> None:
    lm = device_lm(short_demo())
    explained = lm.explain("One day a fox", steps=1, speculation=2, temperature=0)
    assert all(isinstance(node.text, str) and node.text for node in explained.steps[0].nodes)
