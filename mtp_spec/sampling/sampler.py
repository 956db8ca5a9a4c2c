"""From a row of logits to a token, one row at a time.

Plain decoding, verification and drafting all use this code, and a row's result depends only on the row, its history and
its absolute position. That makes speculative text equal to plain text (coupled sampling).
All arithmetic is float32 in NumPy on the CPU, which for one row of a vocabulary costs a fraction of the same
operations in torch; a row on a GPU is copied first.

Legend: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from ctypes import c_float
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mtp_spec.errors import MTPSpecError, NotFiniteError, OptionError
from mtp_spec.kernels.cpu import engine
from mtp_spec.sampling.noise import GumbelNoise
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.sampling.processors import LogitsProcessor, Masking, Trail
from mtp_spec.sampling.seeds import fresh_seed

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

_NEGATIVE_INFINITY = np.float32(-np.inf)
# a history keeps this many recent tokens as a tuple before it folds them into new count arrays
_MAX_RECENT = 32
# up to here repeated argmax is faster than a stable sort
_MAX_ARGMAX_PASSES = 32


class History:
    """The tokens of a path: those of the prompt, and how often each was generated. Immutable.

    ``child`` shares the counts of its parent, so a history can be kept for every node of a tree.

    Args:
        trail: the state of the path's logits processor; None if there is none.
    Attributes:
        length: tokens generated.
    """

    __slots__ = ("_counts", "_prompt", "_recent", "length", "trail")

    def __init__(self, prompt_ids: Sequence[int], vocab_size: int, trail: Trail | None = None) -> None:
        self.trail = trail
        self._prompt: npt.NDArray[np.bool_] = np.zeros(vocab_size, dtype=np.bool_)
        self._prompt[np.asarray(prompt_ids, dtype=np.int64)] = True
        self._counts: Int64Array = np.zeros(vocab_size, dtype=np.int64)
        self._recent: tuple[int, ...] = ()
        self.length = 0

    def child(self, token: int) -> History:
        """The history after one more generated token."""
        return self.extend((token,))

    def extend(self, tokens: Iterable[int]) -> History:
        """The history after several more generated tokens."""
        tokens = tuple(tokens)
        after = History.__new__(History)
        after._prompt, after._counts, after.trail = self._prompt, self._counts, self.trail
        for token in tokens:
            after.trail = None if after.trail is None else after.trail.after(token)
        after._recent = (*self._recent, *tokens)
        after.length = self.length + len(tokens)
        if len(after._recent) > _MAX_RECENT:
            after._counts, after._recent = after.counts(), ()
        return after

    def counts(self) -> Int64Array:
        """[V] int64: how often each token was generated. Not to be written to."""
        if not self._recent:
            return self._counts
        counts = self._counts.copy()
        for token in self._recent:
            counts[token] += 1
        return counts

    def generated(self) -> tuple[Int64Array, Int64Array]:
        """Generated token ids in ascending order, and how often each was generated."""
        counts = self.counts()
        ids = np.flatnonzero(counts)
        return ids, counts[ids]

    def seen(self) -> Int64Array:
        """Token ids of the prompt and of the generated text, in ascending order."""
        seen: Int64Array = np.flatnonzero(self._prompt | (self.counts() > 0))
        return seen


class Sampler:
    """Draws the tokens of one request.

    Args:
        params: sampling parameters; a seed is drawn if they have none.
        vocab_size: V, the width of the logits.
        noise: the noise of the request; by default made from the seed.
        processors: further processors, applied before those of ``params``.
        stop_ids: tokens that end the text; processors are not called for rows after them, and they are forbidden before
            `min_new_tokens`.

    Raises:
        OptionError: a parameter that does not fit the vocabulary, or noise of another width.
    """

    __slots__ = ("_bias_ids", "_bias_values", "_early", "_engine", "_log_min_p", "_stop_ids",
                 "_temperature", "noise", "params", "processors", "vocab_size")  # fmt: skip

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        noise: GumbelNoise | None = None,
        processors: Sequence[LogitsProcessor[Any]] = (),
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        params.validate(vocab_size)
        self.params = params = params if params.seed is not None else replace(params, seed=fresh_seed())
        self.vocab_size = vocab_size
        self.noise = GumbelNoise(params.known_seed, vocab_size) if noise is None else noise
        if self.noise.vocab_size != vocab_size:
            raise OptionError(f"noise has {self.noise.vocab_size} columns, the logits {vocab_size}: they must agree")
        bias = params.logit_bias or {}
        self._bias_ids: Int64Array = np.fromiter(bias.keys(), dtype=np.int64, count=len(bias))
        self._bias_values: Float32Array = np.fromiter(bias.values(), dtype=np.float32, count=len(bias))
        self._log_min_p = np.float32(math.log(params.min_p)) if params.min_p > 0 else None
        self.processors = (*processors, *params.processors)
        self._stop_ids = stop_ids
        self._early = np.array(sorted(stop_ids), dtype=np.int64)
        if params.min_new_tokens and len(stop_ids) == vocab_size:
            raise OptionError(f"min_new_tokens={params.min_new_tokens} leaves nothing: every token ends the text")
        # None if a row is changed by anything but temperature
        self._engine = engine.usable() if self._only_temperature() else None
        self._temperature = c_float(float(self._divisor()))

    @property
    def guides(self) -> bool:
        """Whether the host has to guide rows: by processors, or by forbidding the end of the text."""
        return bool(self.processors) or self.forbids_ends

    @property
    def masks(self) -> bool:
        """Whether the guidance only masks tokens: there is at most a grammar, no processor that changes rows."""
        return not self.processors or (len(self.processors) == 1 and isinstance(self.processors[0], Masking))

    @property
    def forbids_ends(self) -> bool:
        """Whether tokens that end the text are forbidden at first."""
        return self.params.min_new_tokens > 0 and len(self._early) > 0

    def history(self, prompt_ids: Sequence[int]) -> History:
        """The history at the end of the prompt."""
        return History(prompt_ids, self.vocab_size, Trail.begin(self.processors, prompt_ids, self._stop_ids))

    def process(self, logits_row: torch.Tensor, history: History, position: int | None = None) -> torch.Tensor:
        """Returns the row that a token is drawn from: unnormalised log-probabilities, removed tokens at -inf.

        The stages, in order, unless switched off: logit bias, repetition penalty, presence and frequency penalty,
        logits processors (as in transformers), no end before `min_new_tokens`, temperature, top-k, top-p, min-p. At
        temperature 0 those from temperature on do not apply; above it the best token is shifted to 0, which keeps
        precision when noise is added and changes no probability.

        Args:
            logits_row: [V], any float dtype; left untouched.
            history: the path that leads to this row.
            position: of the token that will be drawn, for a row of the main model. A draft row may hold anything; check
                it with `leaves_nothing`.

        Returns:
            [V] float32 on the CPU.

        Raises:
            NotFiniteError: the main model's row holds NaN or +inf.
        """
        row = self._float_row(logits_row).copy()
        highest = float(row.max())
        if not math.isfinite(highest):  # checked before bias, penalties and processors, which may hide it
            if position is not None and highest != -math.inf:
                raise NotFiniteError(str(self._no_token(highest, position)))
            return torch.from_numpy(row)
        row = self._changed(row, history)
        # a row without a finite best token is returned as it is; draw reports it
        if self.params.greedy or not math.isfinite(best := row.max()):
            return torch.from_numpy(row)
        self._scale(row, best)
        if 0 < self.params.top_k < self.vocab_size:
            _keep_top_k(row, self.params.top_k)
        if self.params.top_p < 1.0:
            _keep_top_p(row, self.params.top_p)
        if self._log_min_p is not None:
            # the best token is at 0
            row[row < self._log_min_p] = _NEGATIVE_INFINITY
        return torch.from_numpy(row)

    def guided(self, logits_row: torch.Tensor, history: History) -> torch.Tensor:
        """Returns the row after all stages before temperature, for a device that runs the others; see `process`."""
        row = self._float_row(logits_row).copy()
        return torch.from_numpy(self._changed(row, history) if math.isfinite(float(row.max())) else row)

    def mask(self, history: History) -> npt.NDArray[np.uint8]:
        """Returns the tokens that grammar and `min_new_tokens` allow, if `masks`: `[ceil(V / 8)]`, lowest bit first."""
        trail = history.trail
        given = np.full(-(-self.vocab_size // 8), 255, np.uint8) if trail is None else trail.mask()
        if history.length < self.params.min_new_tokens:
            given = given.copy()
            np.bitwise_and.at(given, self._early // 8, ~(1 << self._early % 8).astype(np.uint8))
        return given

    def _changed(self, row: Float32Array, history: History) -> Float32Array:
        """Returns the row after bias, penalties, processors and `min_new_tokens`; may write to the given one."""
        if len(self._bias_ids):
            row[self._bias_ids] += self._bias_values
        self._penalise(row, history)
        if history.trail is not None:
            row = history.trail.apply(row)
        if history.length < self.params.min_new_tokens:
            row[self._early] = _NEGATIVE_INFINITY
        return row

    def check(self, logits_row: torch.Tensor, position: int) -> None:
        """Rejects a row of a model that holds -inf, which only processors may put there; `process` checks the rest.

        Raises:
            NotFiniteError: it holds one.
        """
        if not math.isfinite(lowest := float(logits_row.min())):
            raise NotFiniteError(f"no token can be drawn at position {position}: the logits contain {lowest}")

    def leaves_nothing(self, processed: torch.Tensor) -> bool:
        """Whether no token can be drawn: all were removed, or one is NaN or +inf. A target row then is an error, a
        draft row ends the draft."""
        return not math.isfinite(float(processed.max()))

    def draw(self, processed: torch.Tensor, position: int) -> int:
        """The token at an absolute position: argmax of the row plus the position's noise; lowest id among equals.

        Raises:
            MTPSpecError: the row holds NaN or +inf, or no token is left in it.
        """
        scores = self._scores(processed, position)
        best = int(scores.argmax())
        # argmax stops at the first NaN, so checking the winner is enough
        if not math.isfinite(scores[best]):
            raise self._no_token(scores[best], position)
        return best

    def pick(self, logits_row: torch.Tensor, position: int) -> tuple[int, float] | None:
        """Returns what `process` and `draw` would, and what `lead` would, in one pass of the CPU engine over the row.

        None if there is more to do than that: the row is changed by more than temperature, holds a number that is not
        finite, or is not float32 on a CPU.
        """
        if self._engine is None or logits_row.dtype != torch.float32 or logits_row.device.type != "cpu":
            return None
        if logits_row.shape != (self.vocab_size,) or not logits_row.is_contiguous():
            return None
        noise, scores = None if self.params.greedy else self.noise.row_array(position).ctypes.data, (c_float * 2)()
        token = self._engine.draw(logits_row.data_ptr(), self.vocab_size, self._temperature, noise, scores)
        return None if token < 0 else (token, scores[0] - scores[1])

    def top(self, processed: torch.Tensor, position: int, k: int) -> list[int]:
        """The k best tokens of the row plus noise, best first: siblings of a draft tree.

        The first is what ``draw`` returns. There are fewer than k if fewer tokens are left in the row.

        Raises:
            MTPSpecError: the row holds NaN or +inf, or no token is left in it.
        """
        if k == 1:
            return [self.draw(processed, position)]
        scores = self._scores(processed, position)
        best = [token for token in _best(scores, k) if scores[token] != _NEGATIVE_INFINITY]
        if not best or not math.isfinite(scores[best[0]]):
            raise self._no_token(scores.max(), position)
        return best

    def lead(self, processed: torch.Tensor, position: int, best: int) -> float:
        """Returns the lead of the best token's score (row plus noise) over the next; inf if it is the only one."""
        scores = self._scores(processed, position).copy()
        score = scores[best]
        scores[best] = _NEGATIVE_INFINITY
        return float(score - scores.max())

    def distribution(self, processed: torch.Tensor, position: int) -> npt.NDArray[np.float64]:
        """Returns the distribution `[V]` for drawing without coupling; at temperature 0 all on the best token.

        Raises:
            MTPSpecError: the row holds NaN or +inf, or no token is left in it.
        """
        row: Float32Array = processed.numpy()
        best = int(row.argmax())
        if not math.isfinite(row[best]):
            raise self._no_token(row[best], position)
        if self.params.greedy:
            certain = np.zeros(len(row))
            certain[best] = 1.0
            return certain
        weights: npt.NDArray[np.float64] = np.exp(row.astype(np.float64) - float(row[best]))
        return weights / weights.sum()

    def logprobs(self, raw_row: torch.Tensor, token: int, k: int) -> tuple[float, list[tuple[int, float]]]:
        """Log-probability of the token, and of the k most probable tokens, best first.

        They are the model's own: the log-softmax, in float32, of the row as the model returned it, before bias,
        penalties, temperature and truncation.
        """
        row = self._float_row(raw_row)
        shifted = row - row.max()
        values = shifted - np.log(np.exp(shifted).sum(dtype=np.float32))
        return float(values[token]), [(best, float(values[best])) for best in _best(values, k)]

    def _no_token(self, score: float, position: int) -> MTPSpecError:
        if score != -math.inf:
            why = f"the logits contain {float(score)}; check the weights and dtype"
        elif self.forbids_ends:
            least = self.params.min_new_tokens
            why = (f"min_new_tokens={least} forbids the end of the text, and logit_bias, logits_processor or "
                   "response_format all else; lower min_new_tokens, or allow more tokens")  # fmt: skip
        else:
            why = "no token is left after logit_bias and logits_processor; check the weights, or allow more tokens"
        return MTPSpecError(f"no token can be drawn at position {position}: {why}")

    def _float_row(self, row: torch.Tensor) -> Float32Array:
        """[V] float32 array, sharing storage where it can."""
        if row.shape != (self.vocab_size,):
            raise MTPSpecError(f"logits of shape {tuple(row.shape)} given, one row of ({self.vocab_size},) expected")
        array: Float32Array = row.detach().to(device="cpu", dtype=torch.float32).numpy()
        return array

    def _penalise(self, row: Float32Array, history: History) -> None:
        params = self.params
        if params.repetition_penalty != 1.0:
            ids = history.seen()
            values = row[ids]
            penalty = np.float32(params.repetition_penalty)
            row[ids] = np.where(values > 0, values / penalty, values * penalty)
        if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            ids, counts = history.generated()
            penalties = params.presence_penalty + params.frequency_penalty * counts
            row[ids] -= penalties.astype(np.float32)

    def _scale(self, row: Float32Array, best: np.float32) -> None:
        """(row - best) / temperature; a temperature too small for float32 leaves only the best tokens."""
        row -= best
        temperature = self._divisor()
        if temperature != 1.0:
            with np.errstate(over="ignore"):
                row /= temperature

    def _divisor(self) -> np.float32:
        # max(...) keeps 0 / temperature at 0 for temperatures that float32 rounds to 0
        return max(np.float32(self.params.temperature), np.finfo(np.float32).tiny)

    def _only_temperature(self) -> bool:
        params = self.params
        neutral = params.repetition_penalty == 1.0 and not params.presence_penalty and not params.frequency_penalty
        whole = not 0 < params.top_k < self.vocab_size and params.top_p >= 1.0 and self._log_min_p is None
        return (
            neutral and (whole or params.greedy) and not (len(self._bias_ids) or self.processors or self.forbids_ends)
        )

    def _scores(self, processed: torch.Tensor, position: int) -> Float32Array:
        row: Float32Array = processed.numpy()
        return row if self.params.greedy else row + self.noise.row_array(position)


def _keep_top_k(row: Float32Array, k: int) -> None:
    """Remove all but the k largest in place; among equals at the edge the lowest ids stay."""
    edge = np.partition(row, len(row) - k)[len(row) - k]
    edge_ids = np.flatnonzero(row == edge)
    spare = k - int(np.count_nonzero(row > edge))
    row[row < edge] = _NEGATIVE_INFINITY
    row[edge_ids[spare:]] = _NEGATIVE_INFINITY


def _keep_top_p(row: Float32Array, top_p: float) -> None:
    """Remove all but the smallest set of largest entries whose probability reaches top_p, in place.

    The largest entry is 0. Tokens below (1 - top_p) / V cannot belong to it: all of them together weigh less than
    1 - top_p. Only the others, few in a language model's row, are sorted; half that edge leaves room for rounding.
    """
    weights = np.exp(row.astype(np.float64))  # in float32 libraries differ too often in the last bit
    total = float(weights.sum())
    candidates = np.flatnonzero(weights >= 0.5 * (1.0 - top_p) / len(row) * total)
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    mass = np.cumsum(weights[order])
    kept = order[: int(np.searchsorted(mass, top_p * total)) + 1]
    values = row[kept]
    row.fill(_NEGATIVE_INFINITY)
    row[kept] = values


def _best(values: Float32Array, k: int) -> list[int]:
    """Indices of the k largest, best first, lowest index first among equals."""
    if k > _MAX_ARGMAX_PASSES:
        return [int(index) for index in np.argsort(-values, kind="stable")[:k]]
    values = values.copy()
    best: list[int] = []
    for _ in range(min(k, len(values))):
        index = int(values.argmax())
        if values[index] == _NEGATIVE_INFINITY:
            break
        best.append(index)
        values[index] = _NEGATIVE_INFINITY
    return best
