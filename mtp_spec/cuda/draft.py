"""The MTP side of a captured step: extends the modules' caches with committed tokens, then drafts a tree by depth.

Does at fixed shapes what `mtp_spec.cpu.draft` does on a CPU. Slot i of module m (from 0) holds the latent of the token
at position i + m + 1 combined with the output of module m - 1 at slot i (of the main model for m = 0). Deeper levels
reuse the last module on its own output.

Legend: `B` sequences, `R` rows of each, `D` hidden size, `n` position of the root, `N` nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_spec.cuda.constants import Constants
from mtp_spec.cuda.state import State
from mtp_spec.kernels import mla
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.tree_shape import TreeShape


def feed_modules(
    model: DeviceModel, state: State, constants: Constants, ids: Tensor, hidden: Tensor, first: Tensor, count: Tensor
) -> Tensor:
    """Runs the modules over tokens with true hidden states; returns the first module's outputs `[B, R, D]`.

    Every module reads the same tokens: row j of module m takes the output of module m - 1 one slot before that module's
    row j, so its first input is carried over from the previous call. In a sequence's first call nothing is carried
    over: later modules skip its first rows, whose slots do not exist or belong to another sequence.

    Args:
        ids: `[B, R]` int64 tokens at positions first + 1 and on.
        hidden: `[B, R, D]` the main model's hidden states from position `first` on.
        first: `[B]` int32.
        count: `[B]` int64, number of valid rows; the others are padding, whose slots are overwritten later.
    """
    (sequences, rows), outputs = ids.shape, None
    order, sequence = constants.integers(range(rows)), constants.places(range(sequences))
    for module, cache in enumerate(state.mtp_caches):
        begin = torch.maximum(first - module, state.begun)
        plan = mla.Plan(begin, order, order, None, rows - 1, module + 1, state.pages)
        if module == 0:
            own = model.mtp_rows(0, ids.flatten(), hidden.flatten(0, 1), cache, plan)
            outputs = own = own.unflatten(0, (sequences, rows))
        else:
            # rows without a slot are moved to the end, as padding
            lacking = (begin - first + module)[:, None]
            there = sequence[:, None], (order + lacking).clamp_max(rows - 1)
            back = sequence[:, None], (order - lacking).clamp_min(0)
            own = model.mtp_rows(module, ids[there].flatten(), hidden[there].flatten(0, 1), cache, plan)
            own = own.unflatten(0, (sequences, rows))[back]
        if module + 1 < len(state.mtp_caches):
            shifted = torch.cat((state.carried[:, module : module + 1], own), 1)
            hidden = shifted[:, :-1]
            state.carried[:, module] = shifted[sequence, count]
    assert outputs is not None
    return outputs


def run_module(
    model: DeviceModel, state: State, shape: TreeShape, constants: Constants, nodes: list[int], ids: Tensor,
    hidden: Tensor,
) -> Tensor:  # fmt: skip
    """Runs a module on nodes of one depth; returns the outputs `[B R, D]`, which predict their children.

    Args:
        ids: `[B R]` int64, the nodes' tokens.
        hidden: `[B R, D]`, the outputs that predicted them.
    """
    depth = shape.depths[nodes[0]]
    module = min(depth + 1, len(state.mtp_caches)) - 1
    # nodes from depth `begins` on are drafted into this module's cache, after the slots that `feed_modules` wrote
    begins = max(1, module)
    base, level = shape.level(begins)[0], depth - begins
    table = None
    if not shape.is_chain:
        paths = [[node - base for node in shape.path(node)[begins - 1 :]] for node in nodes]
        table = constants.table(paths)
    plan = mla.Plan(
        (state.length - module).clamp_min(0), constants.integers([level] * len(nodes)),
        constants.integers(node - base for node in nodes), table, level, module + begins, state.pages,
    )  # fmt: skip
    return model.mtp_rows(module, ids, hidden, state.mtp_caches[module], plan)
