"""A conversation with a model: its turns, settings and statistics, independent of any terminal."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mtp_spec.api import LM
from mtp_spec.errors import MTPSpecError, PromptError
from mtp_spec.results import Generation
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.speculation import Speculation
from mtp_spec.stats import GenerationStats
from mtp_spec.stream import TokenStream

Message = dict[str, str]
Shape = Speculation | Literal["auto"] | None
# answers may be long; the context may end them earlier
MAX_NEW_TOKENS = 1024
# share of the context that is kept free for an answer when old turns are dropped
ROOM = 0.25


@dataclass(frozen=True, slots=True)
class Draw:
    """Everything needed to repeat an answer.

    Attributes:
        messages: the conversation, the question last.
        params: sampling parameters, with the drawn seed if none was given.
        speculation: as given to `LM.stream`.
        template: arguments of the chat template.
        tools: tools for the chat template.
    """

    messages: list[Message]
    params: SamplingParams
    speculation: Shape
    template: dict[str, Any] = field(default_factory=dict)
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer.

    Attributes:
        draw: how it was generated; None for a turn from a file.
        result: its generation; None for a turn from a file.
        interrupted: whether the user stopped the answer.
    """

    question: str
    answer: str
    draw: Draw | None = None
    result: Generation | None = None
    interrupted: bool = False


class ContextFullError(PromptError):
    """A conversation that leaves too little of the context for an answer.

    Attributes:
        drop: how many of the oldest turns must be dropped; None if even the question alone is too long.
    """

    def __init__(self, message: str, drop: int | None) -> None:
        super().__init__(message)
        self.drop = drop


class Session:
    """The state of a chat.

    Args:
        lm: a model with a chat template.
        params: sampling parameters; without a seed each answer draws its own.
        speculation: as for `LM.stream`.
        system: the system message.
        template: arguments of the chat template.
        tools: tools for the chat template.
    Attributes:
        turns: oldest first.
        totals: statistics of all answers.

    Raises:
        MTPSpecError: the checkpoint has no tokenizer or no chat template.
    """

    def __init__(
        self,
        lm: LM,
        params: SamplingParams,
        speculation: Shape = "auto",
        system: str | None = None,
        template: dict[str, Any] | None = None,
        tools: list[Any] | None = None,
    ) -> None:
        self.lm, self.params, self.speculation, self.system = lm, params, speculation, system
        self.template, self.tools = template or {}, tools
        self.turns: list[Turn] = []
        self.totals = GenerationStats()
        self._last: TokenStream | None = None
        self.count(self.messages("?"))

    def messages(self, question: str | None = None, first: int = 0) -> list[Message]:
        """Returns the conversation from turn `first` on as messages, then the question."""
        found = [] if self.system is None else [_message("system", self.system)]
        for turn in self.turns[first:]:
            found += [_message("user", turn.question), _message("assistant", turn.answer)]
        return found if question is None else [*found, _message("user", question)]

    def count(self, messages: list[Message]) -> int:
        """Returns how many tokens of the context these messages take."""
        return len(self.lm.chat_ids(messages, template=self.template, tools=self.tools)) if messages else 0

    def ask(self, question: str) -> tuple[Draw, TokenStream]:
        """Returns the stream of the answer to a question; `keep` makes it a turn.

        Raises:
            ContextFullError: too little of the context is left.
        """
        self._check_room(question)
        draw = Draw(self.messages(question), self.params, self.speculation, self.template, self.tools)
        stream = self.draw(draw)
        return replace(draw, params=replace(self.params, seed=stream.result.seed)), stream

    def draw(self, draw: Draw) -> TokenStream:
        """Returns the stream that a draw describes; the prefix shared with the last turn is not computed again."""
        return self.lm.stream(
            draw.messages,
            after=self._last,
            sampling=draw.params,
            speculation=draw.speculation,
            template=draw.template,
            tools=draw.tools,
        )

    def keep(self, draw: Draw, stream: TokenStream, interrupted: bool) -> bool:
        """Adds a turn; returns false, and adds none, if the answer was stopped before its first token."""
        result = stream.result
        self.follow(stream)
        self.totals = self.totals.merge(result.stats)
        if interrupted and not result.text:
            return False
        self.turns.append(Turn(draw.messages[-1]["content"], result.text, draw, result, interrupted))
        return True

    def follow(self, stream: TokenStream) -> None:
        """Makes this the stream that the next one follows (`after=`), so that its memory can be reused."""
        self._last = stream

    def set(self, name: str, value: Any) -> None:
        """Changes one of the sampling parameters."""
        self.params = replace(self.params, **{name: value})

    def set_template(self, arguments: dict[str, Any]) -> None:
        """Changes the chat template's arguments, from the next answer on.

        Raises:
            MTPSpecError: the template fails with them; the former ones stay.
        """
        before, self.template = self.template, arguments
        try:
            self.count(self.messages("?"))
        except MTPSpecError:
            self.template = before
            raise

    def _check_room(self, question: str) -> None:
        context = self.lm.max_context
        taken = self.count(self.messages(question))
        if taken < context:
            return
        wanted = context - min(self.params.max_new_tokens, int(context * ROOM))
        for drop in range(1, len(self.turns) + 1):
            enough = wanted if drop < len(self.turns) else context - 1
            if self.count(self.messages(question, drop)) <= enough:
                raise ContextFullError(
                    f"the context is full: the conversation takes {taken} tokens of {context}. /clear {drop} forgets "
                    f"as many of the oldest turns, /clear all of it",
                    drop,
                )
        alone = self.count(self.messages(question, len(self.turns)))
        raise ContextFullError(f"the question takes {alone} tokens and the context is {context}: shorten it", None)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
