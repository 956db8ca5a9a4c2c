"""Block verification (Sun et al., 2403.10444): a chain is judged as a whole, from its end.

With `P_0 = 1`, `P_i = min(1, P_{i-1} p_i(x_i) / q_i(x_i))`, `S_i = sum over x of (P_i p_{i+1}(x) - q_{i+1}(x))+`,
`h_i = S_i / (S_i + 1 - P_i)` before the end and `h_K = P_K`: i drafts are accepted, where i is the LARGEST with
`u_i <= h_i` for independent u_i. Unlike in rejection the first failure does not decide: a later draft may succeed. The
next token is drawn from `norm((P_i p_{i+1} - q_{i+1})+)`, or from p after all K. Optimal for one path.
"""

from __future__ import annotations

from mtp_spec.acceptance.base import Choices, Drafted, Target, Verdict, WithoutReplacement, positive_part
from mtp_spec.tree import ROOT, TokenTree


class Block(WithoutReplacement):
    """See the module."""

    chains_only = True

    def judge(self, tree: TokenTree, q: Drafted, p: Target, choices: Choices) -> Verdict:
        if not tree.is_chain():
            raise ValueError("block verification judges chains")
        count, weights = len(tree), [1.0]
        targets = [p(node) for node in range(ROOT, count)]
        for node, token in enumerate(tree.tokens):
            weights.append(min(1.0, weights[-1] * float(targets[node][token] / q[node][token])))
        if choices.happens(weights[count]):
            return Verdict(list(range(count)), choices.pick(targets[count]))
        # from the end, so that the first success is the largest
        for length in range(count - 1, -1, -1):
            rest, mass = positive_part(weights[length] * targets[length] - q[length])
            missing = mass + 1.0 - weights[length]
            if length == 0 or choices.happens(mass / missing if missing > 0.0 else 1.0):
                token = choices.pick(rest / mass if mass > 0.0 else targets[length])
                return Verdict(list(range(length)), token)
        raise AssertionError("length 0 always succeeds")
