"""`/parity`: generates the last answer again without speculation, compares it token by token and times it."""

from __future__ import annotations

from dataclasses import replace

from mtp_spec.chat.chat import Chat
from mtp_spec.chat.interrupt import interruptible
from mtp_spec.chat.status import speed
from mtp_spec.errors import OptionError


def parity(chat: Chat) -> None:
    """Repeats the answer, compares it and prints the outcome.

    Raises:
        OptionError: there is no answer to repeat, or it was drawn without drafts.
    """
    turn = chat.session.turns[-1] if chat.session.turns else None
    if turn is None or turn.draw is None or turn.result is None or not turn.result.token_ids:
        raise OptionError("/parity: ask something first, there is no answer to repeat")
    if not turn.result.stats.drafted:
        raise OptionError("/parity: the last answer was drawn without drafts; /spec auto, then ask again")
    ids = turn.result.token_ids
    # an answer that the user stopped ends at the same token
    params = replace(turn.draw.params, max_new_tokens=len(ids)) if turn.interrupted else turn.draw.params
    stream = chat.session.draw(replace(turn.draw, params=params, speculation=None))
    with interruptible(chat.screen.rich) as interrupt:
        chat.interrupted = chat.screen.count(stream, len(ids), lambda: interrupt.asked)
    chat.session.follow(stream)
    plain = stream.result.token_ids
    if chat.interrupted:
        chat.screen.say(f"stopped after {len(plain)} of {len(ids)} tokens, {_equal(plain, ids[: len(plain)])}")
        return
    fast, slow = speed(turn.result.stats), speed(stream.result.stats)
    times = "too short to time"
    if slow:
        times = f"{fast:.0f} tok/s with drafts, {slow:.0f} without: {fast / slow:.2f} times as fast with them"
    chat.screen.show(f"{len(ids)} tokens, {_equal(plain, ids)}: {times}")


def _equal(one: list[int], other: list[int]) -> str:
    if one == other:
        return "the same without drafts"
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"different from token {at} on without drafts, which should never be: please report it"
