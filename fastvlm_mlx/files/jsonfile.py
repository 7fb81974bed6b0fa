"""JSON files of a model folder: bounded in size, no duplicate keys, no NaN or infinity, and an object at the top."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, about_its_path, listed
from . import regular as files

MAX_JSON_BYTES = 20_000_000  # bytes; a vocabulary takes 3 MB, a config a thousandth of that


@about_its_path
def read_table(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises CheckpointError where it is missing, too large, or anything else.
    """
    try:
        data = files.read(path, MAX_JSON_BYTES)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent}: no {path.name}, so this is not a FastVLM folder; check the path.",
            path=path.parent,
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the file and its permissions.",
            path=path,
        ) from error
    return parse_table(data, str(path))


def parse_table(data: bytes, name: str) -> dict[str, Any]:
    """Parse UTF-8 bytes that hold one JSON object (a byte order mark is allowed).

    Raises CheckpointError, whose message calls the source `name`.
    """
    try:
        table = json.loads(files.decoded(data), object_pairs_hook=_unique, parse_constant=_no_constant)
    except _Twice as error:
        raise CheckpointError(
            f"{name}: {listed(error.args[0])} appear twice in one table; fetch the file again."
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"{name}: not valid JSON (nested too deeply); fetch the file again.") from error
    except ValueError as error:
        raise CheckpointError(f"{name}: not valid JSON ({str(error)[:200]}); fetch the file again.") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{name}: holds a {type(table).__name__}, expected a table; fetch the file again.")
    return table


class _Twice(Exception):
    """Raised with the keys that occur more than once in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise _Twice(sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1))
    return table


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")
