"""One running chat: a session, its screen and its reader."""

from __future__ import annotations

from mtp_spec.chat.interrupt import interruptible
from mtp_spec.chat.reading import Reader
from mtp_spec.chat.screen import Screen
from mtp_spec.chat.session import ContextFullError, Session
from mtp_spec.chat.status import counted


class Chat:
    """Attributes:
    leaving: whether the loop should end.
    interrupted: whether Ctrl-C was the last input; a second one at an empty prompt leaves.
    """

    def __init__(self, session: Session, screen: Screen, reader: Reader) -> None:
        self.session, self.screen, self.reader = session, screen, reader
        self.leaving = self.interrupted = False

    def ask(self, question: str) -> bool:
        """Shows the answer to a question; returns whether it became a turn."""
        try:
            draw, stream = self.session.ask(question)
        except ContextFullError as full:
            if full.drop is None:
                raise
            if not self.reader.agree(f"The context is full. Drop {counted(full.drop, 'old turn')}?"):
                raise
            del self.session.turns[: full.drop]
            draw, stream = self.session.ask(question)
        with interruptible(self.screen.rich) as interrupt:
            self.interrupted = self.screen.answer(stream, draw.params.known_seed, lambda: interrupt.asked)
        kept = self.session.keep(draw, stream, self.interrupted)
        self._comment(kept)
        return kept

    def _comment(self, kept: bool) -> None:
        """Says why an answer is incomplete."""
        if not kept:
            self.screen.say("stopped before the first word: the question is not kept")
            return
        turn = self.session.turns[-1]
        if self.interrupted:
            self.screen.say("stopped; what is written stays in the conversation")
        elif turn.result is not None and turn.result.finish_reason == "length":
            limit = self.session.params.max_new_tokens
            if len(turn.result.token_ids) >= limit:
                self.screen.say(f"cut at max_new_tokens: /set max_new_tokens {2 * limit} and /regen for more")
            else:
                self.screen.say(
                    f"cut: the context of {self.session.lm.max_context} tokens is full. /clear forgets the "
                    "conversation, /clear 1 its oldest turn"
                )
