"""Steps laid open agree with the text and the statistics of generation."""

from __future__ import annotations

import pytest
from rich.console import Console

import mtp_spec
from mtp_spec.cli.main import main


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_accepted_path_is_the_text(temperature: float) -> None:
    lm = mtp_spec.load()
    shape = mtp_spec.Speculation(branching=(3, 2, 1))
    options = {"temperature": temperature, "seed": 3, "speculation": shape, "max_new_tokens": 40}
    explained = lm.explain("One day a fox", steps=4, **options)
    assert len(explained.steps) == 4
    ids: list[int] = []
    for step in explained.steps:
        assert len(step.nodes) == 15
        accepted = [node for node in step.nodes if node.accepted]
        assert [node.depth for node in accepted] == list(range(1, len(accepted) + 1))
        assert all(0 <= node.draft <= 1 and 0 < node.target <= 1 for node in accepted)
        assert 0 < step.bonus_target <= 1
        ids += [node.token for node in accepted] + lm.encode(step.bonus)[-1:]
    plain = lm.generate("One day a fox", **{**options, "speculation": None})
    text = explained.first + "".join(
        "".join(node.text for node in step.nodes if node.accepted) + step.bonus for step in explained.steps
    )
    assert plain.text.replace(" ", "").startswith(text.replace(" ", ""))


def test_it_prints_as_trees(capsys: pytest.CaptureFixture[str]) -> None:
    lm = mtp_spec.load()
    console = Console(width=100, record=True)
    question = [{"role": "user", "content": "Tell me a story about a fox"}]
    console.print(lm.explain(question, steps=2, temperature=0, speculation=2))
    text = console.export_text()
    assert "step 2" in text
    assert "accepted" in text
    assert "its own" in text
    with pytest.raises(mtp_spec.OptionError, match="steps=0"):
        lm.explain("fox", steps=0)
    main(["generate", "a fox", "--trace", "1", "--max-new-tokens", "8"])
    assert "step 1" in capsys.readouterr().out
