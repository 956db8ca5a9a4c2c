"""`bench acceptance`: what is measured, what an interruption leaves, and what the files hold."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import mtp_spec
from mtp_spec.bench.acceptance.contexts import prompt_ids
from mtp_spec.bench.acceptance.journal import Journal, Text
from mtp_spec.bench.acceptance.report import CSV_COLUMNS
from mtp_spec.bench.acceptance.running import Runner
from mtp_spec.cli.main import main

TINY = ["--prompts", "2", "--max-new-tokens", "6"]
SMALL = [*TINY, "--depths", "1,2", "--temperatures", "0.8"]
# what another run of the same command may find different
TIMES = {"seconds", "cost", "times_plain", "plain_seconds", "x plain", "tok/s", "tokens_per_second", "date", "command",
         "options"}  # fmt: skip
LOAD = mtp_spec.load


@pytest.fixture(scope="module")
def lm() -> mtp_spec.LM:
    return LOAD(max_batch=3)


@pytest.fixture(autouse=True)
def _loaded(lm: mtp_spec.LM, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path | None = None, draft_vocabulary: Any = None, **options: Any) -> mtp_spec.LM:
        assert options["max_batch"] <= lm.max_batch
        return lm if path is draft_vocabulary is None else LOAD(path, draft_vocabulary=draft_vocabulary, **options)

    monkeypatch.setattr(mtp_spec, "load", load)


def run(arguments: list[str], folder: Path) -> dict[str, Any]:
    file = folder / "deeper" / "report.json"
    main(["bench", "acceptance", *arguments, "--json", str(file)])
    assert [found.name for found in file.parent.iterdir()] == ["report.json"]
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def lasting(value: Any) -> Any:
    """Returns a document without what is measured in seconds."""
    if isinstance(value, dict):
        return {key: lasting(part) for key, part in value.items() if key not in TIMES}
    return [lasting(part) for part in value] if isinstance(value, list) else value


def interrupting(error: type[BaseException], after: int) -> Callable[..., Text]:
    """Returns a `Runner._text` that stops the run at a text, half of whose line is already in the journal."""
    honest, texts = Runner._text, iter(range(1000))

    def careless(self: Runner, *args: Any) -> Text:
        text = honest(self, *args)
        if next(texts) == after:
            assert self.journal._out is not None
            self.journal._out.write(text.to_line()[:60])
            self.journal._out.flush()
            raise error
        return text

    return careless


@pytest.mark.usefixtures("auto_drafts")
def test_numbers_agree_with_one_another(tmp_path: Path) -> None:
    document = run([*TINY, "--depths", "2", "--auto", "--temperatures", "0,0.8"], tmp_path)
    details = document["details"]
    assert list(details) == [f"{name} at {t}" for t in (0.0, 0.8) for name in ("plain", "chain 2", "auto")]
    assert document["set"]["questions"] == 2
    for row, cell in zip(document["rows"], details.values(), strict=True):
        texts = cell["texts"]
        assert row["tok/step"] == cell["tokens_per_step"]
        assert cell["tokens_per_step"] == sum(t["step_tokens"] for t in texts) / sum(t["steps"] for t in texts)
        assert cell["mean_acceptance_length"] == 1 + cell["accepted"] / cell["steps"]
        assert sum(cell["histogram"].values()) == cell["steps"] == cell["num_spec_steps"]
        assert sum(sum(c.values()) for c in cell["histogram_by_draft_length"].values()) == cell["steps"]
        assert sum(part["texts"] for part in cell["by_category"].values()) == 2
        assert cell["parity"] == {"same": 2, "texts": 2, "first_differences": []}
        assert sum(cell["accepted_by_rank"].values()) == cell["accepted"]
    plain, chain = details["plain at 0.0"], details["chain 2 at 0.0"]
    assert plain["times_plain"]["median"] == plain["tokens_per_step"] == 1.0
    assert plain["steps_without_draft"] == 1.0
    assert chain["tokens_by_source"]["target"] == chain["steps"] + 2
    assert chain["cost"]["step_ms_p99"] >= chain["cost"]["step_ms_p50"] > 0
    assert details["auto at 0.8"]["texts"][0]["expected_tokens_per_step"] >= 1
    assert chain["texts"][0]["expected_tokens_per_step"] is None


BATCHES = ["--prompts", "4", "--max-new-tokens", "6", "--depths", "2", "--temperatures", "0.8", "--batch", "3,1"]


def test_texts_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"--{kind}={tmp_path / 'out'}.{kind}" for kind in ("html", "csv")]
    document = run([*BATCHES, *files], tmp_path)
    details = document["details"]
    assert list(details) == [f"{name}{batch} at 0.8" for batch in ("", ", batch 3") for name in ("plain", "chain 2")]
    for draft in ("plain", "chain 2"):
        alone, beside = details[f"{draft} at 0.8"], details[f"{draft}, batch 3 at 0.8"]
        assert beside["tokens_per_step"] == alone["tokens_per_step"]
        assert beside["accepted_per_depth"] == alone["accepted_per_depth"]
        assert beside["parity"]["same"] == 4
        assert alone["same_as"] == beside["same_as"] == "plain at 0.8"
        assert beside["plain"] == "plain, batch 3 at 0.8"
        texts = beside["texts"]
        assert [text["first_of_batch"] for text in texts] == [0, 0, 0, 3]
        assert [text["first_of_batch"] for text in alone["texts"]] == [0, 1, 2, 3]
        # texts of a batch share its time
        assert texts[0]["seconds"] == texts[1]["seconds"] == texts[2]["seconds"]
        tokens = sum(text["new_tokens"] for text in texts)
        assert beside["cost"]["tokens_per_second"] == pytest.approx(tokens / sum(text["seconds"] for text in texts))
    assert [row["tok/s"] for row in document["rows"]] == [c["cost"]["tokens_per_second"] for c in details.values()]
    assert "3 texts side by side" in capsys.readouterr().out
    assert [row["batch"] for row in csv.DictReader((tmp_path / "out.csv").open())] == ["1", "1", "3", "3"]
    assert "Tokens per second of texts side by side" in (tmp_path / "out.html").read_text()
    first, second = (str(tmp_path / f"{name}.json") for name in "ab")
    slower = details["chain 2, batch 3 at 0.8"]["texts"]
    for file in (first, second):
        Path(file).write_text(json.dumps(document))
        for text in slower[:3]:
            text["seconds"] *= 2
    main(["bench", "compare", first, second, "--json", str(tmp_path / "compare.json")])
    cells = json.loads((tmp_path / "compare.json").read_text())["cells"]
    assert cells["chain 2 at 0.8"]["times_plain"]["interval"] == [0.0, 0.0]
    assert cells["chain 2, batch 3 at 0.8"]["times_plain"]["difference"] < 0


def test_a_batch_that_was_interrupted_is_generated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(BATCHES, tmp_path / "whole")
    command = ["bench", "acceptance", *BATCHES, "--json", str(tmp_path / "r.json")]
    honest, texts = Journal.add, iter(range(1000))

    def careless(self: Journal, text: Text) -> None:
        if next(texts) == 10:  # the third text of a batch
            raise KeyboardInterrupt
        honest(self, text)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", careless)
        with pytest.raises(SystemExit):
            main(command)
    main([*command, "--resume"])
    assert lasting(json.loads((tmp_path / "r.json").read_text())) == lasting(whole)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bound"], "one text at a time"),
        (["--transformers", "--batch", "3"], "1 in --batch"),
    ],
)
def test_batches_are_refused_before_loading(
    more: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mtp_spec, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit):
        main(["bench", "acceptance", *BATCHES, *more])
    assert message in capsys.readouterr().err


def test_rules_beside_their_bound(tmp_path: Path) -> None:
    shapes = ["--depths", "1", "--trees", "2", "--rules", "coupled,hybrid,block,typical"]
    document = run([*TINY, *shapes, "--temperatures", "0,1", "--bound"], tmp_path)
    assert len(document["rows"]) == 2 * (1 + 3 * 2 + 1)
    assert set(document["left_out"]) == {"tree 2, block"}
    first = {name: cell.get("first_depth") for name, cell in document["details"].items()}
    assert first["tree 2, typical at 1.0"] is None
    assert document["details"]["tree 2, typical at 1.0"]["times_plain"]["median"] > 0
    assert document["details"]["tree 2, hybrid at 1.0"]["times_plain"] is None
    for rule in ("", ", hybrid"):
        # certain drafts are accepted wherever they can be
        assert first[f"tree 2{rule} at 0.0"]["part"] == 1.0
        assert all(0.4 < first[f"{shape}{rule} at 1.0"]["bound"] <= 1.0 for shape in ("chain 1", "tree 2"))
    assert 0.7 < first["tree 2 at 1.0"]["part"] <= 1.05


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_run_goes_on(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(SMALL, tmp_path / "whole")
    command = ["bench", "acceptance", *SMALL, "--json", str(tmp_path / "report.json"), "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_text", interrupting(error, after=7))
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error) as stopped:
            main(command[:-1])
    journal = tmp_path / "report.json.journal"
    kept = journal.read_text().count("\n") - 1
    assert [found.name for found in tmp_path.iterdir() if found.is_file()] == [journal.name]
    if error is KeyboardInterrupt:
        assert stopped.value.args == (130,)
        shown = capsys.readouterr().out
        assert "Interrupted" in shown
        assert "chain 2" in shown
        assert f"{kept} texts are kept" in shown
    with pytest.raises(SystemExit):
        main(command[:-1])
    assert "--resume goes on with it" in capsys.readouterr().err
    generated: list[Text] = []
    honest = Runner._text
    monkeypatch.setattr(Runner, "_text", lambda *args: generated.append(honest(*args)) or generated[-1])
    main(command)
    missing, warm_ups = 6 - kept, 3
    assert missing < len(generated) <= missing + warm_ups
    assert not journal.exists()
    assert lasting(json.loads((tmp_path / "report.json").read_text())) == lasting(whole)


def test_a_journal_of_another_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--json", str(tmp_path / "report.json")]
    monkeypatch.setattr(Runner, "_text", interrupting(KeyboardInterrupt, after=6))
    with pytest.raises(SystemExit):
        main(["bench", "acceptance", *SMALL, *output])
    before = (tmp_path / "report.json.journal").read_text()
    refused = {
        ("--depths", "1,3", "--resume"): "another depths",
        ("--prompts", "3", "--resume"): "another prompts, questions",
        ("--json", str(tmp_path / "other.json"), "--resume"): "other.json.journal does not exist",
    }
    for changes, message in refused.items():
        with pytest.raises(SystemExit) as stopped:
            main(["bench", "acceptance", *SMALL, *output, *changes])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "report.json.journal").read_text() == before
    lines = before.splitlines(keepends=True)
    (tmp_path / "report.json.journal").write_text("".join([lines[0], lines[1][:40] + "\n", *lines[2:]]))
    with pytest.raises(SystemExit):
        main(["bench", "acceptance", *SMALL, *output, "--resume"])
    assert "line 2 is damaged" in capsys.readouterr().err


def test_csv_has_the_same_columns_whatever_was_measured(tmp_path: Path) -> None:
    found = []
    for name, more in {"a": ["--depths", "1"], "b": ["--trees", "2x1", "--rules", "coupled,typical"]}.items():
        file = tmp_path / f"{name}.csv"
        main(["bench", "acceptance", *TINY, *more, "--temperatures", "0", "--csv", str(file)])
        found.append(list(csv.DictReader(file.read_text().splitlines())))
    assert [list(rows[0]) for rows in found] == [CSV_COLUMNS] * 2
    plain, tree, typical = found[1]
    assert (plain["draft"], tree["draft"], typical["rule"]) == ("plain", "tree 2,1", "typical")
    assert float(plain["tokens_per_step"]) == float(plain["times_plain_median"]) == 1.0
    low, middle, high = (float(tree[f"tokens_per_step{end}"]) for end in ("_interval_low", "", "_interval_high"))
    assert low <= middle <= high
    assert 0 <= float(tree["accepted_2_conditional"]) <= 1
    assert tree["accepted_3_conditional"] == ""
    assert (tree["same_texts"], tree["texts"]) == ("2", "2")


class Resources(HTMLParser):
    """Collects what a page would fetch, and its tags that were left open."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched, self.open, self.count = list[str](), list[str](), dict[str, int]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "use", "path", "image", "rect"):
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "use", "path", "image", "rect"):
            assert self.open.pop() == tag


@pytest.mark.usefixtures("auto_drafts")
def test_a_page_stands_alone(tmp_path: Path) -> None:
    html, folder = tmp_path / "page.html", tmp_path / "pictures"
    main(["bench", "acceptance", *TINY, "--depths", "1,2", "--auto", "--html", str(html), "--png", str(folder)])
    text = html.read_text()
    found = Resources()
    found.feed(text)
    assert found.open == []
    assert all(target.startswith("#") for target in found.fetched)
    assert "http" not in text.replace(str(tmp_path), "")
    assert "url(" not in text.replace("url(#", "")
    # every fragment that a plot refers to is on the page, once
    for target in {*found.fetched, *(f"#{name}" for name in re.findall(r"url\(#([^)]+)", text))}:
        assert text.count(f'id="{target[1:]}"') == 1, target
    names = ["acceptance", "cost", "histogram", "planned", "speed"]
    assert found.count["svg"] == len(names)
    assert text.count('<tr class="first">') == 2
    assert sorted(picture.stem for picture in folder.iterdir()) == names
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in folder.iterdir())


def test_plots_need_matplotlib_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(Runner, "run", None)
    with pytest.raises(SystemExit):
        main(["bench", "acceptance", *TINY, "--html", str(tmp_path / "page.html")])
    assert "pip install 'mtp-spec[plots]'" in capsys.readouterr().err


def test_two_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / f"{name}.json" for name in "abc"]
    for file, more in zip(files, (["--depths", "1,2"], ["--depths", "2,3"], ["--depths", "2", "--prompts", "3"]),
                          strict=True):  # fmt: skip
        main(["bench", "acceptance", *SMALL, *more, "--json", str(file)])
    first, second, third = map(str, files)
    whole = tmp_path / "compare.json"
    capsys.readouterr()
    main(["bench", "compare", first, second, "--json", str(whole)])
    shown, compared = capsys.readouterr().out, json.loads(whole.read_text())
    assert "only in" in shown
    assert list(compared["cells"]) == ["plain at 0.8", "chain 2 at 0.8"]
    assert compared["only"] == {first: ["chain 1 at 0.8"], second: ["chain 3 at 0.8"]}
    a, b = (json.loads(file.read_text())["details"]["chain 2 at 0.8"] for file in files[:2])
    tokens, speed = (compared["cells"]["chain 2 at 0.8"][name] for name in ("tokens_per_step", "times_plain"))
    # the same questions resampled alike: what does not differ, does not differ in any sample
    assert (tokens["difference"], tokens["interval"]) == (0.0, [0.0, 0.0])
    assert speed["a"] == pytest.approx(a["times_plain"]["ratio"])
    assert speed["b"] == pytest.approx(b["times_plain"]["ratio"])
    assert speed["interval"][0] <= speed["difference"] <= speed["interval"][1]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "compare", first, third])
    assert stopped.value.code == 2
    assert "do not measure the same: questions" in capsys.readouterr().err
    main(["bench", "compare", first, third, "--anyway"])
    assert "they differ in questions" in capsys.readouterr().out


def test_draft_vocabularies_and_contexts(tmp_path: Path) -> None:
    document = run([*TINY, "--depths", "1", "--temperatures", "0", "--contexts", "32,96", "--draft-vocabulary",
                    "300,all"], tmp_path)  # fmt: skip
    for context in (32, 96):
        small, whole = (document["details"][f"chain 1, context {context}{more} at 0.0"]
                        for more in (", vocabulary 300", ""))  # fmt: skip
        assert small["parity"]["same"] == whole["parity"]["same"] == 2
        assert small["accepted"] < whole["accepted"]
        assert all(context - 6 < text["prompt_tokens"] <= context for text in whole["texts"])
    assert list(whole["by_context"]) == ["up to 128"]


@pytest.mark.parametrize("raw", [False, True])
def test_prompts_come_to_a_length(lm: mtp_spec.LM, raw: bool) -> None:
    messages = [{"role": "user", "content": " ".join(f"word{i}" for i in range(60))}]
    whole = prompt_ids(lm, messages, None, raw, 0)
    shorter, longer = (prompt_ids(lm, messages, length, raw, 0) for length in (len(whole) - 50, len(whole) + 300))
    assert len(whole) - 56 < len(shorter) <= len(whole) - 50
    assert len(whole) + 290 < len(longer) <= len(whole) + 300
    assert longer != prompt_ids(lm, messages, len(whole) + 300, raw, 1)
    for ids in (shorter, longer):
        assert "word58 word59" in lm.decode(ids)
    with pytest.raises(mtp_spec.OptionError, match="too many outside its first message"):
        prompt_ids(lm, [*messages, {"role": "assistant", "content": "so " * 200}, messages[0]], 64, raw, 0)


def test_later_turns_follow_plain_decodings_answer(tmp_path: Path, lm: mtp_spec.LM) -> None:
    file = tmp_path / "question.jsonl"
    turns = ["Tell me a story about a fox.", "Now make it sad."]
    file.write_text(json.dumps({"question_id": 81, "category": "writing", "turns": turns}) + "\n")
    document = run(["--set", str(file), "--max-new-tokens", "8", "--depths", "2", "--temperatures", "0.8"], tmp_path)
    first, second = document["details"]["chain 2 at 0.8"]["texts"]
    answer = lm.chat([{"role": "user", "content": turns[0]}], max_new_tokens=8, temperature=0.8, seed=0).text
    talk = [{"role": "user", "content": turns[0]}, {"role": "assistant", "content": answer},
            {"role": "user", "content": turns[1]}]  # fmt: skip
    assert second["prompt_tokens"] == len(lm.chat_ids(talk)) > first["prompt_tokens"]
    assert document["set"] == {**document["set"], "name": "question.jsonl", "kind": "mt-bench", "questions": 1}
    assert document["details"]["chain 2 at 0.8"]["parity"]["same"] == 2


def test_questions_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Hello"}\n' + json.dumps({"prompt": "long " * 3000}) + "\n")
    more = ["--max-new-tokens", "4", "--depths", "1", "--temperatures", "0"]
    document = run(["--set", str(file), *more], tmp_path)
    assert list(document["too_long"]) == ["question 1, turn 0, context None"]
    assert document["details"]["chain 1 at 0.0"]["parity"]["texts"] == 1
    file.write_text(json.dumps({"prompt": "long " * 3000}) + "\n")
    with pytest.raises(SystemExit):
        main(["bench", "acceptance", "--set", str(file), *more])


def test_beside_transformers(tmp_path: Path) -> None:
    document = run([*TINY, "--depths", "1", "--temperatures", "0,1", "--transformers"], tmp_path)
    details = document["details"]
    assert "transformers plain at 1.0" not in details
    theirs = details["transformers use_mtp at 0.0"]
    assert details["transformers plain at 0.0"]["tokens_per_step"] == 1.0
    # what transformers reports of its steps is what it generated
    assert theirs["accepted"] > 0
    assert theirs["new_tokens"] == sum(text["new_tokens"] for text in theirs["texts"]) == 12
