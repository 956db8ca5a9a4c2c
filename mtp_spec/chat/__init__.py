"""The terminal chat, `mtp-spec chat`: `session` holds the conversation, `screen` draws it, `loop` runs it."""
