"""A loaded model: `generate`, `chat`, `stream`, `submit`, `score`, `explain`."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from threading import Lock
from typing import Any, overload

from typing_extensions import Unpack

from mtp_spec.analysis.explain import Explainer, Explanation
from mtp_spec.analysis.scoring import Scores, score_ids
from mtp_spec.analysis.watch import Watch
from mtp_spec.distributed.consistency import check_first
from mtp_spec.drafting import Drafter, Text
from mtp_spec.errors import OptionError
from mtp_spec.handle import Handle
from mtp_spec.keywords import ChatIdsOptions, ChatOptions, GenerateOptions, StreamOptions
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.host import Technique
from mtp_spec.prompt import Asking, Message, taken
from mtp_spec.request import Request, checked_ids, is_batch, new_request
from mtp_spec.results import Generation
from mtp_spec.sampling.defaults import Defaults
from mtp_spec.sampling.grammar import GrammarProcessor, Grammars
from mtp_spec.sampling.params import SamplingParams, expanded_options
from mtp_spec.sampling.seeds import fresh_seed, text_seeds
from mtp_spec.sequence import Observer, Sequence
from mtp_spec.serving import Worker
from mtp_spec.speculation import Speculation, resolve_speculation
from mtp_spec.step import Backend
from mtp_spec.stream import SharedStream, TokenStream
from mtp_spec.text import Tokenizer

Ids = Seq[int]
TEXTS = 8  # sets of references that stay indexed


class LM:
    """A loaded model with its tokenizer, as returned by `mtp_spec.load`."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None,
        max_context: int,
        max_batch: int = 1,
        defaults: Defaults | None = None,
        ends: frozenset[int] = frozenset(),
    ) -> None:
        self.backend, self.model, self.tokenizer, self._ends = backend, backend.model, tokenizer, ends
        self.defaults = Defaults() if defaults is None else defaults
        self.max_context, self.max_batch = max_context, max_batch
        self._asking = Asking(tokenizer, self.config, max_context)
        self._worker: Worker | None = None
        self._starting = Lock()
        self._place = self.model.ranks.place()
        self._closed = 0
        self._watch = Watch(backend.technique == "batched")
        self._grammars: Grammars | None = None
        self._texts: dict[tuple[Any, ...], Text] = {}  # by references, the latest last
        self._indexing = Lock()

    @property
    def technique(self) -> Technique:
        """How rows are computed here: "batched", or "single", one by one, which torch may need."""
        return self.backend.technique

    @property
    def drafts_pay(self) -> bool:
        """Whether "auto" may draft: if rows must run one by one, verifying costs as much as it saves."""
        return self.technique == "batched"

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def encode(self, text: str) -> list[int]:
        """Returns token ids of plain text, with the beginning-of-sequence token if the model uses one."""
        return self._asking.text().encode(text)

    def decode(self, ids: Ids) -> str:
        """Returns the text of token ids, special tokens left out."""
        return self._asking.text().decode(ids)

    def chat_ids(self, messages: Seq[Message], **options: Unpack[ChatIdsOptions]) -> list[int]:
        """Returns token ids of a conversation through the checkpoint's chat template, ready for the answer.

        Args:
            **options: `template`, `tools`, `continue_final_message` and `add_generation_prompt`, as
                `mtp_spec.text.Tokenizer.chat_ids` takes them; see there for what messages may contain.
        """
        return self._asking.chat_ids(messages, options)

    # a str is also a sequence of them: the first of two that fit counts
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str | Ids, *, n: int, **options: Unpack[GenerateOptions]
    ) -> list[Generation]: ...
    @overload
    def generate(
        self, prompt: Seq[str] | Seq[Ids], *, n: int, **options: Unpack[GenerateOptions]
    ) -> list[list[Generation]]: ...
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str | Ids, **options: Unpack[GenerateOptions]
    ) -> Generation: ...
    @overload
    def generate(self, prompt: Seq[str] | Seq[Ids], **options: Unpack[GenerateOptions]) -> list[Generation]: ...
    def generate(self, prompt: Any, *, n: int | None = None, **options: Unpack[GenerateOptions]) -> Any:
        """Returns the continuation of a prompt, or a list of them in order for a list of prompts.

        Args:
            prompt: text, token ids, or a list of either.
            n: return a list of n continuations for each prompt.
            **options: `SamplingParams` (max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty,
                presence_penalty, frequency_penalty, logit_bias, seed, stop, stop_token_ids, ignore_eos, min_new_tokens,
                logprobs, logits_processor, response_format), one by one or all as `sampling=SamplingParams(...)`, and
                `speculation`: "auto", None (off), a chain depth, or a `Speculation`. Every text has its own seed,
                `Generation.seed`, which reproduces it alone: an int is the first text's, from which the others are
                derived (`mtp_spec.sampling.seeds`); a list has one for each; None draws a fresh one. `defaults`:
                "library" or "checkpoint", as for `load`, for parameters that are not given; `sampling` gives all.

        Raises:
            OptionError: an unknown option or a value outside its range.
            PromptError: an empty prompt, an id outside the vocabulary, or a prompt longer than the context.
        """
        prompts, given = self._asking.prompts(prompt), expanded_options(options)
        if not is_batch(prompt) and n is None and self.model.ranks.size == 1:
            return self._stream(self._sequence(self._request(prompts[0], given))).rest()
        results = self._samples(prompts, n, given)
        return results if is_batch(prompt) else results[0]

    @overload
    def chat(self, messages: Seq[Message], *, n: int, **options: Unpack[ChatOptions]) -> list[Generation]: ...
    @overload
    def chat(self, messages: Seq[Message], **options: Unpack[ChatOptions]) -> Generation: ...
    def chat(self, messages: Seq[Message], *, n: int | None = None, **options: Unpack[ChatOptions]) -> Any:
        """Returns the assistant's answer to `[{"role": ..., "content": ...}, ...]`.

        Args:
            messages: with any field that the chat template knows; the template decides which roles exist.
            n: as for `generate`.
            **options: as for `generate`, and those of the template: `template`, its arguments, such as
                `{"enable_thinking": False}`; `tools`, JSON schemas; `continue_final_message`, so that the answer
                continues the last message, which `"prefix": True` in that message does too.
        """
        given = {**expanded_options(options), **({} if n is None else {"n": n})}
        ids = self._asking.chat_ids(messages, taken(given))
        return self.generate(ids, **given)

    def submit(self, prompt: str | Ids | Seq[Message], **options: Unpack[StreamOptions]) -> Handle:
        """Submits a request to be generated in a batch with others; options as for `chat`, without `n`.

        Up to `load(max_batch=)` requests run at a time, the others wait. Each text is the same as if it were generated
        alone. A logits processor is called in the worker's thread.

        Returns:
            A `Handle`: iterate over it with `async for`, await it, or ask for its `result()`.

        Raises:
            OptionError, PromptError: as for `generate`, raised immediately.
        """
        given = expanded_options(options)
        ids = self._asking.ids(prompt, given)
        self._agree("text", [ids], given)
        return self._submit([self._sequence(self._request(ids, given), beside=True)])[0]

    def close(self) -> None:
        """Cancels all submitted requests and ends their worker; the model itself stays usable.

        If ranks share the model, a rank other than the first waits for requests that the first has not cancelled.
        """
        with self._starting:
            self._closed += 1
            end = None if self._worker is None else self._end_worker
            self._worker = None
        if end is not None:  # without the lock, for which a drafter or processor that submits a text would wait
            end()
            atexit.unregister(end)
        self.backend.trim()

    def __enter__(self) -> LM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _samples(self, prompts: list[list[int]], n: int | None, options: Mapping[str, Any]) -> list[Any]:
        """Returns for each prompt its generation, or n of them, all generated in a batch."""
        self._agree("text", prompts, {**options, **({} if n is None else {"n": n})})
        seeds = text_seeds(options.get("seed"), len(prompts), n, self._fresh_seed)
        requests = [self._request(ids, {**options, "seed": seed})
                    for ids, own in zip(prompts, seeds, strict=True) for seed in own]  # fmt: skip
        handles = self._submit([self._sequence(request, beside=True) for request in requests])
        try:
            texts = [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return texts if n is None else [texts[first : first + n] for first in range(0, len(texts), n)]

    def _submit(self, sequences: list[Sequence]) -> list[Handle]:
        with self._starting:
            return self._started().submit(sequences, self)

    def _started(self) -> Worker:
        """Returns the worker, started if necessary."""
        if self._worker is None:
            ranks = self.model.ranks
            # only handles refer to this object, so that the worker ends once nothing else refers to the model
            with ranks.together():
                # with several ranks and no batching, a request has memory of its own, as in a single process
                shared = ranks.size == 1 or self.max_batch > 1
                self._worker = Worker(self.backend.runner(shared), self.max_batch, ranks)
            self._end_worker = weakref.finalize(self, self._worker.close)
            if ranks.size > 1:
                ranks.users.add(self._worker)
                atexit.register(self._end_worker)  # runs before the ranks disconnect, which was registered earlier
        return self._worker

    def stream(
        self,
        prompt: str | Ids | Seq[Message],
        *,
        after: TokenStream | None = None,
        observer: Observer | None = None,
        **options: Unpack[StreamOptions],
    ) -> TokenStream:
        """Returns an iterator of `TokenEvent`s for one prompt or list of messages; options as for `chat`.

        Tokens and text are those of `generate`. `stream.result` is the `Generation`. If ranks share the model,
        generation starts immediately, in a batch, whether or not the stream is read.

        Args:
            after: an earlier stream of this model, which is closed if it is unfinished and there is memory for only one
                sequence, as for the next turn of a chat. Several ranks always close it. Prompts with a common prefix
                share its cache pages without this option.
            observer: gets every step's drafts and rows (`mtp_spec.sequence.Observer`); give it on all ranks or on none.
                On a GPU its steps are not captured, so they take longer.
        """
        given = expanded_options(options)
        ids = self._asking.ids(prompt, given)
        if after is not None and (not isinstance(after, TokenStream) or after.owner is not self):
            raise OptionError(f"after={after!r}: give an earlier stream of this model, or None")
        if observer is not None and (isinstance(observer, type) or not isinstance(observer, Observer)):
            raise OptionError(f"observer={observer!r}: give an object with drafted, pruned and verified, or None")
        self._agree("text", [ids], given if observer is None else {**given, "observer": "given"})
        return self._stream(self._sequence(self._request(ids, given), observer), after)

    def explain(
        self, prompt: str | Ids | Seq[Message], steps: int = 3, **options: Unpack[StreamOptions]
    ) -> Explanation:
        """Returns the drafts of the first verify steps, their probabilities under both models, and what was accepted.

        Args:
            prompt: as for `stream`.
            steps: number of verify steps.
            options: as for `generate`; generation stops after these steps.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise OptionError(f"steps={steps!r}: an integer of 1 or more")
        given = expanded_options(options)
        ids = self._asking.ids(prompt, given)
        self._agree("text", [ids], given)
        explainer = Explainer(lambda ids: self.decode(ids) if self.tokenizer else str(ids), steps)
        explainer.sequence = self._sequence(self._request(ids, given), explainer)
        return explainer.watch(self._stream(explainer.sequence))

    def score(self, token_ids: Ids) -> Scores:
        """Returns the model's and the MTP modules' logits for a text, teacher-forced; see `Scores`."""
        ids = checked_ids(token_ids, None, self.config, self.max_context)
        self._agree("score", [ids], {})

        def scores() -> Scores:
            with self.backend.exclusive():
                return score_ids(self.model, ids)

        if self.model.ranks.size == 1:
            return scores()
        with self._starting:
            worker = self._started()
        return worker.call(scores)

    def _agree(self, call: str, prompts: Seq[list[int]], options: Mapping[str, Any]) -> None:
        """Checks that all ranks make the same call; if several models share the ranks, waits for the other models."""
        ranks = self.model.ranks
        if ranks.size > 1:
            ranks.rest(beside=self._worker)
            check_first(ranks, f"{call}, model {self._place}, closed {self._closed} times", prompts, options)

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
        drafters = () if speculation is None else self._drafters(speculation)
        return new_request(ids, params, speculation, self.config, self.max_context, processors, self.tokenizer,
                           self.stop_ids(), drafters)  # fmt: skip

    def _drafters(self, speculation: Speculation) -> tuple[Drafter, ...]:
        """Returns the drafters beside the MTP modules; "text" learns from all texts with the same references."""
        replay, vocabulary = speculation.replay, self.config.vocab_size
        if replay is not None and (most := max(replay.tokens, default=0)) >= vocabulary:
            raise OptionError(f"Replay's tokens hold the id {most}: ids are integers from 0 to {vocabulary - 1}")
        found = list[Drafter]()
        for drafter in speculation.others:
            if not isinstance(drafter, str):
                found.append(drafter)
            elif drafter == Text.name:
                found.append(self._text(speculation.references))
        return tuple(found)

    def _text(self, references: tuple[str | tuple[int, ...], ...]) -> Text:
        """Returns the drafter "text" of these references, indexed once while they stay among the latest."""
        with self._indexing:
            text = self._texts.get(references)
        if text is None:  # other threads do not wait for a long document
            text = Text(self._asking.references(references))
        with self._indexing:
            text = self._texts.pop(references, text)
            self._texts[references] = text
            if len(self._texts) > TEXTS:
                del self._texts[next(iter(self._texts))]
        return text

    def _fresh_seed(self) -> int:
        """Returns a fresh seed, the same on all ranks."""
        return int(self.model.ranks.from_first(fresh_seed()))

    def _sequence(self, request: Request, observer: Observer | None = None, beside: bool = False) -> Sequence:
        # in a batch "auto" drafts little or nothing, so its acceptance is no evidence
        unwatched = request.speculation is None or (beside and self.max_batch > 1)
        return Sequence(request, observer=observer, ended=None if unwatched else self._ended)

    def _stream(self, sequence: Sequence, after: TokenStream | None = None) -> TokenStream:
        if self.model.ranks.size == 1:
            return TokenStream(sequence, self.backend.runner(shared=False), self, after)
        if after is not None:
            after.close()
        (handle,) = self._submit([sequence])
        return SharedStream(sequence, handle, self)

    def _ended(self, sequence: Sequence) -> None:
        if sequence.speculation is not None:
            self._watch.ended(sequence.stats, sequence.sampler.params)

    def speculation_for(self, value: object) -> Speculation | None:
        """Returns the speculation that `speculation=value` stands for with this model; None is off.

        Raises:
            OptionError: the value is impossible, or this model has no MTP modules for it.
        """
        speculation = resolve_speculation(value)
        modules = len(self.model.mtp)
        if speculation == "auto":
            pays = self.drafts_pay and (modules or not self.backend.auto.modules)
            return self.backend.auto.chosen(self.backend.mixes) if pays else None
        if speculation is None:
            return None
        if speculation.modules and not modules:
            raise OptionError(
                f"speculation={value!r} needs a multi-token-prediction module and this checkpoint has none "
                "(num_nextn_predict_layers is 0 or its tensors are absent): use speculation=None"
                ' or Speculation(drafters=("text",))'
            )
        self.backend.check(speculation)
        return speculation.chosen(self.backend.mixes)

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
