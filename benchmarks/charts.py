"""Figures -> SVG, written by hand: bars per stage, and curves against size. No library, no font but the reader's."""

from collections.abc import Sequence
from html import escape

COLOURS = ("#0a6cff", "#e8833a", "#8a8f98", "#3a9d6a", "#b04ac0")
STYLE = (
    "<style>text{font:13px system-ui,sans-serif;fill:#222}.small{font-size:11px;fill:#666}.title{font-size:15px;font-weight:600}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.small{fill:#999}}</style>"
)
Point = tuple[float, float]


def bars(title: str, below: str, groups: Sequence[tuple[str, dict[str, float]]]) -> str:
    """One group of bars per stage, one bar per name, in seconds; the bar's length is the time, all to one scale."""
    names = list(groups[0][1])
    longest = max(max(values.values()) for _, values in groups)
    left, width, thick, gap = 110, 460, 16, 14
    y = 58
    parts = []
    for label, values in groups:
        parts.append(_text(left - 10, y + len(names) * thick / 2 + 4, label, anchor="end"))
        for name, value in values.items():
            length = max(1.0, width * value / longest)
            colour = COLOURS[names.index(name) % len(COLOURS)]
            parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{thick - 2}" rx="2" fill="{colour}"/>')
            parts.append(_text(left + length + 6, y + thick - 5, _duration(value), kind="small"))
            y += thick
        y += gap
    return _svg(left + width + 80, y + 24, title, below, _legend(names, left, 38) + parts)


def curves(title: str, below: str, x_label: str, y_label: str, lines: dict[str, Sequence[Point]]) -> str:
    """Lines through measured points, from zero on both axes."""
    left, top, width, height = 70, 58, 460, 260
    right = max(x for points in lines.values() for x, _ in points)
    high = max(y for points in lines.values() for _, y in points) or 1.0
    parts = [f'<path d="M{left},{top}V{top + height}H{left + width}" fill="none" stroke="#999"/>']
    for share in (0.25, 0.5, 0.75, 1.0):
        y = top + height * (1 - share)
        parts.append(f'<path d="M{left},{y:.1f}H{left + width}" stroke="#999" stroke-opacity="0.25"/>')
        parts.append(_text(left - 8, y + 4, f"{high * share:.3g}", kind="small", anchor="end"))
    for x in sorted({x for points in lines.values() for x, _ in points}):
        parts.append(_text(left + width * x / right, top + height + 16, f"{x:g}", kind="small", anchor="middle"))
    for number, points in enumerate(lines.values()):
        colour = COLOURS[number % len(COLOURS)]
        places = [(left + width * x / right, top + height * (1 - y / high)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    parts.append(_text(left + width, top + height + 34, x_label, anchor="end"))
    parts.append(_text(8, top - 2, y_label, kind="small"))
    return _svg(left + width + 40, top + height + 62, title, below, _legend(list(lines), left, 38) + parts)


def _legend(names: Sequence[str], x: float, y: float) -> list[str]:
    parts = []
    for number, name in enumerate(names):
        parts.append(
            f'<rect x="{x}" y="{y - 10}" width="10" height="10" rx="2" fill="{COLOURS[number % len(COLOURS)]}"/>'
        )
        parts.append(_text(x + 15, y, name))
        x += 34 + 7.2 * len(name)
    return parts


def _svg(width: float, height: float, title: str, below: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img">'
    lines = [head, f"<title>{escape(title)}</title>", STYLE, _text(8, 20, title, kind="title"), *parts]
    return "\n".join([*lines, _text(8, height - 8, below, kind="small"), "</svg>", ""])


def _text(x: float, y: float, text: str, *, kind: str = "", anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(text)}</text>'


def _duration(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"
