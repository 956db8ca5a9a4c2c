"""Decodes ids with llama.cpp on a CPU. Run by a Python that has it, without this package.

Argument: one JSON object {file, context, threads, repack}. Then one request a line: {begin: ids, threads} forgets what
was read and reads ids at once, by so many threads from now on, and answers {logits} of the last; {steps: ids} reads one
after another and answers {seconds, cpu}, of each, its logits included, by the clock and of the processor.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any


def main() -> None:
    asked = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries must not print between the answers
    import llama_cpp as llama

    llama.llama_backend_init()
    loading = llama.llama_model_default_params()
    loading.n_gpu_layers = 0
    # repacked for AMX, attn_k_b and attn_v_b fail an assertion: llama.cpp's AMX code has no products by head
    loading.use_extra_bufts = asked["repack"]
    model = llama.llama_model_load_from_file(asked["file"].encode(), loading)
    if not model:
        raise SystemExit(f"llama.cpp does not load {asked['file']}")
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_batch, options.no_perf = asked["context"], asked["context"], True
    options.n_threads = options.n_threads_batch = asked["threads"]
    context = llama.llama_init_from_model(model, options)
    if not context:
        raise SystemExit("llama.cpp makes no context")
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def decode(ids: list[int]) -> Any:
        array = (llama.llama_token * len(ids))(*ids)
        code = llama.llama_decode(context, llama.llama_batch_get_one(array, len(ids)))
        if code:
            raise SystemExit(f"llama_decode of {len(ids)} tokens returns {code}")
        return llama.llama_get_logits_ith(context, -1)

    system = ctypes.cast(llama.llama_print_system_info(), ctypes.c_char_p).value or b""
    facts = {
        "llama-cpp-python": version("llama-cpp-python"),
        "system": system.decode(),
        "model": _description(llama, model),
        "bytes": llama.llama_model_size(model),
    }
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "begin" in request:
            llama.llama_set_n_threads(context, request["threads"], request["threads"])
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            answer = {"logits": decode(request["begin"])[:vocabulary]}
        else:
            seconds, cpu = [], []
            for one in request["steps"]:
                start, used = time.perf_counter(), time.process_time()
                decode([one])
                seconds.append(time.perf_counter() - start)
                cpu.append(time.process_time() - used)
            answer = {"seconds": seconds, "cpu": cpu}
        print(json.dumps(answer), file=answers, flush=True)


def _description(llama: Any, model: Any) -> str:
    text = ctypes.create_string_buffer(256)
    llama.llama_model_desc(model, text, len(text))
    return text.value.decode()


if __name__ == "__main__":
    main()
