"""Reads JSON files of a checkpoint folder that hold an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtp_spec.model.errors import CheckpointError


def read_object(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        CheckpointError: it cannot be read, is not JSON, or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no object but {value!r:.60}, and an object is needed: download it again")
    return value
