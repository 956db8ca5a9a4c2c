"""Shows a few steps of speculative decoding: the tree, both models' probabilities, the accepted path."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.text import Text
from rich.tree import Tree
from torch import Tensor

from mtp_spec.acceptance.accept import Accepted
from mtp_spec.sampling.sampler import History
from mtp_spec.sequence import Sequence
from mtp_spec.stream import TokenStream
from mtp_spec.tree import MODULES, ROOT, TokenTree

Decode = Callable[[Seq[int]], str]


@dataclass(frozen=True, slots=True)
class Node:
    """A drafted token.

    Attributes:
        parent: number of the node it follows, -1 for the root.
        draft: its probability under the draft, after temperature, truncation, penalties and bias; at temperature 0,
            where only the best token counts, that of temperature 1. 1 if it is not from the MTP modules.
        target: likewise under the target.
        source: name of the drafter that proposed it, "mtp" for the modules.
    """

    token: int
    text: str
    parent: int
    depth: int
    draft: float
    target: float
    accepted: bool
    source: str = MODULES


@dataclass(frozen=True, slots=True)
class Step:
    """A verify step: the last committed token, the drafts after it, and the token that the target added."""

    root: str
    nodes: list[Node]
    bonus: str
    bonus_target: float


@dataclass(slots=True)
class Explanation:
    """Steps of a text; rich prints them as trees.

    Attributes:
        first: the first generated token, drawn from the prompt's last row.
    """

    first: str = ""
    steps: list[Step] = field(default_factory=list)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(*(_tree(number, step) for number, step in enumerate(self.steps, start=1)))


class Explainer:
    """Watches a sequence's first steps, see `sequence.Observer`.

    Attributes:
        sequence: must be set before its first step.
    """

    def __init__(self, decode: Decode, steps: int) -> None:
        self._decode, self._steps, self._found = decode, steps, Explanation()
        self._rows, self._kept = dict[int, Tensor](), list[int]()
        self.sequence: Sequence | None = None

    def watch(self, stream: TokenStream) -> Explanation:
        """Returns the first steps of a stream that has not been read."""
        for _ in stream:
            if len(self._found.steps) == self._steps:
                break
        stream.close()
        sequence = stream.sequence
        self._found.first = self._decode(sequence.tokens[sequence.prompt_tokens :][:1])
        return self._found

    def drafted(self, parent: int, row: Tensor) -> None:
        """Keeps the row that a node's children come from."""
        if parent == ROOT:
            self._rows.clear()
            self._kept.clear()
        self._rows[parent] = row

    def pruned(self, kept: list[int]) -> None:
        """Keeps the numbers of the verified nodes."""
        self._kept[:] = kept

    def verified(self, tree: TokenTree, logits: Tensor, history: History, accepted: Accepted) -> None:
        """Adds a step."""
        if len(self._found.steps) == self._steps:  # the sequence went on past the last step to explain
            return
        sequence = self.sequence
        assert sequence is not None
        sampler, decode = sequence.sampler, self._decode

        def target(node: int, token: int) -> float:
            if any(
                nodes[step].target == 0.0 for step in tree.path(node)
            ):  # processors need not know what follows such a token
                return 0.0
            own = sampler.process(logits[node + 1], history.extend(tree.path_tokens(node)))
            return _share(own, token)

        def draft(node: int, token: int, source: str) -> float:
            if source != MODULES:
                return 1.0
            return _share(self._rows[self._kept[node] if self._kept and node != ROOT else node], token)

        kept, nodes = set(accepted.nodes), list[Node]()
        for node, token in enumerate(tree.tokens):
            parent, depth = tree.parents[node], tree.depths[node]
            chances = draft(parent, token, tree.sources[node]), target(parent, token)
            nodes.append(Node(token, decode([token]), parent, depth, *chances, node in kept, tree.sources[node]))
        last, row = accepted.drawn[-1].token, [ROOT, *accepted.nodes][len(accepted.drawn) - 1]
        step = Step(decode([sequence.tokens[-1]]), nodes, decode([last]), target(row, last))
        self._found.steps.append(step)


def _share(row: Tensor, token: int) -> float:
    """Returns a token's probability under a processed row `[V]`."""
    return float(row.double().softmax(-1)[token])


def _tree(number: int, step: Step) -> Tree:
    drawn = Tree(Text.assemble((f"step {number} ", "bold"), "after ", (repr(step.root), "cyan")))
    branches, end = {ROOT: drawn}, ROOT
    for at, node in enumerate(step.nodes):
        style = "green" if node.accepted else "dim"
        mark = "accepted" if node.accepted else "rejected"
        draft = f"draft {node.draft:.0%}" if node.source == MODULES else f"from {node.source}"
        label = f"{node.text!r}  {draft}, target {node.target:.0%}, {mark}"
        branches[at] = branches[node.parent].add(Text(label, style=style))
        end = at if node.accepted else end
    branches[end].add(Text(f"{step.bonus!r}  target {step.bonus_target:.0%}, its own", style="bold yellow"))
    return drawn
