"""`bench speed`: wall-clock of plain and speculative generation side by side in one run."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from mtp_spec.api import LM
from mtp_spec.bench.common import Report, Row, average, bundled_prompts, question, spread
from mtp_spec.errors import OptionError
from mtp_spec.model.checkpoint import load_checkpoint, save_checkpoint
from mtp_spec.model.device import DeviceModel

Generate = Callable[[list[int], dict[str, Any]], tuple[list[int], float, dict[str, float]]]
LOAD = """
import json, resource, sys, time
start = time.perf_counter()
import mtp_spec
imported = time.perf_counter()
lm = mtp_spec.load(sys.argv[1] if len(sys.argv) > 1 else None)
loaded = time.perf_counter()
lm.generate([0, 2, 400], max_new_tokens=32)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"import_s": imported - start, "load_s": loaded - imported, "peak_mb": peak / 1024}))
"""


def speed(lm: LM, args: argparse.Namespace) -> Report:
    """Times every way to generate on the same prompts, in turn, and reports medians of ratios against plain."""
    ways: dict[str, Generate] = {"plain": _ours(lm, None)}
    ways |= {f"chain {depth}": _ours(lm, depth) for depth in args.depths}
    ways["auto"] = _ours(lm, "auto")
    with tempfile.TemporaryDirectory() as folder:
        if args.transformers:
            ways |= _transformers(lm, Path(folder), args)
        rows, facts = [], dict[str, Any]()
        for temperature in args.temperatures:
            part, facts[f"seconds per token at {temperature}"] = _compare(lm, ways, temperature, args)
            rows += part
    if lm.model.device.type == "cpu":
        facts["load"] = _load(args)
    return Report(f"Wall-clock against plain decoding, median over {args.prompts} prompts", rows, facts)


def _compare(
    lm: LM, ways: dict[str, Generate], temperature: float, args: argparse.Namespace
) -> tuple[list[Row], dict[str, Any]]:
    prompts = bundled_prompts(args.prompts, seed=1)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    agree: list[float] = []
    greedy = {n: w for n, w in ways.items() if temperature == 0 or not n.startswith("transformers")}
    warm = {"temperature": temperature, "seed": 0, "max_new_tokens": 8}
    for way in greedy.values():  # compilation and capture are no part of a text's time
        way(question(lm, prompts[0]["prompt"]), warm)
    for number, item in enumerate(track(prompts, f"temperature {temperature}", transient=True)):
        ids = _noise(lm, number) if args.adversarial else question(lm, item["prompt"])
        options = {"temperature": temperature, "seed": item["seed"], "max_new_tokens": args.max_new_tokens}
        texts: dict[str, list[int]] = {}
        names = list(greedy)
        # another way goes first each time, so that none always finds warm caches
        for name in names[number % len(names) :] + names[: number % len(names)]:
            texts[name], took, phase = greedy[name](ids, options)
            seconds[name].append(took / max(1, len(texts[name])))
            phases[name].append(phase)
        if "transformers plain" in texts:
            theirs, ours = texts["transformers plain"], texts["plain"]
            agree.append(next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), len(ours)))
    rows: list[Row] = []
    for name in greedy:
        median, low, high = spread([p / s for p, s in zip(seconds["plain"], seconds[name], strict=True)])
        rows.append({"T": temperature, "way": name, "times plain": median, "quartiles": f"{low:.2f}-{high:.2f}",
                     "tokens/s": 1 / spread(seconds[name])[0], **_shares(phases[name])})  # fmt: skip
    kept: dict[str, Any] = {name: values for name, values in seconds.items() if values}
    if agree:
        kept["tokens on which transformers agrees, mean"] = average(agree)
    return rows, kept


def _noise(lm: LM, number: int) -> list[int]:
    """Returns a prompt of random tokens, of which no draft can make sense."""
    return torch.randint(lm.config.vocab_size, (24,), generator=torch.Generator().manual_seed(number)).tolist()


def _shares(phases: list[dict[str, float]]) -> Row:
    """Returns the share of the time by phase, as text."""
    total = sum(p.get("total", 0.0) for p in phases)
    names = ("draft", "verify", "sample")
    return {name: f"{sum(p.get(name, 0.0) for p in phases) / total:.0%}" if total else "-" for name in names}


def _ours(lm: LM, speculation: Any) -> Generate:
    def generate(ids: list[int], options: dict[str, Any]) -> tuple[list[int], float, dict[str, float]]:
        start = time.perf_counter()
        out = lm.generate(ids, speculation=speculation, **options)
        return out.token_ids, time.perf_counter() - start, out.stats.seconds

    return generate


def _transformers(lm: LM, folder: Path, args: argparse.Namespace) -> dict[str, Generate]:
    """transformers' own DeepSeek-V3, plain and with `use_mtp`, on a copy of the same weights."""
    try:
        import transformers
    except ImportError:
        raise OptionError("--transformers needs the library: pip install transformers") from None
    ours = lm.model
    if isinstance(ours, DeviceModel):  # FP8 there needs kernels from a hub: bfloat16 it is
        source = Path(str(files("mtp_spec.configs") / "demo")) if args.model is None else args.model
        ours = load_checkpoint(source, dtype=torch.bfloat16)
    save_checkpoint(ours, folder / "copy", fp8=False)
    transformers.utils.logging.set_verbosity_error()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "copy", dtype=ours.dtype)
    model = model.to(lm.model.device).eval()
    stops = sorted(lm.stop_ids())

    def way(**more: Any) -> Generate:
        def generate(ids: list[int], options: dict[str, Any]) -> tuple[list[int], float, dict[str, float]]:
            tokens = torch.tensor([ids], device=model.device)
            start = time.perf_counter()
            with torch.inference_mode():
                out = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
                                     eos_token_id=stops, pad_token_id=stops[0],
                                     max_new_tokens=options["max_new_tokens"], **more)  # fmt: skip
            return out[0, len(ids) :].tolist(), time.perf_counter() - start, {}

        return generate

    ways = {"transformers plain": way()}
    try:
        way(use_mtp=True)([0, 2, 400], {"max_new_tokens": 4})
        ways["transformers use_mtp"] = way(use_mtp=True)
    except Exception as error:  # whatever it raises: the version may lack it, or want another layout
        print(f"transformers use_mtp does not run here: {error!r}"[:300], file=sys.stderr)
    return ways


def _load(args: argparse.Namespace) -> dict[str, float]:
    """Returns medians over fresh processes: seconds to import and to load, and peak memory after a text."""
    model = [] if args.model is None else [str(args.model)]
    runs = []
    for _ in range(args.loads):
        done = subprocess.run([sys.executable, "-c", LOAD, *model], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {key: spread([run[key] for run in runs])[0] for key in runs[0]}
