"""A progress bar over bytes or steps, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

Report = Callable[[int, int], None]


@contextmanager
def byte_progress(show: bool, label: str = "loading") -> Iterator[Report | None]:
    """Yields `report(done, total)` that draws a bar with the time left on stderr, or None."""
    with _progress(show, label, (BarColumn(), DownloadColumn(), TimeRemainingColumn())) as report:
        yield report


@contextmanager
def step_progress(show: bool, label: str) -> Iterator[Report | None]:
    """Yields the same for counted steps."""
    with _progress(show, label, (BarColumn(), TimeRemainingColumn())) as report:
        yield report


@contextmanager
def _progress(show: bool, label: str, columns: tuple[ProgressColumn, ...]) -> Iterator[Report | None]:
    if not show:
        yield None
        return
    with Progress(TextColumn(label), *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
