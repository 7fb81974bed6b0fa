"""One line of doctor's report: what was looked at, what was found, what was expected, and whether that is right."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# "measured" has no limit to be held against: a figure to read, or one that nobody knows the right value of yet.
Status = Literal["right", "note", "measured", "wrong"]


@dataclass(frozen=True)
class Finding:
    """What a check found. `found` and `expected` are for people; `value` and `limit`, in `unit`, are for programs.

    `details` are the figures that a finding is made of, by name. `check` is the check that made it, set by who runs it.
    """

    what: str
    status: Status
    found: str
    expected: str = ""
    value: float | None = None
    limit: float | None = None
    unit: str = ""
    details: Mapping[str, float | str | None] = field(default_factory=dict)
    check: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For programs; a figure that is not finite is None, since JSON has no other word for it."""
        return {
            "check": self.check, "what": self.what, "status": self.status, "found": self.found, "expected": self.expected,
            "value": finite(self.value), "limit": finite(self.limit), "unit": self.unit,
            "details": {name: finite(value) if isinstance(value, float) else value for name, value in self.details.items()},
        }  # fmt: skip


def finite(value: float | None) -> float | None:
    """The value, or None where it is no finite number."""
    return value if value is not None and math.isfinite(value) else None


def at_most(
    what: str, value: float, limit: float, *, found: str, expected: str, unit: str = "", **details: Any
) -> Finding:
    """A figure that is right up to a limit; one that is no number is wrong."""
    return Finding(what, "right" if value <= limit else "wrong", found, expected, value, limit, unit, details)


def at_least(
    what: str, value: float, limit: float, *, found: str, expected: str, unit: str = "", **details: Any
) -> Finding:
    """A figure that is right from a limit on; one that is no number is wrong."""
    return Finding(what, "right" if value >= limit else "wrong", found, expected, value, limit, unit, details)


def holds(
    what: str, condition: bool, found: str, expected: str, *, otherwise: Status = "wrong", **details: Any
) -> Finding:
    """Something that is so or is not."""
    return Finding(what, "right" if condition else otherwise, found, expected, details=details)
