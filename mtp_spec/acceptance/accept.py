"""Decides which drafted tokens are accepted, and which tokens are committed.

The default is coupled sampling (Gumbel coupling, Daliri et al. 2408.07978); other rules are in `mtp_spec.acceptance`.

Every row of the target determines its own token: the argmax of its processed logits plus noise that depends only on
seed, position and token. A draft is accepted if it is that token. The text is therefore the same as in plain decoding,
whatever was drafted; drafts only make it faster. At temperature 0 there is no noise, and the same walk is greedy
verification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from mtp_spec.acceptance import Choices, Rule
from mtp_spec.acceptance.base import Distribution
from mtp_spec.errors import NotFiniteError
from mtp_spec.sampling.sampler import History, Sampler
from mtp_spec.tree import MODULES, ROOT, TokenTree

TokenLogprob = tuple[float, list[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A committed token.

    Attributes:
        token: its id.
        depth: draft depth of the node that proposed it, 0 if only the target did.
        logprob: its log-probability under the model and the best alternatives, if requested.
        source: name of the drafter that proposed it, if one did.
    """

    token: int
    depth: int
    logprob: TokenLogprob | None
    source: str = MODULES


@dataclass(frozen=True, slots=True)
class Accepted:
    """Outcome of one verify pass.

    Attributes:
        nodes: accepted nodes, depth 1 first.
        drawn: the tokens committed: those of `nodes`, then the target's own (the bonus token).
        history: the sampler's history after them.
        stopped: whether the last token of `drawn` ends the sequence, on whichever row it was drawn.
    """

    nodes: list[int]
    drawn: list[Drawn]
    history: History
    stopped: bool


def accept_coupled(
    tree: TokenTree,
    logits: Tensor,
    sampler: Sampler,
    history: History,
    position: int,
    is_last: Callable[[int], bool],
) -> Accepted:
    """Returns the path from the root along which drafts equal the target's draws.

    Args:
        tree: drafted nodes; row n + 1 of the logits belongs to node n, row 0 to the root.
        logits: `[1 + N, V]` target rows, as the model returned them.
        history: tokens up to and including the root.
        position: absolute position of the token that row 0 predicts.
        is_last: called with each token as it is drawn; returns whether it ends the sequence.

    Raises:
        NotFiniteError: a row that a token is drawn from holds NaN or infinity.
    """
    node, nodes, drawn = ROOT, list[int](), list[Drawn]()
    while True:
        row, place = logits[node + 1], position + len(drawn)
        picked = sampler.pick(row, place)
        token = sampler.draw(_processed(sampler, row, history, place, node), place) if picked is None else picked[0]
        history = history.child(token)
        child = tree.child(node, token)
        wanted = sampler.params.logprobs
        logprob = sampler.logprobs(row, token, wanted) if wanted else None
        drawn.append(
            Drawn(token, 0, logprob)
            if child is None
            else Drawn(token, tree.depths[child], logprob, tree.sources[child])
        )
        stopped = is_last(token)
        if child is not None:
            nodes.append(child)
        if stopped or child is None:
            return Accepted(nodes, drawn, history, stopped)
        node = child


def accept_by_rule(
    rule: Rule,
    choices: Choices,
    tree: TokenTree,
    distributions: Sequence[Distribution],
    logits: Tensor,
    sampler: Sampler,
    history: History,
    position: int,
    is_last: Callable[[int], bool],
) -> Accepted:
    """Returns what a rule accepts; other arguments as for `accept_coupled`.

    Args:
        choices: the source of the rule's randomness.
        distributions: for each node the distribution it was drawn from.
    """

    found, impossible = dict[int, Distribution](), set[int]()

    def target(node: int) -> Distribution:
        if node not in found:
            found[node] = distribution(node)
        return found[node]

    def distribution(node: int) -> Distribution:
        if node != ROOT:
            parent = tree.parents[node]
            above = target(parent)
            if parent in impossible or above[tree.tokens[node]] == 0.0:
                impossible.add(node)  # never accepted; processors need not know what would follow
                return above
        own = history.extend(tree.path_tokens(node))
        depth = 0 if node == ROOT else tree.depths[node]
        return sampler.distribution(
            _processed(sampler, logits[node + 1], own, position + depth, node), position + depth
        )

    verdict = rule.judge(tree, distributions, target, choices)
    tokens = [*(tree.tokens[node] for node in verdict.nodes), verdict.token]
    rows = [ROOT, *verdict.nodes]
    sources = [*(tree.sources[node] for node in verdict.nodes), MODULES]
    wanted, drawn, stopped = sampler.params.logprobs, list[Drawn](), False
    for number, (row, token) in enumerate(zip(rows, tokens, strict=True), start=1):
        logprob = sampler.logprobs(logits[row + 1], token, wanted) if wanted else None
        drawn.append(Drawn(token, number if number < len(tokens) else 0, logprob, sources[number - 1]))
        stopped = is_last(token)
        if stopped:
            break
    history = history.extend(one.token for one in drawn)
    return Accepted(verdict.nodes[: len(drawn)], drawn, history, stopped)


def _processed(sampler: Sampler, row: Tensor, history: History, position: int, node: int) -> Tensor:
    try:
        return sampler.process(row, history, position)
    except NotFiniteError as error:
        error.node = node
        raise
