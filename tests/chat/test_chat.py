"""The chat: scripted input, a console of fixed width, the bundled model."""

from __future__ import annotations

import io
import json
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

import mtp_spec
from lms import lm_of
from mtp_spec.chat.chat import Chat
from mtp_spec.chat.commands import COMMANDS, suggestions
from mtp_spec.chat.loop import converse
from mtp_spec.chat.reading import LineReader
from mtp_spec.chat.screen import Screen
from mtp_spec.chat.session import Session, Turn
from mtp_spec.model.cache import PAGE
from mtp_spec.sampling.params import SamplingParams

QUESTION = "Tell me a story about a fox"
LENGTH = 16
Step = str | type[KeyboardInterrupt]


class Script:
    """A reader that plays lines and Ctrl-C, and agrees or not."""

    def __init__(self, steps: Sequence[Step], agrees: bool = False) -> None:
        self.steps, self.agrees, self.asked = list(steps), agrees, list[str]()

    def read(self) -> str | None:
        step = self.steps.pop(0) if self.steps else None
        if step is KeyboardInterrupt:
            raise KeyboardInterrupt
        assert step is None or isinstance(step, str)
        return step

    def agree(self, question: str) -> bool:
        self.asked.append(question)
        return self.agrees


@pytest.fixture(scope="module")
def lm() -> mtp_spec.LM:
    return mtp_spec.load()


Run = Callable[..., tuple[Chat, str]]


@pytest.fixture
def run(lm: mtp_spec.LM) -> Run:
    """Plays a script; returns the chat and everything it printed."""

    def play(*steps: Step, width: int = 80, terminal: bool = True, agrees: bool = False, live: bool = False,
             session: Session | None = None) -> tuple[Chat, str]:  # fmt: skip
        file = io.StringIO()
        console = Console(file=file, width=width, height=24, force_terminal=terminal, color_system=None,
                          force_interactive=live, highlight=False)  # fmt: skip
        session = session or Session(lm, SamplingParams(max_new_tokens=LENGTH, seed=3))
        chat = Chat(session, Screen(console, console), Script(steps, agrees))
        converse(chat)
        return chat, file.getvalue()

    return play


def test_an_answer_is_that_of_the_library(run: Run, lm: mtp_spec.LM) -> None:
    chat, out = run(QUESTION, "And then?")
    said: list[dict[str, str]] = []
    for turn in chat.session.turns:
        said.append({"role": "user", "content": turn.question})
        assert turn.answer == lm.chat(said, max_new_tokens=LENGTH, seed=3).text
        said.append({"role": "assistant", "content": turn.answer})
        assert turn.answer.split()[0] in out
    assert [turn.question for turn in chat.session.turns] == [QUESTION, "And then?"]
    assert "tok/s" in out
    assert "seed 3" in out
    assert "cut at max_new_tokens" in out
    first, second = (turn.result.stats for turn in chat.session.turns if turn.result is not None)
    assert first.reused_tokens == 0
    # the first turn was not read again, but for the page that it did not fill
    assert lm.technique == "single" or second.prompt_tokens - second.reused_tokens < 2 * PAGE


def test_commands_have_help_and_all_that_were_promised_exist(run: Run) -> None:
    _, out = run("/help", "/help parity")
    promised = ["help", "set", "show", "clear", "regen", "undo", "system", "template", "seed", "spec",
                "stats", "save", "load", "parity", "exit"]  # fmt: skip
    assert list(COMMANDS) == promised
    assert all(f"/{name}" in out for name in promised)
    assert out.count("/parity") == 2


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("/quit", "/exit"),
        ("/clera", "/clear"),
        ("/xyzzy", "/help"),
        ("/", "/help"),
        ("/help nothing", "nothing"),
        ("/set temprature 1", "did you mean temperature?"),
        ("/set temperature", "a value is missing"),
        ("/set temperature warm", "a number"),
        ("/set temperature -1", "temperature=-1.0"),
        ("/set top_k 1.5", "a whole number"),
        ("/set logit_bias 5", "logit_bias"),
        ("/set logit_bias {5", "JSON"),
        ("/set logprobs 2", "mtp-spec generate"),
        ("/set colour blue", "on or off"),
        ("/set colour on", "no colours"),
        ("/set stats maybe", "on or off"),
        ("/seed -1", "seed"),
        ("/spec 9", "speculation=9"),
        ("/spec 2.5", "a depth from 1 to 8"),
        ("/spec tree a", "3,2,1"),
        ("/spec tree 9,9,9", "64 nodes"),
        ("/spec auto 3", "auto 3"),
        ("/clear 1", "0 turns"),
        ("/clear all", "how many"),
        ("/regen", "nothing was answered"),
        ("/undo", "nothing was said"),
        ("/stats", "nothing was answered"),
        ("/parity", "ask something first"),
        ("/parity now", "nothing after it"),
        ("/show all", "history"),
        ("/save", "a file is missing"),
        ("/save /no/such/folder/a.json", "No such file"),
        ("/load /no/such/file", "No such file"),
    ],
)
def test_mistakes_are_explained_and_the_chat_goes_on(run: Run, line: str, names: str) -> None:
    chat, out = run(line, "/seed 5", width=200)
    assert names in out
    assert chat.session.params.seed == 5


def test_even_an_unforeseen_error_leaves_the_conversation(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Screen, "answer", broken)
    chat, out = run(QUESTION, "/seed 5")
    assert "RuntimeError: out of memory" in out
    assert chat.session.params.seed == 5
    assert chat.session.turns == []


def test_settings(run: Run) -> None:
    chat, out = run(
        "/set temperature 0.5", "/set top_k 7", '/set logit_bias {"5": -2}', "/set stop END", '/set stop ["a", "b"]',
        "/set temperature off", "/system Be brief", "/seed 77", "/spec tree 2,2", "/set stats off", "/show",
    )  # fmt: skip
    params = chat.session.params
    assert (params.temperature, params.top_k, params.stop) == (0.8, 7, ("a", "b"))
    assert params.logit_bias == {5: -2.0}
    assert chat.session.speculation == mtp_spec.Speculation(branching=(2, 2))
    for shown in ("Be brief", "77", "tree 2,2", '["a", "b"]', '{"5": -2.0}'):
        assert shown in out
    shapes = [(line, run(f"/spec {line}")[0].session.speculation) for line in ("off", "auto", "4", "tree")]
    assert [shape for _, shape in shapes] == [
        None, "auto", mtp_spec.Speculation(4), mtp_spec.Speculation(branching=(3, 2, 1)),
    ]  # fmt: skip


def test_regen_undo_and_clear(run: Run) -> None:
    chat, _ = run(QUESTION, "/regen", "/regen 3", "And then?", "/undo")
    assert [turn.question for turn in chat.session.turns] == [QUESTION]
    first, second = (run(QUESTION, *more)[0].session.turns[0].answer for more in ((), ("/regen",)))
    assert chat.session.turns[0].answer == first != second
    assert chat.session.params.seed == 3
    chat, _ = run("one", "two", "three", "/clear 2")
    assert [turn.question for turn in chat.session.turns] == ["three"]
    assert run("one", "/clear")[0].session.turns == []


def test_parity_repeats_what_was_drawn(run: Run) -> None:
    _, out = run("/spec 3", QUESTION, "/spec off", "/set temperature 0", "/parity")
    assert f"{LENGTH} tokens, the same without drafts" in out
    assert "times as fast with them" in " ".join(out.split()), "lines are broken by the width of the numbers"
    _, out = run("/spec off", QUESTION, "/parity")
    assert "drawn without drafts" in out


def test_statistics(run: Run) -> None:
    chat, out = run("/spec 3", QUESTION, QUESTION, "/stats")
    last = chat.session.turns[-1].result
    assert last is not None
    assert chat.session.totals.new_tokens == 2 * last.stats.new_tokens
    rates = last.stats.accepted_per_depth
    expected = f"{rates['unconditional'][0]:.0%} ({rates['conditional'][0]:.0%})"
    assert expected in out
    assert re.search(r"tokens/step +" + f"{last.stats.tokens_per_step:.2f}", out)


def test_save_and_load(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    biased = '/set logit_bias {"5": -2}'
    before, _ = run("/system Be brief", biased, QUESTION, "/spec 2", "/seed 9", f"/save {file}")
    after, out = run(f"/load {file}", "/show history")
    one, two = before.session, after.session
    assert (one.system, one.params, one.speculation) == (two.system, two.params, two.speculation)
    assert [(t.question, t.answer) for t in one.turns] == [(t.question, t.answer) for t in two.turns]
    assert QUESTION in out
    # what came from a file can be answered again but not compared
    _, out = run(f"/load {file}", "/parity", "/regen")
    assert "no answer to repeat" in out
    assert "tok/s" in out


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{", "no conversation"),
        ("{}", "messages"),
        ('[{"role": "user"}]', "content"),
        ('[{"role": "user", "content": "a"}]', "an answer last"),
        ('{"messages": [], "settings": {"top_q": 1}}', "top_q"),
        ('{"messages": [], "speculation": "much"}', "much"),
    ],
)
def test_files_that_are_no_conversations(run: Run, lm: mtp_spec.LM, tmp_path: Path, text: str, names: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    session = Session(lm, SamplingParams())
    session.turns = [Turn("a", "b")]
    _, out = run(f"/load {file}", session=session, width=300)
    assert names in out
    assert session.turns == [Turn("a", "b")]
    if "settings" not in text and "speculation" not in text:
        _, out = run(f"/save {file}", width=300)
        assert "not overwritten" in out
        assert file.read_text() == text


def test_a_plain_list_of_messages_can_be_loaded(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "messages.json"
    file.write_text(json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]))
    assert run(f"/load {file}")[0].session.turns == [Turn("a", "b")]


@pytest.fixture
def ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Presses Ctrl-C so often before each token from one on."""

    def press(at: int, times: int) -> None:
        original = mtp_spec.TokenStream.__next__

        def pressing(self: mtp_spec.TokenStream) -> mtp_spec.TokenEvent:
            if len(self.result.token_ids) >= at:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            return original(self)

        monkeypatch.setattr(mtp_spec.TokenStream, "__next__", pressing)

    return press


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_keeps_what_is_written(run: Run, ctrl_c: Callable[[int, int], None], times: int) -> None:
    whole = run(QUESTION)[0].session.turns[0]
    ctrl_c(5, times)
    chat, out = run("/spec 2", QUESTION, "/parity", KeyboardInterrupt, "never asked")
    [turn] = chat.session.turns
    assert turn.interrupted
    assert turn.answer
    assert whole.answer.startswith(turn.answer)
    assert turn.answer.split()[-1] in out
    assert "stopped" in out
    assert re.search(r"stopped after \d of \d tokens, the same", out)


def test_ctrl_c_before_the_first_word_keeps_nothing(run: Run, ctrl_c: Callable[[int, int], None]) -> None:
    ctrl_c(0, 2)
    chat, out = run(QUESTION)
    assert chat.session.turns == []
    assert "not kept" in out


def test_ctrl_c_at_the_prompt(run: Run, ctrl_c: Callable[[int, int], None]) -> None:
    assert run(KeyboardInterrupt, KeyboardInterrupt, "/seed 8")[0].session.params.seed == 3
    assert run(KeyboardInterrupt, "/spec 2", KeyboardInterrupt, "/seed 8")[0].session.params.seed == 8
    ctrl_c(4, 1)
    # after a stopped answer once is enough
    assert run(QUESTION, KeyboardInterrupt, "/seed 8")[0].session.params.seed == 3


@pytest.fixture
def small(lm: mtp_spec.LM) -> mtp_spec.LM:
    return lm_of(lm.model, lm.tokenizer, 96)


def test_a_full_context_offers_to_drop_the_oldest_turns(run: Run, small: mtp_spec.LM) -> None:
    def session() -> Session:
        full = Session(small, SamplingParams(max_new_tokens=8))
        full.turns = [Turn(f"question {n} " + "word " * 10, "answer " * 8) for n in range(3)]
        return full

    long = "tell me more " * 10
    refused, out = run(long, session=session(), width=200)
    assert re.search(r"context is full.*/clear \d", out)
    assert len(refused.session.turns) == 3
    agreed, out = run(long, session=session(), agrees=True)
    assert "Drop" in agreed.reader.asked[0]  # type: ignore[attr-defined]
    assert agreed.session.turns[-1].question == long.strip()
    _, out = run("word " * 500, session=session(), width=200, agrees=True)
    assert "shorten it" in out


def test_an_answer_that_fills_the_context_says_so(run: Run, small: mtp_spec.LM) -> None:
    endless = dict.fromkeys(small.stop_ids(), -100.0)
    session = Session(small, SamplingParams(max_new_tokens=500, logit_bias=endless))
    _, out = run(QUESTION, session=session, width=200)
    assert "the context of 96 tokens is full" in out


def test_a_checkpoint_without_text_is_refused(lm: mtp_spec.LM) -> None:
    with pytest.raises(mtp_spec.MTPSpecError, match=r"tokenizer\.json"):
        Session(lm_of(lm.model, None, 64), SamplingParams())


def test_lines_from_a_pipe() -> None:
    reader = LineReader(["one\n", '/system """a\n', 'b"""\n', '"""never closed\n'])
    assert [reader.read() for _ in range(4)] == ["one\n", '/system """a\nb"""\n', '"""never closed\n', None]


def test_words_after_commands() -> None:
    assert "/parity" in suggestions("/p")
    assert "temperature" in suggestions("/set te")
    assert suggestions("/set colour ") == ("on", "off")
    assert "auto" in suggestions("/spec ")
    assert list(suggestions("/undo x")) == []
