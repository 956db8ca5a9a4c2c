"""Two processes that train one head."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

TOGETHER = """
import sys, json, torch, mtp_spec
model, few, *jobs = sys.argv[1:]
torch.set_num_threads(1)
said = []
for texts in jobs:
    try:
        made = mtp_spec.train(model, texts + ".head", texts=texts, **json.loads(few))
        said.append([made.verdict, [line["loss"] for line in made.log]])
    except mtp_spec.MTPSpecError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def together(*arguments: object) -> list[Any]:
    """Returns what each of two processes says that train a model with some options together, of each file of texts: the
    verdict and losses, or the error."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    runs = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        given = {name: str(value) for name, value in place.items()}
        command = [sys.executable, "-c", TOGETHER, *map(str, arguments)]
        runs.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **given}))
    try:
        return [json.loads(run.communicate(timeout=120)[0].splitlines()[-1]) for run in runs]
    finally:
        for run in runs:
            run.kill()
