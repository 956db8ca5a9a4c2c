"""The bundled model: loads, generates the same text with and without speculation, drafts usefully."""

from __future__ import annotations

import pytest
import torch

import mtp_spec

PROMPTS = ["Tell me a story about a fox.", "List three fruits.", "Explain how rain forms."]


@pytest.fixture(scope="module")
def lm() -> mtp_spec.LM:
    return mtp_spec.load()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_same_text(lm: mtp_spec.LM, temperature: float) -> None:
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        plain = lm.chat(chat, max_new_tokens=30, temperature=temperature, speculation=None, seed=0)
        for speculation in (3, mtp_spec.Speculation(branching=(2, 2, 1))):
            drafted = lm.chat(chat, max_new_tokens=30, temperature=temperature, speculation=speculation, seed=0)
            assert drafted.token_ids == plain.token_ids
            assert drafted.text == plain.text
            assert drafted.stats.tokens_per_step > 1.2


def test_stop_string_cuts_text_and_ids(lm: mtp_spec.LM) -> None:
    chat = [{"role": "user", "content": PROMPTS[0]}]
    whole = lm.chat(chat, max_new_tokens=30, temperature=0.0)
    stop = whole.text[20:25]
    cut = lm.chat(chat, max_new_tokens=30, temperature=0.0, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    stream = lm.stream(chat, max_new_tokens=30, temperature=0.0, stop=stop)
    assert "".join(event.text for event in stream) == cut.text


def test_scores_are_what_texts_are_written_from() -> None:
    lm = mtp_spec.load(dtype="bfloat16", measure=False)
    together = lm.technique == "batched"
    if not together:  # scored rows round otherwise than generated ones, in float32 by next to nothing
        lm = mtp_spec.load(dtype="float32", measure=False)
    prompt = lm.encode("Tell me a story about a fox")
    out = lm.generate(prompt, temperature=0, max_new_tokens=60, speculation=None, logprobs=1)
    rows = lm.score([*prompt, *out.token_ids]).logits[len(prompt) - 1 : -1]
    assert rows.argmax(-1).tolist() == out.token_ids
    assert out.logprobs is not None
    found = rows.log_softmax(-1)[range(len(rows)), out.token_ids]
    # where bits of rows are the same, what is left is log_softmax's
    written = torch.tensor([one for one, _ in out.logprobs])
    assert torch.allclose(found, written, rtol=0, atol=1e-5 if together else 1e-4)
