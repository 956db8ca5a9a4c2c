"""Traversal verification (2505.12398): a tree is judged from its leaves to its root; on a chain it is block
verification.

Each node has a weight P and a residual r, which starts as p; the root's P is 1, a child x drawn from s has
`min(1, P r(x) / s(x))` of its parent's. Follow first children down to a leaf. With probability P its whole path is
accepted and the next token drawn from its r. Else it is removed and its parent becomes `w = (P r - s)+`,
`r = norm(w)`, `P = S / (S + 1 - P)` with S the sum of w. When only the root is left, its r gives the token.
"""

from __future__ import annotations

from mtp_spec.acceptance.base import Choices, Drafted, Target, Verdict, WithoutReplacement, positive_part
from mtp_spec.tree import ROOT, TokenTree


class Traversal(WithoutReplacement):
    """See the module."""

    def judge(self, tree: TokenTree, q: Drafted, p: Target, choices: Choices) -> Verdict:
        # a node's weight is fixed when the walk first reaches it: its parent's changes only when the node is removed
        weight, left = {ROOT: 1.0}, {ROOT: p(ROOT)}
        children = {node: tree.children(node) for node in range(ROOT, len(tree))}
        while True:
            node, path = ROOT, list[int]()
            while children[node]:
                child = children[node][0]
                if child not in weight:
                    token = tree.tokens[child]
                    weight[child] = min(1.0, weight[node] * float(left[node][token] / q[child][token]))
                    left[child] = p(child)
                node = child
                path.append(node)
            if node == ROOT or choices.happens(weight[node]):
                return Verdict(path, choices.pick(left[node]))
            parent = tree.parents[node]
            children[parent].pop(0)
            rest, mass = positive_part(weight[parent] * left[parent] - q[node])
            missing = mass + 1.0 - weight[parent]
            # no mass: nothing is left for the parent, unless only rounding has rejected
            left[parent] = rest / mass if mass > 0.0 else left[parent]
            weight[parent] = mass / missing if missing > 0.0 else 1.0
