"""The bundled model with three of its ten layers, for tests of the kernels' references, which need a second a token."""

from __future__ import annotations

import json
import shutil
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import safe_open
from safetensors.torch import save_file

DEMO = Path(str(files("mtp_spec.configs") / "demo"))
KEPT = (0, 8, 9)  # the dense one, and the last
_ROOM = TemporaryDirectory(prefix="short-demo-")


@cache
def short_demo() -> Path:
    """Returns the folder; the MTP module follows the layers, as in the whole model."""
    folder = Path(_ROOM.name)
    config = json.loads((DEMO / "config.json").read_text())
    layers = config["num_hidden_layers"]
    numbers = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate((*KEPT, layers))}
    tensors = {}
    for file in sorted(DEMO.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no dict
                beginning = ".".join(name.split(".")[:3]) + "."
                if not name.startswith("model.layers."):
                    tensors[name] = opened.get_tensor(name)
                elif beginning in numbers:
                    tensors[name.replace(beginning, numbers[beginning], 1)] = opened.get_tensor(name)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": len(KEPT)}))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder
