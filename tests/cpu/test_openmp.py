"""Threads that computed go when they are dismissed, and come back."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from mtp_spec.cpu import openmp as teams

TASKS = "/proc/self/task"


def compute() -> int:
    """Returns how many threads the process has once this one has computed with two."""
    torch.set_num_threads(2)
    x = torch.ones(512, 512)
    for _ in range(3):
        x = (x @ x).clamp(max=1.0)
    return len(os.listdir(TASKS))


@pytest.mark.skipif(not os.path.isdir(TASKS) or teams._pause() is None, reason="needs Linux and GNU's OpenMP")
def test_a_dismissed_team_is_gone_and_comes_back() -> None:
    # in a thread of its own: a team of it, and no other test's
    found: list[int] = []

    def work() -> None:
        found.append(compute())
        teams.dismiss()
        found.append(len(os.listdir(TASKS)))
        found.append(compute())
        teams.dismiss()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [found[0], found[0] - 1, found[0]]


def test_where_openmp_is_another_one_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teams, "_pause", lambda: None)
    teams.dismiss()
