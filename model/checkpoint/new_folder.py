"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtp_spec.model.errors import CheckpointError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Context manager of a temporary folder beside `folder`, which takes that name when the block ends.

    Files are on the disk before it is renamed. An error in the block leaves nothing behind.

    Raises:
        CheckpointError: the folder exists.
    """
    if os.path.lexists(folder):  # a link that leads nowhere cannot be replaced by a folder
        raise CheckpointError(f"{folder} exists: give a new folder, nothing is overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield part
        for file in part.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
            file.chmod(0o644)  # safetensors' own are for their writer alone
        part.chmod(0o755)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
