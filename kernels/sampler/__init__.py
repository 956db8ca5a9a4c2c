"""Sampling on the device: `sampling` has the launches, `settings` their parameters, `uniform` random numbers.

Names used by other folders are exported here.
"""

from __future__ import annotations

from mtp_spec.kernels.sampler.reference import gumbel_reference, sample_reference, uniforms_reference
from mtp_spec.kernels.sampler.sampling import gumbel, sample
from mtp_spec.kernels.sampler.settings import COLUMNS, IN_PROMPT, Sampled, Settings, Stages, seed_bits, settings_row
from mtp_spec.kernels.sampler.uniform import uniforms

__all__ = ["COLUMNS", "IN_PROMPT", "Sampled", "Settings", "Stages", "gumbel", "gumbel_reference", "sample",
           "sample_reference", "seed_bits", "settings_row", "uniforms", "uniforms_reference"]  # fmt: skip
