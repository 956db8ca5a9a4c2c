"""Parses and formats the values of `/set` and `/spec`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, get_type_hints

from mtp_spec.chat.session import Session, Shape
from mtp_spec.chat.status import counted
from mtp_spec.errors import OptionError
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.speculation import MAX_DEPTH, Speculation, resolve_speculation

# a chat shows no log-probabilities, and functions cannot be typed
NAMES = tuple(field.name for field in fields(SamplingParams) if field.name not in ("logprobs", "logits_processor"))
TREE = (3, 2, 1)
SHAPES = ("off", "auto", "tree", *(str(depth) for depth in range(1, MAX_DEPTH + 1)))
_KINDS = get_type_hints(SamplingParams)


def parse_setting(name: str, text: str) -> Any:
    """Returns a sampling parameter's value from text; "off" is its default.

    Raises:
        OptionError: the text is not a value of this type; `SamplingParams` checks the range later.
    """
    if text == "off":
        return getattr(SamplingParams(), name)
    kind = int if name == "seed" else _KINDS[name]
    if kind is bool:
        if text != "on":
            raise OptionError(f"{name} {text!r}: give on or off")
        return True
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise OptionError(f"{name} {text!r}: give {what}, or off for the default") from None
    try:
        value = json.loads(text)
    except ValueError:
        if name == "stop":
            return text
        raise OptionError(f'{name} {text!r}: give it as JSON, such as {{"42": -1.5}}, or off') from None
    if name == "logit_bias" and isinstance(value, Mapping):
        try:
            return {int(token): amount for token, amount in value.items()}
        except ValueError:
            raise OptionError(f"logit_bias {text}: its names are token ids") from None
    # a stop string that looks like a number is still a string
    return text if name == "stop" and not isinstance(value, str | list) else value


def setting_text(value: Any) -> str:
    """Returns a value as `/set` takes it."""
    if value is None:
        return "off"
    if isinstance(value, bool):
        return "on" if value else "off"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | tuple | Mapping) else str(value)


def template_text(arguments: Mapping[str, Any]) -> str:
    """Returns a chat template's arguments in the form that `/template` takes."""
    return ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in arguments.items()) or "nothing more"


def parse_shape(text: str) -> Shape:
    """Returns the speculation given to `/spec`.

    Raises:
        OptionError: it is not a valid speculation.
    """
    word, _, rest = text.partition(" ")
    if word == "tree":
        return _tree(rest)
    if word == "off" or rest:
        if rest:
            raise _no_shape(text)
        return None
    if word.isdecimal():
        return resolve_speculation(int(word))
    if word != "auto":
        raise _no_shape(text)
    return "auto"


def _tree(text: str) -> Speculation:
    if not text:
        return Speculation(branching=TREE)
    try:
        return Speculation(branching=[int(part) for part in text.split(",")])
    except ValueError as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"/spec tree {text}: give children by depth, such as 3,2,1") from None


def _no_shape(text: str) -> OptionError:
    return OptionError(f"/spec {text}: give off, a depth from 1 to {MAX_DEPTH}, tree, tree 4,2,1 or auto")


def shape_text(shape: Shape) -> str:
    """Returns speculation as `/spec` takes it."""
    if shape is None or isinstance(shape, str):
        return shape or "off"
    if shape.adaptive:
        return "auto"
    return str(shape.depth) if shape.is_chain else "tree " + ",".join(map(str, shape.branching))


def describe(session: Session) -> dict[str, str]:
    """Returns the model, the context and every setting, for a table."""
    lm, params = session.lm, asdict(session.params)
    used = session.count(session.messages())
    config = lm.config
    return {
        "model": f"{config.model_type}, {config.num_hidden_layers} layers, {counted(len(lm.model.mtp), 'MTP module')}, "
        f"{str(lm.model.dtype).removeprefix('torch.')} on {lm.model.device} by {lm.model.runs_on}",
        "context": f"{used} of {lm.max_context} tokens, {counted(len(session.turns), 'turn')}",
        "system": session.system or "off",
        "template": template_text(session.template),
        "speculation": shape_text(session.speculation),
        **{name: setting_text(params[name]) for name in NAMES},
    }
