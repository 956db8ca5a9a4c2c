"""Rules that accept tokens which the target might not have drawn: they change the distribution of the text.

- typical (Medusa, 2401.10774): x is accepted if `p(x) > min(epsilon, delta exp(-H(p)))`, H the entropy.
- relaxed (TensorRT-LLM): x is accepted if it is among the `among` most probable and `p(x) >= max p - delta`.

Of several acceptable siblings the most probable is taken. The token after the path is drawn from p.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from mtp_spec.acceptance.base import Choices, Distribution, Drafted, Proposal, Target, Verdict, best
from mtp_spec.tree import ROOT, TokenTree


class _Lossy(ABC):
    lossless = False
    chains_only = False
    samples = False

    def propose(self, q: Distribution, scores: npt.NDArray[np.float32], width: int, choices: Choices) -> list[Proposal]:
        return best(scores, width)

    @abstractmethod
    def accepts(self, p: Distribution, token: int) -> bool:
        """Returns whether a draft is acceptable."""

    def judge(self, tree: TokenTree, q: Drafted, p: Target, choices: Choices) -> Verdict:
        node, nodes = ROOT, list[int]()
        while True:
            own = p(node)
            fitting = [child for child in tree.children(node) if self.accepts(own, tree.tokens[child])]
            if not fitting:
                return Verdict(nodes, choices.pick(own))
            node = max(fitting, key=lambda child: own[tree.tokens[child]])
            nodes.append(node)


class Typical(_Lossy):
    """Medusa's typical acceptance."""

    def __init__(self, epsilon: float = 0.09, delta: float = 0.3) -> None:
        self.epsilon, self.delta = epsilon, delta

    def accepts(self, p: Distribution, token: int) -> bool:
        held = p[p > 0.0]
        entropy = -float((held * np.log(held)).sum())
        return bool(p[token] > min(self.epsilon, self.delta * math.exp(-entropy)))


class Relaxed(_Lossy):
    """TensorRT-LLM's relaxed acceptance."""

    def __init__(self, among: int = 10, delta: float = 0.6) -> None:
        self.among, self.delta = among, delta

    def accepts(self, p: Distribution, token: int) -> bool:
        better = int((p > p[token]).sum())
        return bool(p[token] > 0.0 and better < self.among and p[token] >= p.max() - self.delta)
