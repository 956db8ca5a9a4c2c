"""lm-eval runs its kinds of tasks on this library, with the same answers whatever the speculation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mtp_spec

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from mtp_spec.evaluation import SpeculativeLM  # noqa: E402

ROWS = [
    {"question": "Tell me a story about a fox.", "answer": "fox", "choices": ["Once upon a time", "zq xk"], "gold": 0},
    {"question": "Write a poem about rain.", "answer": "rain", "choices": ["##@@!!", "The rain falls"], "gold": 1},
]
TASKS = {
    "tiny_answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: SAMPLED, temperature: HEAT}
metric_list: [{metric: exact_match}]
""",
    "tiny_choices": """
output_type: multiple_choice
doc_to_text: "{{question}}\\n"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "tiny_texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in TASKS.items():
        for suffix, sampled, heat in (("", "false", "0.0"), ("_sampled", "true", "0.9")):
            data = f"task: {name}{suffix}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: "
            data += f"{folder / 'rows.jsonl'}}}}}\n"
            (folder / f"{name}{suffix}.yaml").write_text(data + text.replace("SAMPLED", sampled).replace("HEAT", heat))
    return folder


def evaluate(folder: Path, tasks: list[str], chat: bool = False, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model="mtp_spec", model_args={"seed": 3, **options}, tasks=tasks, apply_chat_template=chat, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False), log_samples=True,
        cache_requests=False,
    )  # fmt: skip
    return found


def answers(found: dict[str, Any]) -> dict[str, list[Any]]:
    return {task: [sample["resps"] for sample in samples] for task, samples in found["samples"].items()}


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def test_answers_are_the_same_with_speculation_on_and_off(folder: Path) -> None:
    tasks = ["tiny_answers", "tiny_answers_sampled", "tiny_choices", "tiny_texts"]
    plain = evaluate(folder, tasks, speculation="off")
    drafted = evaluate(folder, tasks, speculation="3x1", batch_size=2)
    assert answers(plain) == answers(drafted)
    assert all(text for [[text]] in answers(plain)["tiny_answers"])
    assert answers(plain)["tiny_answers"] != answers(plain)["tiny_answers_sampled"]
    assert plain["results"]["tiny_choices"]["acc,none"] == 1.0
    assert 1 < plain["results"]["tiny_texts"]["word_perplexity,none"] < 1e6
    assert plain["results"].keys() == drafted["results"].keys()


def test_a_chat_is_answered_through_the_template(folder: Path) -> None:
    (first,), _ = answers(evaluate(folder, ["tiny_answers"], chat=True, speculation=2))["tiny_answers"]
    lm = mtp_spec.load()
    own = lm.chat([{"role": "user", "content": ROWS[0]["question"]}], temperature=0, max_new_tokens=12, stop="\n\n")
    assert first == [own.text]


def test_probabilities_are_those_of_score_in_windows_too() -> None:
    model = SpeculativeLM(max_context=16)
    ids = model.tok_encode("Once upon a time there was a small fox who lived in the forest near a quiet village.")
    rows = model.lm.score(ids[:15]).logits.log_softmax(-1)
    expected = sum(float(rows[i, ids[i + 1]]) for i in range(4, 14))
    ((chance, greedy),) = model._loglikelihood_tokens([(None, ids[:5], ids[5:15])], disable_tqdm=True)
    assert chance == pytest.approx(expected, rel=1e-4)
    assert greedy == all(int(rows[i].argmax()) == ids[i + 1] for i in range(4, 14))
    with pytest.raises(mtp_spec.OptionError, match="the context is 16"):
        model._loglikelihood_tokens([(None, ids[:1], ids[:17])], disable_tqdm=True)
    with pytest.raises(mtp_spec.OptionError, match="no room for a prompt"):
        model._cut(ids, 16)
    assert model._cut(ids, 10) == ids[-6:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "auto"}, "give batch_size a number"),
        ({"speculation": "maybe"}, "speculation='maybe'"),
        ({"device": "tpu"}, "device='tpu'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mtp_spec.OptionError, match=message):
        SpeculativeLM(**options)


def test_an_unknown_generation_option_of_a_task_is_refused() -> None:
    model = SpeculativeLM()
    options = model._options({"until": "\n", "num_beams": 4})
    assert options["stop"] == ["\n"]
    with pytest.raises(mtp_spec.OptionError, match="num_beams"):
        model.lm.generate("Hi", **options)
