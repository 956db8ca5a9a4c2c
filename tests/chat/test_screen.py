"""How a chat looks: blocks of markdown, colours, the line of statistics, pipes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from mtp_spec.chat.blocks import Blocks, drawn
from mtp_spec.chat.screen import Screen
from mtp_spec.chat.status import status_line
from mtp_spec.results import Generation, TokenEvent
from mtp_spec.stats import GenerationStats
from mtp_spec.stream import TokenStream

STORY = """# A fox

One day a *fox* met
a <b>bear</b> and said:

- one

  still one
- two

```python
def f():

    return 1
```

The end."""


class Fake(TokenStream):
    """A stream of given pieces."""

    result: Any = None  # in place of the property

    def __init__(self, pieces: Sequence[tuple[str, int]]) -> None:
        self.result = Generation(stats=statistics())
        self._events = self._play(pieces)

    def __next__(self) -> TokenEvent:
        return next(self._events)

    def _play(self, pieces: Sequence[tuple[str, int]]) -> Iterator[TokenEvent]:
        for number, (text, depth) in enumerate(pieces):
            self.result.text += text
            self.result.token_ids.append(number)
            yield TokenEvent(text, number, number, depth or "target")


def statistics() -> GenerationStats:
    stats = GenerationStats(total_seconds=2.5)
    stats.record_prefill(10)
    for accepted in (3, 1, 2, 0, 3):
        stats.record_step(3, 3, [0] * accepted, accepted + 1)
    stats.phase_seconds |= {"prefill": 0.5, "draft": 0.02, "verify": 0.1}
    return stats


def words(text: str) -> list[tuple[str, int]]:
    return [(piece, number % 4) for number, piece in enumerate(re.findall(r"\s*\S+|\s+$", text))]


def screen(width: int = 80, **options: object) -> tuple[Screen, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    given = {"force_terminal": True, "color_system": None, "force_interactive": False, "height": 24, **options}
    return Screen(Console(file=out, width=width, **given), Console(file=err, width=width)), out, err


def shown(text: str, width: int = 80, **options: object) -> str:
    page, out, _ = screen(width, **options)
    assert not page.answer(Fake(words(text)), 7, lambda: False)
    return out.getvalue()


MARKDOWN = st.lists(st.sampled_from(["a", "\n", "\n\n", "```", "```\n", "- b", "  c", " ", "# d", "~~~"])).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=MARKDOWN, cuts=st.lists(st.integers(0, 40)))
def test_blocks_are_those_of_the_whole_text_however_it_arrives(text: str, cuts: list[int]) -> None:
    def blocks(pieces: Sequence[str]) -> list[str]:
        found = Blocks()
        finished = [block for piece in pieces for block in found.push(piece, "target")]
        return ["".join(piece for piece, _ in block) for block in [*finished, found.open]]

    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[a:b] for a, b in pairwise(places)]
    assert "".join(blocks(parts)) == text
    assert blocks(parts) == blocks([text]) == blocks(list(text))


def test_markdown_keeps_line_breaks_code_and_html() -> None:
    out = shown(STORY)
    lines = [line.strip() for line in out.splitlines()]
    assert "One day a fox met" in lines
    assert "a <b>bear</b> and said:" in lines
    assert "def f():" in lines
    assert lines.index("return 1") - lines.index("def f():") == 2
    assert sum("•" in line for line in lines) == 2
    assert "```" not in out


@pytest.mark.parametrize("width", [40, 80, 200])
def test_nothing_is_wider_than_the_window(width: int) -> None:
    text = STORY + "\n\n" + "狐狸住在森林里。" * 30 + "\n\n" + "long " * 100 + "x" * 300
    out = shown(text, width)
    assert max(cell_len(line) for line in out.splitlines()) <= width
    assert out.count("狐") == 30
    assert out.count("x") - out.count("fox") == 300


def test_while_it_is_written_the_open_block_is_drawn_again() -> None:
    out = shown("One two three.\n\nFour " + "five " * 600, force_interactive=True)
    drawn_blocks = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert drawn_blocks.count("One two three.") >= 1
    assert "\x1b[?25l" in out
    assert out.rstrip().endswith("seed 7\x1b[0m") or out.rstrip().endswith("seed 7")
    # never taller than the window: no frame moves up more lines than it has
    assert all(int(lines) < 24 for lines in re.findall(r"\x1b\[(\d+)A", out))
    frames = re.split(r"\x1b\[2K", out)
    assert len(frames) > 2


def test_tokens_in_their_proposers_colours() -> None:
    page, out, _ = screen(color_system="standard")
    page.coloured = True
    page.answer(Fake([("One", 0), (" two", 1), (" *three*", 2), (" four", 3), (" five", 8)]), 7, lambda: False)
    line = out.getvalue().splitlines()[0]
    for code, word in ((32, " two"), (36, " *three*"), (34, " four"), (33, " five")):
        assert f"\x1b[{code}m{word}" in line
    assert line.startswith("One")


@pytest.mark.parametrize("options", [{"no_color": True, "color_system": "standard"}, {"force_terminal": False}, {}])
def test_outputs_without_colours_say_so(options: dict[str, object]) -> None:
    assert not screen(**options)[0].can_colour
    assert screen(color_system="truecolor")[0].can_colour


def test_no_color_leaves_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = shown(STORY, color_system="truecolor", force_interactive=True)
    colours = re.findall(r"\x1b\[([0-9;]*)m", out)
    assert not any(re.search(r"(^|;)(3[0-7]|4[0-7]|38|48|9[0-7])(;|$)", code) for code in colours)


def test_a_pipe_gets_the_bare_text() -> None:
    page, out, err = screen(40, force_terminal=False)
    page.answer(Fake(words(STORY)), 7, lambda: False)
    assert out.getvalue() == STORY + "\n"
    assert "seed 7" in err.getvalue()
    page.statistics = False
    page.answer(Fake(words("x")), 7, lambda: False)
    assert err.getvalue().count("seed") == 1


def test_the_line_of_statistics_fits() -> None:
    stats = statistics()
    whole = status_line(stats, 7)
    assert whole == "7 tok/s · 2.80 tokens/step · accepted 80/75/67 % · draft 4.0, verify 20.0 ms · seed 7"
    for width in range(10, 120):
        assert len(status_line(stats, 7, width)) <= width
    assert status_line(stats, 7, 75) == "7 tok/s · 2.80 tokens/step · accepted 80/75/67 % · 4.0+20.0 ms · seed 7"
    assert status_line(stats, 7, 60) == "7 tok/s · 2.80/step · 80/75/67 % · 4.0+20.0 ms · seed 7"
    assert status_line(stats, 7, 40) == "7 tok/s · 2.80/step · 80/75/67 %"
    assert status_line(stats, 7, 200) == whole
    assert status_line(GenerationStats(), 7) == "0 tok/s · seed 7"


def test_steps_of_a_gpu_have_one_time() -> None:
    stats = statistics()
    stats.phase_seconds |= {"step": 0.01, "draft": 0.0, "verify": 0.0}
    assert "step 2.0 ms" in status_line(stats, 7)


def test_what_stops_an_answer() -> None:
    page, out, _ = screen()
    stream = Fake(words(STORY))
    assert page.answer(stream, 7, lambda: len(stream.result.token_ids) == 5)
    assert len(stream.result.token_ids) == 5
    assert "met" not in out.getvalue()


def test_a_block_without_words_is_not_drawn() -> None:
    assert shown("\n\n\n").strip() == status_line(statistics(), 7, 80)
    assert drawn([("a\n\n", "target")], coloured=True).plain == "a"  # type: ignore[union-attr]
