"""What happened in a run: `log.jsonl`, a table a line for every step and every look, and `curve.svg`, the loss drawn
from it.
"""

import json
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..files import regular as files

WIDTH, HEIGHT, MARGIN = 640, 320, 48  # of the picture, in its units
POINTS = 300  # of a curve at most; more are averaged
COLOURS = {"loss": "#888888", "held_out": "#0a64d8", "old": "#d8640a"}
NAMES = {"loss": "training", "held_out": "held-out new rows", "old": "held-out old rows"}


class Log:
    """The events of a run, in memory and, where there is a folder, on disk as they come."""

    def __init__(self, folder: Path | None, events: list[dict[str, Any]] | None = None):
        self.folder = folder
        self.events = events or []
        if folder is not None:
            self._write("".join(json.dumps(event) + "\n" for event in self.events))

    @classmethod
    def taken_up(cls, folder: Path, step: int) -> "Log":
        """The log of an earlier run up to a step; what came later is forgotten."""
        events = []
        try:
            for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
                try:
                    event = json.loads(line)
                except ValueError:  # the line that was being written when the run was killed
                    break
                if event.get("step", 0) <= step:
                    events.append(event)
        except OSError:
            events = []
        return cls(folder, events)

    def add(self, event: dict[str, Any]) -> None:
        """Note an event; raises OutputError."""
        self.events.append(event)
        if self.folder is not None:
            try:
                with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(event) + "\n")
            except OSError as error:
                raise OutputError(
                    f"{self.folder}/log.jsonl cannot be written ({error.strerror}); make room and go on."
                ) from error

    def draw(self) -> None:
        """Write curve.svg, where there is a folder and something to draw."""
        if self.folder is not None and len(self.events) > 1:
            try:
                files.write(self.folder / "curve.svg", curve(self.events))
            except OSError as error:
                raise OutputError(
                    f"{self.folder}/curve.svg cannot be written ({error.strerror}); make room."
                ) from error

    def _write(self, text: str) -> None:
        assert self.folder is not None
        try:
            files.write(self.folder / "log.jsonl", text)
        except OSError as error:
            raise OutputError(f"{self.folder}/log.jsonl cannot be written ({error.strerror}); make room.") from error


def curve(events: list[dict[str, Any]]) -> str:
    """An SVG of the losses by step: of training, averaged, and of held-out rows."""
    lines: dict[str, list[tuple[float, float]]] = {
        "loss": _averaged([(e["step"], e["loss"]) for e in events if "loss" in e])
    }
    for name in ("held_out", "old"):
        lines[name] = [(e["step"], e[name]["loss"]) for e in events if name in e]
    every = [point for line in lines.values() for point in line]
    if not every:
        return '<svg xmlns="http://www.w3.org/2000/svg"/>\n'
    last, top = max(max(x for x, _ in every), 1), max(max(y for _, y in every), 1e-6)

    def at(x: float, y: float) -> str:
        return f"{MARGIN + x / last * (WIDTH - 2 * MARGIN):.1f},{HEIGHT - MARGIN - y / top * (HEIGHT - 2 * MARGIN):.1f}"

    drawn = [
        f'<polyline fill="none" stroke="{COLOURS[name]}" stroke-width="1.5" points="{" ".join(at(*p) for p in line)}"/>'
        for name, line in lines.items()
        if line
    ]
    legend = [
        f'<text x="{WIDTH - MARGIN}" y="{MARGIN + 16 * n}" text-anchor="end" fill="{COLOURS[name]}">'
        f"{NAMES[name]}</text>"
        for n, name in enumerate(name for name, line in lines.items() if line)
    ]
    axes = [
        f'<path d="M{MARGIN},{MARGIN} V{HEIGHT - MARGIN} H{WIDTH - MARGIN}" fill="none" stroke="#444"/>',
        f'<text x="{MARGIN - 6}" y="{MARGIN + 4}" text-anchor="end">{top:.2f}</text>',
        f'<text x="{MARGIN - 6}" y="{HEIGHT - MARGIN + 4}" text-anchor="end">0</text>',
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - MARGIN + 18}" text-anchor="end">step {last:g}</text>',
        f'<text x="{MARGIN}" y="{MARGIN - 16}">loss, nats per token</text>',
    ]
    body = "\n".join([*axes, *drawn, *legend])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _averaged(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points, each the mean of its neighbours."""
    size = -(-len(points) // POINTS) if points else 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
