"""A few steps of speculative decoding laid open: the tree, both models' probabilities, the accepted path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.text import Text
from rich.tree import Tree
from torch import Tensor

from mtp_spec.acceptance.accept import Accepted
from mtp_spec.cpu.engine import Decoder
from mtp_spec.sampling.sampler import History
from mtp_spec.tree import ROOT, TokenTree

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Node:
    """A drafted token.

    Attributes:
        parent: number of the node it follows, -1 for the root.
        draft, target: its probability under each model, after temperature, truncation, penalties and bias; at
            temperature 0, where only the best counts, that of temperature 1.
    """

    token: int
    text: str
    parent: int
    depth: int
    draft: float
    target: float
    accepted: bool


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
        first: the text's first token, which the prompt's last row gives.
    """

    first: str = ""
    steps: list[Step] = field(default_factory=list)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(*(_tree(number, step) for number, step in enumerate(self.steps, start=1)))


def explain(decoder: Decoder, steps: int, decode: Decode) -> Explanation:
    """Returns the first steps of a decoder that has not run yet."""
    out = Explanation()
    if decoder.drafter is not None:
        decoder.drafter.explaining = True
    decoder.watch = lambda tree, logits, history, accepted: out.steps.append(
        _step(decoder, tree, logits, history, accepted, decode)
    )
    out.first = decode([decoder.prefill()[0].token])
    while not decoder.finished and len(out.steps) < steps:
        decoder.step()
    return out


def _step(
    decoder: Decoder, tree: TokenTree, logits: Tensor, history: History, accepted: Accepted, decode: Decode
) -> Step:
    sampler = decoder.sampler

    def target(node: int, token: int) -> float:
        own = sampler.process(logits[node + 1], history.extend(tree.path_tokens(node)))
        return float(own.double().softmax(-1)[token])

    draft = decoder.drafter.chances if decoder.drafter is not None else []
    kept, nodes = set(accepted.nodes), list[Node]()
    for node, token in enumerate(tree.tokens):
        chance = target(tree.parents[node], token)
        text, parent, depth = decode([token]), tree.parents[node], tree.depths[node]
        nodes.append(Node(token, text, parent, depth, draft[node], chance, node in kept))
    last = accepted.drawn[-1].token
    row = [ROOT, *accepted.nodes][len(accepted.drawn) - 1]
    return Step(decode([decoder.tokens[-1]]), nodes, decode([last]), target(row, last))


def _tree(number: int, step: Step) -> Tree:
    drawn = Tree(Text.assemble((f"step {number} ", "bold"), "after ", (repr(step.root), "cyan")))
    branches, end = {ROOT: drawn}, ROOT
    for at, node in enumerate(step.nodes):
        style = "green" if node.accepted else "dim"
        mark = "accepted" if node.accepted else "rejected"
        label = f"{node.text!r}  draft {node.draft:.0%}, target {node.target:.0%}, {mark}"
        branches[at] = branches[node.parent].add(Text(label, style=style))
        end = at if node.accepted else end
    branches[end].add(Text(f"{step.bonus!r}  target {step.bonus_target:.0%}, its own", style="bold yellow"))
    return drawn
