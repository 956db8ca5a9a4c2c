"""What one sequence keeps on the device from step to step."""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_spec.kernels import commit as commits
from mtp_spec.kernels.sampler import COLUMNS, IN_PROMPT, Settings, Stages, seed_bits, settings_row
from mtp_spec.model.device import DeviceModel
from mtp_spec.options import MAX_DEPTH, MAX_NODES, SamplingParams

ROWS = MAX_NODES + 1
MOST = MAX_DEPTH + 1
# prompt tokens that pass through the model at once; the last chunk takes the smallest that holds it
PREFILL_ROWS = (16, 64, 256)
# rows of plain steps that MTP modules may be behind, in steps of several shapes
WAITING = 128
# a step may run ahead of the host's decision to stop, and the one after it; what modules read late is padded
SLACK = 2 * MOST + max(ROWS, WAITING)


class State:
    """Caches, the tokens of the last step, sampling parameters.

    Args:
        tokens: most tokens of prompt and text.
    Attributes:
        length: `[1]` int32, committed slots of the main model; a module's cache has one fewer for each module before.
        hidden: `[ROWS, D]` of the last pass.  path, tokens: of the last step, see `kernels.commit.accept`.
        drawn: `[1]` int64, random numbers that a rule has used, see `device_rules`.
        fed: `[1]` int32, slots of the main model that the modules have seen, where steps of several shapes take turns.
        ring, ring_tokens: `[WAITING, D]` and `[WAITING]` int64, rows of plain steps, see `kernels.commit.keep`.
        carried: `[modules - 1, D]`, each module's output at its last slot, which the next module has not seen.
    """

    def __init__(self, model: DeviceModel, tokens: int) -> None:
        config, device = model.config, model.device
        caches = model.new_caches(tokens + SLACK, ROWS)
        self.caches, self.mtp_caches = caches[: config.num_hidden_layers], caches[config.num_hidden_layers :]
        self.store = caches[0].store
        model.table(caches[0].capacity + MOST)
        self.length = torch.zeros(1, dtype=torch.int32, device=device)
        self.hidden = torch.zeros(ROWS, config.hidden_size, dtype=torch.bfloat16, device=device)
        self.fed = torch.zeros_like(self.length)
        self.ring = self.hidden.new_zeros(WAITING, config.hidden_size)
        self.ring_tokens = torch.zeros(WAITING, dtype=torch.int64, device=device)
        self.carried = self.hidden.new_zeros(max(0, len(self.mtp_caches) - 1), config.hidden_size)
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
        self.drawn = torch.zeros(1, dtype=torch.int64, device=device)
        self.busy = False

    def reset(self, params: SamplingParams, prompt: list[int]) -> None:
        """Prepares for a new text."""
        # numbers left behind could be NaN, which masks do not remove
        self.store.zero_()
        self.carried.zero_()
        self.length.zero_()
        self.fed.zero_()
        self.ring.zero_()
        self.ring_tokens.zero_()
        self.drawn.zero_()
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

    def blank(self) -> None:
        """Makes it that of a text of one token, for work that is captured or timed."""
        self.record.zero_()
        self.record[commits.COUNT] = 1
        self.length.fill_(1)
        self.fed.zero_()

    def start(self, token: int, hidden: Tensor, length: int, seen: bool) -> None:
        """Takes the first token, drawn from the prompt's last hidden state `[1, D]`."""
        self.length.fill_(length)
        self.fed.fill_(length - 1)  # the prompt's last token waits for the one after it
        self.hidden[:1] = hidden
        self.path.zero_()
        self.tokens.fill_(token)
        self.record.zero_()
        self.record[commits.COUNT] = 1
        if seen and self.settings.seen is not None:
            self.settings.seen[0, token] += 1


def prefill_rows(left: int) -> int:
    """Returns the rows of the pass for a prompt's next tokens, of which so many are left."""
    return next((size for size in PREFILL_ROWS if left <= size), PREFILL_ROWS[-1])


def stages_of(params: SamplingParams) -> Stages:
    """Returns the stages of sampling that a request needs; others would cost a captured step time."""
    noise = params.temperature > 0
    penalised = (params.repetition_penalty != 1.0, params.presence_penalty != 0.0, params.frequency_penalty != 0.0)
    return Stages(
        bias=bool(params.logit_bias), penalty=any(penalised), noise=noise, top_k=noise and params.top_k > 0,
        top_p=noise and params.top_p < 1.0, min_p=noise and params.min_p > 0,
    )  # fmt: skip
