"""A question's token ids, as they are or cut or padded to a length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mtp_spec.api import LM
from mtp_spec.bench.common import bundled_prompts, question
from mtp_spec.errors import OptionError
from mtp_spec.text import Tokenizer

Message = dict[str, str]
# number of bundled prompts used for padding
FILLERS = 128


def prompt_ids(lm: LM, messages: Sequence[Message], context: int | None, raw: bool, number: int) -> list[int]:
    """Returns the ids of a conversation whose last message is the user's.

    Args:
        context: the first message is padded with bundled prompts, or loses its beginning, so that the ids are this
            many, or a few fewer where tokens at a seam merge.
        raw: continue the text instead of answering it as a chat.
        number: of the question: each is padded with other text.

    Raises:
        OptionError: the other messages alone are longer than the context.
    """
    if lm.tokenizer is None:
        ids = question(lm, "".join(message["content"] for message in messages))
        return ids if context is None else (ids * context)[:context]
    plain = raw or lm.tokenizer.template is None

    def build(first: str) -> list[int]:
        every = [{**messages[0], "content": first}, *messages[1:]]
        return lm.encode("\n\n".join(message["content"] for message in every)) if plain else lm.chat_ids(every)

    content = messages[0]["content"]
    return build(content) if context is None else _fitted(lm.tokenizer, build, content, context, number)


def _fitted(
    tokenizer: Tokenizer, build: Callable[[str], list[int]], content: str, context: int, number: int
) -> list[int]:
    whole = build(content)
    over = len(whole) - context
    kept = _filler(tokenizer, -over, number) if over < 0 else _ids(tokenizer, content)[over:]
    while kept:
        text = tokenizer.decode(kept)
        ids = build(f"{text}\n\n{content}" if over < 0 else text)
        if len(ids) <= context:
            return ids
        # a text that is cut and read again may have a few tokens more
        kept = kept[: context - len(ids)] if over < 0 else kept[len(ids) - context :]
    if over <= 0:
        return whole
    raise OptionError(
        f"--contexts {context}: question {number} has {len(whole)} tokens, too many outside its first "
        "message; give a larger context"
    )


def _filler(tokenizer: Tokenizer, length: int, number: int) -> list[int]:
    """Returns ids of the bundled prompts one after another, from another one on for each number."""
    prompts = [item["prompt"] for item in bundled_prompts(FILLERS)]
    first = (number + 1) % len(prompts)
    text = " ".join(prompts[first:] + prompts[:first])
    repeats = 1 + length // len(_ids(tokenizer, text))
    return _ids(tokenizer, " ".join([text] * repeats))[:length]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.raw.encode(text, add_special_tokens=False).ids)
