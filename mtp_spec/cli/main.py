"""The command line: one verb, one function. Everything that generates goes through the public API."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

import mtp_spec
from mtp_spec.bench.cli import add_bench, run_bench
from mtp_spec.bench.options import LOAD, MTP, add_options
from mtp_spec.cli.chat_options import add_chat_options, chat_options
from mtp_spec.cli.convert import add_converting, run_cast, run_convert, run_export
from mtp_spec.cli.inspect import add_inspect, run_inspect
from mtp_spec.cli.prompts import NOT_IN_CHAT, add_prompts, check_interactive, read_prompts
from mtp_spec.cli.train import add_train, run_train
from mtp_spec.console import Parser
from mtp_spec.model.distributed.joining import join_ranks
from mtp_spec.sampling.defaults import CHOICES
from mtp_spec.sampling.seeds import fresh_seed, text_seeds
from mtp_spec.speculation import ACCEPTANCE_RULES, MAX_DEPTH, MAX_NODES

# the largest tree that is drafted if only the drafters are given
LARGEST: dict[str, Any] = {"branching": (2,) * MAX_DEPTH, "budget": MAX_NODES, "adaptive": True}
EXAMPLES = """examples:
  mtp-spec generate "Tell me a story about a fox"
  mtp-spec generate "Tell me a story about a fox" --depth 5 --temperature 0
  mtp-spec generate "List three fruits" --branching 3,2,1 --seed 7 --json
  echo "Write a poem about rain" | mtp-spec generate -
  mtp-spec generate --prompts prompts.jsonl --json > answers.jsonl
  mtp-spec chat --system "Answer in one sentence"
  mtp-spec chat --once "Name three birds"
  mtp-spec inspect /models/DeepSeek-V3
  mtp-spec cast /models/DeepSeek-V3 /models/DeepSeek-V3-bf16 --to bf16
  mtp-spec bench speed --json speed.json
"""
SAMPLING: dict[str, tuple[type, str]] = {
    "max_new_tokens": (int, "most tokens to generate (128)"),
    "min_new_tokens": (int, "fewest tokens: until then nothing ends the text (0)"),
    "temperature": (float, "0 is greedy (0.8)"),
    "top_p": (float, "keep the most probable tokens up to this mass (1: off)"),
    "top_k": (int, "keep the k most probable tokens (0: off)"),
    "min_p": (float, "keep tokens this fraction as probable as the best (0: off)"),
    "repetition_penalty": (float, "above 1 discourages tokens already seen (1: off)"),
    "presence_penalty": (float, "subtracted once from tokens already generated (0: off)"),
    "frequency_penalty": (float, "subtracted for every earlier occurrence (0: off)"),
    "seed": (int, "same seed, same text, whatever the speculation (a fresh one, which is told)"),
    "logprobs": (int, "report log-probabilities and this many alternatives, with --json (0: off)"),
}

VERBS = {
    "inspect": run_inspect, "bench": run_bench, "convert": run_convert, "cast": run_cast, "export": run_export,
    "train": run_train,
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = Parser(
        prog="mtp-spec",
        description="Exact speculative decoding of DeepSeek-V3-style models with their own MTP modules.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=mtp_spec.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_chat(commands)
    add_inspect(commands)
    add_converting(commands)
    add_train(commands)
    add_bench(commands)
    return parser


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="generate text, streamed, with a line of statistics",
        description="Generates text. The text does not depend on the speculation, only its speed does.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_prompts(generate)
    _add_model(generate)
    add_chat_options(generate)
    generate.add_argument("--raw", action="store_true", help="continue the prompt instead of answering it as a chat")
    generate.add_argument("--n", type=int, default=1, metavar="N", help="texts a prompt, each of its own seed (1)")
    generate.add_argument("--json", action="store_true", help="print one JSON document a text instead of the text")
    generate.add_argument(
        "--max-batch", type=int, default=1, metavar="N", help="write up to N texts side by side; with --json (1)"
    )
    drafting = _add_shape(generate, "speculation (never changes the text, but for --acceptance)")
    drafting.add_argument("--trace", type=int, metavar="N", help="show N steps as trees instead of the text")
    drafting.add_argument(
        "--acceptance",
        choices=ACCEPTANCE_RULES,
        metavar="RULE",
        help=", ".join(ACCEPTANCE_RULES) + " (coupled: same text; typical and relaxed change its distribution)",
    )
    _add_sampling(generate, SAMPLING)


def _add_chat(commands: Any) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk with a model in the terminal; /help lists its commands",
        description="A chat. Lines from a pipe are questions and commands, one each.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(chat)
    add_chat_options(chat)
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    chat.add_argument("--once", metavar="PROMPT", help="answer this one question; - reads it from standard input")
    chat.add_argument("--history", type=Path, metavar="FILE", help="where what is typed is remembered")
    _add_shape(chat, "speculation (never changes the text)")
    _add_sampling(chat, {name: option for name, option in SAMPLING.items() if name not in NOT_IN_CHAT})
    chat.set_defaults(**NOT_IN_CHAT)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        "--ckpt-path",
        type=Path,
        metavar="PATH",
        help="checkpoint folder, per-rank files too (default: demo, the bundled model)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="describes the model in place of its config.json")
    MTP.add(parser)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored on a CPU)")
    add_options(parser, LOAD)


def _add_shape(parser: argparse.ArgumentParser, title: str) -> Any:
    drafting = parser.add_argument_group(title)
    drafting.add_argument("--no-speculation", action="store_true", help="plain decoding")
    drafting.add_argument("--depth", type=int, metavar="K", help="draft a chain of K tokens, 1 to 8")
    drafting.add_argument("--branching", metavar="N,N,...", help="draft a tree: children by depth, such as 3,2,1")
    drafting.add_argument("--drafters", metavar="NAME,...", help="who drafts: mtp, text (as pays best)")
    drafting.add_argument(
        "--reference",
        type=Path,
        action="append",
        metavar="FILE",
        help='text in which the drafter "text" looks too; may be repeated',
    )
    return drafting


def _add_sampling(parser: argparse.ArgumentParser, options: dict[str, tuple[type, str]]) -> None:
    sampling = parser.add_argument_group("sampling")
    for name, (kind, text) in options.items():
        sampling.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=text)
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    sampling.add_argument(
        "--defaults",
        choices=CHOICES,
        help="of these: the library's, or those of the checkpoint's generation_config.json (library)",
    )
    sampling.add_argument("--stop-token-ids", metavar="N,N,...", help="token ids that end the text too")
    sampling.add_argument("--ignore-eos", action="store_true", default=None, help="go on after end-of-sequence tokens")
    formats = sampling.add_mutually_exclusive_group()
    formats.add_argument("--json-object", action="store_true", help="write a JSON object (needs mtp-spec[grammar])")
    formats.add_argument("--json-schema", type=Path, metavar="FILE", help="write JSON that follows this schema")
    formats.add_argument("--regex", metavar="REGEX", help="write what matches this regular expression")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; usage errors print one line to standard error and exit with code 2."""
    if sys.stderr is None:  # closed; `print` would write to standard output instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    args = build_parser().parse_args(arguments)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, TextIOWrapper):
            output.reconfigure(errors="replace")  # a character that cannot be shown must not end the program
    try:
        if args.command in VERBS:
            VERBS[args.command](args)
        elif args.command == "chat":
            _chat(args)
        else:
            _generate(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except mtp_spec.MTPSpecError as error:
        print(f"mtp-spec: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (BrokenPipeError, SystemExit) as ended:
        if isinstance(ended, SystemExit) and not isinstance(ended.__context__, BrokenPipeError):
            raise
        sys.stderr.close()  # rich's consoles exit with code 1 here
        raise SystemExit(141) from None
    except OSError as error:
        print(f"mtp-spec: {error}", file=sys.stderr)
        output = sys.__stdout__
        if output is not None and output is sys.stdout:
            with suppress(OSError):
                output.close()  # its buffer cannot be written
        raise SystemExit(2) from None


def _generate(args: argparse.Namespace) -> None:
    if args.interactive:
        check_interactive(args)
        args.system = args.once = args.history = None
        return _chat(args)
    ranks = join_ranks("auto", args.device)
    with ranks.together():
        given = read_prompts(args) if ranks.rank == 0 else None
        options = _options(args)
        chat_options(args)  # checked before the model is loaded, like seeds
        text_seeds(options.get("seed"), 1, args.n)
    prompts, seed = ranks.from_first([given, options.pop("seed", fresh_seed())])
    seeds = text_seeds(seed, len(prompts), args.n)
    lm = _load(args)
    with ExitStack() as stack:
        if ranks.rank:  # only the first rank prints
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        _write(args, lm, prompts, seeds, options)


def _stopped(number: int, frame: FrameType | None) -> None:
    raise mtp_spec.RankError("told to stop, as launchers do once another rank has ended: see what that one said")


def _write(
    args: argparse.Namespace, lm: mtp_spec.LM, prompts: list[str], seeds: list[list[int]], options: dict[str, Any]
) -> None:
    chat, said = _answers(args, lm)
    if lm.model.ranks.rank == 0 and not args.json:
        print(f"[{said}]", file=sys.stderr)
    options = {**options, **(chat_options(args) if chat else {})}
    asked: list[tuple[str, int, Any]]
    asked = [
        (prompt, seed, [{"role": "user", "content": prompt}] if chat else prompt)
        for prompt, own in zip(prompts, seeds, strict=True)
        for seed in own
    ]
    if args.max_batch > 1:
        handles = [lm.submit(question, **{**options, "seed": seed}) for _, seed, question in asked]
        for (prompt, _, _), handle in zip(asked, handles, strict=True):
            print(json.dumps(_document(prompt, chat, handle.result()), ensure_ascii=False), flush=True)
        return
    for prompt, seed, question in asked:
        options["seed"] = seed
        if args.trace is not None:
            Console().print(lm.explain(question, steps=args.trace, **options))
            if lm.model.ranks.rank == 0:
                print(f"[seed {seed}]", file=sys.stderr)
            continue
        if args.input_file is not None and not args.json:
            print(f"Prompt: {prompt}\nCompletion: ", end="")
        stream = lm.stream(question, **options)
        for event in stream:
            if not args.json:
                print(event.text, end="", flush=True)
        if args.json:
            print(json.dumps(_document(prompt, chat, stream.result), ensure_ascii=False), flush=True)
        else:
            print(flush=True)
            if lm.model.ranks.rank == 0:
                print(statistics_line(stream.result.stats, seed), file=sys.stderr)


def _answers(args: argparse.Namespace, lm: mtp_spec.LM) -> tuple[bool, str]:
    """Returns whether prompts are rendered by the chat template, and a description of that."""
    if not args.raw and lm.tokenizer is not None and lm.tokenizer.templates:
        return True, "answered through the chat template; --raw continues the prompt instead"
    why = "--raw" if args.raw else "this checkpoint has no chat template"
    for option, value in (("--template", args.template), ("--tools", args.tools)):
        if value is not None:
            raise mtp_spec.OptionError(f"{option} is for the chat template, which is not used: {why}")
    return False, f"continued as text, without a chat template: {why}"


def _load(args: argparse.Namespace) -> mtp_spec.LM:
    if join_ranks("auto", args.device).size > 1:
        signal.signal(signal.SIGTERM, _stopped)
    return mtp_spec.load(
        args.model,
        config=args.config,
        device=args.device,
        dtype=args.dtype,
        weights=args.weights,
        mtp=args.mtp,
        draft_vocabulary=args.draft_vocabulary,
        cache_dtype=args.cache_dtype,
        max_context=args.max_context,
        max_batch=args.max_batch,
        progress=sys.stderr.isatty(),
    )


def _chat(args: argparse.Namespace) -> None:
    from mtp_spec.chat.loop import run_chat

    options = _options(args)
    lm = _load(args)
    run_chat(lm, {**options, **chat_options(args)}, system=args.system, prompt=args.once, history=args.history)


def _document(prompt: str, chat: bool, result: mtp_spec.Generation) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "chat_template": chat,
        "seed": result.seed,
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "logprobs": result.logprobs,
        "stats": result.stats.to_json(),
    }


def statistics_line(stats: mtp_spec.GenerationStats, seed: int) -> str:
    """Returns speed, tokens per step, acceptance by depth and the seed in one line."""
    parts = [f"{stats.new_tokens} tokens", f"{stats.tokens_per_second:.0f} tok/s"]
    if stats.drafted:
        rates = "/".join(f"{rate:.2f}" for rate in stats.accepted_per_depth["conditional"])
        parts += [f"{stats.tokens_per_step:.2f} tokens per step", f"accepted by depth {rates}"]
    else:
        parts.append("no drafts")
    return "[" + ", ".join([*parts, f"seed {seed}"]) + "]"


def _options(args: argparse.Namespace) -> dict[str, Any]:
    given: dict[str, Any] = vars(args)
    options = {name: given[name] for name in (*SAMPLING, "stop", "ignore_eos", "defaults") if given[name] is not None}
    if args.stop_token_ids is not None:
        options["stop_token_ids"] = _numbers("--stop-token-ids", args.stop_token_ids, "1,2")
    if (response_format := _response_format(args)) is not None:
        options["response_format"] = response_format
    drafters = _drafters(args)
    others = "--branching, --acceptance, --drafters and --reference"
    if args.no_speculation and (args.depth is not None or args.branching or args.acceptance or drafters):
        raise mtp_spec.OptionError(f"--no-speculation excludes --depth, {others}")
    if args.depth == 0 and (args.branching or args.acceptance or drafters):
        raise mtp_spec.OptionError(f"--depth 0 is plain decoding: it excludes {others}")
    if args.max_batch != 1 and (not args.json or args.trace is not None):
        raise mtp_spec.OptionError("--max-batch needs --json: texts that are written side by side cannot be shown so")
    if args.trace is not None and args.json:
        raise mtp_spec.OptionError("--trace excludes --json: it shows trees instead of the text")
    if args.trace is not None and args.trace < 1:
        raise mtp_spec.OptionError(f"--trace {args.trace}: give a number of steps, 1 or more")
    if args.logprobs and not args.json:
        raise mtp_spec.OptionError("--logprobs needs --json: nothing else shows log-probabilities")
    rule = args.acceptance or "coupled"
    if args.no_speculation:
        options["speculation"] = None
    elif args.branching:
        widths = _numbers("--branching", args.branching, "3,2,1")
        options["speculation"] = mtp_spec.Speculation(args.depth, widths, acceptance=rule, **drafters)
    elif args.depth is not None or args.acceptance:
        fixed = args.depth != 0
        options["speculation"] = mtp_spec.Speculation(args.depth, acceptance=rule, **drafters) if fixed else None
    elif drafters:
        options["speculation"] = mtp_spec.Speculation(**LARGEST, **drafters)
    # checked before the model is loaded
    own = ("speculation", "defaults")
    mtp_spec.SamplingParams.from_options({name: value for name, value in options.items() if name not in own})
    return options


def _drafters(args: argparse.Namespace) -> dict[str, Any]:
    """Returns `Speculation`'s options for who drafts, as far as they are given."""
    found: dict[str, Any] = {}
    if args.drafters is not None:
        found["drafters"] = tuple(args.drafters.split(","))
    if args.reference:
        found["references"] = [_reference(file) for file in args.reference]
    return found


def _reference(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise mtp_spec.OptionError(f"--reference {file} is not a readable text file: {reason}") from error


def _numbers(option: str, text: str, example: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise mtp_spec.OptionError(f"{option} {text!r}: give numbers such as {example}") from None


def _response_format(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.json_object:
        return {"type": "json_object"}
    if args.regex is not None:
        return {"type": "regex", "regex": args.regex}
    if args.json_schema is None:
        return None
    try:
        return {"type": "json_schema", "schema": json.loads(args.json_schema.read_text(encoding="utf-8"))}
    except (OSError, ValueError) as error:
        raise mtp_spec.OptionError(f"--json-schema {args.json_schema} is not a readable JSON file: {error}") from error
