"""The best k - 1 tokens and one drawn from the rest (Hu et al., "Towards optimal multi-draft", 2502.18779).

With H the certain tokens and z drawn from q', q restricted to the others: z is accepted with probability
`min(1, p(z) / q'(z))`; else y is drawn from `norm(p on H, (p - q')+ off H)`, and y in H is an accepted child. A node
has an accepted child with probability `p(H) + sum over x off H of min(p, q')`. Testing H first would be exact too, but
accept less.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mtp_spec.acceptance.base import Choices, Distribution, Drafted, Proposal, Target, Verdict, best, positive_part
from mtp_spec.tree import ROOT, TokenTree


class Hybrid:
    """See the module. The drawn child is the last of its siblings; if q has nothing left, all are certain."""

    lossless = True
    chains_only = False
    samples = True

    def propose(self, q: Distribution, scores: npt.NDArray[np.float32], width: int, choices: Choices) -> list[Proposal]:
        certain = best(scores, width - 1)
        rest = q.copy()
        rest[[proposal.token for proposal in certain]] = 0.0
        mass = float(rest.sum())
        if mass <= 0.0:  # as at temperature 0
            return best(scores, width)
        rest /= mass
        return [*certain, Proposal(choices.pick(rest), rest)]

    def judge(self, tree: TokenTree, q: Drafted, p: Target, choices: Choices) -> Verdict:
        node, nodes = ROOT, list[int]()
        while True:
            own, children = p(node), tree.children(node)
            if not children:
                return Verdict(nodes, choices.pick(own))
            # The last sibling is the drawn one. A certain token in its place (q had nothing left) is judged in the same
            # way: its distribution is a point mass, and `(p - q')+` then differs from p on that token alone.
            drawn = children[-1]
            token, drafted = tree.tokens[drawn], q[drawn]
            child = drawn
            if not choices.happens(min(1.0, float(own[token] / drafted[token]))):
                # off H the residual; on H, where q' has no mass, p itself: one formula for both
                rest, mass = positive_part(own - drafted)
                token = choices.pick(rest / mass if mass > 0.0 else own)
                certain = tree.child(node, token)
                if certain is None:
                    return Verdict(nodes, token)
                child = certain
            nodes.append(child)
            node = child
