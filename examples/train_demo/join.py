"""Puts MTP modules that `mtp-spec train` made into a checkpoint, in FP8 as the trainer stores the rest:
`python join.py configs/demo HEAD OUT`. Files that hold none of their tensors stay as they are, byte for byte.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mtp_spec.model.checkpoint.folder import load_checkpoint, open_checkpoint, save_checkpoint

if __name__ == "__main__":
    source, head, out = map(Path, sys.argv[1:])
    save_checkpoint(load_checkpoint(open_checkpoint(source, mtp=head), dtype=torch.float32), out, fp8=True)
