"""Handles of texts that a worker writes."""

from __future__ import annotations

import threading

from mtp_spec.handle import Handle


def test_garbage_may_cancel_a_text_whose_events_are_made() -> None:
    """A thread that creates events can be the one to collect the text's unread stream: it must not wait for itself."""
    woken = list[str]()

    class Log:
        def pop(self) -> None:
            handle.cancel()  # what a collected stream does

    handle = Handle(None, Log(), lambda: woken.append("leave"), lambda: False)
    handle.listen(lambda: woken.append("wake"))
    thread = threading.Thread(target=handle.written, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert handle.cancelled()
    assert woken == ["leave", "wake"]
