"""From logits to tokens: parameters, noise, processors, grammars, seeds."""

from mtp_spec.sampling.noise import gumbel
from mtp_spec.sampling.sampler import History, Sampler

__all__ = ["History", "Sampler", "gumbel"]
