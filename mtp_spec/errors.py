"""Errors of options and prompts, in addition to those of `mtp_spec.model.errors`."""

from mtp_spec.model.errors import MTPSpecError

__all__ = ["MTPSpecError", "NotFiniteError", "OptionError", "PromptError"]


class OptionError(MTPSpecError):
    """An option that is unknown, of the wrong kind or outside its range."""


class NotFiniteError(MTPSpecError):
    """A row of the model's logits holds NaN or infinity.

    Attributes:
        node: the tree node of the row; -1 is the root.
    """

    node = -1


class PromptError(MTPSpecError):
    """A prompt that cannot be generated from."""
