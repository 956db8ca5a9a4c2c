"""Error classes; messages name what was given, what is allowed and the remedy."""


class MTPSpecError(ValueError):
    """Base of every error of the library; raised directly if something cannot be done now or does not fit in memory."""


class CheckpointError(MTPSpecError):
    """A checkpoint or its description that cannot be used; the message names the cause and the remedy."""


class RankError(MTPSpecError, RuntimeError):
    """Another rank failed, differs or does not answer."""
