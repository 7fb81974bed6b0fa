"""JSON schemas: some as people write them, and random ones of every rule that answers can be held to."""

from collections.abc import Callable
from random import Random
from typing import Any

Schema = dict[str, Any]

PERSON: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colour": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 3},
    },
    "required": ["name", "age", "colour", "tags"],
    "additionalProperties": False,
}
NAMED: dict[str, Schema] = {
    "person": PERSON,
    "choice": {"enum": ["yes", "no", None, 1.5]},
    "whole": {"type": "integer", "minimum": -5, "maximum": 20},
    "number": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "text": {"type": "string", "maxLength": 5},
    "digits": {"type": "string", "pattern": "^[0-9]{3}-[0-9]{4}$"},
    "date": {"type": "string", "format": "date"},
    "pairs": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "é😀\n"}], "items": False, "minItems": 2},
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["left"],
                "additionalProperties": False,
            }
        },
    },
    "either": {
        "oneOf": [{"type": "null"}, {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}]
    },
    "blanks": {
        "type": "array",
        "items": {"type": "null"},
        "x-guidance": {"whitespace_flexible": True, "lenient": True},
    },
}

SCALARS: tuple[Callable[[Random], Schema], ...] = (
    lambda rng: {"type": "string", "maxLength": rng.randrange(6)},
    lambda rng: {"type": "integer", "minimum": (low := rng.randrange(-50, 50)), "maximum": low + rng.randrange(100)},
    lambda rng: {"type": "number", "exclusiveMinimum": rng.choice([0, -1.5, 3]), "maximum": rng.choice([5.5, 10, 1e6])},
    lambda rng: {"enum": rng.sample(["a", "ab", 1, 2.5, None, True, "é", "\n", [], {}, {"a": 1}], rng.randrange(1, 5))},
    lambda rng: {"type": "boolean"},
    lambda rng: {"type": "string", "pattern": rng.choice(["^[a-c]{1,3}$", "^\\d+$", "x", "^a|b$", "^$", "^.{2}$"])},
    lambda rng: {"type": rng.sample(["string", "integer", "null", "boolean"], 2), "maxLength": 3},
    lambda rng: {"type": "string", "format": rng.choice(["date", "time", "uuid", "ipv4", "email"])},
    lambda rng: {"type": "integer", "multipleOf": rng.choice([2, 5, 7]), "minimum": 0},
    lambda rng: {"type": "string", "minLength": 1, "maxLength": 4, "pattern": rng.choice(["a", "^[^a]*$", "é"])},
)


def random_schema(rng: Random, depth: int = 3) -> Schema:
    """A schema of objects, lists, alternatives and single values, nested up to `depth`; nothing may fulfil it."""
    kind = rng.randrange(10) if depth else 0
    if kind < 3:
        return rng.choice(SCALARS)(rng)
    if kind < 6:
        return _an_object(rng, depth)
    if kind < 8:
        schema: Schema = {"type": "array", "items": random_schema(rng, depth - 1), "minItems": rng.randrange(3)}
        schema |= {"maxItems": schema["minItems"] + rng.randrange(3)} if rng.random() < 0.5 else {}
        beginning = [random_schema(rng, depth - 1) for _ in range(rng.randrange(3))]
        return schema | ({"prefixItems": beginning} if beginning else {})
    return {
        rng.choice(["anyOf", "allOf", "oneOf"]): [random_schema(rng, depth - 1) for _ in range(rng.randrange(1, 3))]
    }


def _an_object(rng: Random, depth: int) -> Schema:
    names = rng.sample(["a", "b", "ab", "é", "x y"], rng.randrange(4))
    schema: Schema = {"type": "object", "properties": {name: random_schema(rng, depth - 1) for name in names}}
    schema["required"] = rng.sample([*names, "zz"], rng.randrange(min(3, len(names) + 1)))
    if (others := rng.random()) < 0.7:
        schema["additionalProperties"] = False if others < 0.4 else random_schema(rng, depth - 1)
    if rng.random() < 0.25:
        schema["patternProperties"] = {rng.choice(["^a", "b$", "^x"]): random_schema(rng, depth - 1)}
    if rng.random() < 0.2:
        schema |= {rng.choice(["minProperties", "maxProperties"]): rng.randrange(3)}
    return schema
