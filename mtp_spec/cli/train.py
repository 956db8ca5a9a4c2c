"""`mtp-spec train`: MTP modules for a model that has none, or better ones for a model that has."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mtp_spec.bench import parsing
from mtp_spec.bench.options import WEIGHTS, Option, OptionGroup, add_options
from mtp_spec.errors import OptionError
from mtp_spec.training.objective import PARTS
from mtp_spec.training.options import BLOCKS, OPTIMISERS, STARTS

EXAMPLES = """examples:
  mtp-spec train /models/Moonlight moonlight-head --texts chats.jsonl.gz --device cuda
  mtp-spec train /models/GLM-4.7-Flash glm-head --prompts questions.jsonl --from shipped --device cuda
  mtp-spec generate "Name three birds" --model /models/Moonlight --mtp moonlight-head
"""


def _held_out(text: str) -> float | Path:
    try:
        return float(text)
    except ValueError:
        return Path(text)


OPTIONS = (
    OptionGroup(
        "texts: one of the first two, or both",
        Option("--texts", 'texts to train on, each a line {"text": ...} or {"messages": [...]}', type=Path,
               metavar="FILE"),
        Option("--prompts", 'prompts that the model answers itself, each a line {"prompt": ...} or {"messages": [...]}',
               type=Path, metavar="FILE"),
        Option("--held-out", "share of each domain's prompts kept from training, or a file of those (0.05)",
               type=_held_out, metavar="SHARE|FILE"),
        Option("--temperatures", "at which prompts are answered, in turn (0,0.7,1)", type=parsing.numbers,
               metavar="T,T,..."),
        Option("--answer-tokens", "most tokens of an answer (256)", type=int, metavar="N"),
        Option("--answer-passes", "how often a pass over --texts has each answer (1)", type=int, metavar="N"),
        Option("--max-tokens", "longest text (1024)", type=int, metavar="N"),
        Option("--batch", "texts generated side by side (16)", type=int, metavar="N"),
    ),
    OptionGroup(
        "modules",
        Option("--from", "random modules, the model's last layer, or the modules that it ships (random)",
               choices=STARTS, dest="start"),
        Option("--block", "of new modules; dense is the cheapest to draft with (dense)", choices=BLOCKS),
        Option("--width", "of a dense block (the model's intermediate_size)", type=int, metavar="N"),
        Option("--modules", "number of new modules; deeper drafts reuse the last (1)", type=int, metavar="N"),
    ),
    OptionGroup(
        "training",
        Option("--depth", "drafts are trained to this depth (5)", type=int, metavar="K"),
        Option("--loss", f"some of {', '.join(PARTS)}, each with a weight, as tv:0.9,ce:0.1 (kl,tv)", metavar="PARTS"),
        Option("--decay", "weight of a depth, relative to the one before (0.8)", type=float, metavar="X"),
        Option("--epochs", "how often each text is trained on (3)", type=float, metavar="X"),
        Option("--steps", "so many steps instead", type=int, metavar="N"),
        Option("--minutes", "of training at most; the learning rate falls in time", type=float, metavar="X"),
        Option("--batch-tokens", "tokens of a step (1024 on a CPU, 16384 on a GPU)", type=int, metavar="N"),
        Option("--optimiser", "(adamw on a CPU, muon on a GPU)", choices=OPTIMISERS),
        Option("--rate", "learning rate (0.002 for adamw, 0.0075 for muon; with --from shipped a fifth of these)",
               type=float, metavar="X"),
        Option("--check-every", "steps from one check on held-out texts to the next (100)", type=int, metavar="N"),
        Option("--cache-gigabytes", "of a GPU's memory and of disk for hidden states (8)", type=float, metavar="X"),
        Option("--seed", "of everything random (0)", type=int, metavar="N"),
    ),
    OptionGroup(
        "measuring, before and after",
        Option("--check-prompts", "held-out prompts of each domain (16)", type=int, metavar="N"),
        Option("--check-tokens", "most tokens of each answer (128)", type=int, metavar="N"),
        Option("--check-temperatures", "at which (0,0.8)", type=parsing.numbers, metavar="T,T,..."),
    ),
)  # fmt: skip
LISTS = ("temperatures", "check_temperatures")
MODEL = ("config", "device", "dtype", "weights")


def add_train(commands: Any) -> None:
    """Adds the verb."""
    verb: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="train MTP modules for a model that has none, or better ones",
        description="Trains MTP modules on a frozen model and measures them on held-out prompts. The model does not "
        "change. A run that was stopped goes on when the same command is run again.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the model's folder, or `demo`")
    verb.add_argument("out", type=Path, metavar="OUT", help="folder to write, for --mtp; must not exist")
    verb.add_argument("--config", type=Path, metavar="FILE", help="describes the model in place of its config.json")
    verb.add_argument("--device", default="cpu", help="cpu or cuda")
    verb.add_argument("--dtype", help="of the model: float32, bfloat16 or float16 (as stored)")
    WEIGHTS.add(verb)
    add_options(verb, OPTIONS)


def run_train(args: argparse.Namespace) -> None:
    """Trains.

    Raises:
        OptionError, CheckpointError, MTPSpecError: as `train`.
    """
    from mtp_spec.training.run import train

    values = {name: value for name, value in vars(args).items() if value is not None and name not in ("command",)}
    path = values.pop("checkpoint")
    out, model = values.pop("out"), {name: values.pop(name) for name in MODEL if name in values}
    values |= {name: tuple(values[name]) for name in LISTS if name in values}
    try:
        train(path, out, progress=_say, **model, **values)
    except KeyboardInterrupt:
        print("stopped: run the same command again, and it goes on", file=sys.stderr)
        raise
    except OptionError as error:
        raise OptionError(str(error).replace("start=", "--from ")) from error


def _say(line: str) -> None:
    print(line, flush=True)
