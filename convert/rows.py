"""The rows of a layout's table, which rename, merge or drop tensors, and how a checkpoint's names are matched.

A row leads from a layout's names to the published form (`published.py`). In a template {i} and {b} stand for numbers,
{p} for "weight" or "bias", {q} for these or a quantised layer's further parts, {r} for the buffers of rotary positions,
{any} for anything.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import mlx.core as mx

from fastvlm_mlx.errors import CheckpointError, counted, listed

Merge = Callable[[dict[str, mx.array]], dict[str, mx.array]]


class Rename(NamedTuple):
    """A tensor under another name; `axes` is the order of its axes in the published form, where it differs."""

    source: str
    target: str
    axes: tuple[int, ...] = ()


class Drop(NamedTuple):
    """Tensors that are left out, and the reason."""

    source: str
    reason: str


class Group(NamedTuple):
    """The branches of a block in training form, merged into the tensors of its published form.

    `parts` maps the layout's names of the branches, relative to `source`, to the names that `merge` uses; those with a
    "?" may be missing. `merge` returns tensors by name, relative to `target`.
    """

    source: str
    parts: dict[str, str]
    target: str
    merge: Merge


Row = Rename | Drop | Group
Table = tuple[Row, ...]

PLACEHOLDERS = {
    "i": r"\d+", "b": r"\d+", "p": "weight|bias", "q": "weight|scales|biases|bias", "any": ".+",
    "r": "inv_freq|original_inv_freq|cos_cached|sin_cached",
}  # fmt: skip


class Renamed(NamedTuple):
    """The source of a tensor of the published form: its name in the checkpoint, and the order to put its axes in."""

    source: str
    axes: tuple[int, ...]


class Merged(NamedTuple):
    """A block to merge: its name in the checkpoint, its published name, and the checkpoint's names of its parts."""

    row: Group
    source: str
    target: str
    parts: dict[str, str]


class Plan(NamedTuple):
    """The result of matching names with a table: renames by target, merges, and drops by source."""

    renames: dict[str, Renamed]
    merges: list[Merged]
    drops: dict[str, str]

    def names(self) -> dict[str, str]:
        """The renames as target -> source."""
        return {target: renamed.source for target, renamed in self.renames.items()}


def match(names: Iterable[str], table: Table, layout: str) -> Plan:
    """Assign every name to exactly one row of the table; raises CheckpointError with the names that no row takes."""
    plan = Plan({}, [], {})
    groups: dict[tuple[int, str], Merged] = {}
    matchers = list(_matchers(table))
    unknown = []
    for name in names:
        hits = [
            (index, part, found)
            for index, part, prefix, regex in matchers
            if name.startswith(prefix) and (found := regex.fullmatch(name))
        ]
        if not hits:
            unknown.append(name)
            continue
        if len(hits) > 1:
            raise AssertionError(f"layout {layout!r}: {len(hits)} rows take {name!r}")
        index, part, found = hits[0]
        row = table[index]
        if isinstance(row, Rename):
            plan.renames[row.target.format(**found.groupdict())] = Renamed(name, row.axes)
        elif isinstance(row, Drop):
            plan.drops[name] = row.reason
        else:
            source, target = row.source.format(**found.groupdict()), row.target.format(**found.groupdict())
            groups.setdefault((index, target), Merged(row, source, target, {})).parts[part] = name
    if unknown:
        raise CheckpointError(
            f"{counted(len(unknown), 'tensor')} of unknown name, {listed(sorted(unknown))}: not the {layout!r} layout "
            "of FastVLM; fetch the checkpoint again."
        )
    for group in groups.values():
        missing = _missing(group)
        if missing:
            raise CheckpointError(f"tensors {listed(missing)} are missing; fetch the checkpoint again.")
        plan.merges.append(group)
    return plan


def source_name(target: str, table: Table) -> str:
    """The layout's name of a tensor of the published form; for a merged one, the block that its branches are in."""
    for row in table:
        if isinstance(row, Rename) and (found := _regex(row.target).fullmatch(target)):
            return row.source.format(**found.groupdict())
        if isinstance(row, Group) and (found := _regex(row.target + ".{p}").fullmatch(target)):
            return row.source.format(**found.groupdict()) + ".*"
    raise AssertionError(f"no row for {target!r}")


def _missing(group: Merged) -> list[str]:
    """Parts that a block lacks; an optional branch is missing only as a whole."""
    present = {part.split(".")[0] for part in group.parts}
    return [
        f"{group.source}.{theirs}"
        for theirs, part in group.row.parts.items()
        if part.lstrip("?") not in group.parts and (not part.startswith("?") or part[1:].split(".")[0] in present)
    ]


def _matchers(table: Table) -> Iterator[tuple[int, str, str, re.Pattern[str]]]:
    """(row, part, the beginning that a name must have, the whole pattern) for everything that a table takes."""
    for index, row in enumerate(table):
        if isinstance(row, Group):
            for theirs, part in row.parts.items():
                template = f"{row.source}.{theirs}"
                yield index, part.lstrip("?"), template.split("{")[0], _regex(template)
        else:
            yield index, "", row.source.split("{")[0], _regex(row.source)


def _regex(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for placeholder, what in PLACEHOLDERS.items():
        pattern = pattern.replace(rf"\{{{placeholder}\}}", f"(?P<{placeholder}>{what})", 1)
    return re.compile(pattern)
