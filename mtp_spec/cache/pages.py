"""Pages of latent cache, and the prompt prefixes that sequences share.

A sequence leases every page that it may need before it begins, so that it is never preempted; if too few are free, it
waits. A full page is named by its tokens and all tokens before them (as vLLM's hash chain, but compared
whole), so that a text that begins alike reads it instead of computing it again, bit for bit the same. Pages that no
text uses are kept until their memory is needed, and then go in the order in which they were last used.

One page holds the slots of the main model and of its MTP modules. A module's row has also read the tokens that follow,
one or more, so a page's name includes these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

from torch import Tensor

from mtp_spec.errors import MTPSpecError
from mtp_spec.model.cache import PAGE, LatentCache, pages_for
from mtp_spec.request import Request

Name = tuple[int, tuple[int, ...]]
L = TypeVar("L", bound="Lease")


@dataclass(slots=True, eq=False)
class _Node:
    """A page whose content is known.

    Attributes:
        number: of the node; the root, which is no page, is 0.
        name: the number of the page before, and the tokens.
        drafted: whether it holds the modules' slots too.
        after: nodes whose `before` this is.
    """

    number: int
    name: Name
    before: _Node | None
    page: int
    drafted: bool
    after: int = 0


class Pages(ABC, Generic[L]):
    """Which pages are free, and what is known of the others.

    Any thread may lease pages and give them back; the content of a page is its owner's business.

    Args:
        total: how many there are.
        modules: MTP modules whose slots they hold too.
        unit: pages are shared in runs of so many: 1 where a row's bits do not depend on the pass that computed it.
        most_idle: pages that are kept for later sequences at most; None: all.
    """

    def __init__(self, total: int, modules: int, unit: int = 1, most_idle: int | None = None) -> None:
        self.total, self.modules, self.unit, self._most_idle = total, modules, unit, most_idle
        self._lock, self._returned = Lock(), deque[list[int]]()
        self._free, self._uses = list(range(self.total)), [0] * self.total
        self._nodes: dict[Name, _Node] = {}
        self._named: dict[int, _Node] = {}  # by page
        self._idle: OrderedDict[int, _Node] = OrderedDict()  # named pages that no text uses, by page, oldest first
        self._numbers = 0

    @property
    def free(self) -> int:
        """Pages that hold nothing of worth."""
        return len(self._free)

    @property
    def idle(self) -> int:
        """Pages that no text uses and a later one may share."""
        return len(self._idle)

    def lease(self, prompt: Sequence[int], tokens: int, drafted: bool) -> L | None:
        """Returns pages for a text of so many tokens; None where too many are in use.

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
            return self._leased(pages, len(shared), all(node.drafted for node in shared))

    def give_back(self, pages: list[int]) -> None:
        """Takes pages of a lease that has ended; also called by the garbage collector, in the middle of anything."""
        self._returned.append(pages)
        if self._lock.acquire(blocking=False):  # else whoever has it is here, and the next lease collects them
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
        """Returns how many tokens of a prompt are in pages that another prompt's text will have filled."""
        last = min(common(prompt, other) - self.modules, len(prompt) - 1)
        return max(0, last) // PAGE * PAGE

    def is_being_read(
        self, prompt: Sequence[int], drafted: bool, others: Iterable[tuple[Lease, Sequence[int], bool]]
    ) -> bool:
        """Whether a running text is about to fill pages that a prompt begins with: waiting for them costs less.

        Args:
            drafted: whether the modules' slots are needed.
            others: of each running text its lease, its prompt, and whether it fills the modules' slots.
        """
        known: int | None = None
        for lease, other, drafts in others:
            to_come = max(0, len(other) - self.modules) // PAGE * PAGE > lease.published
            if not to_come or (drafted and not drafts) or prompt[:PAGE] != other[:PAGE]:
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
        """Forgets what is in every page, as when it would be computed otherwise now. No text may be running."""
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
        """Returns the known pages that a prompt begins with; the prompt's last token is read in any case."""
        found, number = list[_Node](), 0
        for first in range(0, len(prompt) - PAGE - max(self.modules, 1) + 1, PAGE):
            node = self._nodes.get((number, tuple(prompt[first : first + PAGE + self.modules])))
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
        """Returns a lease, arguments as `Lease`, whose own pages have been cleaned: attention multiplies what was never
        written by zero, which would not undo a NaN."""

    def _start(self, count: int, wanted: int) -> int:
        """Returns which of the free pages, in ascending order, are the first of so many; at `wanted` if possible."""
        return 0

    def _evict(self) -> bool:
        """Frees the page that was used longest ago, of those that no other builds on."""
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
        # a page is needed before those that build on it, so it is given up after them
        for page in reversed(pages):
            self._uses[page] -= 1
            if self._uses[page]:
                continue
            if page in self._named:
                self._idle[page] = self._named[page]
            else:
                insort(self._free, page)

    def _name(self, before: _Node | None, tokens: Sequence[int], page: int, drafted: bool) -> _Node:
        """Makes a page known; returns the node of its content, which may be another page that came first."""
        name = (before.number if before is not None else 0, tuple(tokens))
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
    """The pages of one text.

    Args:
        pages: numbers, in order of position; the first `shared` are others' too and are only read.
    Attributes:
        reused: tokens in the shared ones.
        drafted: whether the modules' shared slots are written too.
    """

    def __init__(self, store: Pages[L], pages: list[int], shared: int, drafted: bool) -> None:
        self._store, self._pages, self.drafted = store, pages, drafted
        # pages known without the modules' slots, and with them, and the last of each
        self._known: dict[bool, tuple[int, _Node | None]] = {False: (0, None), True: (0, None)}
        self.reused = shared * PAGE

    @property
    def published(self) -> int:
        """Tokens in pages that others may share by now."""
        return max(count for count, _ in self._known.values()) * PAGE

    def publish(self, tokens: Sequence[int], held: int, drafted: bool) -> None:
        """Lets other texts share the pages that are full by now.

        Args:
            tokens: of the text so far.
            held: slots that all caches hold, the main model's alone if not `drafted`.
        """
        store, known = self._store, self._known
        count, last = known[True] if drafted else max(known.values(), key=lambda pages: pages[0])
        end = min(held - PAGE, len(tokens) - PAGE - store.modules) + 1
        if count * PAGE >= end:
            return
        with store._lock:
            for first in range(count * PAGE, end, PAGE):
                last = store._name(last, tokens[first : first + PAGE + store.modules], self._pages[count], drafted)
                count += 1
        known[drafted] = count, last

    def end(self) -> None:
        """Gives the pages back; no harm if repeated."""
        pages, self._pages = self._pages, []
        if pages:
            self._store.give_back(pages)


class HostPages(Pages["HostLease"]):
    """Pages on a CPU, those of a text in a row where possible: such are read in place.

    Args:
        layers: per layer `[pages * PAGE, width]`: the main model's, then one for each MTP module.
        modules: how many of the layers are modules'.
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
    """Pages of a text on a CPU.

    Attributes:
        cache, mtp_caches: of the main model and its modules, with the shared slots committed.
    """

    def __init__(self, store: HostPages, pages: list[int], shared: int, drafted: bool) -> None:
        super().__init__(store, pages, shared, drafted)
        main = len(store.layers) - store.modules
        self.cache = LatentCache(store.layers[:main], pages, self.reused)
        self.mtp_caches = [LatentCache([layer], pages, self.reused) for layer in store.layers[main:]]


def check_pages(request: Request, tokens: int, total: int) -> None:
    """Refuses a text of up to so many tokens, drafts included, that would not fit into all pages."""
    needed = pages_for(tokens)
    if needed > total:
        raise MTPSpecError(
            f"this text may need {needed} pages of {PAGE} tokens ({len(request.ids)} of the prompt, up to "
            f"{request.limit} new ones, and its drafts), and there are {total}: shorten it, lower max_new_tokens, or "
            "load with more cache_tokens"
        )


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the length of the longest common beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
