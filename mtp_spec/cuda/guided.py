"""Steps whose tokens the host draws: logits processors are Python and see every row, and so it is with grammars.

Drafts and verification stay captured; then the rows come to the host, where tokens are drawn as on a CPU, and what was
drawn goes back. So the GPU waits for the host in every step, and copies `M` rows of the vocabulary to it. Drafts do not
know the processors: fewer are accepted than on a CPU, where they do. Plain decoding takes the same way, so that the
text is the same with and without speculation.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from mtp_spec.acceptance.accept import accept_coupled
from mtp_spec.cuda.step import Step
from mtp_spec.cuda.text import DeviceText, Record
from mtp_spec.tree import ROOT, TokenTree
from mtp_spec.tree_shape import TreeShape


def draw_first(text: DeviceText, logits: Tensor) -> int:
    """Returns a sequence's first token, drawn from the prompt's last row `[1, V]`."""
    assert text.history is not None
    row = text.sampler.process(logits[0], text.history, len(text.tokens))
    token = text.sampler.draw(row, len(text.tokens))
    text.history = text.history.child(token)
    return token


def draw_step(text: DeviceText, step: Step) -> None:
    """Draws on the host from the rows of a step that has run, and tells the step what was drawn."""
    assert text.history is not None
    shape = step.shape
    tree, rows = drafted(shape, step.ids.tolist())
    logits = step.logits[[0, *rows]].cpu()
    with text.sequence.stats.phase("sample"):
        accepted = accept_coupled(tree, logits, text.sampler, text.history, len(text.tokens), text.sequence.is_last)
    text.history = accepted.history
    path = [0, *(rows[node] for node in accepted.nodes)]
    if not accepted.stopped:
        drawn = [-1] * (len(shape.parents) + 1)
        for row, one in zip(path, accepted.drawn, strict=True):
            drawn[row] = one.token
        step.take(torch.tensor(drawn, dtype=torch.int32).to(step.model.device))
    record = Record([one.token for one in accepted.drawn], path, ranks=shape.ranks, depth=shape.depth)
    text.commit(record, accepted.drawn, accepted.stopped)


def drafted(shape: TreeShape, ids: Seq[int]) -> tuple[TokenTree, list[int]]:
    """Returns the tree that a pass of `ids` (root first) verified, and the row of each of its nodes.

    A row that repeats a sibling, as where a distribution had too few tokens, is no node.
    """
    tree, rows, nodes = TokenTree(), list[int](), {ROOT: ROOT}
    for place, parent in enumerate(shape.parents):
        if parent in nodes and tree.child(nodes[parent], ids[place + 1]) is None:
            nodes[place] = tree.add(nodes[parent], ids[place + 1], shape.ranks[place])
            rows.append(place + 1)
    return tree, rows
