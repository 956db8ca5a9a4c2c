"""Generates texts with vLLM on a CPU. Run by a Python that has it, without this package.

Argument: one JSON object {model, dtype, depth, context, eager}. Then one request a line, {ids, tokens}, and an answer
{ids, seconds, cpu, steps, accepted}: greedy, past end tokens, so that every text has as many tokens as asked.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

# run the engine in this process, so that no other process is waiting while another library is timed
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main() -> None:
    asked = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries must not print between the answers
    import torch
    import vllm

    # 0.32.0's own rotation of queries on a CPU is wrong for this family's interleaved halves, and the text another one:
    # torch's is asked for, which its compiler takes by itself
    more: dict[str, Any] = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
    if asked["depth"]:
        more["speculative_config"] = {"method": "mtp", "num_speculative_tokens": asked["depth"]}
    lm = vllm.LLM(
        model=asked["model"],
        dtype=asked["dtype"],
        max_model_len=asked["context"],
        max_num_seqs=1,
        enable_prefix_caching=False,
        enforce_eager=asked["eager"],
        disable_log_stats=False,
        **more,
    )
    facts = {"vllm": vllm.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        rule = vllm.SamplingParams(temperature=0.0, max_tokens=request["tokens"], ignore_eos=True, detokenize=False)
        before = _drafts(lm)
        start, used = time.perf_counter(), time.process_time()
        (text,) = lm.generate([{"prompt_token_ids": request["ids"]}], rule, use_tqdm=False)
        seconds, used = time.perf_counter() - start, time.process_time() - used
        drafts, accepted = (after - old for after, old in zip(_drafts(lm), before, strict=True))
        answer = {
            "ids": list(text.outputs[0].token_ids),
            "seconds": seconds,
            "cpu": used,
            "steps": drafts,
            "accepted": accepted,
        }
        print(json.dumps(answer), file=answers, flush=True)


def _drafts(lm: Any) -> tuple[int, int]:
    """Returns the number of steps with drafts, and of accepted drafts, since the engine started."""
    counts = {metric.name: metric.value for metric in lm.get_metrics() if hasattr(metric, "value")}
    names = ("vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens")
    return counts.get(names[0], 0), counts.get(names[1], 0)


if __name__ == "__main__":
    main()
