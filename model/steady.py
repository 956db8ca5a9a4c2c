"""Products of which every row is computed as if it were alone, as far as a processor's library can be brought to it.

A library chooses its loops by the number of rows: one row, or more than some, may be summed in another order than the
rest, which shows in a last bit now and then. Between two such limits the order is one. `probe` finds the limits of a
product on this machine; `steadily` stays within them: it gives few rows company, and parts many.

Which order a sum took is seen best where nothing but its roundings is left: the probe's operands cancel, so that every
sum is zero and what comes out is the order's own error.

Legend: `M` rows, `N` outputs, `K` summed columns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# rows of the passes that are tried, and companies that a row may be given
ROWS = (*range(1, 10), 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 128, 256)
COMPANY = (1, 2, 4, 8, 16)
MOST = ROWS[-1]
# rows of a verified tree: larger passes read prompts, which are alike for every way of decoding
VERIFIED = 65
# a limit below this makes verifying many rows too slow to be of use; from the other on prompts keep to it too
LEAST_LIMIT, PROMPT_LIMIT = 16, 64
SPREAD = 4  # powers of two by which operands of the probe differ, up and down
LARGEST = 2**22  # elements of a matrix that the probe makes for itself

Key = tuple[Hashable, ...]


class Limits(NamedTuple):
    """Rows between which a product's rows do not depend on their number; none at all where `most` is 0."""

    least: int = 1
    most: int = MOST


FREE, NONE = Limits(), Limits(1, 0)
# what was found, by torch's number of threads and the product; products without limits are left out of the second
_known: dict[Key, Limits] = {}
_limited: dict[Key, Limits] = {}


def steadily(multiply: Callable[[Tensor], Tensor], x: Tensor, name: Key) -> Tensor:
    """Returns multiply(x), `[M, ...]` of x `[M, ...]`, each row as if it were alone as far as `probe` found how.

    Args:
        name: as given to `probe`.
    """
    limits = _limited.get((torch.get_num_threads(), *name)) if _limited and x.is_cpu else None
    if limits is None:
        return multiply(x)
    rows, (least, most) = x.shape[0], limits
    if rows < least:
        return multiply(F.pad(x, (0, 0) * (x.dim() - 1) + (0, least - rows)))[:rows]
    if rows > most and (rows <= VERIFIED or most >= PROMPT_LIMIT):
        return torch.cat([steadily(multiply, part, name) for part in x.split(most)])
    return multiply(x)


@torch.inference_mode()
def probe(name: Key, prepare: Callable[[], tuple[Callable[[Tensor], Tensor], Tensor]]) -> Limits:
    """Finds a product's limits with this number of torch's threads, once.

    Args:
        name: of the product: all that its loops may depend on.
        prepare: returns the product and rows `[MOST, ...]` to try it on.
    """
    key = (torch.get_num_threads(), *name)
    if key not in _known:
        limits = _known[key] = _limits(*prepare())
        if limits not in (FREE, NONE):
            _limited[key] = limits
    return _known[key]


def _limits(multiply: Callable[[Tensor], Tensor], x: Tensor) -> Limits:
    passes, found = dict[int, Tensor](), NONE

    def of(rows: int) -> Tensor:
        if rows not in passes:
            passes[rows] = multiply(x[:rows]).clone()
        return passes[rows]

    for least in COMPANY:
        most, before = least, least
        for rows in ROWS[ROWS.index(least) + 1 :]:
            if not torch.equal(of(rows)[:before], of(before)):
                break
            most, before = rows, rows
        useful = most >= LEAST_LIMIT and most > max(least, found.most)
        if useful and _anywhere(multiply, x, of(most), least):
            found = Limits(least, most)
        if most >= PROMPT_LIMIT:
            break
    return found


def _anywhere(multiply: Callable[[Tensor], Tensor], x: Tensor, together: Tensor, least: int) -> bool:
    """Whether rows in all places of a pass are what they are as the first of `least`."""
    some = range(0, len(together), 1 + len(together) // LEAST_LIMIT)
    return all(torch.equal(multiply(x[row : row + least])[0], together[row]) for row in some if row + least <= len(x))


def cancelling(lead: tuple[int, ...], outer: tuple[int, ...], size: int) -> tuple[Tensor, Tensor]:
    """Returns bfloat16 x `[*lead, K]` and weight `[*outer, K]` whose products all sum to zero, but for roundings."""
    generator = torch.Generator().manual_seed(size)
    order = torch.randperm(size // 2 * 2, generator=generator)

    def half(shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(*shape, size // 2, generator=generator)
        return values * torch.exp2(torch.randint(-SPREAD, SPREAD + 1, values.shape, generator=generator).float())

    a, b = half(lead), half(outer)
    x, weight = torch.cat((a, -a), -1)[..., order], torch.cat((b, b), -1)[..., order]
    return tuple(F.pad(t, (0, size % 2)).bfloat16() for t in (x, weight))  # type: ignore[return-value]
