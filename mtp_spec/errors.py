"""Errors of options and prompts, beside those of `mtp_spec.model.errors`."""

from mtp_spec.model.errors import MTPSpecError

__all__ = ["MTPSpecError", "OptionError", "PromptError"]


class OptionError(MTPSpecError):
    """An option that is unknown, of the wrong kind or outside its range."""


class PromptError(MTPSpecError):
    """A prompt that cannot be generated from."""
