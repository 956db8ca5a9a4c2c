"""Room that launches keep: where captured graphs may still write is never freed, moved or handed out smaller."""

from __future__ import annotations

import weakref

import pytest
import torch

from mtp_spec.kernels.workspace import Workspace

CPU, META = torch.device("cpu"), torch.device("meta")


def test_room_stays_until_more_is_needed() -> None:
    space = Workspace(torch.bfloat16)
    first = space.room(CPU, 100)
    assert first.dtype == torch.bfloat16
    for count in (100, 1, 99):
        assert space.room(CPU, count) is first
    assert space.room(META, 7).device == META
    assert space.room(CPU, 3) is first


def test_outgrown_room_is_kept_for_graphs_that_know_it() -> None:
    space = Workspace(torch.int32, zeros=True)
    first = space.room(CPU, 10)
    first.fill_(5)
    address, alive = first.data_ptr(), weakref.ref(first)
    del first
    second = space.room(CPU, 11)
    assert second.numel() >= 11
    assert not second.any()
    kept = alive()
    assert kept is not None, "outgrown room was freed"
    assert kept.data_ptr() == address
    assert (kept == 5).all()
    assert second.data_ptr() != address
    assert [id(room) for room in space.held(CPU)] == [id(kept), id(second)]
    assert space.room(CPU, 2) is second


def test_spaces_do_not_share() -> None:
    one, other = Workspace(torch.float32), Workspace(torch.float32, least=64)
    assert one.room(CPU, 4).data_ptr() != other.room(CPU, 4).data_ptr()
    assert other.room(CPU, 4).numel() == 64


def test_no_room_is_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    space = Workspace(torch.int32, zeros=True)
    with pytest.raises(RuntimeError, match=r"room for 5 numbers while a CUDA graph is captured: run .* once before"):
        space.room(torch.device("cuda", 0), 5)
    assert space.held(torch.device("cuda", 0)) == []


@pytest.mark.gpu
def test_captured_launches_write_to_the_room_that_they_were_captured_with() -> None:
    space, device = Workspace(torch.int32, zeros=True), torch.device("cuda", torch.cuda.current_device())
    first = space.room(device, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        space.room(device, 8).add_(1)
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            space.room(device, 9)
    second = space.room(device, 9)
    graph.replay()
    assert (first == 1).all()
    assert not second.any()
