"""The bundled model and the published shapes that come with the library, by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from mtp_spec.errors import OptionError

# names from earlier versions, which results in docs/results still use
FORMER = {"gigachat3.1-10b": "GigaChat3-10B-A1.8B"}

BUNDLED = "demo"


def model_folder(path: str | Path | None = None) -> Path:
    """Returns a checkpoint's folder; None is the bundled model, and so is "demo" if no file or folder has that name."""
    if path is None or (str(path) == BUNDLED and not Path(BUNDLED).exists()):
        return Path(str(files("mtp_spec.configs") / BUNDLED))
    return Path(path)


def published() -> list[str]:
    """Returns the names of the library's shapes."""
    folder = files("mtp_spec.configs")
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


def named_shape(path: Path) -> Path:
    """Returns the configuration file that a name stands for, the bundled model's folder, or the path if it exists.

    Raises:
        OptionError: the name is unknown.
    """
    path = model_folder(path)
    if path.exists() or len(path.parts) > 1:
        return path
    names = {name.lower(): name for name in published()}
    wanted = path.name.lower().removesuffix(".json")
    found = names.get(wanted) or names.get(f"config_{wanted}") or FORMER.get(wanted)
    if found is None:
        raise OptionError(f"{path} does not exist here, and the library's own shapes are {', '.join(names.values())}")
    return Path(str(files("mtp_spec.configs") / f"{found}.json"))
