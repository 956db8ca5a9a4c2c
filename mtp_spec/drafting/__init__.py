"""What proposes drafts beside the MTP modules: the text itself, a list of answers, a recorded text."""

from mtp_spec.drafting.base import Continuation, Drafter, Drafts
from mtp_spec.drafting.replay import Replay
from mtp_spec.drafting.text import Text

__all__ = ["Continuation", "Drafter", "Drafts", "Replay", "Text"]
