"""Figures -> SVG, drawn by matplotlib (the extra `benchmarks`): bars per stage, curves against size, points of two
measures.

    python -m benchmarks.redraw    # draws every chart of benchmarks/results/ again, from the figures recorded beside it

A chart has no background and takes its ink from the reader's colour scheme. Its text stays text, in the reader's own
font, and the same figures give the same bytes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

COLOURS = ("#0a6cff", "#e8833a", "#8a8f98", "#3a9d6a", "#b04ac0")  # told apart on white and on black
INK, PALE = "#222222", "#666666"  # of text and axes, of grid lines and notes: each replaced where the scheme is dark
DARK = {INK: "#dddddd", PALE: "#999999"}
SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "fastvlm-mlx", "path.simplify": True, "font.size": 10,
    "font.sans-serif": "DejaVu Sans",
    "text.color": INK, "axes.edgecolor": PALE, "axes.labelcolor": INK, "xtick.color": PALE, "ytick.color": PALE,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titlesize": 12, "axes.axisbelow": True, "legend.frameon": False,
    "xtick.major.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0, "axes.linewidth": 0.8,
}  # fmt: skip
WIDTH = 6.4  # inches, of 72 points each


def bars(title: str, below: str, groups: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Lying bars: a group per stage, a bar per name, as long as the time it takes, in seconds; all to one scale."""
    names = list(groups[0][1])
    figure, axes = _blank(title, below, height=0.9 + 0.28 * len(names) * len(groups) + 0.15 * len(groups))
    thick = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [row + (number - (len(names) - 1) / 2) * thick for row in range(len(groups))]
        values = [measured[name] for _, measured in groups]
        drawn = axes.barh(places, values, thick * 0.9, label=name, color=COLOURS[number % len(COLOURS)])
        axes.bar_label(drawn, [_duration(value) for value in values], padding=3, fontsize=9, color=INK)
    axes.set_yticks(range(len(groups)), [label for label, _ in groups])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds")
    _grid(axes, "x")
    _legend(axes)
    return _svg(figure, title)


def curves(title: str, below: str, x_label: str, y_label: str, lines: Mapping[str, Sequence[Point]]) -> str:
    """Lines through measured points, from zero on both axes."""
    figure, axes = _blank(title, below, height=3.9)
    for number, (name, points) in enumerate(lines.items()):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", label=name, color=COLOURS[number % len(COLOURS)], markersize=4)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.06 * max(y for points in lines.values() for _, y in points) or 1)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _round_ticks(axes, {x for points in lines.values() for x, _ in points})
    _grid(axes, "y")
    if len(lines) > 1:
        _legend(axes)
    return _svg(figure, title)


def trade(title: str, x_label: str, y_label: str, points: Mapping[str, Point], mark: tuple[str, float]) -> str:
    """Named points, y on a logarithmic scale, and a dashed line at the x of what they are measured against."""
    figure, axes = _blank(title, "", height=3.9)
    axes.set_yscale("log")
    axes.axvline(mark[1], color=PALE, linestyle="--", linewidth=1)
    axes.scatter(*zip(*points.values(), strict=True), color=COLOURS[0], zorder=3)
    axes.set_xlim(0, 1.06 * max(mark[1], *(x for x, _ in points.values())))
    exponents = [math.log10(y) for _, y in points.values()]
    axes.set_ylim(10 ** math.floor(min(exponents)), 10 ** math.ceil(max(exponents)))  # whole decades
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _round_ticks(axes)
    _grid(axes, "y")
    axes.annotate(mark[0], (mark[1], 0), (-4, 6), ("data", "axes fraction"), "offset points", ha="right", fontsize=9)
    _name(figure, axes, points)
    return _svg(figure, title)


def _blank(title: str, below: str, height: float) -> "tuple[Figure, Axes]":
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(SETTINGS)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    if below:
        figure.supxlabel(below, x=0.02, ha="left", fontsize=8, color=PALE)
    axes = figure.add_subplot()
    axes.set_title(title, fontweight="bold", pad=10)
    return figure, axes


def _grid(axes: "Axes", axis: str) -> None:
    axes.grid(axis=axis, color=PALE, alpha=0.25, linewidth=0.8)  # type: ignore[arg-type]


def _legend(axes: "Axes") -> None:
    """The names of the colours in one row between the title and the axes."""
    axes.set_title(axes.get_title("left"), fontweight="bold", pad=30)
    handles, names = axes.get_legend_handles_labels()
    where: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.4}
    axes.legend(handles, names, ncols=len(names), columnspacing=1.2, handlelength=1.2, borderpad=0, **where)


def _round_ticks(axes: "Axes", measured: "set[float] | None" = None) -> None:
    """Ticks at round numbers; along x at the measured places, where these are few and far enough apart."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    if measured:
        places, widest = sorted(measured), max(measured)
        kept = [
            x for x, following in zip(places, [*places[1:], 2 * widest], strict=True) if following - x > widest / 12
        ]
        axes.set_xticks(kept, [f"{x:g}" for x in kept])


def _name(figure: "Figure", axes: "Axes", points: Mapping[str, Point]) -> None:
    """Write each point's name beside it, moved up or down where it would lie on another name or another point."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    places = axes.transData.transform(list(points.values()))  # in pixels
    dot = 0.06 * figure.dpi
    taken = [Bbox.from_extents(x - dot, y - dot, x + dot, y + dot) for x, y in places]
    middle = sum(axes.get_xlim()) / 2
    for name, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        side = -8 if x > middle else 8
        label = axes.annotate(
            name,
            (x, y),
            (side, 0),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
            va="center",
            fontsize=9,
        )
        shifts = (sign * step for step in range(100) for sign in (1, -1))  # the nearest free place, above or below
        while any(label.get_window_extent().overlaps(other) for other in taken):
            label.set_position((side, next(shifts)))
        taken.append(label.get_window_extent())


def _svg(figure: "Figure", title: str) -> str:
    """The figure as SVG whose ink follows the colour scheme, without what a reader does not need."""
    file = StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Title": title, "Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r" <metadata>.*?</metadata>\n", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\n?", "", text)
    text = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', text, count=2)
    text = re.sub(r"font-family: [^;\"]*; ", "", text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r"-?\d+\.\d{2,}", lambda number: f"{float(number[0]):.5g}", text)
    text = text.replace(' transform="rotate(-0', ' transform="rotate(0')
    dark = "".join(
        f'[style*="{part}: {ink}"]{{{part}:{other}!important}}'
        for ink, other in DARK.items()
        for part in ("fill", "stroke")
    )
    text = text.replace(
        "</style>", f"text{{font-family:system-ui,sans-serif}}@media(prefers-color-scheme:dark){{{dark}}}</style>", 1
    )
    text = re.sub(r"\n(?![ <])", " ", text)  # of paths, which come in a line per point
    return "\n".join(line.strip() for line in text.splitlines() if line.strip()) + "\n"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
