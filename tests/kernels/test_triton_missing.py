"""A GPU without a usable Triton: the references run, and `load` tells a missing Triton from an old one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from places import ROOT

pytest.importorskip("triton")

# what a wheel of that version is: a module without the names of later ones; or today's, which says that it is older
MISSING = "sys.modules['triton'] = None"
OLD = "sys.modules['triton'] = types.ModuleType('triton'); sys.modules['triton'].__version__ = '3.2.0'"
COMPLETE_BUT_OLD = "import triton; triton.__version__ = '3.5.1'"
WORK = """
import torch
from mtp_spec import load_checks
from mtp_spec.kernels import commit, exchange, gemm, launching, mla, moe, quant, sampler
from mtp_spec.kernels.mla import attention
from mtp_spec.kernels.moe import grouping, router
from mtp_spec.kernels.sampler import sampling, uniform
torch.cuda.get_device_capability = lambda device: (9, 0)
assert all(module.triton is None for module in (attention, commit, exchange, gemm, grouping, launching, quant, router,
                                                sampling, uniform))
x = torch.ones(2, 128)
assert quant.quant(x)[1].shape == (2, 1)
assert sampler.uniforms(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 2).shape == (2,)
print(load_checks._no_kernels("cuda:0", load_checks.HALF_CAPABILITY))
"""


@pytest.mark.parametrize(
    ("fake", "told"),
    [
        (MISSING, "Triton is not installed (pip install triton)"),
        (OLD, "Triton 3.2.0 is not one that the kernels run with, 3.6 is the first (pip install -U torch triton)"),
        (COMPLETE_BUT_OLD, "Triton 3.5.1 is not one"),
    ],
    ids=["missing", "old", "old, with every name"],
)
def test_load_says_what_is_wrong_with_triton(fake: str, told: str) -> None:
    # kernels look for Triton when they are imported, so each case has a process of its own
    program = f"import sys, types\n{fake}\n{WORK}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip().startswith(told), done.stdout + done.stderr[-2000:]


def test_the_bound_is_that_of_the_package() -> None:
    from mtp_spec.kernels.launching import OLDEST_TRITON, triton_obstacle

    text = (ROOT / "pyproject.toml").read_text()
    assert f'"triton>={".".join(str(part) for part in OLDEST_TRITON)};' in text
    assert triton_obstacle() is None
