"""A JSON schema as it is given (a dict, a text, a file, a class of pydantic) -> its JSON text, known to be kept to.

The rules are those of JSON Schema as far as llguidance follows them; what it does not follow is refused by name, so
that an answer held to a schema never breaks it.
"""

import json
import os
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from ..config import is_number
from ..errors import MAX_SHOWN_CHARS, OptionError, shown
from ..files import regular as files

ANY_OBJECT = "json"  # in place of a schema: any JSON object
MAX_SCHEMA_BYTES = 1_000_000  # of a schema's text
HOLD_SCHEMAS = ("items", "additionalProperties", "prefixItems", "allOf", "anyOf", "oneOf")  # one, or a list
HOLD_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
# Where both bounds of numbers lie within one unit, llguidance lets the exclusive one nearest to zero through.
BOUNDS = (("exclusiveMinimum", "minimum", "maximum", 1), ("exclusiveMaximum", "maximum", "minimum", -1))
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
    """llguidance's grammar for the JSON text of a schema; raises OptionError where nothing fulfils it, or none can."""
    llguidance = library()
    try:
        found: str = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=WRITING)
    except ValueError as error:
        refuse(str(error))
    matcher = new_matcher(llguidance.LLTokenizer("byte"), found)
    matcher.compute_bitmask()
    matcher.compute_ff_bytes()  # as far as there is no choice; an object that must hold itself never ends
    check(matcher)
    return found


def new_matcher(tokenizer: Any, found: str) -> Any:
    """llguidance's automaton at the beginning of a grammar, for its form of a tokenizer; raises OptionError."""
    llguidance = library()
    limits = llguidance.LLParserLimits(verbose_errors=False)  # else messages hold pages of the automaton's state
    matcher = llguidance.LLMatcher(tokenizer, found, log_level=0, limits=limits)
    check(matcher)
    return matcher


def check(matcher: Any) -> None:
    """Raise OptionError where an automaton has failed: its schema breaks the rules, or has become too large."""
    if matcher.is_error():
        refuse(matcher.get_error())


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
    line = " ".join(reason.removesuffix("<non-verbose/>").split())
    if "not present in a registry" in line:
        address = line.partition("'")[2].partition("'")[0].removeprefix("json-schema:///")
        raise OptionError(
            f"`schema` refers to another document ({shown(address)}), and nothing is fetched; write what it refers to "
            'under "$defs" and refer to it as "#/$defs/NAME".'
        )
    if line.startswith("NoExtension"):
        line = "nothing fulfils it"
    raise OptionError(f"`schema` cannot be kept to: {_short(line)}; write that part of it in another way.")


def _short(line: str) -> str:
    return line if len(line) <= MAX_SHOWN_CHARS else f"{line[:MAX_SHOWN_CHARS]}..."


def _check_nodes(schema: dict[str, Any]) -> None:
    """Raise OptionError for what llguidance takes and does not keep to."""
    waiting: list[object] = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            _check_node(node)
            waiting += [node[key] for key in HOLD_SCHEMAS if key in node]
            waiting += [
                each for key in HOLD_NAMED_SCHEMAS if isinstance(node.get(key), dict) for each in node[key].values()
            ]


def _check_node(node: dict[str, Any]) -> None:
    required, least = node.get("required", []), node.get("minProperties", 0)
    if is_number(least) and isinstance(required, list) and least > len(set(map(str, required))) + 1:
        raise OptionError(
            f"`schema` asks for {shown(least)} properties and names {len(required)} that are required: more than one "
            'other could come twice with the same name; list them under "required".'
        )
    for exclusive, inclusive, opposite, outwards in BOUNDS:
        bound = node.get(exclusive)
        for other in (node.get(opposite), node.get(f"exclusive{opposite.capitalize()}")):
            if not is_number(bound) or not is_number(other) or bound != int(bound):
                continue
            if bound * outwards >= 0 and 0 < (Fraction(other) - Fraction(bound)) * outwards < 1:
                raise OptionError(
                    f"`schema` asks for numbers between {bound} and {other} without {bound} itself, which would come "
                    f'all the same; give "{inclusive}" in place of "{exclusive}", such as {bound + 0.001 * outwards:g}.'
                )


def _text(schema: object) -> str:
    if schema is True or (isinstance(schema, str) and schema == ANY_OBJECT):
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
        raise OptionError(f"`schema` {what} is not valid JSON ({error}); check it.") from error
    if not isinstance(found, dict):
        raise OptionError(
            f'`schema` {what} holds {shown(found)}, expected a JSON object, such as {{"type": "object"}}.'
        )
    return found


def _written(schema: dict[str, Any]) -> str:
    """The JSON text of a schema without what llguidance would not keep to; raises OptionError."""
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
    _check_nodes(json.loads(text))
    return text


def _of_numpy(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__}")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")
