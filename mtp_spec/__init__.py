"""Exact speculative decoding of DeepSeek-V3-style models with their own multi-token-prediction modules.

```python
import mtp_spec
lm = mtp_spec.load()
print(lm.generate("Tell me a story about a fox", temperature=0.7).text)
```
"""

from mtp_spec._version import __version__
from mtp_spec.analysis.scoring import Scores
from mtp_spec.api import LM
from mtp_spec.errors import MTPSpecError, OptionError, PromptError
from mtp_spec.handle import Handle
from mtp_spec.loading import load
from mtp_spec.model.errors import CheckpointError, RankError
from mtp_spec.results import Generation, TokenEvent
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.sampling.processors import LogitsProcessor
from mtp_spec.speculation import Speculation
from mtp_spec.stats import GenerationStats
from mtp_spec.stream import TokenStream
from mtp_spec.training.run import Trained, train

__all__ = [
    "LM",
    "CheckpointError",
    "Generation",
    "GenerationStats",
    "Handle",
    "LogitsProcessor",
    "MTPSpecError",
    "OptionError",
    "PromptError",
    "RankError",
    "SamplingParams",
    "Scores",
    "Speculation",
    "TokenEvent",
    "TokenStream",
    "Trained",
    "__version__",
    "load",
    "train",
]
