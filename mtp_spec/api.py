"""The library: what a loaded model does: `generate`, `chat`, `stream`, `submit`, `score`, `explain`."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any, overload

import torch
from typing_extensions import Unpack

from mtp_spec.analysis.agreement import Watch
from mtp_spec.analysis.explain import Explanation, explain
from mtp_spec.analysis.scoring import Scores, score_ids
from mtp_spec.cache.pages import HostLease, HostPages
from mtp_spec.cpu.batch import Batch
from mtp_spec.cpu.engine import PREFILL_CHUNK, Decoder
from mtp_spec.cpu.passes import Runner
from mtp_spec.cuda.batch import DeviceBatch
from mtp_spec.cuda.engine import DeviceDecoder, DeviceRuntime, SharedDecoder, late_of
from mtp_spec.cuda.group import Groups, shares
from mtp_spec.cuda.guided import GuidedDecoder
from mtp_spec.cuda.pages import DeviceLease
from mtp_spec.cuda.planned import PLANNED_DEPTH, PlannedDecoder
from mtp_spec.distributed.consistency import check_first, request_facts
from mtp_spec.errors import MTPSpecError, OptionError
from mtp_spec.handle import Handle
from mtp_spec.keywords import ChatIdsOptions, ChatOptions, GenerateOptions, StreamOptions
from mtp_spec.memory import PagePlan
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.host import HostModel, Technique
from mtp_spec.planning.node_planner import TextPlanner
from mtp_spec.planning.store import Planners
from mtp_spec.prompt import Asking, Message, taken
from mtp_spec.request import Request, checked_ids, is_batch, new_request
from mtp_spec.results import Generation, TokenStream
from mtp_spec.sampling.defaults import Defaults
from mtp_spec.sampling.grammar import GrammarProcessor, Grammars
from mtp_spec.sampling.params import SamplingParams, expanded_options
from mtp_spec.sampling.seeds import fresh_seed, text_seeds
from mtp_spec.scheduler import Place, Worker
from mtp_spec.speculation import MAX_DEPTH, Speculation, resolve_speculation
from mtp_spec.text import Tokenizer

Ids = Sequence[int]
# the most that "auto" drafts
AUTO = Speculation(branching=(2,) * MAX_DEPTH, budget=16, adaptive=True)
AUTO_DEVICE = Speculation(depth=PLANNED_DEPTH, adaptive=True)


class LM:
    """A loaded model with its tokenizer; made by `mtp_spec.load`."""

    def __init__(
        self,
        model: HostModel | DeviceModel,
        tokenizer: Tokenizer | None,
        technique: Technique,
        max_context: int,
        measure: bool = True,
        progress: bool = False,
        max_batch: int = 1,
        cache_tokens: int | None = None,
        defaults: Defaults | None = None,
        ends: frozenset[int] = frozenset(),
    ) -> None:
        self.model, self.tokenizer, self._ends = model, tokenizer, ends
        self.defaults = Defaults() if defaults is None else defaults
        self.max_context, self.max_batch, self.cache_tokens = max_context, max_batch, cache_tokens
        self._asking = Asking(tokenizer, model.config, max_context)
        self._batch: Worker | None = None
        self._starting = Lock()
        self._technique = technique
        self._watch = Watch(technique == "batched")
        self._grammars: Grammars | None = None
        self._planners: Planners | None = None
        if isinstance(model, HostModel):
            self._planners = Planners(model, tokenizer, max_context, measure, progress)
        self.runtime = DeviceRuntime(model, max_context) if isinstance(model, DeviceModel) else None
        self._groups = None if self.runtime is None else Groups(self.runtime, max_batch, cache_tokens)

    @property
    def technique(self) -> Technique:
        """How rows are computed here: "batched", or "single", one by one, where torch computes them."""
        return self._technique

    @property
    def drafts_pay(self) -> bool:
        """Whether "auto" may draft: where rows must run one by one, verifying costs as much as it saves."""
        return self.technique == "batched"

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def encode(self, text: str) -> list[int]:
        """Returns token ids of plain text, with the beginning-of-sequence token if the model uses one."""
        return self._asking.text().encode(text)

    def decode(self, ids: Ids) -> str:
        """Returns the text of token ids, special tokens left out."""
        return self._asking.text().decode(list(ids))

    def chat_ids(self, messages: Sequence[Message], **options: Unpack[ChatIdsOptions]) -> list[int]:
        """Returns token ids of a conversation through the checkpoint's chat template, ready for the answer.

        Args:
            **options: `template`, `tools`, `continue_final_message` and `add_generation_prompt`, as
                `mtp_spec.text.Tokenizer.chat_ids` takes them; it also says what a message cannot do.
        """
        return self._asking.chat_ids(messages, options)

    # a str is also a sequence of them: the first of two that fit counts
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str | Ids, *, n: int, **options: Unpack[GenerateOptions]
    ) -> list[Generation]: ...
    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Ids], *, n: int, **options: Unpack[GenerateOptions]
    ) -> list[list[Generation]]: ...
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str | Ids, **options: Unpack[GenerateOptions]
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Ids], **options: Unpack[GenerateOptions]
    ) -> list[Generation]: ...
    def generate(self, prompt: Any, *, n: int | None = None, **options: Unpack[GenerateOptions]) -> Any:
        """Returns the continuation of a prompt, or a list of them in order for a list of prompts.

        Args:
            prompt: text, token ids, or a list of either.
            n: return a list of n continuations in place of each one.
            **options: `SamplingParams` (max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty,
                presence_penalty, frequency_penalty, logit_bias, seed, stop, stop_token_ids, ignore_eos, min_new_tokens,
                logprobs, logits_processor, response_format), one by one or all as `sampling=SamplingParams(...)`, and
                `speculation`: "auto", None (off), a chain depth, or a `Speculation`. Every text has a seed of its own,
                `Generation.seed`, which gives it again alone: an int is that of the first, and the others' derive from
                it (`mtp_spec.sampling.seeds`); a list has one for each; None draws a fresh one. `defaults`: "library"
                or "checkpoint", as for `load`, for parameters that are not given; `sampling` gives all.

        Raises:
            OptionError: an unknown option or a value outside its range.
            PromptError: an empty prompt, an id outside the vocabulary, or a prompt longer than the context.
        """
        prompts, given = self._asking.prompts(prompt), expanded_options(options)
        # ranks write a single text beside others where they write several: they compute in one thread at a time
        shared = self.model.ranks.size > 1 and self.max_batch > 1
        if not is_batch(prompt) and n is None and not shared:
            self._agree(prompts, given)
            return self.begin(self._request(prompts[0], given)).rest()
        results = self._samples(prompts, n, given)
        return results if is_batch(prompt) else results[0]

    @overload
    def chat(self, messages: Sequence[Message], *, n: int, **options: Unpack[ChatOptions]) -> list[Generation]: ...
    @overload
    def chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Generation: ...
    def chat(self, messages: Sequence[Message], *, n: int | None = None, **options: Unpack[ChatOptions]) -> Any:
        """Returns the assistant's answer to `[{"role": ..., "content": ...}, ...]`.

        Args:
            messages: with every field that the chat template knows; it decides about roles.
            n: as for `generate`.
            **options: as `generate`, and those of the template: `template`, its arguments, such as
                `{"enable_thinking": False}`; `tools`, JSON schemas; `continue_final_message`, so that the answer
                goes on with the last message, as `"prefix": True` in it asks too.
        """
        given = {**expanded_options(options), **({} if n is None else {"n": n})}
        ids = self._asking.chat_ids(messages, taken(given))
        return self.generate(ids, **given)

    def submit(self, prompt: str | Ids | Sequence[Message], **options: Unpack[StreamOptions]) -> Handle:
        """Puts a text in the queue of those that are written side by side; options as `chat`, without `n`.

        Up to `load(max_batch=)` texts run at a time, the others wait for their turn. Each text is what it is alone. A
        logits processor is called in the worker's thread.

        Returns:
            A `Handle`: iterate over it with `async for`, await it, or ask for its `result()`.

        Raises:
            OptionError, PromptError: as `generate`, at once.
        """
        given = expanded_options(options)
        ids = self._asking.ids(prompt, given)
        self._agree([ids], given, beside=True)
        request = self._request(ids, given)
        self.model.ranks.submitted += 1
        return self._submit([request])[0]

    def close(self) -> None:
        """Cancels the texts that were submitted and ends their worker; the model itself can go on."""
        with self._starting:
            if self._batch is not None:
                self._end_batch()
                atexit.unregister(self._end_batch)
                self._batch = None

    def __enter__(self) -> LM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _samples(self, prompts: list[list[int]], n: int | None, options: Mapping[str, Any]) -> list[Any]:
        """Returns for each prompt its text, or n of them, all written side by side."""
        self._agree(prompts, {**options, **({} if n is None else {"n": n})}, beside=True)
        seeds = text_seeds(options.get("seed"), len(prompts), n, self._fresh_seed)
        texts = self._texts([self._request(ids, {**options, "seed": seed})
                             for ids, own in zip(prompts, seeds, strict=True) for seed in own])  # fmt: skip
        return texts if n is None else [texts[first : first + n] for first in range(0, len(texts), n)]

    def _texts(self, requests: list[Request]) -> list[Generation]:
        handles, ranks = self._submit(requests), self.model.ranks
        try:
            texts = [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            ranks.submitted += 1
            raise
        if ranks.size > 1:  # the caller's thread may compute next
            all(user.rests() for user in ranks.users)
        return texts

    def _submit(self, requests: list[Request]) -> list[Handle]:
        with self._starting:
            if self._batch is None:
                ranks = self.model.ranks
                # the batch knows this object by its texts only, so that its worker ends with a model that nobody holds
                with ranks.together():
                    self._batch = self._new_batch()
                self._end_batch = weakref.finalize(self, self._batch.close)
                if ranks.size > 1:
                    ranks.users.add(self._batch)
                    atexit.register(self._end_batch)  # before the ranks leave one another, which was registered first
            return self._batch.submit(requests, self)

    def _new_batch(self) -> Worker:
        if self._groups is not None:
            return DeviceBatch(self.max_batch, self._groups)
        return Batch(self.max_batch, self._new_pages(), self.model.ranks)

    def stream(
        self, prompt: str | Ids | Sequence[Message], *, after: TokenStream | None = None,
        **options: Unpack[StreamOptions],
    ) -> TokenStream:
        """Returns an iterator of `TokenEvent`s for one prompt or list of messages; options as `chat`.

        The events are those of `generate`: same tokens, same text. `stream.result` is the `Generation`.

        Args:
            after: an earlier stream of this model, finished or left where it is. What both texts begin with is not
                read again, so the next turn of a chat costs its own tokens only; the bits are the same. On a GPU the
                caches themselves are handed on: once, if no other text has used them since, and a stream left where it
                is cannot go on. `stream.result.stats.reused_tokens` counts.
        """
        given = expanded_options(options)
        ids = self._asking.ids(prompt, given)
        self._agree([ids], given)
        request = self._request(ids, given)
        if after is not None and (not isinstance(after, TokenStream) or after.decoder.model is not self.model):
            raise OptionError(f"after={after!r}: give an earlier stream of this model, or None")
        stream, ranks = self.begin(request, after), self.model.ranks
        if ranks.size > 1:
            stream.allowed = partial(check_first, ranks, ranks.submitted)
        return stream

    def explain(
        self, prompt: str | Ids | Sequence[Message], steps: int = 3, **options: Unpack[StreamOptions]
    ) -> Explanation:
        """Returns what the first verify steps drafted, what both models thought of it and what was accepted.

        Args:
            prompt: as for `stream`.  steps: how many.  options: as `generate`; the text is cut after these steps.

        Raises:
            OptionError: also for a model on a GPU, whose steps keep their drafts to themselves.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise OptionError(f"steps={steps!r}: an integer of 1 or more")
        if self.runtime is not None:
            raise OptionError('explain runs on the CPU: load(..., device="cpu")')
        stream = self.stream(prompt, **options)
        decoder = stream.decoder
        assert isinstance(decoder, Decoder)
        return explain(decoder, steps, lambda ids: self.decode(ids) if self.tokenizer else str(ids))

    def score(self, token_ids: Ids) -> Scores:
        """Returns the model's and the MTP modules' logits for a text, teacher-forced; see `Scores`."""
        ids = checked_ids(token_ids, None, self.config, self.max_context)
        self._agree([ids], {})
        with nullcontext() if self.runtime is None else self.runtime.turns:
            return score_ids(self.model, ids)

    def _agree(self, prompts: Sequence[list[int]], options: Mapping[str, Any], beside: bool = False) -> None:
        """Compares what ranks are asked for.

        Args:
            beside: it is written beside the texts that this model's worker has.

        Raises:
            MTPSpecError: a worker's thread computes, and this one is to do so too.
        """
        ranks = self.model.ranks
        if ranks.size == 1:
            return
        busy = any(not user.rests() for user in ranks.users if not beside or user is not self._batch)
        if ranks.agree(request_facts(prompts, options), busy):
            raise MTPSpecError(
                "submitted texts are still being written, and ranks do one thing at a time: wait for their handles, or "
                "close the model, then call again"
            )

    def _request(self, ids: list[int], options: Mapping[str, Any]) -> Request:
        given = self.defaults.applied(options)
        if "n" in given:
            raise OptionError(f"n={given['n']!r}: generate and chat take it; ask for one text for each of the seeds")
        speculation = self.speculation_for(given.pop("speculation", "auto"))
        params = SamplingParams.from_options(given, also_allowed=("sampling", "speculation", "defaults"))
        if params.seed is None:
            params = replace(params, seed=self._fresh_seed())
        processors = () if params.response_format is None else (self._grammar(params.response_format),)
        if params.stop_strings:
            self._asking.text()
        return new_request(ids, params, speculation, self.config, self.max_context, processors, self.tokenizer,
                           self.stop_ids())  # fmt: skip

    def _fresh_seed(self) -> int:
        """Returns a seed that nobody gave, the same on all ranks."""
        return int(self.model.ranks.from_first(fresh_seed()))

    def begin(self, request: Request, after: TokenStream | None = None, lease: Place | None = None) -> TokenStream:
        """Returns the stream of a checked request: what `stream`, `generate` and a batch do."""
        # beside others "auto" drafts little or nothing, which is no sign of anything
        told = request.speculation is not None and (lease is None or self.max_batch == 1)
        watched = self._watch.ended if told else None
        return TokenStream(self._decoder(request, after, lease), request.finisher, watched)

    def _decoder(
        self, request: Request, after: TokenStream | None, lease: Place | None
    ) -> Decoder | DeviceDecoder | SharedDecoder:
        ids, sampler, speculation = request.ids, request.sampler, request.speculation
        is_last = request.finisher.push
        if self.runtime is not None:
            assert lease is None or isinstance(lease, DeviceLease)
            if lease is not None and shares(request):
                late = late_of(speculation)
                return SharedDecoder(self.runtime.model, ids, sampler, is_last, lease, late, request.limit)
            planned = speculation is not None and speculation.adaptive
            kind = GuidedDecoder if sampler.on_host else PlannedDecoder if planned else DeviceDecoder
            earlier = after.decoder if after is not None and isinstance(after.decoder, DeviceDecoder) else None
            return kind(self.runtime, ids, sampler, speculation, is_last, lease, earlier)
        assert isinstance(self.model, HostModel)
        assert lease is None or isinstance(lease, HostLease)
        prefix = after.decoder.prefix() if after is not None and isinstance(after.decoder, Decoder) else None
        reused = 0
        if prefix is not None and prefix.threads == torch.get_num_threads():
            unit = 1 if self.technique == "batched" else PREFILL_CHUNK
            reused = prefix.shared(ids, speculation is not None, unit)
        planner = None
        if speculation is not None and speculation.adaptive and self._planners is not None:
            planner = TextPlanner(self._planners.here(self.technique))
        return Decoder(
            Runner(self.model, self.technique), ids, sampler, speculation, request.limit, is_last, planner, prefix,
            reused, lease,
        )  # fmt: skip

    def joint_runner(self) -> Runner | None:
        """Returns how to run passes of several texts here; None on a GPU's kernels, whose steps are captured."""
        if not isinstance(self.model, HostModel):
            return None
        return Runner(self.model, self.technique, PREFILL_CHUNK)

    def _new_pages(self) -> HostPages | None:
        """Returns the planned memory of the caches of texts side by side; None on a GPU."""
        if not isinstance(self.model, HostModel) or self.model.device.type != "cpu":
            return None
        plan = PagePlan.of(self.config, self.model.dtype, self.max_context, self.max_batch, self.cache_tokens)
        return HostPages(self.model.new_layers(plan.pages), len(self.model.mtp))

    def speculation_for(self, value: object) -> Speculation | None:
        """Returns what `speculation=value` means for this model; None is off.

        Raises:
            OptionError: no possible value, or one that this model cannot follow.
        """
        speculation = resolve_speculation(value)
        modules = len(self.model.mtp)
        if speculation == "auto":
            automatic = AUTO if self.runtime is None else AUTO_DEVICE
            return automatic if modules and self.drafts_pay else None
        if speculation is not None and not modules:
            raise OptionError(
                f"speculation={value!r} needs a multi-token-prediction module and this checkpoint has none "
                "(num_nextn_predict_layers is 0 or its tensors are absent): use speculation=None"
            )
        return speculation

    def _grammar(self, response_format: Mapping[str, Any]) -> GrammarProcessor:
        if self._grammars is None:
            self._grammars = Grammars(self._asking.text(), self.config.vocab_size, self.stop_ids())
        return self._grammars.processor(response_format)

    def stop_ids(self) -> frozenset[int]:
        """Returns the tokens that end a text."""
        ids = self._ends | set(self.config.eos_token_ids)
        if self.tokenizer is not None:
            ids |= set(self.tokenizer.eos_ids)
        return frozenset(ids)

