"""Rejection sampling (Leviathan et al., 2211.17192; Chen et al., 2302.01318), recursive over siblings drawn without
replacement (RSD, 2402.14160; Sequoia, 2402.12374).

At a node `r = p`. A child x drawn from s is accepted with probability `min(1, r(x) / s(x))`; else `r = norm((r - s)+)`
and the next sibling is tried. If none is left the token is drawn from r. A single child is accepted with probability
`1 - TV(p, q)`.
"""

from __future__ import annotations

from mtp_spec.acceptance.base import Choices, Drafted, Target, Verdict, WithoutReplacement, positive_part
from mtp_spec.tree import ROOT, TokenTree


class Rejection(WithoutReplacement):
    """See the module."""

    def judge(self, tree: TokenTree, q: Drafted, p: Target, choices: Choices) -> Verdict:
        node, nodes = ROOT, list[int]()
        while True:
            left = p(node)
            for child in tree.children(node):
                token = tree.tokens[child]
                if choices.happens(min(1.0, float(left[token] / q[child][token]))):
                    break
                rest, mass = positive_part(left - q[child])
                # without mass the two distributions were equal, and only rounding can have rejected
                left = rest / mass if mass > 0.0 else left
            else:
                return Verdict(nodes, choices.pick(left))
            nodes.append(child)
            node = child
