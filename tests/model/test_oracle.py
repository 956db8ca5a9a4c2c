"""Logits and greedy text against transformers, on random small checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mtp_spec
import tiny

IDS = [(37 * i + 11) % 96 for i in range(40)]
TOLERANCE = 1e-4  # of the largest logit


@pytest.fixture(scope="module", params=list(tiny.KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[tiny.Tiny, mtp_spec.LM]:
    made = tiny.make(tmp_path_factory.mktemp("tiny") / "model", request.param, seed=3)
    return made, mtp_spec.load(made.folder, dtype="float32")


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


def test_main_logits(pair: tuple[tiny.Tiny, mtp_spec.LM]) -> None:
    made, lm = pair
    with torch.no_grad():
        theirs = made.main(torch.tensor([IDS])).logits[0]
    close(lm.score(IDS).logits, theirs)


def test_decoded_rows_have_the_scored_logits(pair: tuple[tiny.Tiny, mtp_spec.LM]) -> None:
    _, lm = pair
    cache = lm.model.new_cache(64)
    rows = []
    with torch.inference_mode():
        for token in IDS:
            rows.append(lm.model.logits(lm.model.rows([token], cache, [-1])))
            cache.commit([0])
    close(torch.cat(rows), lm.score(IDS).logits)


def test_mtp_logits(pair: tuple[tiny.Tiny, mtp_spec.LM]) -> None:
    made, lm = pair
    scores = lm.score(IDS).mtp_logits
    assert scores.shape[0] == len(lm.model.mtp)
    if made.mtp is None:
        return
    with torch.no_grad():
        hidden = made.main.model(torch.tensor([IDS])).last_hidden_state
        for depth in range(1, len(lm.model.mtp) + 1):
            count = len(IDS) - depth
            positions = torch.arange(depth, len(IDS))[None]
            hidden = made.mtp.forward_layer(
                depth - 1, hidden[:, :count], positions, None, input_ids=torch.tensor([IDS[depth:]])
            )
            close(scores[depth - 1, :count], made.mtp.shared_head(hidden)[0])
            assert scores[depth - 1, count:].isnan().all()


def test_greedy_text(pair: tuple[tiny.Tiny, mtp_spec.LM]) -> None:
    made, lm = pair
    prompt = IDS[:9]
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = made.main.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    for speculation in (None, *((1, 3) if made.mtp is not None else ())):
        ours = lm.generate(prompt, max_new_tokens=30, temperature=0.0, speculation=speculation)
        assert ours.token_ids == theirs


def test_greedy_text_equals_transformers_use_mtp(tmp_path: Path) -> None:
    made = tiny.make(tmp_path / "model", "v3", seed=5)
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(made.folder)
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3.*"]  # transformers only knows V3's own 61
    prompt = IDS[:9]
    try:
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, use_mtp=True, eos_token_id=None, pad_token_id=0
        )
    except Exception as error:
        pytest.skip(f"use_mtp does not run on a small checkpoint here: {error}")
    lm = mtp_spec.load(made.folder, dtype="float32")
    ours = lm.generate(prompt, max_new_tokens=20, temperature=0.0, speculation=1)
    assert ours.token_ids == theirs[0, len(prompt) :].tolist()
