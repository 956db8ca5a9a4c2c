"""Errors that name what was given, what is allowed and the remedy."""


class MTPSpecError(ValueError):
    """Base of every error of the library."""


class OptionError(MTPSpecError):
    """An option that is unknown, of the wrong kind or outside its range."""


class PromptError(MTPSpecError):
    """A prompt that cannot be generated from."""
