"""The options of `train`, checked before anything is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mtp_spec.errors import OptionError
from mtp_spec.option_checks import shown
from mtp_spec.speculation import MAX_DEPTH
from mtp_spec.training.objective import LARGEST, Objective

BLOCKS = ("dense", "moe")
STARTS = ("random", "last-layer", "shipped")
OPTIMISERS = ("muon", "adamw")
# what these are while nothing is given; a key for each device
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
OPTIMISER = {"cpu": "adamw", "cuda": "muon"}
RATES = {"muon": 7.5e-3, "adamw": 2e-3}
GENTLE = 0.2  # rate of modules that go on learning, relative to new ones
MOST_COUNT, MOST_SEED = 2**31 - 1, 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What is trained, on what, and how.

    Attributes:
        texts: a file of texts to train on, or None.
        prompts: a file of prompts that the model answers itself, or None; one of both is given, or both are.
        held_out: share of each domain's prompts that is kept from training, or a file of texts or prompts that are.
        start: "random" for new modules, "last-layer" for new ones that begin as the model's last layer, "shipped" to go
            on with the checkpoint's.
        block: of new modules: "dense", which costs almost nothing to draft with, or "moe", like the model's own layers.
        width: of a dense block; None is the model's own `intermediate_size`.
        modules: number of new modules; deeper drafts reuse the last one.
        depth: K, how deep drafts are trained and measured.
        loss: see `objective.Objective.of`.
        decay: weight of a depth, relative to the one before.
        steps: of training; None for `epochs`.
        epochs: how often each text is trained on.
        minutes: of training at most; the learning rate then follows the time where it is ahead of the steps.
        batch_tokens: tokens of a step, padding included.
        max_tokens: longest text; what is longer is cut into pieces, chats are cut off.
        optimiser: "muon" or "adamw".
        rate: the optimiser's learning rate.
        temperatures: at which the model answers prompts, in turn.
        answer_tokens: most tokens of an answer.
        answer_passes: how often a pass over the given texts has each of the model's own answers.
        check_prompts: held-out prompts of each domain that drafts are measured on.
        check_tokens: most tokens of each answer that they are measured on.
        check_temperatures: at which.
        batch: texts that are generated side by side.
        check_every: steps from one check on held-out texts to the next.
        cache_gigabytes: of a GPU's memory and of disk, at most, for hidden states that are used again.
        seed: of everything random.
    """

    texts: Path | None = None
    prompts: Path | None = None
    held_out: float | Path = 0.05
    start: str = "random"
    block: str = "dense"
    width: int | None = None
    modules: int = 1
    depth: int = 5
    loss: str = "kl,tv"
    decay: float = 0.8
    steps: int | None = None
    epochs: float = 3.0
    minutes: float | None = None
    batch_tokens: int | None = None
    max_tokens: int = 1024
    optimiser: str | None = None
    rate: float | None = None
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    answer_tokens: int = 256
    answer_passes: int = 1
    check_prompts: int = 16
    check_tokens: int = 128
    check_temperatures: tuple[float, ...] = (0.0, 0.8)
    batch: int = 16
    check_every: int = 100
    cache_gigabytes: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.texts is None and self.prompts is None:
            raise OptionError(
                "give texts, a file of texts, or prompts, a file of prompts that the model answers itself"
            )
        for name in ("texts", "prompts", "held_out"):
            file = getattr(self, name)
            if isinstance(file, Path) and not file.is_file():
                what = "no such file" if not file.exists() else "a folder" if file.is_dir() else "no regular file"
                raise OptionError(f"{name}={str(file)!r}: {what}; give a file with one JSON object a line")
        for name, allowed in (("block", BLOCKS), ("start", STARTS), ("optimiser", (None, *OPTIMISERS))):
            if getattr(self, name) not in allowed:
                kinds = ", ".join(repr(one) for one in allowed if one is not None)
                raise OptionError(f"{name}={shown(getattr(self, name))}: allowed are {kinds}")
        counts = ("modules", "depth", "max_tokens", "answer_tokens", "answer_passes", "check_prompts", "check_tokens",
                  "batch", "check_every")  # fmt: skip
        for name in counts:
            self._check_count(name, 1, MOST_COUNT)
        for name in ("width", "steps", "batch_tokens"):
            if getattr(self, name) is not None:
                self._check_count(name, 1, MOST_COUNT)
        self._check_count("seed", 0, MOST_SEED)
        if self.answer_passes > 1 and (self.texts is None or self.prompts is None):
            raise OptionError(f"answer_passes={self.answer_passes} weighs answers to prompts against texts: give both")
        if self.depth > MAX_DEPTH or self.modules > self.depth:
            raise OptionError(
                f"depth={self.depth}, modules={self.modules}: a depth up to {MAX_DEPTH}, with no more modules than that"
            )
        for name, low in (("epochs", 0), ("decay", 0), ("cache_gigabytes", None)):
            value = getattr(self, name)
            if not _is_number(value) or not value >= 0 or value == low:
                raise OptionError(f"{name}={shown(value)}: a number {'of 0 or more' if low is None else 'above 0'}"
                                  f"; at most {LARGEST:g}")  # fmt: skip
        for name, otherwise in (("rate", "to choose it"), ("minutes", "for no limit")):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise OptionError(f"{name}={shown(value)}: a number above 0, or None {otherwise}; at most {LARGEST:g}")
        if not isinstance(self.held_out, Path) and not (_is_number(self.held_out) and 0 < self.held_out <= 0.5):
            raise OptionError(f"held_out={self.held_out!r}: a share above 0 and up to 0.5, or a file of held-out texts")
        for name in ("temperatures", "check_temperatures"):
            values = getattr(self, name)
            if not isinstance(values, tuple | list) or not values or not all(map(_is_temperature, values)):
                raise OptionError(f"{name}={shown(values)}: one or more numbers of 0 or more, at most {LARGEST:g}")
        if len(set(self.check_temperatures)) < len(self.check_temperatures):
            raise OptionError(f"check_temperatures={self.check_temperatures!r}: give each once")
        if self.start == "shipped":
            given = [name for name in ("block", "width", "modules") if getattr(self, name) != _default(name)]
            if given:
                raise OptionError(f"start='shipped' excludes {', '.join(given)}: the checkpoint's modules say it")
        if self.block == "moe" and self.width is not None:
            raise OptionError(f"width={self.width} is of a dense block, and block='moe' was given")
        if self.max_tokens <= self.check_tokens + self.depth:
            raise OptionError(
                f"max_tokens={self.max_tokens}: more than check_tokens={self.check_tokens} and depth={self.depth}"
            )
        Objective.of(self.loss, self.depth, self.decay)

    def _check_count(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise OptionError(f"{name}={shown(value)}: an integer of {low} or more")
        if value > high:
            raise OptionError(f"{name} is larger than {high}: give an integer from {low} to that")

    def objective(self) -> Objective:
        return Objective.of(self.loss, self.depth, self.decay)

    def to_json(self) -> dict[str, Any]:
        """Returns the options for `json.dumps`; paths as they were given."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_temperature(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _default(name: str) -> Any:
    return next(field.default for field in fields(TrainOptions) if field.name == name)
