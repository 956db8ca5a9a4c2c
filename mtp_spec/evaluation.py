"""An lm-eval model (the extra `mtp-spec[eval]`): runs its tasks with speculation, which does not change the answers.

`python -m mtp_spec.evaluation run --model mtp_spec --tasks gsm8k` is lm-eval's own command with this model registered.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import mtp_spec
from mtp_spec.errors import OptionError
from mtp_spec.sampling.seeds import checked_seed, text_seeds
from mtp_spec.text import Tokenizer

# most tokens of an answer if a task does not say
DEFAULT_TOKENS = 256
# a task's generation options that have another name here; the others keep theirs
RENAMED = {"until": "stop", "max_gen_toks": "max_new_tokens"}
log = logging.getLogger(__name__)


@register_model("mtp_spec")
class SpeculativeLM(TemplateLM):
    """A model of this library under lm-eval's interface.

    Args:
        pretrained: folder of a checkpoint; None is the bundled model.
        speculation: "auto", "off", a chain depth, or a tree such as "3x2x1". Answers do not depend on it.
        batch_size: most sequences in a batch, as `load(max_batch=)`.
        seed: of the first sampled answer, from which the others' are derived; None draws one.
        max_gen_toks: most tokens of an answer if a task does not say.
        device, options: as `mtp_spec.load`.

    Raises:
        OptionError: `load` or `generate` rejects an option, or a task's generation option has no counterpart.
    """

    def __init__(
        self, pretrained: str | None = None, speculation: Any = "auto", batch_size: int | str = 1,
        max_batch_size: int | None = None, device: str | None = None, seed: Any = 0,
        max_gen_toks: int = DEFAULT_TOKENS, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if not str(batch_size).isdigit() or max_batch_size is not None:
            raise OptionError(f"batch_size={batch_size!r}, max_batch_size={max_batch_size!r}: give batch_size a number")
        self.batch_size, self.max_gen_toks = int(batch_size), max_gen_toks
        self.seed = None if seed == "None" else checked_seed(seed)  # as lm-eval reads its command line
        self.speculation, self._name = _speculation(speculation), pretrained or "bundled"
        self.lm = mtp_spec.load(pretrained, device=device or "cpu", max_batch=self.batch_size, **options)
        self.lm.speculation_for(self.speculation)
        if self.lm.tokenizer is None:
            raise OptionError(f"pretrained={pretrained!r} has no tokenizer.json: lm-eval's tasks are text")
        self.text: Tokenizer = self.lm.tokenizer

    @property
    def eot_token_id(self) -> int:
        return min(self.lm.stop_ids())

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.text.bos_id is None else self.text.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.text.template if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        if not add_generation_prompt:
            raise OptionError("a task that begins the answer itself (gen_prefix) has no counterpart: run it without "
                              "--apply_chat_template")  # fmt: skip
        return self.text.chat_text(chat_history)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is False:
            return list(self.text.raw.encode(string, add_special_tokens=False).ids)
        return self.lm.encode(string)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the answer to each request's (context, generation options)."""
        texts: list[str] = []
        # one for each request, independent of the batch
        seeds = [seed for (seed,) in text_seeds(self.seed, len(requests))]
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            for options, group in self._groups(requests):
                options.setdefault("seed", seeds[len(texts) : len(texts) + len(group)])
                prompts = [self._cut(self.lm.encode(request.args[0]), options["max_new_tokens"]) for request in group]
                for request, out in zip(group, self.lm.generate(prompts, **options), strict=True):
                    self.cache_hook.add_partial("generate_until", request.args, out.text)
                    texts.append(out.text)
                bar.update(len(group))
        return texts

    def _groups(self, requests: Sequence[Any]) -> Iterator[tuple[dict[str, Any], list[Any]]]:
        """Yields groups of consecutive requests with the same options, at most `batch_size` in each."""
        group: list[Any] = []
        for request in requests:
            if group and (len(group) == self.batch_size or group[0].args[1] != request.args[1]):
                yield self._options(group[0].args[1]), group
                group = []
            group.append(request)
        if group:
            yield self._options(group[0].args[1]), group

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        known = normalize_gen_kwargs(dict(given), self.max_gen_toks)
        known.pop("do_sample")  # temperature 0 has the same meaning
        options = {RENAMED.get(name, name): value for name, value in known.items()}
        options["stop"] = [stop for stop in options["stop"] if stop] or None
        return {"temperature": 0.0, **options, "speculation": self.speculation}

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """Returns the end of a prompt that leaves room for an answer."""
        most = self.lm.max_context - room
        if most < 1:
            raise OptionError(f"max_gen_toks={room} leaves no room for a prompt in a context of {self.lm.max_context}")
        if len(ids) > most:
            log.warning("a prompt of %d tokens loses its beginning: %d have room beside the answer", len(ids), most)
        return ids[-most:]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns the sum of log-probabilities of each continuation, and whether greedy decoding would write it."""
        found = []
        for key, context, continuation in tqdm(requests, disable=disable_tqdm, desc="loglikelihood"):
            if len(continuation) > self.lm.max_context:
                raise OptionError(f"a continuation of {len(continuation)} tokens: the context is {self.lm.max_context}")
            ids = (context + continuation)[-self.lm.max_context - 1 :]
            rows = self.lm.score(ids[:-1]).logits[-len(continuation) :].log_softmax(-1)
            wanted = torch.tensor(continuation)
            chances = rows.gather(-1, wanted[:, None])
            answer = float(chances.sum()), bool((rows.argmax(-1) == wanted).all())
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
            found.append(answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each text, in windows of the context."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(self.tok_encode(request.args[0], add_special_tokens=False),
                                                self.prefix_token_id, self.lm.max_context, 1)  # fmt: skip
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            whole = sum(chance for chance, _ in self._loglikelihood_tokens(parts, disable_tqdm))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, whole)
            found.append(whole)
        return found


def _speculation(given: Any) -> Any:
    if isinstance(given, str) and "x" in given and given.replace("x", "").isdigit():
        return mtp_spec.Speculation(branching=[int(width) for width in given.split("x")])
    return None if given in ("off", "None", None) else given


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
