"""One step on a GPU as one CUDA graph: extend, draft every depth, verify, accept, commit.

Everything a step needs lies on the device and everything it changes stays there, so that step follows step without
the host, which reads the record of committed tokens one step behind. Plain decoding is the step without a tree.

A tree's shape is fixed when its step is captured: node by node, parents before children. With a budget the nodes with
the smallest sum of ranks are kept.

Legend: `M` rows of the verify pass (root and nodes), `A` = most tokens a step commits, `n` position of the root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mtp_spec.kernels import commit as commits
from mtp_spec.kernels import mla
from mtp_spec.kernels.sampler import COLUMNS, IN_PROMPT, Settings, Stages, sample, seed_bits, settings_row
from mtp_spec.model.device import DeviceModel
from mtp_spec.options import MAX_DEPTH, MAX_NODES, SamplingParams, Speculation
from mtp_spec.tree import path_to

ROWS = MAX_NODES + 1
MOST = MAX_DEPTH + 1
# a step may run ahead of the host's decision to stop, and the one after it
SLACK = 2 * MOST + ROWS


@dataclass(frozen=True, slots=True)
class Shape:
    """A tree's topology: for each node its parent (-1 the root), depth and rank among its siblings."""

    parents: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    @classmethod
    def of(cls, speculation: Speculation | None) -> Shape:
        """Returns the topology that `speculation` asks for."""
        nodes: list[tuple[int, int, int, int]] = []  # parent, depth, rank, sum of ranks on the path
        level: list[int] = [-1]
        for depth, width in enumerate(() if speculation is None else speculation.branching, start=1):
            worth = {node: 0 if node < 0 else nodes[node][3] for node in level}
            children = [(worth[node] + rank, node, rank) for node in level for rank in range(width)]
            if speculation is not None and speculation.budget is not None:
                children = sorted(sorted(children)[: speculation.room(depth, len(nodes))], key=lambda child: child[1:])
            level = list(range(len(nodes), len(nodes) + len(children)))
            nodes += [(node, depth, rank, total) for total, node, rank in children]
        columns = list(zip(*nodes, strict=True)) or [(), (), (), ()]
        return cls(columns[0], columns[1], columns[2])

    @property
    def depth(self) -> int:
        return max(self.depths, default=0)

    @property
    def is_chain(self) -> bool:
        return self.depth == len(self.parents)

    def path(self, node: int) -> list[int]:
        """Returns the nodes from depth 1 to the node itself."""
        return path_to(node, self.parents)

    def level(self, depth: int) -> list[int]:
        """Returns the nodes of one depth."""
        return [node for node, own in enumerate(self.depths) if own == depth]

    def with_children(self, depth: int) -> list[int]:
        """Returns the nodes of one depth that have children; the root is -1."""
        return sorted({self.parents[node] for node in self.level(depth + 1)})


class State:
    """What one sequence keeps on the device.

    Args:
        tokens: most tokens of prompt and text.
    """

    def __init__(self, model: DeviceModel, tokens: int) -> None:
        config, device = model.config, model.device
        caches = model.new_caches(tokens + SLACK, ROWS)
        self.caches, self.mtp_cache = caches[: config.num_hidden_layers], caches[config.num_hidden_layers :]
        self.store = caches[0].store
        model.table(caches[0].capacity + MOST)
        self.length = torch.zeros(1, dtype=torch.int32, device=device)
        self.hidden = torch.zeros(ROWS, config.hidden_size, dtype=torch.bfloat16, device=device)
        self.path = torch.zeros(MOST, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(MOST, dtype=torch.int64, device=device)
        self.record = torch.zeros(commits.record_size(MOST), dtype=torch.int32, device=device)
        vocabulary = config.vocab_size
        self.settings = Settings(
            values=torch.zeros(1, COLUMNS, dtype=torch.float64, device=device),
            seed=torch.zeros(1, dtype=torch.int64, device=device),
            bias=torch.zeros(1, vocabulary, device=device),
            seen=torch.zeros(1, vocabulary, dtype=torch.int32, device=device),
        )
        self.busy = False

    def reset(self, params: SamplingParams, prompt: list[int]) -> None:
        """Prepares for a new text."""
        # numbers left behind could be NaN, which masks do not remove
        self.store.zero_()
        self.length.zero_()
        device, settings = self.length.device, self.settings
        row = settings_row(params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty,
                           params.presence_penalty, params.frequency_penalty)  # fmt: skip
        settings.values.copy_(torch.tensor([row], dtype=torch.float64))
        settings.seed.fill_(seed_bits(params.seed))
        assert settings.bias is not None
        assert settings.seen is not None
        settings.bias.zero_()
        if params.logit_bias:
            ids, amounts = zip(*params.logit_bias.items(), strict=True)
            settings.bias[0, torch.tensor(ids, device=device)] = torch.tensor(amounts, device=device)
        settings.seen.zero_()
        settings.seen[0, torch.tensor(sorted(set(prompt)), device=device)] = IN_PROMPT

    def start(self, token: int, hidden: Tensor, length: int, seen: bool) -> None:
        """Takes the first token, drawn from the prompt's last hidden state `[1, D]`."""
        self.length.fill_(length)
        self.hidden[:1] = hidden
        self.path.zero_()
        self.tokens.fill_(token)
        self.record.zero_()
        self.record[commits.COUNT] = 1
        if seen and self.settings.seen is not None:
            self.settings.seen[0, token] += 1


def stages_of(params: SamplingParams) -> Stages:
    """Returns the stages of sampling that a request needs; others would cost a captured step time."""
    noise = params.temperature > 0
    penalised = (params.repetition_penalty != 1.0, params.presence_penalty != 0.0, params.frequency_penalty != 0.0)
    return Stages(
        bias=bool(params.logit_bias), penalty=any(penalised), noise=noise, top_k=noise and params.top_k > 0,
        top_p=noise and params.top_p < 1.0, min_p=noise and params.min_p > 0,
    )  # fmt: skip


@dataclass(slots=True)
class Step:
    """The step of one tree on one state; call it, after `capture` it replays a graph.

    Args:
        extend: tokens that the step before may have committed, which the MTP module has not seen; 0 without drafting.
    Attributes:
        logits: `[M, V]` float32 of the last call, root first.
    """

    model: DeviceModel
    state: State
    shape: Shape
    stages: Stages
    extend: int
    logits: Tensor = field(init=False)
    _graph: Callable[[], None] | None = field(init=False, default=None)
    _constants: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __call__(self) -> None:
        if self._graph is None:
            self._run()
        else:
            self._graph()

    def capture(self) -> None:
        """Makes later calls replay a graph; the state must not hold a text."""
        self.state.record.zero_()
        self.state.record[commits.COUNT] = 1
        self.state.length.fill_(1)
        self._graph = captured(self._run)

    def _run(self) -> None:
        state, shape = self.state, self.shape
        root = state.tokens[-1:]  # the last committed token: tokens are padded with it
        hidden = self._extend() if self.extend else None
        ids = root if hidden is None or not shape.parents else torch.cat((root, self._draft(hidden)))
        rows = [[0, *(node + 1 for node in shape.path(row - 1))] for row in range(len(shape.parents) + 1)]
        depths, table = self._integers([0, *shape.depths]), self._table(rows)
        order = self._integers(range(len(rows)))
        plan = mla.Plan(state.length, depths, order, None if shape.is_chain else table, shape.depth)
        outputs = self.model.rows(ids, state.caches, plan)
        self.logits = self.model.logits(outputs)
        position = (state.length + depths + 1).long()
        seen = state.settings.seen if self.stages.penalty else None
        path = None if seen is None or not shape.parents else _drafted(ids, table[:, 1:])
        drawn = sample(self.logits, self._requests(len(rows)), position, state.settings, self.stages, 1, path)
        state.hidden[: len(rows)] = outputs
        parents = self._integers([-1, *(parent + 1 for parent in shape.parents)])
        commits.accept(drawn.tokens[:, 0].contiguous(), drawn.failed, ids, parents, state.path, state.tokens,
                       state.record, None if seen is None else seen[0])  # fmt: skip
        if not shape.is_chain:
            commits.commit(state.caches, state.length, state.path, state.record)
        state.length += state.record[commits.COUNT : commits.COUNT + 1]

    def _extend(self) -> Tensor:
        """Shows the MTP module the tokens of the last step with their true hidden states; returns the root's output."""
        state, rows = self.state, self.extend
        count = state.record[commits.COUNT : commits.COUNT + 1]
        order = self._integers(range(rows))
        # rows past the count repeat the last token, so they reach few further experts; their slots are overwritten
        plan = mla.Plan(state.length - count, order, order, None, rows - 1, offset=1)
        hidden = state.hidden[state.path[:rows]]
        out = self.model.mtp_rows(state.tokens[:rows], hidden, state.mtp_cache[0], plan)
        return out.index_select(0, count.long() - 1)

    def _draft(self, hidden: Tensor) -> Tensor:
        """Returns the drafted tokens of all nodes `[N]` int64; hidden `[1, D]` is the root's output."""
        state, shape = self.state, self.shape
        tokens = torch.zeros(len(shape.parents), dtype=torch.int64, device=self.model.device)
        feeding = [-1]
        for depth in range(1, shape.depth + 1):
            path = None
            if depth > 1:
                above, feeding = feeding, shape.with_children(depth - 1)
                hidden = hidden.index_select(0, self._places([above.index(shape.parents[n]) for n in feeding]))
                hidden = self._advance(feeding, depth - 1, tokens, hidden)
                path = _drafted(tokens, self._table([shape.path(n) for n in feeding])) if self.stages.penalty else None
            children = shape.level(depth)
            width = max(shape.ranks[node] for node in children) + 1
            position = (state.length + depth).long().expand(len(feeding)).contiguous()
            drawn = sample(self.model.draft_logits(hidden), self._requests(len(feeding)), position, state.settings,
                           self.stages, width, path)  # fmt: skip
            places = [feeding.index(shape.parents[node]) * width + shape.ranks[node] for node in children]
            tokens[children[0] : children[-1] + 1] = drawn.tokens.flatten().index_select(0, self._places(places))
        return tokens

    def _advance(self, feeding: list[int], depth: int, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Runs the module on nodes of one depth; its outputs `[M, D]` predict their children."""
        state, shape = self.state, self.shape
        depths = self._integers([depth - 1] * len(feeding))
        table = None if shape.is_chain else self._table([shape.path(node) for node in feeding])
        plan = mla.Plan(state.length, depths, self._integers(feeding), table, depth - 1, offset=1)
        ids = tokens.index_select(0, self._places(feeding))
        return self.model.mtp_rows(ids, hidden, state.mtp_cache[0], plan)

    # constants live as long as the step: a graph reads them again, and nothing may be copied while it is captured

    def _constant(self, values: object, dtype: torch.dtype) -> Tensor:
        name = f"{values} {dtype}"
        if name not in self._constants:
            self._constants[name] = torch.tensor(values, dtype=dtype).to(self.model.device)
        return self._constants[name]

    def _integers(self, values: Iterable[int]) -> Tensor:
        return self._constant(list(values), torch.int32)

    def _places(self, values: list[int]) -> Tensor:
        return self._constant(values, torch.int64)

    def _requests(self, rows: int) -> Tensor:
        return self._constant([0] * rows, torch.int32)

    def _table(self, paths: list[list[int]]) -> Tensor:
        """Returns `[M, A]` int32, each row a path padded with -1."""
        most = max(len(path) for path in paths)
        return self._constant([path + [-1] * (most - len(path)) for path in paths], torch.int32)


@dataclass(slots=True)
class Prefill:
    """A pass of `rows` prompt tokens through the model and, with `draft`, its MTP module; captured like a step.

    A shorter chunk is padded with its last token, whose slots the next pass overwrites.

    Args:
        capture: replay a graph from the second call on. The first call itself compiles and captures, so that nothing
            but the chunk's own slots is ever written.
    """

    model: DeviceModel
    state: State
    rows: int
    draft: bool
    capture: bool = False
    hidden: Tensor = field(init=False)  # [rows, D]
    _ids: Tensor = field(init=False)  # one more than rows: the MTP module reads the token that follows
    _order: Tensor = field(init=False)
    _graph: Callable[[], None] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._ids = torch.zeros(self.rows + 1, dtype=torch.int64, device=self.model.device)
        self._order = torch.arange(self.rows, dtype=torch.int32, device=self.model.device)

    def __call__(self, ids: Tensor, first: int) -> Tensor:
        """Returns the hidden states `[chunk, D]` of the prompt `ids` from token `first` on; they join the caches."""
        chunk = ids[first : first + self.rows + 1]
        self._ids.copy_(torch.cat((chunk, chunk[-1:].expand(self.rows + 1 - len(chunk)))))
        self.state.length.fill_(first)
        if self._graph is not None:
            self._graph()
        elif self.capture:
            self._graph = captured(self._run)
            self._graph()
        else:
            self._run()
        return self.hidden[: min(self.rows, len(ids) - first)]

    def _run(self) -> None:
        state, last = self.state, self.rows - 1
        plan = mla.Plan(state.length, self._order, self._order, None, last)
        self.hidden = self.model.rows(self._ids[:-1], state.caches, plan)
        if self.draft:
            self.model.mtp_rows(self._ids[1:], self.hidden, state.mtp_cache[0], replace(plan, offset=1))


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """Runs work once, which compiles what is missing, then returns its replay from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _drafted(ids: Tensor, table: Tensor) -> Tensor:
    """Returns the tokens that a table of paths `[M, A]` names, int32, -1 where it has -1."""
    return torch.where(table >= 0, ids[table.long().clamp_min(0)], -1).int().contiguous()
