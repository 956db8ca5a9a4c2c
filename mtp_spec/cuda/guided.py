"""Generation on a GPU with logits processors, which are Python and see every row, or with `min_new_tokens`.

Drafts and verification stay captured; then the rows come to the host, where tokens are drawn as on a CPU, and what was
drawn goes back. So the GPU waits for the host in every step, and copies `M` rows of the vocabulary to it. Drafts do not
know the processors: fewer are accepted than on a CPU, where they do. Plain decoding takes the same way, so that the
text is the same with and without speculation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtp_spec.acceptance.accept import Drawn, accept_coupled
from mtp_spec.cuda.constants import Shape
from mtp_spec.cuda.engine import DeviceDecoder, DeviceRuntime
from mtp_spec.cuda.pages import DeviceLease
from mtp_spec.errors import OptionError
from mtp_spec.model.undisturbed import undisturbed
from mtp_spec.sampling.sampler import Sampler
from mtp_spec.speculation import Speculation
from mtp_spec.tree import ROOT, TokenTree

GUIDED_DEPTH = 3


class GuidedDecoder(DeviceDecoder):
    """One sequence; arguments as for `DeviceDecoder`.

    Raises:
        OptionError: an acceptance rule other than "coupled", whose draft laws do not leave the GPU.
    """

    draws = False

    def __init__(
        self,
        runtime: DeviceRuntime,
        prompt: Sequence[int],
        sampler: Sampler,
        speculation: Speculation | None,
        is_last: Callable[[int], bool],
        lease: DeviceLease | None = None,
        after: DeviceDecoder | None = None,
    ) -> None:
        if speculation is not None and speculation.acceptance != "coupled":
            raise OptionError(
                f'acceptance="{speculation.acceptance}" with logits_processor, response_format or min_new_tokens '
                'runs on the CPU only: use "coupled" on a GPU'
            )
        if speculation is not None and speculation.adaptive:
            # the host draws between steps, so that nothing is gained by taking turns: the depth that pays on most texts
            depth = min(speculation.depth, GUIDED_DEPTH)
            speculation = Speculation(depth, speculation.branching[:depth], speculation.budget)
        super().__init__(runtime, prompt, sampler, speculation, is_last, lease, after)
        self.history = sampler.history(prompt)

    def _first(self, logits: Tensor) -> tuple[int, bool]:
        row = self.sampler.process(logits[0], self.history, len(self.tokens))
        token = self.sampler.draw(row, len(self.tokens))
        self.history = self.history.child(token)
        return token, False

    @undisturbed()
    def step(self) -> list[Drawn]:
        """Returns the tokens of the next step."""
        with self.stats.phase("step"), self.runtime.turns:
            self._check_own()
            self.one_step()
            self.model.ranks.wait()
            shape = self.one_step.shape
            tree, rows = drafted(shape, self.one_step.ids.tolist())
            logits = self.one_step.logits[[0, *rows]].cpu()
        with self.stats.phase("sample"):
            accepted = accept_coupled(tree, logits, self.sampler, self.history, len(self.tokens), self.is_last)
        self.history, self.finished = accepted.history, accepted.stopped
        self.tokens += [drawn.token for drawn in accepted.drawn]
        ranks = [tree.ranks[node] for node in accepted.nodes]
        self.stats.record_step(shape.depth, len(shape.parents), ranks, len(accepted.drawn))
        if accepted.stopped:
            self._release()
            return accepted.drawn
        drawn = [-1] * (len(shape.parents) + 1)
        for row, one in zip([0, *(rows[node] for node in accepted.nodes)], accepted.drawn, strict=True):
            drawn[row] = one.token
        with self.stats.phase("step"), self.runtime.turns:
            self.one_step.take(torch.tensor(drawn, dtype=torch.int32).to(self.model.device))
        self._publish()
        return accepted.drawn


def drafted(shape: Shape, ids: Sequence[int]) -> tuple[TokenTree, list[int]]:
    """Returns the tree that a pass of `ids` (root first) verified, and the row of each of its nodes.

    A row that repeats a sibling, as where a law had too few tokens, is no node.
    """
    tree, rows, nodes = TokenTree(), list[int](), {ROOT: ROOT}
    for place, parent in enumerate(shape.parents):
        if parent in nodes and tree.child(nodes[parent], ids[place + 1]) is None:
            nodes[place] = tree.add(nodes[parent], ids[place + 1], shape.ranks[place])
            rows.append(place + 1)
    return tree, rows
