"""Trees of what drafters other than the MTP modules propose, and their branches in the modules' trees."""

from __future__ import annotations

from collections.abc import Sequence

from mtp_spec.drafting import Continuation
from mtp_spec.speculation import Speculation
from mtp_spec.tree import MODULES, ROOT, TokenTree

# in a fixed tree a proposal takes the modules' place if it is at least as likely; if there are no modules any does
LEAST_BESIDE, LEAST_ALONE = 0.5, 0.0
MOST_SURE = 0.98  # two drafters that agree are no surer


def fixed_tree(given: Sequence[Continuation], limits: Speculation, depth: int, modules: bool) -> TokenTree:
    """Returns the part of a fixed tree that proposals fill; empty if the modules have to fill up the root's children.

    Args:
        depth: no deeper than this.
        modules: whether the MTP modules could draft instead.
    """
    tree, width = TokenTree(), limits.branching[0]
    least = LEAST_BESIDE if modules else LEAST_ALONE
    level = [(ROOT, one) for one in given[:width] if one.chances[0] >= least]
    if modules and len(level) < width:
        return tree
    for number in range(1, min(depth, limits.depth) + 1):
        above, level = level[: limits.room(number, len(tree))], []
        for parent, one in above:
            node = tree.add(parent, one.tokens[0], len(tree.children(parent)), one.source)
            if len(one.tokens) > 1:
                level.append((node, one.rest()))
    return tree


def graft(
    tree: TokenTree, chances: list[float], parent: int, given: Sequence[Continuation], most: int, least: float = 0.0
) -> None:
    """Adds continuations below a node; where they agree with a draft that is there, they make it likelier.

    Args:
        chances: for each node the probability that it is accepted; nodes that are added get theirs.
        most: most nodes of the tree.
        least: no node with a smaller chance is added.
    """
    above = 1.0 if parent == ROOT else chances[parent]
    drafted = [child for child in tree.children(parent) if tree.sources[child] == MODULES]
    best = max((chances[child] / above for child in drafted), default=0.0)
    for one in given:
        node, chance = parent, above
        for place, token in enumerate(one.tokens):
            own, child = one.chance(place), tree.child(node, token)
            if child is None:
                if node == parent and best > 0.0:  # of two drafters that contradict each other at most one is right
                    own = own * (1.0 - best) / max(1.0 - own * best, 1.0 - MOST_SURE)
                if chance * own < least or len(tree) >= most:
                    break
                child = tree.add(node, token, len(tree.children(node)), one.source)
                chances.append(chance * own)
            elif chance > 0.0:
                agreed = 1.0 - (1.0 - min(1.0, chances[child] / chance)) * (1.0 - own)
                chances[child] = max(chances[child], chance * min(agreed, MOST_SURE))
            node, chance = child, chances[child]
