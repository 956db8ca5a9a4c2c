"""Exchange of small tensors between GPUs of one host in one launch: every rank writes to every rank, then waits.

For the few rows of a step only latency matters, and launching a library's collective costs several times the transfer.
Here each program takes a stretch of the bytes: it stores it into a room (buffer) of every rank, raises a flag there,
waits for the flags that the others raise here, and copies what arrived to its place. No program waits for another of
its own rank.

Exchanges alternate between two parts of a room. A rank can be at most one exchange ahead of another, because it needs
that one's flag, so it never overwrites unread data. Flags count exchanges; each program counts its own, on the device,
so that exchanges in a CUDA graph continue where the last replay ended.

Legend: `M` rows, `S` ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_spec.kernels.launching import late

try:
    import triton
    import triton.language as tl

    from mtp_spec.kernels.launching import follow
except ImportError:  # no Triton for this platform
    triton = None

PROGRAMS = 128  # fewer than multiprocessors, so that all are resident at once
CAPACITY = 2**14  # words of a program's part of a room
CHUNK = 1024  # words per access
WORD = 4  # bytes
# polls of a flag, about a microsecond each, before a rank counts as lost
LOOKS = 30_000_000


def room_words(size: int) -> int:
    """Returns the size of a rank's room in int32 words: two parts for each sender and program, and a flag."""
    return size * PROGRAMS * (2 * CAPACITY + 1)


@dataclass(slots=True)
class Rooms:
    """The rooms of all ranks, as mapped by this rank.

    Attributes:
        rank: number of this rank.
        addresses: `[S]` int64, address of each rank's room.
        turns: `[PROGRAMS]` int32, exchanges so far, initially zero.
        lost: `[1]` int32 in pinned memory; nonzero once a rank has not answered.
        looks: polls of a flag before that.
    """

    rank: int
    addresses: Tensor
    turns: Tensor
    lost: Tensor
    looks: int = LOOKS


def fits(tensors: Sequence[Tensor]) -> bool:
    """Whether one or two tensors, of whole words a row, fit into the rooms."""
    words = sum(x.nbytes // WORD for x in tensors)
    whole = all(x.is_contiguous() and x.ndim == 2 and x.shape[1] * x.element_size() % WORD == 0 for x in tensors)
    return whole and len(tensors) <= 2 and 0 < words <= PROGRAMS * CAPACITY


def exchange(tensors: Sequence[Tensor], rooms: Rooms) -> list[Tensor]:
    """Returns all ranks' tensors `[M, n]` concatenated, `[M, S n]`; takes one or two for which `fits` is true."""
    size, first, last = rooms.addresses.shape[0], tensors[0], tensors[-1]
    outs = [x.new_empty(x.shape[0], size * x.shape[1]) for x in tensors]
    words = [x.nbytes // WORD for x in tensors]
    each = -(-sum(words) // (PROGRAMS * CHUNK)) * CHUNK
    _exchange_kernel[(-(-sum(words) // each),)](
        _words(first), _words(last), _words(outs[0]), _words(outs[-1]), rooms.addresses, rooms.turns, rooms.lost,
        words[0], sum(words), words[0] // first.shape[0], words[-1] // last.shape[0], each, rooms.rank, rooms.looks,
        SIZE=size, TWO=len(tensors) == 2, PROGRAMS=PROGRAMS, CAPACITY=CAPACITY, CHUNK=CHUNK, **late(first),
    )  # fmt: skip
    return outs


def _words(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.int32)


if triton is not None:
    SOON: tl.constexpr = tl.constexpr(1000)  # looks

    @triton.jit
    def _looked(flag, turn, looks):
        """Returns a flag once it has reached `turn`, or after so many polls; differences are safe against overflow."""
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        done = 0
        while (seen - turn < 0) & (done < looks):
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            done += 1
        return seen

    @triton.jit(do_not_specialize=["first_words", "words", "each", "rank"])
    def _exchange_kernel(
        x,  # [M, .] words of the first tensor
        y,  # of the second, with TWO
        x_out,
        y_out,
        addresses,  # [SIZE] int64
        turns,  # [PROGRAMS] int32
        lost,  # [1] int32
        first_words,
        words,
        x_row,  # words of a row
        y_row,
        each,  # words per program
        rank,
        looks,
        SIZE: tl.constexpr,
        TWO: tl.constexpr,
        PROGRAMS: tl.constexpr,
        CAPACITY: tl.constexpr,
        CHUNK: tl.constexpr,
        PDL: tl.constexpr,
    ):
        follow(PDL)
        program = tl.program_id(0)
        turn = tl.load(turns + program) + 1
        part = (turn & 1) * SIZE * PROGRAMS + program  # of sender 0
        flags: tl.constexpr = 2 * SIZE * PROGRAMS * CAPACITY
        lane = tl.arange(0, CHUNK)
        begin = program * each
        end = tl.minimum(begin + each, words)
        for start in range(begin, end, CHUNK):
            place = start + lane
            word = tl.load(x + place, mask=place < tl.minimum(first_words, end), other=0)
            if TWO:
                second = (place >= first_words) & (place < end)
                word = tl.where(second, tl.load(y + place - first_words, mask=second, other=0), word)
            inside = (part + rank * PROGRAMS) * CAPACITY + place - begin
            for other in tl.static_range(SIZE):
                room = tl.load(addresses + other).to(tl.pointer_type(tl.int32))
                tl.store(room + inside, word, mask=place < end)
        tl.debug_barrier()  # all threads' stores must precede the one thread's flags
        for other in tl.static_range(SIZE):
            room = tl.load(addresses + other).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(room + flags + rank * PROGRAMS + program, turn, sem="release", scope="sys")
        own = tl.load(addresses + rank).to(tl.pointer_type(tl.int32))
        for sender in tl.static_range(SIZE):
            flag = own + flags + sender * PROGRAMS + program
            if _looked(flag, turn, SOON) - turn < 0:
                # `lost` is in host memory, so it is read late; after one loss no wait is long
                if _looked(flag, turn, tl.where(tl.load(lost, volatile=True) == 0, looks, 1)) - turn < 0:
                    tl.store(lost, 1)
        tl.debug_barrier()
        for start in range(begin, end, CHUNK):
            place = start + lane
            in_first = place < tl.minimum(first_words, end)
            for sender in tl.static_range(SIZE):
                inside = (part + sender * PROGRAMS) * CAPACITY + place - begin
                word = tl.load(own + inside, mask=place < end, other=0, volatile=True)
                target = place // x_row * (SIZE * x_row) + sender * x_row + place % x_row
                tl.store(x_out + target, word, mask=in_first)
                if TWO:
                    rest = place - first_words
                    target = rest // y_row * (SIZE * y_row) + sender * y_row + rest % y_row
                    tl.store(y_out + target, word, mask=(rest >= 0) & (place < end))
        tl.store(turns + program, turn)
