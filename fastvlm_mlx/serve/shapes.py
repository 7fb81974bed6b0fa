"""Values of a request against the JSON schema that the OpenAPI document gives for them: one description, read by both.

The part of JSON Schema that is understood: type, enum, minimum, maximum, minLength, maxLength, minItems, maxItems,
items, properties, required and anyOf. Numbers without a fraction count as whole, and null as left out where it is among
the types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import shown
from .refusal import Refusal, bad_request

Schema = Mapping[str, Any]


def check(value: Any, schema: Schema, path: str) -> None:
    """Raise a Refusal (400) that names the first part of a value, `path` being its own name, that its schema does not
    allow.
    """
    if "anyOf" in schema:
        _check_any(value, schema, path)
        return
    types = _types(schema)
    if types and not any(_is(value, name) for name in types):
        raise _wrong(value, schema, path)
    if "enum" in schema and not any(value == each and _alike(value, each) for each in schema["enum"]):
        raise _wrong(value, schema, path)
    if isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            raise _wrong(value, schema, path)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if not schema.get("minimum", value) <= value <= schema.get("maximum", value):
            raise _wrong(value, schema, path)
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            raise bad_request(f"`{path}` holds {len(value)} entries, expected {_count(schema)}.", path)
        for number, item in enumerate(value):
            check(item, schema.get("items", {}), f"{path}[{number}]")
    elif isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                raise bad_request(f"`{_joined(path, name)}` is missing.", _joined(path, name))
        for name, each in schema.get("properties", {}).items():
            if name in value:
                check(value[name], each, _joined(path, name))


def _check_any(value: Any, schema: Schema, path: str) -> None:
    """One of several schemas has to allow the value; what is wrong by the first whose type it has is raised."""
    fitting = [each for each in schema["anyOf"] if any(_is(value, name) for name in _types(each))]
    found: Refusal | None = None
    for each in fitting:
        try:
            check(value, each, path)
            return
        except Refusal as refusal:
            found = found or refusal
    raise found or _wrong(value, schema, path)


def whole(value: Any) -> int | None:
    """A number that was checked to be whole as an int; None as it is."""
    return None if value is None else int(value)


def _types(schema: Schema) -> Sequence[str]:
    found = schema.get("type", ())
    return (found,) if isinstance(found, str) else found


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    kinds = {"number": (int, float), "string": str, "array": list, "object": dict, "null": type(None), "boolean": ()}
    return isinstance(value, kinds[name])  # type: ignore[arg-type]  # types, or tuples of them


def _alike(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool)


def _wrong(value: Any, schema: Schema, path: str) -> Refusal:
    return bad_request(f"`{path}` is {shown(value)}, expected {_expected(schema)}.", path)


def _expected(schema: Schema) -> str:
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_expected(each) for each in schema["anyOf"]))
    if "enum" in schema:
        return " or ".join("null" if each is None else repr(each) for each in schema["enum"])
    names = {"integer": "a whole number", "number": "a number", "string": "a text", "boolean": "true or false"}
    names |= {"array": "a list", "object": "an object", "null": "null"}
    words = " or ".join(names[name] for name in _types(schema) if name != "null" or len(_types(schema)) == 1)
    if "minimum" in schema and "maximum" in schema:
        words += f" from {schema['minimum']} to {schema['maximum']}"
    elif "minimum" in schema:
        words += f" of at least {schema['minimum']}"
    elif "minLength" in schema or "maxLength" in schema:
        words += f" of {schema.get('minLength', 0)} to {schema.get('maxLength', 'any number of')} characters"
    return words


def _count(schema: Schema) -> str:
    least, most = schema.get("minItems", 0), schema.get("maxItems")
    return f"{least} to {most}" if most is not None else f"at least {least}"


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
