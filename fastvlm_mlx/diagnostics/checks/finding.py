"""One line of doctor's report: what was checked, what was found, what was expected, and whether that is right."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# "measured" is a figure without a limit: there is none, or the right value is not known yet.
Status = Literal["right", "note", "measured", "wrong"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    `found` and `expected` are texts; `value` and `limit`, in `unit`, are their figures. `details` are the figures that
    the finding is made of, by name. `check` is the name of the check, set by `doctor.examined`.
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
        """The finding as a JSON object; a figure that is not finite is None."""
        return {
            "check": self.check, "what": self.what, "status": self.status, "found": self.found, "expected":
            self.expected, "value": finite(self.value), "limit": finite(self.limit), "unit": self.unit, "details":
            {name: finite(value) if isinstance(value, float) else value for name, value in self.details.items()},
        }  # fmt: skip


def finite(value: float | None) -> float | None:
    """The value, or None where it is not a finite number."""
    return value if value is not None and math.isfinite(value) else None


def at_most(
    what: str, value: float, limit: float, *, found: str, expected: str, unit: str = "", **details: Any
) -> Finding:
    """A finding that is right where `value` is at most `limit`; NaN is wrong."""
    return Finding(what, "right" if value <= limit else "wrong", found, expected, value, limit, unit, details)


def at_least(
    what: str, value: float, limit: float, *, found: str, expected: str, unit: str = "", **details: Any
) -> Finding:
    """A finding that is right where `value` is at least `limit`; NaN is wrong."""
    return Finding(what, "right" if value >= limit else "wrong", found, expected, value, limit, unit, details)


def holds(
    what: str, condition: bool, found: str, expected: str, *, otherwise: Status = "wrong", **details: Any
) -> Finding:
    """A finding that is right where `condition` holds, and has the status `otherwise` where not."""
    return Finding(what, "right" if condition else otherwise, found, expected, details=details)
