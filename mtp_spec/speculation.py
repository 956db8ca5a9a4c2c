"""`Speculation`: the tree that is drafted for each verify pass, and the rule that accepts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Literal

from mtp_spec.acceptance import RULES
from mtp_spec.drafting import Drafter, Replay, Text
from mtp_spec.errors import OptionError
from mtp_spec.option_checks import integer, invalid
from mtp_spec.tree import MODULES

MAX_DEPTH = 8
# of a chain that another drafter than the MTP modules proposes on a GPU: with the root 32 rows, a tile of products
LONGEST_CHAIN = 31
MAX_NODES = 64
DEFAULT_DEPTH = 3
ACCEPTANCE_RULES = ("coupled", *RULES)
TEXT = Text.name
DRAFTERS = (MODULES, TEXT)  # those that are known by name


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Speculation:
    """The shape of the tree that is drafted for each verify pass.

    Args:
        depth: how many tokens ahead are drafted, 1 to 8. Default: the length of ``branching``, else 3, or 8 without
            the MTP modules.
        branching: children of every node, depth by depth; (1, 1, 1) is a chain, (3, 2, 1) a tree of 15 nodes. Missing
            depths are 1.
        budget: at most this many nodes are drafted, the most promising first; up to 64.
        acceptance: the rule that accepts drafts. "coupled" keeps the text identical to plain decoding; "rejection",
            "hybrid", "block" (chains) and "traversal" keep its distribution; "typical" and "relaxed" change it.
        adaptive: draft deeper only if acceptance is likely; depth and branching are then upper limits of what the MTP
            modules draft, and the others may draft as deep as the budget allows.
        drafters: who proposes drafts: "mtp", the model's modules; "text", what followed earlier in the prompt and the
            text; objects of ``mtp_spec.drafting.Drafter``. In a fixed tree the others' confident proposals come first
            and the modules fill what is left of it. Default: "mtp"; "text" too with ``references``, and with
            ``adaptive`` where it runs, which is on a CPU.
        references: texts or lists of token ids in which "text" looks too, such as a document or a file to edit.

    Raises:
        OptionError: a value of the wrong kind or outside its range, or a tree of more than 64 nodes.
    """

    depth: int
    branching: tuple[int, ...]
    budget: int | None
    acceptance: str
    adaptive: bool
    drafters: tuple[str | Drafter | Replay, ...] | None
    references: tuple[str | tuple[int, ...], ...]

    def __init__(
        self,
        depth: int | None = None,
        branching: Sequence[int] | None = None,
        budget: int | None = None,
        acceptance: str = "coupled",
        adaptive: bool = False,
        drafters: Sequence[str | Drafter | Replay] | None = None,
        references: Sequence[str | Sequence[int]] = (),
    ) -> None:
        documents = _references(references)
        if drafters is None and (documents or not adaptive):
            drafters = DRAFTERS if documents else (MODULES,)
        chosen = None if drafters is None else _drafters(drafters)
        if documents and chosen is not None and Text.name not in chosen:
            raise OptionError(
                f'references are what the drafter "{Text.name}" looks in, and drafters={drafters!r} does not have it: '
                "add it, or leave out references"
            )
        widths = () if branching is None else _branching(branching)
        if depth is None:
            depth = len(widths) or (DEFAULT_DEPTH if chosen is None or MODULES in chosen else MAX_DEPTH)
        depth = integer("depth", depth, 1, MAX_DEPTH, f"an integer from 1 to {MAX_DEPTH}; speculation=None is off")
        if len(widths) > depth:
            raise invalid("branching", branching, f"at most one number for each of the {depth} depths; raise depth")
        if budget is not None:
            budget = integer("budget", budget, 1, MAX_NODES, f"an integer from 1 to {MAX_NODES}, or None")
        if not isinstance(adaptive, bool):
            raise invalid("adaptive", adaptive, "True or False")
        _check_acceptance(acceptance, widths, budget, adaptive)
        values = (depth, widths + (1,) * (depth - len(widths)), budget, acceptance, adaptive, chosen, documents)
        for field, value in zip(fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)
        if self.replay is not None and (self.drafters != (MODULES, self.replay) or acceptance != "coupled" or
                                        max(self.branching) > 1):  # fmt: skip
            allowed = f'("{MODULES}", Replay(...)): it replays what the modules draft in a chain, under "coupled"'
            raise invalid("drafters", self.drafters, allowed)
        if self.budget is None and self._tree > MAX_NODES:
            allowed = f"at most {MAX_NODES} nodes (this tree has {self._tree}); give budget={MAX_NODES} or less"
            raise invalid("branching", self.branching, allowed)

    def __repr__(self) -> str:
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        shown = ", ".join(f"{name}={value!r}" for name, value in given if name != "references")
        return f"Speculation({shown}, references={digest(self.references) if self.references else ()})"

    @property
    def modules(self) -> bool:
        """Whether the MTP modules draft."""
        return self.drafters is None or MODULES in self.drafters

    @property
    def others(self) -> tuple[str | Drafter, ...]:
        """The other drafters that propose tokens, as far as they are chosen."""
        chosen = self.drafters or ()
        return tuple(one for one in chosen if one != MODULES and not isinstance(one, Replay))

    @property
    def replay(self) -> Replay | None:
        """What replaces the drafts of the MTP modules; None if they draft themselves."""
        return next((one for one in self.drafters or () if isinstance(one, Replay)), None)

    def chosen(self, mixes: bool) -> Speculation:
        """Returns it with the default drafters filled in.

        Args:
            mixes: whether drafters other than the MTP modules take part.
        """
        if self.drafters is not None:
            return self
        return self.drafted_by(DRAFTERS if mixes else (MODULES,))

    def drafted_by(
        self, drafters: Sequence[str | Drafter | Replay], references: Sequence[str | Sequence[int]] = ()
    ) -> Speculation:
        """Returns it with other drafters and references."""
        fixed = self.depth, self.branching, self.budget, self.acceptance, self.adaptive
        return Speculation(*fixed, drafters, references)

    @property
    def nodes(self) -> int:
        """The largest number of nodes that one step drafts."""
        if self.adaptive and self.others:
            return MAX_NODES if self.budget is None else self.budget
        return self._tree if self.budget is None else min(self._tree, self.budget)

    @property
    def _tree(self) -> int:
        """Number of nodes of the whole tree."""
        total, width = 0, 1
        for children in self.branching:
            width *= children
            total += width
        return total

    def room(self, depth: int, drafted: int) -> int:
        """Returns how many nodes a depth may add to those drafted, keeping room for one at every deeper depth."""
        left = (self.nodes if self.budget is None else self.budget) - drafted
        return min(left, max(1, left - (self.depth - depth)))

    @property
    def is_chain(self) -> bool:
        """Whether every node has one child."""
        return max(self.branching) == 1


def resolve_speculation(value: object) -> Speculation | Literal["auto"] | None:
    """Returns what ``speculation=`` stands for: "auto", a :class:`Speculation`, or None (off).

    An integer is the depth of a chain; 0 is off.

    Raises:
        OptionError: anything else.
    """
    if value is None or isinstance(value, Speculation):
        return value
    if isinstance(value, str) and value == "auto":
        return "auto"
    allowed = f'"auto", None (off), a chain depth from 0 to {MAX_DEPTH}, or mtp_spec.Speculation(...)'
    depth = integer("speculation", value, 0, MAX_DEPTH, allowed)
    return Speculation(depth=depth) if depth else None


def _drafters(value: object) -> tuple[str | Drafter | Replay, ...]:
    allowed = f'names ("{MODULES}", "{Text.name}") and objects of mtp_spec.drafting.Drafter, which have begin(prompt) '
    allowed += f'and a name whose first word is neither "{MODULES}" nor "target"; at least one, such as '
    allowed += f'("{MODULES}", "{Text.name}")'
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
        raise invalid("drafters", value, allowed)
    names = list[object]()
    for one in value:
        known = one in DRAFTERS if isinstance(one, str) else _is_drafter(one)
        if not known:
            raise invalid("drafters entry", one, allowed)
        names.append(one if isinstance(one, str) else one.name)
    if len(set(names)) < len(names):
        raise invalid("drafters", value, "drafters with different names")
    return tuple(value)


def _is_drafter(value: object) -> bool:
    name = getattr(value, "name", None)
    if isinstance(value, Replay):
        return True
    if isinstance(value, type):  # a class, not an object of it
        return False
    # statistics name the modules' drafts "mtp 1", "mtp 2"
    other = isinstance(name, str) and bool(name.strip()) and name.split()[0] not in (MODULES, "target")
    return other and callable(getattr(value, "begin", None))


def _references(value: object) -> tuple[str | tuple[int, ...], ...]:
    allowed = "a list of texts or of lists of token ids"
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise invalid("references", value, allowed)
    found = list[str | tuple[int, ...]]()
    for one in value:
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, Sequence) and not isinstance(one, bytes):
            found.append(tuple(integer("references token", token, 0, None, allowed) for token in one))
        else:
            raise invalid("references entry", one, allowed)
    return tuple(one for one in found if one)


def digest(references: Sequence[str | tuple[int, ...]]) -> str:
    """Returns a short name for references, which may be long."""
    return f"{len(references)} of digest {sha256(repr(references).encode()).hexdigest()[:12]}"


def _branching(value: object) -> tuple[int, ...]:
    allowed = f"1 to {MAX_DEPTH} integers from 1 to {MAX_NODES}, such as (3, 2, 1)"
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not 1 <= len(value) <= MAX_DEPTH:
        raise invalid("branching", value, allowed)
    return tuple(integer("branching entry", width, 1, MAX_NODES, allowed) for width in value)


def _check_acceptance(name: object, widths: Sequence[int], budget: int | None, adaptive: bool) -> None:
    if name not in ACCEPTANCE_RULES:
        raise invalid("acceptance", name, "one of " + ", ".join(f'"{rule}"' for rule in ACCEPTANCE_RULES))
    rule = RULES.get(str(name))
    if rule is None:
        return
    if rule.chains_only and max(widths, default=1) > 1:
        raise invalid("branching", tuple(widths), f'1 at every depth: "{name}" judges chains, "traversal" trees')
    if rule.samples and (budget is not None or adaptive):
        option, value, only = ("adaptive", adaptive, False) if budget is None else ("budget", budget, None)
        raise invalid(option, value, f'{only} with acceptance="{name}", which allows no pruning by what was drawn')
