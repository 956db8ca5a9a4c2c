"""The house: what the wheel holds, and that the README's code runs."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import quick
from places import ROOT


def test_the_quick_tests_exist() -> None:
    for file, function in quick.names():
        assert f"def {function}(" in (ROOT / "tests" / f"{file}.py").read_text(), (file, function)


def test_every_kernel_has_its_reference_at_the_place_for_it() -> None:
    """`x_reference`, in the operation's file or in `reference.py` of its folder; `x` calls it."""
    found = 0
    for file in (ROOT / "kernels").rglob("*.py"):
        own, beside = (_functions(place) for place in (file, file.with_name("reference.py")))
        for name, function in own.items():
            called = {node.func.id for node in ast.walk(function)
                      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
            if "runs_triton" in called:
                found += 1
                assert f"{name}_reference" in called, f"{file}: {name} does not call {name}_reference"
                assert f"{name}_reference" in own | beside, f"{file}: {name}_reference is somewhere else"
    assert found >= 20


def _functions(file: Path) -> dict[str, ast.FunctionDef]:
    if not file.is_file():
        return {}
    return {node.name: node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_files_are_short() -> None:
    for folder in ("mtp_spec", "model", "kernels", "examples", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 420, file


def test_wheel_holds_library_model_and_weights(tmp_path: Path) -> None:
    pytest.importorskip("build")
    pytest.importorskip("setuptools")
    source = tmp_path / "source"  # without build/, from which setuptools would take modules of former builds
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns("build", "*.egg-info", ".*", "docs", "__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for needed in ("model/transformer.py", "kernels/fp8.py", "kernels/mla/attention.py", "kernels/moe/router.py",
                   "kernels/sampler/uniform.py", "kernels/tuned/moe.json", "bench/speed.py", "py.typed",
                   "configs/prompts.jsonl", "configs/demo/tokenizer.json",
                   "configs/demo/model-00001-of-00004.safetensors"):  # fmt: skip
        assert f"mtp_spec/{needed}" in names
    for folder, place in (("mtp_spec", ""), ("model", "model/"), ("kernels", "kernels/")):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"mtp_spec/{place}{file.relative_to(ROOT / folder).as_posix()}" in names
    assert not any("test" in name.lower() for name in names)


def test_python_in_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
