"""Acceptance rules inside a captured step: `mtp_spec.acceptance` at fixed shapes, without the host.

The distributions and random numbers are the same, in the same order, so that drafts, accepted path and following token
are those of the rule's own file. Decisions that are made one after another there are made for all nodes at once here:
the random number of a decision follows from the tree and the existing siblings, because a rule visits nodes in a fixed
order until the first that decides. A node may be missing: if a distribution has fewer tokens than the node has
children, the last children are left out, with everything below them.

Legend: `M` rows (the root is row 0, node n row n + 1), `N` nodes, `F` nodes of one depth that have children, `V`
vocabulary. Distributions are float64 `[., V]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtp_spec.acceptance import RULES
from mtp_spec.acceptance.lossy import Relaxed, Typical
from mtp_spec.cuda.constants import Constants
from mtp_spec.kernels.sampler import uniforms
from mtp_spec.tree_shape import TreeShape


@dataclass(frozen=True, slots=True)
class Outcome:
    """The decisions of a rule.

    Attributes:
        good: `[N]` bool, whether a node is accepted if all its ancestors are.
        left: `[M, V]` distribution of the token after each row if the path ends there.
        at: `[M]` int64, index of the random number that draws it.
    """

    good: Tensor
    left: Tensor
    at: Tensor


@dataclass(slots=True)
class DeviceRule:
    """One rule in the steps of one tree: call `begin`, `propose` for every depth, then `judge`.

    Args:
        name: a key of `RULES`.
        greedy: whether distributions put everything on one token.
        drawn: `[1]` int64, number of random numbers that the sequence has used; updated by `judge`.
    """

    name: str
    shape: TreeShape
    greedy: bool
    drawn: Tensor
    _constants: Constants = field(init=False)
    _numbers: Tensor = field(init=False)
    _used: Tensor = field(init=False)  # [1] of them
    _distributions: list[Tensor] = field(init=False)
    _tokens: list[Tensor] = field(init=False)
    _there: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._constants = Constants(self.drawn.device)

    def begin(self, seed: Tensor) -> None:
        """Prepares a step's random numbers for a seed `[1]`: one per draft, and for judging two per depth or one per
        node."""
        self._numbers = uniforms(seed, self.drawn, 3 * len(self.shape.parents) + 2)
        self._used = torch.zeros_like(self.drawn)
        self._distributions, self._tokens, self._there = [], [], []

    def propose(self, depth: int, rows: Tensor, failed: Tensor) -> Tensor:
        """Returns the tokens of a depth's nodes, int64; missing nodes have token 0.

        Args:
            rows: `[F, V]` float32, processed rows of the nodes above that have children, removed tokens at -inf.
            failed: `[F]` int32, 1 if a row has no token, so that the node has no children.
        """
        shape, feeding, nodes = self.shape, self.shape.with_children(depth - 1), self.shape.level(depth)
        width = max(shape.ranks[node] for node in nodes) + 1
        alive = failed == 0
        if depth > 1:
            first = shape.level(depth - 1)[0]
            alive &= self._there[-1].index_select(0, self._constants.places(node - first for node in feeding))
        if self.name == "hybrid":
            tokens, there, distributions = self._best_and_one(rows, width, alive)
        elif RULES[self.name].samples:
            tokens, there, distributions = self._without_replacement(_distribution(rows, self.greedy), width, alive)
        else:
            tokens, there = _best(rows, width)
            tokens, there, distributions = tokens * there, there & alive[:, None], None
        places = self._constants.places(feeding.index(shape.parents[n]) * width + shape.ranks[n] for n in nodes)
        self._tokens.append(tokens.flatten().index_select(0, places))
        self._there.append(there.flatten().index_select(0, places))
        if distributions is not None:
            self._distributions.append(distributions)
        return self._tokens[-1]

    def judge(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the inputs of `kernels.commit.accept`: the drawn tokens `[M]` int32, and the pass's tokens `[M]`
        int64, -1 where not accepted.

        Args:
            rows: `[M, V]` float32, the target's processed rows.
        """
        p, tokens, there = _distribution(rows, self.greedy), torch.cat(self._tokens), self.there
        outcome = _JUDGES[self.name](self, p, tokens, there)
        reached = (self._paths() <= outcome.good).all(-1)
        # nodes are numbered from the root down, so the path ends at the last one reached
        row = self._constants.places(range(1, len(reached) + 1))
        last = (row * reached).amax(0, keepdim=True)
        at = outcome.at.index_select(0, last)
        bonus = _pick(outcome.left.index_select(0, last), self._number(at))
        self.drawn += at + 1
        # every row has the token that ends the path, except that an accepted node's token is at its parent's row
        count = len(p)
        above = torch.where(reached, self._constants.places(parent + 1 for parent in self.shape.parents), count)
        drawn = bonus.repeat(count + 1).scatter(0, above, tokens)[:count]
        return drawn.int(), torch.nn.functional.pad(torch.where(reached, tokens, -1), (1, 0), value=-1)

    @property
    def there(self) -> Tensor:
        """`[N]` bool, whether each node was proposed."""
        return torch.cat(self._there)

    # drafts

    def _without_replacement(self, distribution: Tensor, width: int, alive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draws siblings without replacement; returns tokens and presence `[F, width]` and distributions `[N, V]`."""
        count = (distribution > 0).sum(-1).clamp_max(width) * alive
        first = self._claim(count)
        tokens, distributions = [], []
        for rank in range(width):
            tokens.append(_pick(distribution, self._number(first + rank)))
            distributions.append(distribution)
            if rank + 1 < width:
                rest = distribution.scatter(1, tokens[-1][:, None], 0.0)
                mass = rest.sum(-1, keepdim=True)
                distribution = rest / torch.where(mass > 0, mass, 1.0)
        there = self._constants.places(range(width)) < count[:, None]
        return torch.stack(tokens, 1) * there, there, torch.stack(distributions, 1).flatten(0, 1)

    def _best_and_one(self, rows: Tensor, width: int, alive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the best tokens and one drawn from the rest, and the distributions `[F, V]` of the last siblings."""
        tokens, there = _best(rows, width)
        rest = _distribution(rows, self.greedy)
        if width > 1:
            rest = rest.scatter(1, tokens[:, :-1], 0.0)
        mass = rest.sum(-1)
        draws = mass > 0
        distribution = rest / torch.where(draws, mass, 1.0)[:, None]
        drawn = _pick(distribution, self._number(self._claim((draws & alive).long())))
        last = there.sum(-1, keepdim=True) - 1
        certain = torch.zeros_like(distribution).scatter(1, tokens.gather(1, last.clamp_min(0)), 1.0)
        tokens = torch.cat((tokens[:, :-1], torch.where(draws, drawn, tokens[:, -1])[:, None]), 1)
        there = torch.cat((there[:, :-1], (draws | there[:, -1])[:, None]), 1) & alive[:, None]
        return tokens * there, there, torch.where(draws[:, None], distribution, certain)

    def _claim(self, counts: Tensor) -> Tensor:
        """Returns where each node's random numbers begin `[F]`, given how many it uses."""
        ends = self._used + counts.cumsum(0)
        self._used = ends[-1:]
        return ends - counts

    def _number(self, at: Tensor) -> Tensor:
        """Returns random numbers of this step; missing nodes may index past the end, without effect."""
        return self._numbers.index_select(0, at.clamp_max(len(self._numbers) - 1))

    # verdicts

    def _rejection(self, p: Tensor, tokens: Tensor, there: Tensor) -> Outcome:
        ranks = self.shape.ranks
        groups = [[node for node, rank in enumerate(ranks) if rank == own] for own in range(max(ranks) + 1)]
        chance, left, _ = self._compare(groups, p, tokens, there)
        # on the path to a node, the earlier siblings of each accepted node were tried before it
        tries = [sum(ranks[step] + 1 for step in self.shape.path(node)) for node in range(len(ranks))]
        passed = there & (self._number(self._used + self._constants.places(tries) - 1) < chance)
        good = passed & ~(self._siblings(lambda node, other: ranks[other] < ranks[node]) & passed).any(-1)
        return Outcome(good, left, self._used + self._constants.places([0, *tries]) + self._children(there))

    def _traversal(self, p: Tensor, tokens: Tensor, there: Tensor) -> Outcome:
        shape, order = self.shape, self._constants.places(self._leaves_first(-1)[:-1])
        groups = [[node for node in shape.level(depth) if shape.ranks[node] == rank]
                  for depth in range(1, shape.depth + 1) for rank in range(max(shape.ranks) + 1)]  # fmt: skip
        _, left, weight = self._compare([group for group in groups if group], p, tokens, there)
        # existing nodes are judged leaves first; the path ends at the first that passes, else at the root
        turn = torch.zeros_like(tokens).scatter(0, order, there.index_select(0, order).cumsum(0) - 1)
        passed = there & (self._number(self._used + turn.clamp_min(0)) < weight[1:])
        every = there.sum(0, keepdim=True)
        first = torch.where(passed, turn, every).amin(0, keepdim=True)
        good = (self._paths() & (passed & (turn == first))[:, None]).any(0)
        return Outcome(good, left, (self._used + torch.minimum(first + 1, every)).expand(len(p)))

    def _hybrid(self, p: Tensor, tokens: Tensor, there: Tensor) -> Outcome:
        shape, constants = self.shape, self._constants
        parents = [node for depth in range(shape.depth) for node in shape.with_children(depth)]
        rows = constants.places(node + 1 for node in parents)
        counts = self._children(there)
        # the last sibling is the drawn one, or, if q had nothing left, a certain one that is judged the same way
        final = constants.places(shape.parents.index(node) for node in parents) + counts.index_select(0, rows) - 1
        token = tokens.index_select(0, final.clamp_min(0))[:, None]
        own, distribution, some = (
            p.index_select(0, rows),
            torch.cat(self._distributions),
            counts.index_select(0, rows)[:, None] > 0,
        )
        rest = (own - distribution).clamp_min(0)
        mass = rest.sum(-1, keepdim=True)
        rest = torch.where(some & (mass > 0), rest / mass, own)
        above = constants.places(parent + 1 for parent in shape.parents)
        takes = 2 - (constants.places(shape.ranks) + 1 == counts.index_select(0, above)).long()
        begins = self._used + torch.nn.functional.pad((self._paths() * takes).sum(-1), (1, 0))
        number = begins.index_select(0, rows)
        passes = self._number(number) < (own.gather(1, token) / distribution.gather(1, token))[:, 0]
        chosen = torch.where(passes, token[:, 0], _pick(rest, self._number(number + 1)))
        wanted = torch.full_like(counts, -1).index_copy(0, rows, chosen)
        good = there & (tokens == wanted.index_select(0, above))
        return Outcome(good, p.index_copy(0, rows, rest), begins + (counts > 0))

    def _typical(self, p: Tensor, tokens: Tensor, there: Tensor) -> Outcome:
        rule = RULES["typical"]
        assert isinstance(rule, Typical)
        least = (rule.delta * (-torch.special.entr(p).sum(-1)).exp()).clamp_max(rule.epsilon)
        share, above = self._share(p, tokens)
        return self._lossy(p, there & (share > least.index_select(0, above)), share)

    def _relaxed(self, p: Tensor, tokens: Tensor, there: Tensor) -> Outcome:
        rule = RULES["relaxed"]
        assert isinstance(rule, Relaxed)
        share, above = self._share(p, tokens)
        better = (p.index_select(0, above) > share[:, None]).sum(-1)
        near = share >= p.amax(-1).index_select(0, above) - rule.delta
        return self._lossy(p, there & (share > 0) & (better < rule.among) & near, share)

    def _lossy(self, p: Tensor, fits: Tensor, share: Tensor) -> Outcome:
        """Accepts the most probable of several siblings that fit, the first if they are equal."""
        share = torch.where(fits, share, -1.0)
        better = self._siblings(lambda *_: True) & (share > share[:, None])
        better |= self._siblings(lambda node, other: other < node) & (share == share[:, None])
        return Outcome(fits & ~better.any(-1), p, self._used.expand(len(p)))

    def _compare(
        self, groups: list[list[int]], p: Tensor, tokens: Tensor, there: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Subtracts nodes from the distributions of their parents, group by group, each after its earlier siblings.

        Returns each node's acceptance probability when it is first tried `[N]`, and the residuals after all nodes:
        distributions `[M, V]` and, for rules such as traversal in which later nodes count, weights `[M]`.
        """
        distributions, left, weight = torch.cat(self._distributions), p.clone(), torch.ones_like(p[:, 0])
        chance = torch.zeros_like(weight[1:])
        for nodes in groups:
            here = self._constants.places(nodes)
            above = self._constants.places(self.shape.parents[node] + 1 for node in nodes)
            own, distribution, heavy = left[above], distributions[here], weight[above][:, None]
            token, exists = tokens[here][:, None], there[here][:, None]
            share = (heavy * (own.gather(1, token) / distribution.gather(1, token))).clamp_max(1.0)
            chance[here] = share[:, 0]
            rest = (heavy * own - distribution).clamp_min(0)
            mass = rest.sum(-1, keepdim=True)
            left[above] = torch.where(exists & (mass > 0), rest / mass, own)
            if self.name != "rejection":
                missing = mass + 1.0 - heavy
                weight[here + 1] = share[:, 0]
                weight[above] = torch.where(exists, torch.where(missing > 0, mass / missing, 1.0), heavy)[:, 0]
        return chance, left, weight

    # the tree

    def _share(self, p: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the target's probability of each node `[N]`, and the rows of their parents."""
        above = self._constants.places(parent + 1 for parent in self.shape.parents)
        return p[above, tokens], above

    def _children(self, there: Tensor) -> Tensor:
        """Returns the number of children of each row `[M]`."""
        above = self._constants.places(parent + 1 for parent in self.shape.parents)
        return torch.zeros(len(there) + 1, dtype=torch.int64, device=there.device).index_add(0, above, there.long())

    def _paths(self) -> Tensor:
        """Returns `[N, N]` bool: whether m is on the path to n."""
        count = range(len(self.shape.parents))
        return self._constants.flags([[other in self.shape.path(node) for other in count] for node in count])

    def _siblings(self, which: Callable[[int, int], bool]) -> Tensor:
        """Returns `[N, N]` bool: whether m is a sibling of n and `which(n, m)` holds."""
        parents = self.shape.parents
        return self._constants.flags([
            [a != b and parents[a] == parents[b] and which(a, b) for b in range(len(parents))]
            for a in range(len(parents))
        ])  # fmt: skip

    def _leaves_first(self, node: int) -> list[int]:
        """Returns a node and all below it in the order in which traversal removes them."""
        below = [self._leaves_first(child) for child, parent in enumerate(self.shape.parents) if parent == node]
        return [*(one for part in below for one in part), node]


_JUDGES: dict[str, Callable[[DeviceRule, Tensor, Tensor, Tensor], Outcome]] = {
    "rejection": DeviceRule._rejection,
    "hybrid": DeviceRule._hybrid,
    "block": DeviceRule._traversal,  # the same rule on a chain
    "traversal": DeviceRule._traversal,
    "typical": DeviceRule._typical,
    "relaxed": DeviceRule._relaxed,
}


def _distribution(rows: Tensor, greedy: bool) -> Tensor:
    """Returns the distributions of processed rows, as `Sampler.distribution` does."""
    if greedy:
        best = rows.argmax(-1, keepdim=True)
        return torch.zeros_like(rows, dtype=torch.float64).scatter(1, best, 1.0)
    wide = rows.double()
    # a row without tokens gives zeros: NaN would spread from rows that are not reached
    weights = (wide - wide.amax(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).min)).exp()
    return weights / weights.sum(-1, keepdim=True).clamp_min(1.0)


def _pick(distribution: Tensor, number: Tensor) -> Tensor:
    """Returns tokens `[F]` drawn from distributions `[F, V]` with numbers `[F]`, as `SeededChoices.pick` does."""
    mass, count = distribution.cumsum(-1), distribution.shape[1]
    token, held = torch.arange(count, device=distribution.device), distribution > 0
    # parallel sums may decrease where nothing is added, so the drawn token's own probability is checked too
    drawn = torch.where(held & (mass > number[:, None] * mass[:, -1:]), token, count).amin(-1)
    return torch.minimum(drawn, torch.where(held, token, 0).amax(-1))


def _best(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Returns the best tokens `[F, width]`, lowest id first among equals, and whether each exists; see `base.best`."""
    tokens, there = [], []
    for _ in range(width):
        token = rows.argmax(-1, keepdim=True)
        there.append(rows.gather(1, token) > -torch.inf)
        tokens.append(token)
        rows = rows.scatter(1, token, -torch.inf)
    return torch.cat(tokens, 1), torch.cat(there, 1)
