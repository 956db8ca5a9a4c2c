"""An engine that was compiled from other sources than those that call it, and the switch that chooses it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import mtp_spec
from mtp_spec.kernels.cpu import engine

pytestmark = pytest.mark.skipif(engine.why_not() is not None, reason="there is no engine")


@pytest.fixture
def other_sources(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gc.collect()  # models of other tests rest the engine that they had
    with monkeypatch.context() as patch:
        patch.setattr(engine, "digest", lambda: 1)
        engine._loaded.cache_clear()
        yield
    engine._loaded.cache_clear()


@pytest.mark.usefixtures("other_sources")
def test_an_engine_of_other_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(mtp_spec.MTPSpecError, match=r"compiled from other sources .*; compile it again .*build\.py"):
        mtp_spec.load()
    assert "other sources" in (engine.why_not() or "")
    assert engine.levels() == ()
    monkeypatch.setenv(engine.SWITCH, "torch")
    assert mtp_spec.load(max_context=64).generate([1, 2], max_new_tokens=2, speculation=None).token_ids


@pytest.mark.parametrize("name", ["AVX2", "fast"])
def test_a_switch_that_names_nothing_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(engine.SWITCH, name)
    with pytest.raises(mtp_spec.MTPSpecError, match=f"MTP_SPEC_CPU={name}: allowed are auto, torch, avx2"):
        mtp_spec.load()


def test_an_empty_switch_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(engine.SWITCH, "")
    assert engine.why_not() is None


def test_sources_that_are_not_there_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine, "digest", lambda: None)
        engine._loaded.cache_clear()
        assert engine.why_not() is None
    engine._loaded.cache_clear()
