"""JSON schemas that answers follow, as grammars of llguidance: which are taken, and what they may cost. No torch."""

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from math import lcm
from typing import Any

from llguidance import LLMatcher, LLParserLimits

MAX_BYTES = 16_384
"""Of a schema as JSON text: a grammar of this size takes well under a second."""
MAX_DEPTH = 16
"""Of schemas in schemas."""
MAX_STEP = 10_000
"""Of the least common multiple of all `multipleOf`, by their digits. llguidance goes through as many remainders, which
none of its limits bounds: 4.4 CPU seconds for 1,000,003, and no end after three minutes for 9,999,991 (measured)."""
KEYWORDS = frozenset({
    "type", "enum", "const", "anyOf", "$ref", "$defs", "definitions",
    "properties", "required", "additionalProperties",
    "items", "prefixItems", "minItems", "maxItems",
    "minLength", "maxLength", "pattern", "format",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
})  # fmt: skip
"""Keywords of JSON Schema (draft 2020-12) that llguidance enforces in every answer."""
NOTES = frozenset({"title", "description", "default", "examples", "deprecated", "$schema", "$id", "$comment"})
"""Keywords that constrain nothing."""
REFERENCE = re.compile(r"#(/(\$defs|definitions)/[^/%]+)?")
"""Places that are checked here. llguidance follows a reference anywhere, such as into `default` or `const`."""
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
"""The slowest of hostile schemas and of 20,000 random ones took 0.06 CPU seconds for the grammar, as much for its
matcher, and 0.012 for a token of a vocabulary of 49,152 (measured)."""


def grammar_of(schema: str) -> str:
    """The grammar of a schema, as JSON text. Raises ValueError that says what is not taken, and where.

    Answers are one line, with the blanks of Python's `json.dumps`: a model that may write blanks anywhere may write
    them forever.
    """
    if len(schema.encode()) > MAX_BYTES:
        raise ValueError(f"the schema has {len(schema.encode())} bytes as JSON text; at most {MAX_BYTES} are taken")
    parsed = json.loads(schema)
    if not isinstance(parsed, dict):
        raise ValueError("the schema has to be an object")
    _check(parsed, "schema", 1)
    if lcm(*_steps(parsed)) > MAX_STEP:
        raise ValueError(
            f"the least common multiple of all multipleOf, without decimal points and last zeros, is more than "
            f"{MAX_STEP}; use rounder numbers"
        )
    try:
        grammar = LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        )
        is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust; PyO3 does not export the class
            raise
        raise ValueError(f"the schema cannot be followed: {str(error)[:300]}") from None
    if is_wrong or messages:
        raise ValueError(f"the schema cannot be followed: {messages[0][:300]}")
    return grammar


def _check(schema: Any, where: str, depth: int) -> None:
    """Raise ValueError for a keyword that is not enforced, which llguidance may ignore without a word."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{where[:200]} is nested deeper than {MAX_DEPTH} schemas")
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where[:200]} has to be a schema")
    if unknown := sorted(set(schema) - KEYWORDS - NOTES):
        taken = ", ".join(sorted(KEYWORDS))
        raise ValueError(f"{where[:200]}: the keyword {unknown[0][:100]!r} is not supported; use {taken}")
    if (step := schema.get("multipleOf")) == 0 and not isinstance(step, bool):
        raise ValueError(f"{where[:200]}: multipleOf has to be greater than 0")
    if not REFERENCE.fullmatch(str(schema.get("$ref", "#"))):
        raise ValueError(f"{where[:200]}: $ref has to be # or #/$defs/NAME, with a NAME without / and %")
    for name, inner in _inner(schema):
        _check(inner, f"{where}.{name}", depth + 1)


def _steps(schema: Any) -> Iterator[int]:
    """The digits of each `multipleOf`: 25 for 0.25 and for 2500."""
    if isinstance(schema, Mapping):
        step = schema.get("multipleOf")
        if isinstance(step, int | float) and not isinstance(step, bool):
            yield int("".join(map(str, Decimal(str(step)).as_tuple().digits)).rstrip("0") or "0")
        for _, inner in _inner(schema):
            yield from _steps(inner)


def _inner(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas in a schema, with their places."""
    for name in ("properties", "$defs", "definitions"):
        values = schema.get(name, {})
        if not isinstance(values, Mapping):
            raise ValueError(f"{name} has to be an object of schemas")
        yield from ((f"{name}.{key}", value) for key, value in values.items())
    for name in ("anyOf", "prefixItems"):
        values = schema.get(name, [])
        if not isinstance(values, list):
            raise ValueError(f"{name} has to be a list of schemas")
        yield from ((f"{name}[{number}]", value) for number, value in enumerate(values))
    yield from ((name, schema[name]) for name in ("items", "additionalProperties") if name in schema)
