"""Pages of latent cache, and the prompt prefixes that sequences share.

A sequence leases every page that it may need before it starts, so that it is never preempted; if too few are free, it
waits. A full page is identified by its tokens and all tokens before them (like vLLM's hash chain, but compared in
full), so that a sequence with the same prefix reads it instead of computing it again, with the same bits. Pages that no
sequence uses are kept until their memory is needed, and are then evicted least recently used first.

One page holds the slots of the main model and of its MTP modules. A module's row depends on one or more of the tokens
that follow, so a page's name includes these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

from torch import Tensor

from mtp_spec.errors import MTPSpecError
from mtp_spec.model.cache import PAGE, LatentCache, pages_for
from mtp_spec.request import Request

Name = tuple[int, tuple[int, ...], bool]
L = TypeVar("L", bound="Lease")


@dataclass(slots=True, eq=False)
class _Node:
    """A page with known content.

    Attributes:
        number: of the node; 0 is the root, which is not a page.
        name: the number of the node before, the tokens, and whether the page is expanded (`Pages.expanded`).
        drafted: whether the modules' slots are filled too.
        after: how many nodes have this one as `before`.
    """

    number: int
    name: Name
    before: _Node | None
    page: int
    drafted: bool
    after: int = 0


class Pages(ABC, Generic[L]):
    """The free pages, and the known content of the others.

    Any thread may lease pages and give them back; only its owner writes to a page.

    Args:
        total: number of pages.
        modules: number of MTP modules whose slots they hold too.
        unit: pages are shared in runs of this many; 1 if a row's bits do not depend on the pass that computed it.
        most_idle: most pages that are kept for later sequences; None keeps all.
        expanded: how many of the tokens at the start of a prompt of so many are computed with other bits than generated
            ones, a multiple of `PAGE`, with the modules' slots; None if all have the same bits. A page is shared with
            sequences that would compute the same bits.
    """

    def __init__(
        self, total: int, modules: int, unit: int = 1, most_idle: int | None = None,
        expanded: Callable[[int], int] | None = None,
    ) -> None:  # fmt: skip
        self.total, self.modules, self.unit, self._most_idle = total, modules, unit, most_idle
        self.expanded = expanded or (lambda _: 0)
        self._lock, self._returned = Lock(), deque[list[int]]()
        self._free, self._uses = list(range(self.total)), [0] * self.total
        self._nodes: dict[Name, _Node] = {}
        self._named: dict[int, _Node] = {}  # by page
        self._idle: OrderedDict[int, _Node] = OrderedDict()  # named pages that no sequence uses, by page, oldest first
        self._numbers = 0

    @property
    def free(self) -> int:
        """Number of pages without known content."""
        return len(self._free)

    @property
    def idle(self) -> int:
        """Number of unused pages that a later sequence may share."""
        return len(self._idle)

    def lease(self, prompt: Sequence[int], tokens: int, drafted: bool) -> L | None:
        """Returns pages for a sequence of up to `tokens` tokens; None if too many are in use.

        Args:
            drafted: whether the modules' slots of shared pages are needed.
        """
        with self._lock:
            self._collect()
            shared = self.shared(prompt, drafted)
            for node in shared:
                self._hold(node.page)
            own = self._take(pages_for(tokens) - len(shared), shared[-1].page + 1 if shared else 0)
            if own is None:
                self._let_go([node.page for node in shared])
                return None
            for page in own:
                self._hold(page)
            pages = [node.page for node in shared] + own
            lease = self._leased(pages, len(shared), all(node.drafted for node in shared))
            lease.expanded = self.expanded(len(prompt))
            return lease

    def give_back(self, pages: list[int]) -> None:
        """Takes back the pages of a lease that has ended; the garbage collector may call this at any point."""
        self._returned.append(pages)
        if self._lock.acquire(blocking=False):  # else this thread may hold it itself; the next lease collects them
            try:
                self._collect()
            finally:
                self._lock.release()

    def _collect(self) -> None:
        while self._returned:
            self._let_go(self._returned.popleft())
        while self._most_idle is not None and len(self._idle) > self._most_idle and self._evict():
            pass

    def will_share(self, prompt: Sequence[int], other: Sequence[int]) -> int:
        """Returns how many tokens of a prompt are in pages that the prefill of another prompt will have filled."""
        last = min(common(prompt, other) - self.modules, len(prompt) - 1)
        own, others = self.expanded(len(prompt)), self.expanded(len(other))
        if own != others:  # in between they compute different bits
            last = min(last, own, others)
        return max(0, last) // PAGE * PAGE

    def is_being_read(
        self, prompt: Sequence[int], drafted: bool, others: Iterable[tuple[Lease, Sequence[int], bool]]
    ) -> bool:
        """Whether a running sequence is about to fill pages of this prompt's prefix: waiting is cheaper than computing.

        Args:
            drafted: whether the modules' slots are needed.
            others: for each running sequence its lease, its prompt, and whether it fills the modules' slots.
        """
        known: int | None = None
        if len(prompt) <= PAGE:  # its last token is always computed
            return False
        first = prompt[:PAGE]
        for lease, other, drafts in others:
            if (drafted and not drafts) or other[:PAGE] != first:
                continue
            if max(0, len(other) - self.modules) // PAGE * PAGE <= lease.published:
                continue
            soon = self.will_share(prompt, other)
            if soon <= lease.published:
                continue
            if known is None:
                with self._lock:
                    known = len(self.shared(prompt, drafted)) * PAGE
            if soon > known:
                return True
        return False

    def forget(self) -> None:
        """Forgets the content of every page, for when it would now be computed differently. No sequence may run."""
        with self._lock:
            self._collect()
            for node in self._idle.values():
                insort(self._free, node.page)
            for memory in (self._nodes, self._named, self._idle):
                memory.clear()

    @property
    def leased(self) -> bool:
        """Whether a sequence has pages."""
        with self._lock:
            self._collect()
            return any(self._uses)

    def shared(self, prompt: Sequence[int], drafted: bool) -> list[_Node]:
        """Returns the known pages of a prompt's prefix; the prompt's last token is always computed."""
        found, number, expanded = list[_Node](), 0, self.expanded(len(prompt))
        for first in range(0, len(prompt) - PAGE - max(self.modules, 1) + 1, PAGE):
            tokens = tuple(prompt[first : first + PAGE + self.modules])
            node = self._nodes.get((number, tokens, first < expanded))
            if node is None or (drafted and not node.drafted):
                break
            found.append(node)
            number = node.number
        return found[: len(found) // self.unit * self.unit]

    def _take(self, count: int, wanted: int) -> list[int] | None:
        """Returns free pages."""
        while len(self._free) < count and self._evict():
            pass
        if len(self._free) < count:
            return None
        start = self._start(count, wanted)
        own = self._free[start : start + count]
        del self._free[start : start + count]
        return own

    @abstractmethod
    def _leased(self, pages: list[int], shared: int, drafted: bool) -> L:
        """Returns a lease, arguments as `Lease`, with its own pages zeroed: attention multiplies slots that were never
        written by zero, which would keep a NaN."""

    def _start(self, count: int, wanted: int) -> int:
        """Returns where in the ascending free list `count` pages are taken from: at page `wanted` if possible."""
        return 0

    def _evict(self) -> bool:
        """Frees the least recently used page that no other page builds on."""
        node = next((node for node in self._idle.values() if not node.after), None)
        if node is None:
            return False
        del self._idle[node.page], self._named[node.page], self._nodes[node.name]
        if node.before is not None:
            node.before.after -= 1
        insort(self._free, node.page)
        return True

    def _hold(self, page: int) -> None:
        self._uses[page] += 1
        self._idle.pop(page, None)

    def _let_go(self, pages: Sequence[int]) -> None:
        # a page is needed by all that build on it, so it is released after them
        for page in reversed(pages):
            self._uses[page] -= 1
            if self._uses[page]:
                continue
            if page in self._named:
                self._idle[page] = self._named[page]
            else:
                insort(self._free, page)

    def _name(self, before: _Node | None, tokens: Sequence[int], expanded: bool, page: int, drafted: bool) -> _Node:
        """Records a page's content; returns its node, which may be an earlier page with the same content."""
        name = (before.number if before is not None else 0, tuple(tokens), expanded)
        node = self._nodes.get(name)
        if node is None:
            self._numbers += 1
            node = self._nodes[name] = self._named[page] = _Node(self._numbers, name, before, page, drafted)
            if before is not None:
                before.after += 1
        elif drafted and node.page == page:
            node.drafted = True
        elif drafted and not node.drafted and page not in self._named:
            del self._named[node.page]
            if self._idle.pop(node.page, None) is not None:
                insort(self._free, node.page)
            node.page, node.drafted = page, True
            self._named[page] = node
        return node


class Lease:
    """The pages of one sequence.

    Args:
        pages: page numbers, in order of position; the first `shared` are shared with others and only read.
    Attributes:
        reused: tokens in the shared pages.
        drafted: whether the modules' slots of the shared pages are filled too.
        expanded: how many of the prompt's tokens have bits of their own, see `Pages`.
    """

    def __init__(self, store: Pages[L], pages: list[int], shared: int, drafted: bool) -> None:
        self._store, self._pages, self.drafted = store, pages, drafted
        # number of published pages without and with the modules' slots, and the last node of each
        self._known: dict[bool, tuple[int, _Node | None]] = {False: (0, None), True: (0, None)}
        self.reused, self.expanded = shared * PAGE, 0

    @property
    def published(self) -> int:
        """Number of tokens in pages that others may already share."""
        return max(count for count, _ in self._known.values()) * PAGE

    def publish(self, tokens: Sequence[int], held: int, drafted: bool) -> int:
        """Lets other sequences share the pages that are full by now; returns how many they can share.

        Args:
            tokens: of the sequence so far.
            held: slots filled in all caches, or in the main model's alone if not `drafted`.
        """
        store, known = self._store, self._known
        count, last = known[True] if drafted else max(known.values(), key=lambda pages: pages[0])
        end = min(held - PAGE, len(tokens) - PAGE - store.modules) + 1
        if count * PAGE >= end:
            return count
        with store._lock:
            for first in range(count * PAGE, end, PAGE):
                name = tokens[first : first + PAGE + store.modules]
                last = store._name(last, name, first < self.expanded, self._pages[count], drafted)
                count += 1
        known[drafted] = count, last
        return count

    def end(self) -> None:
        """Gives the pages back; may be repeated."""
        pages, self._pages = self._pages, []
        if pages:
            self._store.give_back(pages)


class HostPages(Pages["HostLease"]):
    """Pages on a CPU, contiguous for each sequence if possible: then they are read in place.

    Args:
        layers: per layer `[pages * PAGE, width]`: the main model's, then one for each MTP module.
        modules: how many of the layers belong to modules.
        unit, most_idle: see `Pages`.
    """

    def __init__(self, layers: Sequence[Tensor], modules: int, unit: int = 1, most_idle: int | None = None) -> None:
        super().__init__(layers[0].shape[0] // PAGE, modules, unit, most_idle)
        self.layers = list(layers)

    def _leased(self, pages: list[int], shared: int, drafted: bool) -> HostLease:
        for layer in self.layers:
            for page in pages[shared:]:
                layer[page * PAGE : (page + 1) * PAGE].zero_()
        return HostLease(self, pages, shared, drafted)

    def _start(self, count: int, wanted: int) -> int:
        starts = range(len(self._free) - count + 1)
        rows = [start for start in starts if count and self._free[start + count - 1] - self._free[start] == count - 1]
        return next((start for start in rows if self._free[start] == wanted), rows[0] if rows else 0)


class HostLease(Lease):
    """Pages of a sequence on a CPU.

    Attributes:
        cache: of the main model, with the shared slots committed.
        mtp_caches: of its MTP modules, likewise.
    """

    def __init__(self, store: HostPages, pages: list[int], shared: int, drafted: bool) -> None:
        super().__init__(store, pages, shared, drafted)
        main = len(store.layers) - store.modules
        self.cache = LatentCache(store.layers[:main], pages, self.reused)
        self.mtp_caches = [LatentCache([layer], pages, self.reused) for layer in store.layers[main:]]


def check_pages(request: Request, tokens: int, total: int) -> None:
    """Rejects a request of up to `tokens` tokens, drafts included, that would not fit into all pages."""
    needed = pages_for(tokens)
    if needed > total:
        raise MTPSpecError(
            f"this text may need {needed} pages of {PAGE} tokens ({len(request.ids)} of the prompt, up to "
            f"{request.limit} new ones, and its drafts), and there are {total}: shorten it, lower max_new_tokens, or "
            "load with more cache_tokens"
        )


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the length of the longest common prefix."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
