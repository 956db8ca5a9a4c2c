"""The bundled model's name."""

from __future__ import annotations

from pathlib import Path

import pytest

import mtp_spec
from mtp_spec.cli.main import main
from mtp_spec.shapes import model_folder


def test_demo_is_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_folder("demo") == model_folder(Path("demo")) == model_folder(None)
    assert (model_folder("demo") / "config.json").is_file()
    few = {"max_new_tokens": 4, "seed": 0, "speculation": None}
    texts = [mtp_spec.load(path, measure=False).generate("Hello", **few).token_ids for path in ("demo", None)]
    assert texts[0] == texts[1]


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert model_folder("demo") == Path("demo")
    with pytest.raises(mtp_spec.CheckpointError, match="demo"):
        mtp_spec.load("demo")


def test_demo_is_exported_and_cast_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["export", "demo", "exported"])
    main(["cast", "demo", "cast", "--to", "bf16"])
    assert sorted(made.name for made in tmp_path.iterdir()) == ["cast", "exported"]
    assert mtp_spec.load("exported", measure=False).config == mtp_spec.load("demo", measure=False).config
