"""`fastvlm-mlx doctor`: checks whether answers are right on this machine."""

import sys
from typing import Annotated

import typer

from .messages import one_line, with_flags


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what takes long, about half of it.")] = False,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object instead, without paths or user names, to send with a report."
        ),
    ] = False,
) -> None:
    """Check that answers are right on this machine, and what it makes of its speed and memory.

    A GPU is held against the CPU; without one, the forms that a GPU gets against the CPU's own. Nothing is downloaded.
    The exit code is 0 where nothing is wrong and 1 where something is.

    Example: fastvlm-mlx doctor --json > doctor.json
    """
    from json import dumps

    from ..diagnostics.doctor import examine

    report = examine(quick=quick, progress=_show)
    if json:
        print(dumps(report.to_dict(), ensure_ascii=False, allow_nan=False))
    else:
        print(one_line(with_flags(report.verdict)))
        print()
        print(with_flags(report.table()))
    if not report.right:
        raise typer.Exit(1)


def _show(line: str) -> None:
    print(f"Checking {one_line(line)}", file=sys.stderr, flush=True)
