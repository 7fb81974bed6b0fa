"""What a table is made of: rows that rename, merge or drop tensors, and the matching of a checkpoint's names against them.

A row leads from the names of one layout to the published form, the common ground of all layouts, which `published.py`
lists. In a template {i} and {b} stand for numbers, {p} for "weight" or "bias", {q} for these or a quantised layer's
further parts, {r} for the buffers of rotary positions, {any} for anything.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import mlx.core as mx

from fastvlm_mlx.errors import CheckpointError, counted, listed

Merge = Callable[[dict[str, mx.array]], dict[str, mx.array]]


class Rename(NamedTuple):
    """One tensor under another name; `axes` is the order in which the published form has its axes, where it is another."""

    source: str
    target: str
    axes: tuple[int, ...] = ()


class Drop(NamedTuple):
    """Tensors left behind, and why."""

    source: str
    reason: str


class Group(NamedTuple):
    """The branches of one training-form block, merged into the tensors of its published form.

    `parts` names them as the layout does, relative to `source`, and as `merge` knows them; those with a "?" may be
    absent. `merge` returns tensors by name relative to `target`.
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
    """Where a tensor of the published form comes from, and the order its axes have to be put in, if any."""

    source: str
    axes: tuple[int, ...]


class Merged(NamedTuple):
    """One block to merge: its name in the checkpoint, its name in the published form, and part -> name in the checkpoint."""

    row: Group
    source: str
    target: str
    parts: dict[str, str]


class Plan(NamedTuple):
    """What a table makes of a set of names: renames by target, merges, and drops by source."""

    renames: dict[str, Renamed]
    merges: list[Merged]
    drops: dict[str, str]

    def names(self) -> dict[str, str]:
        """The renames as names alone, by target."""
        return {target: renamed.source for target, renamed in self.renames.items()}


def match(names: Iterable[str], table: Table, layout: str) -> Plan:
    """Assign every name to exactly one row of the table; raises CheckpointError naming those no row takes."""
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
    """What a tensor of the published form is called in a layout; for a merged one, the block its branches are in."""
    for row in table:
        if isinstance(row, Rename) and (found := _regex(row.target).fullmatch(target)):
            return row.source.format(**found.groupdict())
        if isinstance(row, Group) and (found := _regex(row.target + ".{p}").fullmatch(target)):
            return row.source.format(**found.groupdict()) + ".*"
    raise AssertionError(f"no row for {target!r}")


def _missing(group: Merged) -> list[str]:
    """Parts that a block lacks; a branch that may be absent is so as a whole."""
    present = {part.split(".")[0] for part in group.parts}
    return [
        f"{group.source}.{theirs}"
        for theirs, part in group.row.parts.items()
        if part.lstrip("?") not in group.parts and (not part.startswith("?") or part[1:].split(".")[0] in present)
    ]


def _matchers(table: Table) -> Iterator[tuple[int, str, str, re.Pattern[str]]]:
    """Row, part, what a name has to begin with, and the whole pattern."""
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
