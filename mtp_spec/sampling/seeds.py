"""Seeds: a fresh one if none is given, and a separate one for every text of a call.

With one seed every prompt would have the same noise, so that draws would not be independent over the texts of a call.
So prompt i of a call has the seed `derived_seed(seed, i)`: the first 53 bits of a
generator (Philox4x64-10) with the key (seed, 2) and the counter (1, i, 0, 0); sample i of a prompt (`n=`) derives from
the prompt's seed in the same way, with the key (seed, 3). The noise of a text has the key (seed, 0), the choices of
acceptance rules (seed, 1). Number 0 keeps the seed unchanged, so that every text can be reproduced alone with the seed
that it reports.

Seeds made here are below 2**53, so that JSON represents them exactly in every language, JavaScript included.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from numbers import Integral

import numpy as np
from torch import Tensor

from mtp_spec.errors import OptionError

LIMIT = 1 << 64  # seeds given by callers are below
MADE_BITS = 53
# second words of the generator's key
PROMPTS, SAMPLES = 2, 3
ALLOWED = "an integer from 0 to 2**64 - 1, or None, which draws one"


def fresh_seed() -> int:
    """A seed from the operating system's randomness."""
    return secrets.randbits(MADE_BITS)


def derived_seed(seed: int, index: int, of: int = PROMPTS) -> int:
    """The seed of prompt `index` of a call that was given `seed`, or of a sample of one: `of=SAMPLES`; 0 keeps it."""
    if index == 0:
        return seed
    # NumPy adds one to the first counter word before it generates
    counter = np.array([0, index, 0, 0], dtype=np.uint64)
    generator = np.random.Philox(key=np.array([seed, of], dtype=np.uint64), counter=counter)
    return int(generator.random_raw()) >> (64 - MADE_BITS)


def checked_seed(value: object) -> int | None:
    """Returns the checked `seed=` of one text.

    Raises:
        OptionError: neither None nor an integer in its range.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < LIMIT:
        several = isinstance(value, Sequence | np.ndarray | Tensor) and not isinstance(value, str | bytes)
        hint = "; a list is for a list of prompts or n=, one for each" if several else ""
        raise OptionError(f"seed={value!r} is not possible: allowed is {ALLOWED}{hint}")
    return int(value)


def text_seeds(seed: object, prompts: int, n: object = None, draw: Callable[[], int] = fresh_seed) -> list[list[int]]:
    """Returns the seeds of every text of a call, prompt by prompt.

    Args:
        seed: None, an integer for all, or a list of integers: one for each prompt, or one for each text.
        n: number of texts for each prompt; None is one.
        draw: returns a fresh seed if none is given.

    Raises:
        OptionError: a bad value of `seed` or `n`, or a list of another length.
    """
    if n is not None and (isinstance(n, bool) or not isinstance(n, Integral) or n < 1):
        raise OptionError(f"n={n!r} is not possible: allowed is an integer, 1 or more")
    count = 1 if n is None else int(n)
    if isinstance(seed, np.ndarray | Tensor) and seed.ndim:
        seed = seed.tolist()
    if isinstance(seed, Sequence) and not isinstance(seed, str | bytes | bytearray):
        return _listed(seed, prompts, count)
    first = checked_seed(seed)
    first = draw() if first is None else first
    return [_samples(derived_seed(first, prompt), count) for prompt in range(prompts)]


def _listed(seeds: Sequence[object], prompts: int, count: int) -> list[list[int]]:
    checked = [checked_seed(one) for one in seeds]
    known = [one for one in checked if one is not None]
    if len(known) < len(checked):
        raise OptionError(f"seed={list(seeds)!r} is not possible: a list holds integers alone, None stands for all")
    if len(known) == prompts:
        return [_samples(one, count) for one in known]
    if len(known) == prompts * count:
        return [known[first : first + count] for first in range(0, len(known), count)]
    each = f" or {prompts * count}, one for each text" if count > 1 else ""
    raise OptionError(f"seed has {len(known)} numbers: a list gives one for each prompt, here {prompts}{each}")


def _samples(seed: int, count: int) -> list[int]:
    return [derived_seed(seed, index, SAMPLES) for index in range(count)]
