"""Draws the pictures of the documentation: `python docs/pictures.py` writes docs/images/*.svg.

The tree and the noise come from a run of the bundled model, the rest from docs/results. `--results` draws only these.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
INK, GREY, PALE, GREEN, AMBER, BLUE = "#24292f", "#57606a", "#d0d7de", "#1a7f37", "#9a6700", "#0969da"
CHAT = [{"role": "user", "content": "Tell me a story about a fox"}]
RESULTS = ("acceptance_cpu", "step_h100")
SEED, TEMPERATURE, BRANCHING = 3, 0.8, (3, 2, 1)


class Picture:
    """An SVG on a white ground, readable in light and dark pages."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title, self.parts = (width, height), title, list[str]()

    def box(self, x: float, y: float, width: float, height: float, fill: str, edge: str = "none") -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self.parts.append(f'<rect {place} rx="4" fill="{fill}" stroke="{edge}" stroke-width="1.5"/>')

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.5, dash: str = "none") -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        style = f'stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}"'
        self.parts.append(f'<polyline points="{path}" fill="none" {style}/>')

    def dot(self, x: float, y: float, colour: str, radius: float = 4) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>')

    def text(
        self, x: float, y: float, text: str, colour: str = INK, size: int = 13, anchor: str = "middle",
        bold: bool = False,
    ) -> None:  # fmt: skip
        weight = "bold" if bold else "normal"
        style = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}"'
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>')

    def svg(self) -> str:
        width, height = self.size
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" role="img">'
        ground = f'<rect width="{width}" height="{height}" rx="6" fill="white"/>'
        return "\n".join([head, f"<title>{escape(self.title)}</title>", ground, *self.parts, "</svg>", ""])


def draw_tree(step: Any) -> Picture:
    """One verify step: every drafted token with both models' probabilities, and the path that was accepted."""
    wide, tall, left, nodes = 170, 48, 96, step.nodes
    children = [[n for n, node in enumerate(nodes) if node.parent == parent] for parent in range(-1, len(nodes))]
    height = {}

    def place(node: int, row: float) -> float:
        below = row
        for child in children[node + 1]:
            below = place(child, below)
        kids = children[node + 1]
        height[node] = sum(height[kid] for kid in kids) / len(kids) if kids else row
        return below if kids else row + 1

    rows = place(-1, 0)
    depth = max(node.depth for node in nodes)
    picture = Picture(left + wide * (depth + 1) + 16, int(rows * tall) + 46, "One verify step as a tree")

    def at(node: int, level: int) -> tuple[float, float]:
        return left + wide * (level - 1) + 20, 40 + height[node] * tall

    accepted = [-1, *(n for n, node in enumerate(nodes) if node.accepted)]
    for n, node in enumerate(nodes):
        (x, y), (px, py) = at(n, node.depth), at(node.parent, node.depth - 1)
        start = (px + (wide - 36 if node.parent >= 0 else wide - 90 + 20), py + 18)
        colour, width = (GREEN, 2.5) if node.accepted else (PALE, 1.5)
        picture.line([start, (x - 10, y + 18), (x, y + 18)], colour, width)
    root_y = at(-1, 0)[1]
    picture.box(8, root_y, 76, 36, "#ddf4ff", BLUE)
    picture.text(46, root_y + 23, repr(step.root), bold=True)
    for n, node in enumerate(nodes):
        x, y = at(n, node.depth)
        picture.box(x, y, wide - 36, 36, "#dafbe1" if node.accepted else "#f6f8fa", GREEN if node.accepted else PALE)
        middle = x + (wide - 36) / 2
        picture.text(middle, y + 15, repr(node.text), INK if node.accepted else GREY, bold=node.accepted)
        picture.text(middle, y + 30, f"draft {node.draft:.0%}, target {node.target:.0%}", GREY, 10)
    level = len(accepted)
    x, y = left + wide * (level - 1) + 20, at(accepted[-1], 1)[1]
    picture.line([(x - 36, y + 18), (x, y + 18)], AMBER, 2.5)
    picture.box(x, y, wide - 36, 36, "#fff8c5", AMBER)
    picture.text(x + (wide - 36) / 2, y + 15, repr(step.bonus), bold=True)
    picture.text(x + (wide - 36) / 2, y + 30, f"target's own, {step.bonus_target:.0%}", GREY, 10)
    for name, spot in (("root", 46), *((f"depth {d}", left + wide * (d - 1) + 87) for d in range(1, depth + 1))):
        picture.text(spot, 22, name, GREY, 12)
    return picture


def draw_noise(words: list[str], target: list[float], draft: list[float], noise: list[float]) -> Picture:
    """Log-probabilities of two models, each moved by the same noise; the rightmost score is the token drawn."""
    step, top, width = 34, 74, 270
    picture = Picture(760, top + step * len(words) + 56, "Coupled sampling: two models, the same noise")
    low = min(*target, *draft, *(a + b for a, b in zip(target, noise, strict=True))) - 0.5
    high = max(a + b for row in (target, draft) for a, b in zip(row, noise, strict=True)) + 0.5
    for name, row, left in (("target", target, 110), ("draft", draft, 450)):

        def x(value: float, left: int = left) -> float:
            return left + (value - low) / (high - low) * width

        picture.text(left + width / 2, 26, f"{name}: log-probability + noise", bold=True)
        scores = [a + b for a, b in zip(row, noise, strict=True)]
        best = scores.index(max(scores))
        for tick in range(-15, 10, 5):
            if low <= tick <= high:
                picture.line([(x(tick), 44), (x(tick), top + step * len(words) - 8)], PALE, 1)
                picture.text(x(tick), top + step * len(words) + 8, str(tick), GREY, 11)
        for i, score in enumerate(scores):
            y = top + i * step
            if i == best:
                picture.box(left - 6, y - 15, width + 22, 30, "#dafbe1", GREEN)
            picture.line([(x(row[i]), y), (x(score), y)], AMBER, 2)
            picture.dot(x(row[i]), y, GREY)
            picture.dot(x(score), y, GREEN if i == best else AMBER, 6 if i == best else 4)
    for i, word in enumerate(words):
        picture.text(94, top + i * step + 4, repr(word), size=13, anchor="end")
    y = top + step * len(words) + 36
    key = ((120, GREY, "log-probability"), (270, AMBER, "after the noise"), (420, GREEN, "the largest: drawn"))
    for x0, colour, label in key:
        picture.dot(x0, y - 4, colour)
        picture.text(x0 + 10, y, label, GREY, 12, "start")
    return picture


def draw_acceptance(document: dict[str, Any]) -> Picture:
    """Acceptance by depth, and tokens per step of every shape."""
    picture = Picture(860, 330, "Acceptance by depth and tokens per step")
    colours = {"0.0": BLUE, "0.8": AMBER}
    details = document["details"]
    left, bottom, wide, tall = 56, 280, 300, 216
    picture.text(left + wide / 2, 26, "drafts accepted at each depth, chain of 5", bold=True)
    for percent in range(0, 101, 25):
        y = bottom - tall * percent / 100
        picture.line([(left, y), (left + wide, y)], PALE, 1)
        picture.text(left - 8, y + 4, f"{percent} %", GREY, 11, "end")
    for heat, colour in colours.items():
        rates = details[f"chain 5 at {heat}"]["accepted_per_depth"]
        for kind, dash in (("conditional", "5 4"), ("unconditional", "none")):
            points = [(left + 24 + i * 62, bottom - tall * rate) for i, rate in enumerate(rates[kind])]
            picture.line(points, colour, 2, dash)
            for point in points:
                picture.dot(*point, colour, 3)
    for i in range(5):
        picture.text(left + 24 + i * 62, bottom + 18, str(i + 1), GREY, 12)
    picture.text(left + wide / 2, bottom + 36, "depth; dashed: given that the depth before was accepted", GREY, 11)
    names = dict.fromkeys(name.rsplit(" at ", 1)[0] for name in details)
    shapes = [name for name in names if name != "plain"]
    left, wide = 500, 300
    picture.text(left + wide / 2, 26, "tokens per verify step (plain: 1)", bold=True)
    step = tall / len(shapes)
    most = max(detail["tokens_per_step"] for detail in details.values())
    for row, shape in enumerate(shapes):
        y = bottom - tall + row * step
        picture.text(left - 8, y + step / 2 + 3, shape, INK, 12, "end")
        for number, (heat, colour) in enumerate(colours.items()):
            value = details[f"{shape} at {heat}"]["tokens_per_step"]
            thick, end = (step - 6) / 2, wide * value / most
            picture.box(left, y + 2 + number * thick, end, thick - 1, colour)
            picture.text(left + end + 5, y + 2 + (number + 1) * thick - 1, f"{value:.2f}", GREY, 10, "start")
    for number, (heat, colour) in enumerate(colours.items()):
        picture.box(left + number * 130, bottom + 10, 12, 12, colour)
        picture.text(left + 18 + number * 130, bottom + 20, f"temperature {float(heat):g}", GREY, 12, "start")
    return picture


def draw_cost(document: dict[str, Any]) -> Picture:
    """What a verify pass of several rows costs, beside the time to copy the bytes it reads."""
    picture = Picture(620, 330, "Cost of a verify pass by rows")
    rows = [row for row in document["rows"] if row["pass"].startswith("decode and verify")]
    counts = [int(row["pass"].split(", ")[1].split()[0]) for row in rows]
    left, bottom, wide, tall = 64, 270, 520, 210
    high = 1.05 * max(row["floor us"] for row in rows) / 1000
    picture.text(left + wide / 2, 26, "DeepSeek-V3, 3 dense and 5 MoE layers, one H100: ms of a pass", bold=True)
    for tick in range(0, int(high) + 1, 2):
        y = bottom - tall * tick / high
        picture.line([(left, y), (left + wide, y)], PALE, 1)
        picture.text(left - 8, y + 4, str(tick), GREY, 11, "end")
    spots = [left + 30 + (wide - 60) * (count - 1) / (counts[-1] - 1) for count in counts]
    for name, colour, dash in (("floor us", GREY, "5 4"), ("us", BLUE, "none")):
        points = [(x, bottom - tall * row[name] / 1000 / high) for x, row in zip(spots, rows, strict=True)]
        picture.line(points, colour, 2, dash)
        for point in points:
            picture.dot(*point, colour, 3)
    for x, count, row in zip(spots, counts, rows, strict=True):
        picture.text(x, bottom + 18, str(count), GREY, 12)
        y = bottom - tall * row["us"] / 1000 / high
        picture.text(x + 6, y + 20, f"x{row['us'] / rows[0]['us']:.2f}", BLUE, 12, "start")
    picture.text(left + wide / 2, bottom + 36, "rows: the last token and the drafts", GREY, 12)
    key = "blue: measured, with its ratio to one row; dashed: copying the bytes it reads"
    picture.text(left + 8, bottom + 54, key, GREY, 11, "start")
    return picture


def draw_loop() -> Picture:
    """A token's way through the code."""
    picture = Picture(860, 236, "A token's way through the code")
    head = [("text", "prompt or messages"), ("ids", "text.py"), ("prefill", "engine.py")]
    loop = [("draft", "draft.py"), ("verify", "model/rows.py"), ("accept", "accept.py"), ("commit", "engine.py")]
    places = {}
    for i, (name, file) in enumerate(head):
        places[name] = (20 + i * 150, 24)
        _station(picture, *places[name], name, file, "#ddf4ff", BLUE)
    for i, (name, file) in enumerate(loop):
        places[name] = (170 + i * 150, 128)
        _station(picture, *places[name], name, file, "#dafbe1", GREEN)
    places["out"] = (770, 24)
    _station(picture, 700, 24, "text", "finish.py", "#ddf4ff", BLUE)
    for x in (140, 290):
        _arrow(picture, [(x, 50), (x + 30, 50)], GREY)
    _arrow(picture, [(380, 76), (380, 102), (230, 102), (230, 128)], GREY)
    for x in (290, 440, 590):
        _arrow(picture, [(x, 154), (x + 30, 154)], GREEN)
    _arrow(picture, [(680, 180), (680, 212), (230, 212), (230, 180)], GREEN)
    picture.text(455, 206, "once a step: 1 token plain, 1 + accepted drafts otherwise", GREY, 12)
    _arrow(picture, [(700, 128), (700, 102), (760, 102), (760, 76)], GREY)
    return picture


def _station(picture: Picture, x: float, y: float, name: str, file: str, fill: str, edge: str) -> None:
    picture.box(x, y, 120, 52, fill, edge)
    picture.text(x + 60, y + 22, name, bold=True)
    picture.text(x + 60, y + 40, file, GREY, 11)


def _arrow(picture: Picture, points: list[tuple[float, float]], colour: str) -> None:
    picture.line(points, colour, 2)
    (x0, y0), (x1, y1) = points[-2:]
    dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
    wings = [(x1 - 7 * dx - 4 * dy, y1 - 7 * dy - 4 * dx), (x1, y1), (x1 - 7 * dx + 4 * dy, y1 - 7 * dy + 4 * dx)]
    picture.line(wings, colour, 2)


def from_results() -> dict[str, Picture]:
    """Returns the pictures that need no model."""
    acceptance, step = (json.loads((DOCS / "results" / f"{name}.json").read_text()) for name in RESULTS)
    return {
        "acceptance": draw_acceptance(acceptance),
        "cost": draw_cost(step),
        "loop": draw_loop(),
    }


def from_model() -> dict[str, Picture]:
    """Returns the pictures of a run of the bundled model: the first step after its first token."""
    import mtp_spec
    from mtp_spec.sampling.noise import gumbel

    lm = mtp_spec.load()
    options = {"seed": SEED, "temperature": TEMPERATURE}
    speculation = mtp_spec.Speculation(branching=BRANCHING)
    step = lm.explain(CHAT, steps=1, speculation=speculation, **options).steps[0]
    first, drawn = lm.chat(CHAT, max_new_tokens=2, speculation=None, **options).token_ids
    ids = [*lm.chat_ids(CHAT), first]
    scores = lm.score(ids)
    target, draft = (
        (row.float() / TEMPERATURE).log_softmax(-1) for row in (scores.logits[-1], scores.mtp_logits[0, len(ids) - 2])
    )
    noise = gumbel(SEED, len(ids), lm.config.vocab_size)
    assert int((target + noise).argmax()) == drawn, "the scored rows do not draw what generation drew"
    likely, lifted = target.topk(5).indices.tolist(), (target + noise).topk(6).indices.tolist()
    shown = sorted({*likely, *lifted}, key=lambda token: -float(target[token]))
    rows = [[float(row[token]) for token in shown] for row in (target, draft, noise)]
    return {"tree": draw_tree(step), "noise": draw_noise([lm.decode([token]) for token in shown], *rows)}


def main() -> None:
    pictures = from_results() if "--results" in sys.argv[1:] else {**from_results(), **from_model()}
    for name, picture in pictures.items():
        (DOCS / "images" / f"{name}.svg").write_text(picture.svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
