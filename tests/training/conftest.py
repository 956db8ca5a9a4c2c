"""Models and texts to train on."""

from __future__ import annotations

from pathlib import Path

import pytest

import worded


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without MTP modules."""
    return worded.make(tmp_path_factory.mktemp("plain") / "model", "moonlight")


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one."""
    return worded.make(tmp_path_factory.mktemp("v3") / "model", "v3")


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worded.texts(tmp_path_factory.mktemp("lines") / "texts.jsonl")
