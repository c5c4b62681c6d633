"""Only schemas that are enforced and bounded are taken; a refusal names what is wrong."""

import contextlib
import json
import time
from typing import Any

import pytest

from vila_ops.generate.json_grammar import MAX_BYTES, MAX_DEPTH, grammar_of


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth - 1):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ([], "has to be an object"),
        ({"not": {"type": "integer"}}, "schema: the keyword 'not' is not supported"),
        ({"properties": {"a": {"patternProperties": {}}}}, "schema.properties.a: the keyword 'patternProperties'"),
        ({"anyOf": [{}, {"oneOf": []}]}, r"schema.anyOf\[1\]: the keyword 'oneOf'"),
        ({"x-guidance": {"lenient": True}}, "the keyword 'x-guidance'"),
        ({"$defs": {"a": {"uniqueItems": True}}}, "schema.*a: the keyword 'uniqueItems'"),
        ({"properties": []}, "properties has to be an object"),
        ({"anyOf": {}}, "anyOf has to be a list"),
        ({"items": 3}, "schema.items has to be a schema"),
        ({"type": "nonsense"}, "cannot be followed: Invalid type"),
        ({"type": "string", "format": "strange"}, "cannot be followed: Unknown format"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "cannot be followed: Unsatisfiable"),
        ({"type": "string", "pattern": "(?=a)b"}, "cannot be followed: regex"),
        ({"$ref": "http://127.0.0.1:9/schema"}, "schema: \\$ref has to be # or #/\\$defs/NAME"),
        ({"$ref": "file:///etc/passwd"}, "schema: \\$ref has to be # or #/\\$defs/NAME"),
        ({"$ref": "#/$defs/missing"}, "cannot be followed"),
        (nested(MAX_DEPTH + 1), "nested deeper than 16"),
        ({"description": "x" * MAX_BYTES}, "at most 16384 are taken"),
        ({"type": "integer", "multipleOf": 9_999_991}, "multipleOf, .* is more than 10000; use rounder"),
        ({"anyOf": [{"multipleOf": 997}, {"items": {"multipleOf": 0.991}}]}, "is more than 10000"),
        ({"multipleOf": 10**4000 + 1}, "is more than 10000"),
        ({"multipleOf": 0}, "schema: multipleOf has to be greater than 0"),
        ({"multipleOf": True}, "cannot be followed"),
        ({"type": "string", "pattern": "(((\\p{L}|\u00e9))|\\p{L})"}, "cannot be followed"),  # llguidance 1.9 panics
    ],
)
def test_what_is_not_enforced_is_refused_by_name(schema: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        grammar_of(json.dumps(schema))


def test_text_that_is_no_json_is_refused() -> None:
    for text in ('{"enum": ["\\ud800"]}', '{"const": NaN}'):
        with pytest.raises(ValueError, match=r"."):
            grammar_of(text)


def test_usual_steps_of_numbers_are_taken_together() -> None:
    steps = [2, 5, 8, 12, 25, 100, 1000, 0.01, 0.25, 0.05, 1e-6]
    assert grammar_of(json.dumps({"anyOf": [{"type": "number", "multipleOf": step} for step in steps]}))


ENDLESS = {"type": "integer", "multipleOf": 9_999_991}
UNCHECKED = ("#/default", "#/$defs/x/const", "#/$defs/x%2Fconst", "#/%24defs/x/const")
"""References to what is no schema."""
HOSTILE: list[dict[str, Any]] = [
    {"type": "string", "pattern": "^(a+)+$"},
    {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"},
    {"type": "string", "pattern": "|".join(f".*{chr(97 + number % 26)}.{{{number}}}" for number in range(1, 60))},
    {"type": "string", "pattern": ".*a.{200}.*b.{200}"},
    {"type": "string", "pattern": "^(\\p{L}{1,50}\\p{N}{1,50}){1,50}$"},
    {"type": "string", "maxLength": 10**9},
    {"type": "array", "items": {"type": "integer"}, "minItems": 10**6, "maxItems": 10**7},
    {"type": "object", "properties": {f"p{number}": {} for number in range(1000)}},
    {"type": "object", "properties": {f"p{n}": {"type": "string", "format": "uri"} for n in range(200)}},
    {"anyOf": [{"const": "x" * number} for number in range(150)]},
    {"anyOf": [{"type": "integer", "minimum": number, "maximum": 10**15 - number} for number in range(200)]},
    {"anyOf": [{"type": "integer", "multipleOf": 9973, "minimum": number} for number in range(60)]},
    {"anyOf": [{"type": "number", "multipleOf": step} for step in (99.99, 33.33, 0.11, 909, 1.01)]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}}},
    {"type": "integer", "multipleOf": 9_999_991, "$defs": {"x": {"multipleOf": 0}}},
    {"type": "integer", "multipleOf": 10**9},
    {"type": "integer", "multipleOf": 4 * 10**9},
    *({"$ref": place, "default": ENDLESS, "$defs": {"x": {"const": ENDLESS}}} for place in UNCHECKED),
    nested(MAX_DEPTH),
]
CPU_SECONDS = 2.0
"""A slow machine's; here the slowest takes 0.06, and some would take minutes without the limits."""


@pytest.mark.parametrize("schema", HOSTILE, ids=range(len(HOSTILE)))
def test_no_schema_takes_long(schema: dict[str, Any]) -> None:
    """Whether it is taken or refused."""
    started = time.thread_time()
    with contextlib.suppress(ValueError):
        grammar_of(json.dumps(schema))
    assert time.thread_time() - started < CPU_SECONDS
