"""The cost of quantising, reported as text, as Markdown for a model card, as JSON, and as a chart."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from ..errors import OutputError, counted
from .quality import Quality

COLUMNS = ("weights", "MB", "bits", "KL", "top-1", "top-5", "same", "right", "memory", "decode")
LEGEND = (
    "bits: per weight of the quantised layers, scales counted. KL: nats per token of the reference's answers. top-1: "
    "tokens it would choose too; top-5: of its five likeliest. same: answers word for word the same; right: answers "
    "exactly right."
)


def table(qualities: Sequence[Quality]) -> str:
    """The figures as aligned text; the first line of figures is the reference's."""
    rows = [COLUMNS, *(row(quality) for quality in qualities)]
    widths = [max(len(line[i]) for line in rows) for i in range(len(COLUMNS))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in rows
    ]
    return "\n".join(lines)


def markdown(qualities: Sequence[Quality]) -> str:
    """The figures as a Markdown table, the reference first, with what the columns mean below."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(row(quality) for quality in qualities)]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    first = qualities[0]
    return f"{text}\n\n{counted(first.questions, 'question')}, {counted(first.tokens, 'token')} of answers. {LEGEND}\n"


def row(quality: Quality) -> tuple[str, ...]:
    """The cells of one line of the table."""
    return (
        quality.name,
        f"{quality.bytes / 1e6:,.1f}",
        "-" if quality.bits_per_weight is None else f"{quality.bits_per_weight:.2f}",
        f"{quality.kl:.2g}" if quality.kl else "0",
        f"{100 * quality.top1:.1f} %",
        f"{100 * quality.top5:.1f} %",
        f"{100 * quality.same_answers:.1f} %",
        "-" if quality.accuracy is None else f"{100 * quality.accuracy:.1f} %",
        f"{quality.peak_memory_bytes / 1e9:.2f} GB",
        f"{quality.decode_tokens_per_second:.0f}/s",
    )


def write_picture(path: Path, qualities: Sequence[Quality], title: str) -> None:
    """Write `picture` to an SVG file; raises OutputError."""
    try:
        path.write_text(picture(qualities, title), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); choose another `chart`.", path=path) from error


def to_json(qualities: Sequence[Quality], **about: object) -> str:
    """Every figure as a JSON object, with `about` as further entries."""
    return json.dumps({**about, "qualities": [asdict(quality) for quality in qualities]}, indent=2) + "\n"


LEFT, TOP, WIDTH, HEIGHT = 80, 60, 520, 280
LABEL_PIXELS, LINE_PIXELS = 180, 12  # about the width of a point's name, and the height of a line
STYLE = (
    "<style>text{font:13px system-ui,sans-serif;fill:#222}.small{font-size:11px;fill:#666}"
    ".title{font-size:15px;font-weight:600}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.small{fill:#999}}</style>"
)


def picture(qualities: Sequence[Quality], title: str) -> str:
    """An SVG chart of divergence (logarithmic) against bytes, one point per recipe with its accuracy.

    The reference is a dashed line.
    """
    own, points = qualities[0], [quality for quality in qualities if quality.kl > 0]
    right = max(quality.bytes for quality in qualities) * 1.05
    exponents = [math.log10(quality.kl) for quality in points] or [0.0]
    low, high = math.floor(min(exponents)), max(math.ceil(max(exponents)), math.floor(min(exponents)) + 1)

    def place(nbytes: float, exponent: float) -> tuple[float, float]:
        return LEFT + WIDTH * nbytes / right, TOP + HEIGHT * (high - exponent) / (high - low)

    parts = [f'<path d="M{LEFT},{TOP}V{TOP + HEIGHT}H{LEFT + WIDTH}" fill="none" stroke="#999"/>']
    for exponent in range(low, high + 1):
        _, y = place(0, exponent)
        parts.append(f'<path d="M{LEFT},{y:.1f}H{LEFT + WIDTH}" stroke="#999" stroke-opacity="0.25"/>')
        parts.append(_text(LEFT - 8, y + 4, f"1e{exponent}", "small", "end"))
    for share in (0.25, 0.5, 0.75, 1.0):
        x, _ = place(right * share, low)
        parts.append(_text(x, TOP + HEIGHT + 16, _size(right * share), "small", "middle"))
    x, _ = place(own.bytes, low)
    parts.append(f'<path d="M{x:.1f},{TOP}V{TOP + HEIGHT}" stroke="#8a8f98" stroke-dasharray="4 4"/>')
    parts.append(_text(x - 4, TOP + HEIGHT - 8, _named(own), "small", "end"))
    written: list[tuple[float, float]] = []
    for quality in sorted(points, key=lambda quality: -quality.kl):
        x, y = place(quality.bytes, math.log10(quality.kl))
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#0a6cff"/>')
        to_left = x > LEFT + 0.8 * WIDTH
        while any(abs(x - a) < LABEL_PIXELS and abs(y - b) < LINE_PIXELS for a, b in written):
            y += 1
        written.append((x, y))
        parts.append(_text(x + (-8 if to_left else 8), y + 4, _named(quality), "small", "end" if to_left else "start"))
    parts.append(_text(8, TOP - 12, "KL divergence from the original, nats per token", "small", "start"))
    parts.append(_text(LEFT + WIDTH, TOP + HEIGHT + 34, "size of the weights", "small", "end"))
    width, height = LEFT + WIDTH + 40, TOP + HEIGHT + 46
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
    lines = [
        head,
        f"<title>{escape(title)}</title>",
        STYLE,
        _text(8, 20, title, "title", "start"),
        *parts,
        "</svg>",
        "",
    ]
    return "\n".join(lines)


def _named(quality: Quality) -> str:
    return quality.name if quality.accuracy is None else f"{quality.name}: {100 * quality.accuracy:.1f} % right"


def _text(x: float, y: float, text: str, css_class: str, anchor: str) -> str:
    named = f' class="{css_class}"' if css_class else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(text)}</text>'


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g} MB"
