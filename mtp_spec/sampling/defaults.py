"""Sampling defaults: the library's own, or those of the checkpoint's generation_config.json (`defaults="checkpoint"`).

The file is read as in transformers and vLLM: its sampling parameters are the defaults of options that the caller does
not give. Keys that would change the text and have no counterpart here are rejected by name, not ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_spec.errors import OptionError
from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.json_object import read_object
from mtp_spec.sampling.params import SamplingParams

CHOICES = ("library", "checkpoint")
FILE = "generation_config.json"
# if any of these is given, tokens are sampled, by default at temperature 1
DRAWN = ("temperature", "top_p", "top_k", "min_p")
SAME = (*DRAWN, "repetition_penalty", "presence_penalty", "frequency_penalty", "max_new_tokens", "min_new_tokens")
RENAMED = {"stop_strings": "stop"}
# keys that change the text and have no counterpart, and the values other than null that switch them off
REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "penalty_alpha": (0,), "typical_p": (1,), "epsilon_cutoff": (0,),
    "eta_cutoff": (0,), "top_h": (), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "bad_words_ids": ([],), "force_words_ids": ([],), "sequence_bias": ([], {}),
    "constraints": ([],), "begin_suppress_tokens": ([],), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "forced_decoder_ids": ([],), "exponential_decay_length_penalty": (), "guidance_scale": (1,), "dola_layers": (),
    "watermarking_config": (), "min_length": (0,), "max_time": (),
}  # fmt: skip


class Defaults:
    """Values of options that the caller does not give.

    Args:
        file: the checkpoint's generation_config.json, which need not exist; None if the model has no folder.
        choice: "library" or "checkpoint", for calls that do not choose.
        vocab_size: of the model.

    Raises:
        OptionError: another choice, or "checkpoint" without the file.
        CheckpointError: the requested file is unreadable or has an impossible value; the message names file and value.
    """

    def __init__(self, file: Path | None = None, choice: object = "library", vocab_size: int | None = None) -> None:
        self._file, self._vocab_size = file, vocab_size
        self._found: dict[str, Any] | None = None
        self.choice = self._checked(choice)
        if self.choice == "checkpoint":
            self.checkpoint()

    def applied(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns options completed by the defaults that their `defaults=` selects; given values win."""
        given = dict(options)
        choice = self._checked(given.pop("defaults", self.choice))
        return given if choice == "library" else {**self.checkpoint(), **given}

    def checkpoint(self) -> dict[str, Any]:
        """Returns the options in the checkpoint's file."""
        if self._found is None:
            if self._file is None or not self._file.is_file():
                where = "this model has no folder" if self._file is None else f"{self._file.parent} has no {FILE}"
                raise OptionError(f"defaults='checkpoint': {where}; leave defaults out, or give the options themselves")
            given = {name: value for name, value in read_object(self._file).items() if value is not None}
            found = _options(self._file, given)
            try:
                params = SamplingParams(**found)
                if self._vocab_size is not None:
                    params.validate(self._vocab_size)
            except OptionError as error:
                raise CheckpointError(f"{self._file}: {error}; mend the file, or leave defaults out") from error
            self._found = found
        return self._found

    @staticmethod
    def _checked(choice: object) -> str:
        if not isinstance(choice, str) or choice not in CHOICES:
            raise OptionError(f"defaults={choice!r} is not possible: allowed are " + " and ".join(map(repr, CHOICES)))
        return choice


def _options(file: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a file's options under this library's names."""
    for name, off in REFUSED.items():
        if name in given and not any(type(given[name]) is not bool and given[name] == value for value in off):
            raise CheckpointError(f"{file}: {name}={given[name]!r} has no counterpart here: leave defaults out and "
                                  "give the other options yourself")  # fmt: skip
    found = {name: given[name] for name in SAME if name in given}
    found |= {new: given[old] for old, new in RENAMED.items() if old in given}
    if "suppress_tokens" in given:
        found["logit_bias"] = _forbidden(file, given["suppress_tokens"])
    draws = given.get("do_sample", any(name in given for name in DRAWN))
    if not isinstance(draws, bool):
        raise CheckpointError(f"{file}: do_sample={draws!r} is neither true nor false")
    if given.get("do_sample") is False:
        found["temperature"] = 0.0
    elif draws:
        found.setdefault("temperature", 1.0)
    return found


def _forbidden(file: Path, tokens: object) -> dict[int, float]:
    if not isinstance(tokens, list) or any(isinstance(token, bool) or not isinstance(token, int) for token in tokens):
        raise CheckpointError(f"{file}: suppress_tokens={tokens!r} is no list of token ids")
    return dict.fromkeys(tokens, -math.inf)
