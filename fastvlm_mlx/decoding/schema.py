"""A JSON schema as it is given (a dict, a text, a file, a class of pydantic) -> its JSON text, known to be one that can
be kept.

The rules are those of JSON Schema as far as llguidance follows them; what it does not follow is refused by name, so
that an answer held to a schema never breaks it.
"""

import json
import os
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from ..errors import OptionError, shown
from ..files import regular as files

ANY_OBJECT = "json"  # in place of a schema: any JSON object
MAX_SCHEMA_BYTES = 1_000_000  # of a schema's text
MAX_CHECKED = 64  # schemas known to be good
NEED = (
    "Answers held to a JSON schema (`schema`) need the package llguidance, which is not installed; run "
    "pip install 'fastvlm-mlx[schema]'."
)

# How JSON is written. Blanks at will would let a model write line ends up to its limit; these are the ones that models
# write anyway. A schema's own `x-guidance` changes none of it, nor lets a rule be skipped that cannot be followed.
WRITING = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}


def read_schema(schema: object) -> str:
    """The JSON text of a schema: a dict, a JSON text of an object, the path of a file that holds one, a class with a
    `model_json_schema()` (pydantic's), or True or "json" for any JSON object.

    A text that does not begin with "{" is a path. Raises OptionError for what is none of these, or breaks the rules of
    JSON Schema, or asks for what cannot be kept to; and where llguidance is not installed.
    """
    text = _text(schema)
    grammar(text)
    return text


@lru_cache(MAX_CHECKED)
def grammar(text: str) -> str:
    """llguidance's grammar for the JSON text of a schema; raises OptionError where there is none."""
    matcher = library().LLMatcher
    try:
        found: str = matcher.grammar_from_json_schema(text, overrides=WRITING)
        wrong, messages = matcher.validate_grammar_with_warnings(found)
    except (ValueError, RuntimeError) as error:
        refuse(str(error))
    if wrong:
        refuse(messages[0])
    return found


@lru_cache(1)
def library() -> ModuleType:
    """llguidance; raises OptionError, which names the extra, where it is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise OptionError(NEED) from error
    return llguidance


def refuse(reason: str) -> NoReturn:
    """Raise OptionError for a schema that cannot be kept to, with llguidance's reason on one line."""
    line = " ".join(reason.split())
    if "not present in a registry" in line:
        raise OptionError(
            f"`schema` refers to another document ({shown(line)}), and nothing is fetched; put what it refers to under "
            '"$defs" and refer to it as "#/$defs/NAME".'
        )
    raise OptionError(f"`schema` cannot be kept to: {shown(line)}; change that part of it.")


def _text(schema: object) -> str:
    if schema is True or schema == ANY_OBJECT:
        return '{"type": "object"}'
    described = getattr(schema, "model_json_schema", None)
    if isinstance(schema, type) and callable(described):
        schema = described()
    if isinstance(schema, dict):
        return _written(schema)
    if isinstance(schema, str) and schema.lstrip().startswith("{"):
        return _written(_parsed(schema, "is a text that"))
    if isinstance(schema, (str, os.PathLike)):
        path = os.fspath(schema)
        return _written(_parsed(_content(path), f"is the file {path}, which"))
    raise OptionError(
        f"`schema` is {shown(schema)}, expected a JSON schema (a dict, a JSON text or the path of a file), or 'json' "
        "for any JSON object."
    )


def _content(path: str | bytes) -> str:
    try:
        return files.read_text(Path(os.fsdecode(path)).expanduser(), MAX_SCHEMA_BYTES)
    except UnicodeDecodeError as error:
        raise OptionError(f"`schema` is the file {shown(path)}, which is not UTF-8; convert it first.") from error
    except (OSError, ValueError, RuntimeError) as error:  # also a path with NUL in it, or of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise OptionError(
            f"`schema` is {shown(path)}, neither a JSON text nor a file that can be read ({reason}); check the path."
        ) from error


def _parsed(text: str, what: str) -> dict[str, Any]:
    """The object in a JSON text; in a message, the schema "`what` is not valid JSON"."""
    if len(text) > MAX_SCHEMA_BYTES:
        raise OptionError(
            f"`schema` holds {len(text):,} characters, more than {MAX_SCHEMA_BYTES:,}; expected a smaller one."
        )
    try:
        found = json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise OptionError(f"`schema` {what} is nested too deeply; expected a flatter one.") from error
    except ValueError as error:
        raise OptionError(f"`schema` {what} is not valid JSON ({error}); correct it.") from error
    if not isinstance(found, dict):
        raise OptionError(
            f'`schema` {what} holds {shown(found)}, expected a JSON object, such as {{"type": "object"}}.'
        )
    return found


def _written(schema: dict[str, Any]) -> str:
    try:
        text = json.dumps(schema, allow_nan=False, default=_of_numpy)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(
            f"`schema` holds what JSON has no form for ({error}); expected dicts, lists, texts, numbers, True, False "
            "and None."
        ) from error
    if len(text) > MAX_SCHEMA_BYTES:
        raise OptionError(
            f"`schema` takes {len(text):,} characters, more than {MAX_SCHEMA_BYTES:,}; expected a smaller one."
        )
    return text


def _of_numpy(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__}")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")
