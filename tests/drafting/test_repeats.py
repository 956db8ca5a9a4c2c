"""What a text says of its own continuation: the longest earlier match, found at any length and added to in any way."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_spec.drafting import Continuation, Text
from mtp_spec.drafting.rates import LENGTHS, Rates
from mtp_spec.drafting.repeats import END, LONGEST, SHORT, TRIED, Repeats

TOKENS = st.lists(st.integers(0, 3), max_size=200)


def longest(text: Sequence[int], end: Sequence[int]) -> int:
    """Returns the length of the longest earlier match by comparing everything."""
    best = 0
    for place in range(len(text)):
        length = 0
        while length < min(place, len(end)) and text[place - 1 - length] == end[-1 - length]:
            length += 1
        best = max(best, length)
    return best


@settings(max_examples=150, deadline=None)
@given(text=TOKENS, cut=st.integers(0, 200))
def test_a_text_is_the_same_however_it_arrives(text: list[int], cut: int) -> None:
    slowly, at_once = Repeats(), Repeats(text[:cut])
    for token in text:
        slowly.extend((token,))
    at_once.extend(text[cut:])
    for last in range(len(text) + 1):
        end = text[max(0, last - LONGEST) : last]
        assert slowly.find(end) == at_once.find(end) == Repeats(text).find(end)


@settings(max_examples=150, deadline=None)
@given(text=st.lists(st.integers(0, 9), max_size=TRIED * 9))
def test_matches_are_true_and_the_longest(text: list[int]) -> None:
    found = Repeats(text).find(text[-LONGEST:])
    assert [match.length for match in found] == sorted((match.length for match in found), reverse=True)
    assert len({match.token for match in found}) == len(found)
    for match in found:
        before = text[match.place - match.length : match.place]
        assert before == text[len(text) - match.length :]
        assert match.token == text[match.place]
    best = longest(text, text[-LONGEST:])
    # of a run that is frequent only the latest places are compared
    frequent = max((text.count(token) for token in text), default=0) > TRIED
    assert frequent or (found[0].length if found else 0) == (best if best >= SHORT else 0)


def propose(prompt: Sequence[int], path: Sequence[int] = (), most: int = 6, **options: object) -> list[list[int]]:
    found = Text(**options).begin(prompt).propose(path, most)
    return [list(one.tokens) for one in found]


def test_the_continuation_is_what_followed() -> None:
    assert propose([1, 2, 3, 4, 5, 9, 1, 2, 3]) == [[4, 5, 9, 1, 2, 3]]
    assert propose([1, 2, 3, 4, 5, 9, 1, 2], path=[3]) == [[4, 5, 9, 1, 2, 3]]
    assert propose([7, 1, 2, 8, 1, 2, 8, 1, 2]) == [[8, 1, 2, 8, 1, 2]]  # a period goes on
    assert propose([5, 5, 5, 5]) == [[5] * 6]
    assert propose([1, 2, 3, 1, 2]) == propose([1]) == propose([]) == []
    two = propose([0, 1, 2, 3, 8, 0, 1, 2, 4, 8, 9, 0, 1, 2], most=2)
    assert two == [[4, 8], [3, 8]]  # the later one first, the match being as long
    assert propose([6, 0, 1, 2, 3, 8, 0, 1, 2, 4, 6, 0, 1, 2], most=2)[0] == [3, 8]  # the longer one first


def test_references_are_looked_up_and_do_not_run_into_each_other() -> None:
    documents = [[9, 10, 11, 12, 13], [14, 15, 16, 17]]
    assert propose([9, 10, 11], references=documents) == [[12, 13]]
    assert propose([12, 13, 14], references=documents) == propose([13, 14, 15], references=documents) == []
    assert propose([4, 14, 15], [16], references=documents) == [[17]]
    assert propose([14, 15, 16, 3, 14, 15, 16], references=documents, most=1) == [[3], [17]]
    drafts = Text(documents).begin([8])
    drafts.commit([9, 10, 11, 12])
    assert [one.tokens for one in drafts.propose((), 6)] == [[13]]
    assert END not in [token for one in drafts.propose((13,), 6) for token in one.tokens]


def test_chances_are_those_of_the_text() -> None:
    drafter, repeated = Text(), list(range(100, 140))
    drafts = drafter.begin([*repeated, 1])
    before = Text().begin([*repeated, 1, 100, 101, 102]).propose((), 4)[0]
    drafts.commit(repeated[:3])
    sure = drafts.propose((), 4)[0]
    assert sure.chances == before.chances
    drafts.commit(repeated[3:])
    drafts.commit([3, *repeated[:3]])
    assert drafts.propose((), 4)[0].chances[0] > sure.chances[0]
    wrong = drafter.begin(repeated)
    wrong.commit([token for three in zip(*(repeated[i:] for i in range(3)), strict=False) for token in (*three, 1)])
    wrong.commit(repeated[:3])
    assert wrong.propose((), 4)[0].chances[0] < sure.chances[0]
    found = drafts.propose((), 9)
    assert all(0.0 < chance < 1.0 for one in found for chance in one.chances)
    assert sum(one.chances[0] for one in found) <= 1.0


def test_rates_follow_what_is_seen_and_new_texts_begin_with_it() -> None:
    rates = Rates()
    assert [rates.chance(length) for length in LENGTHS] == sorted(rates.chance(length) for length in LENGTHS)
    text = rates.for_sequence()
    for number in range(200):
        text.learn(5, 0, number % 4 == 0)
    assert abs(rates.chance(4) - 0.25) < 0.05
    assert rates.chance(4) == rates.chance(5) < rates.chance(3)
    assert abs(rates.for_sequence().chance(5) - rates.chance(5)) < 1e-9


def test_a_long_match_resumes_after_a_token_that_differs() -> None:
    """How often it does is learned from texts in which words were replaced, and said only of long matches."""
    document = [(7 * place) % 101 for place in range(400)]
    followed, left = Text([document]), Text([document])
    replaced = [token if place % 20 else 200 for place, token in enumerate(document)]
    followed.begin([]).commit(replaced)
    left.begin([]).commit([token for first in range(0, 400, 20) for token in (*document[first : first + 15], 300, 301)])
    known, lost = (text.begin(document[1:14]).propose((), 8)[0] for text in (followed, left))
    assert known.resumes > 0.6 > 0.3 > lost.resumes
    assert Text([document]).begin(document[1:5]).propose((), 8)[0].resumes == 0.0
    assert known.rest().resumes == known.resumes


def test_a_continuation_cut_at_its_front() -> None:
    one = Continuation([4, 5, 6], [0.9, 0.5], "mine")
    assert [one.chance(place) for place in range(3)] == [0.9, 0.5, 0.5]
    rest = one.rest()
    assert (list(rest.tokens), list(rest.chances)) == ([5, 6], [0.5])
    assert (list(rest.rest().tokens), list(rest.rest().chances)) == ([6], [0.5])
