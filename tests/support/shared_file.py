"""A file that takes long to make, made once for all of pytest's workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

PATIENCE = 300.0  # seconds


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Returns the file, made by whichever worker asks first; the others wait for it.

    `make` writes to the path that it is given, or to none and raises.
    """
    base = factory.getbasetemp()
    folder = base.parent if base.name.startswith("popen-") else base
    file, claim = folder / name, folder / f"{name}.claimed"
    try:
        claim.mkdir()
    except FileExistsError:
        end = time.monotonic() + PATIENCE
        while not file.exists() and time.monotonic() < end and claim.exists():
            time.sleep(0.1)
        if file.exists():
            return file
    part = claim / name
    try:
        claim.mkdir(exist_ok=True)
        make(part)
        part.rename(file)
    except BaseException:
        if not part.exists():  # another may try, and learn why
            claim.rmdir()
        raise
    return file
