"""Answers follow their JSON schema, at any temperature and seed, as jsonschema reads it."""

import json
import logging
import time
from typing import Any

import jsonschema
import pytest
from llguidance import LLParserLimits

from tests.generate.test_json_grammar import CPU_SECONDS, HOSTILE
from tests.generate.torch_engine.test_scheduler import all_events, of, scheduler
from tests.generate.torch_engine.test_scheduler import folder as folder
from tests.generate.torch_engine.test_scheduler import loaded as loaded
from vila_ops.errors import UnsupportedSetting
from vila_ops.generate.request import Prompt, Sampling
from vila_ops.generate.torch_engine import grammar as grammar_module
from vila_ops.generate.torch_engine.grammar import Grammars
from vila_ops.generate.torch_engine.loaded_model import LoadedModel
from vila_ops.generate.torch_engine.request_state import GenerationRequest

WORD = {"type": "string", "maxLength": 6}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"},
        "age": {"type": "integer", "minimum": 3, "maximum": 140},
        "tall": {"type": "boolean"},
        "share": {"type": "number", "minimum": 0, "maximum": 1},
    },
    "required": ["name", "age", "tall"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": PERSON,
    "array": {"type": "array", "items": {"anyOf": [WORD, {"type": "null"}]}, "minItems": 2, "maxItems": 4},
    "choice": {"enum": ["cat", "dog", 7, None, {"a": [1, 2]}]},
    "nested": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"word": WORD, "date": {"type": "string", "format": "date"}, "one": {"const": 1}},
                "required": ["word", "one"],
                "additionalProperties": False,
            }
        },
    },
    "unicode": {"type": "object", "properties": {"\u00e4 \"q\"": WORD}, "required": ["\u00e4 \"q\""],
                "additionalProperties": False},
}  # fmt: skip


def answers(loaded: LoadedModel, schema: dict[str, Any], count: int, **settings: Any) -> list[tuple[str, str]]:
    """Texts and finish reasons of answers with seeds from 0."""
    grammars, text = Grammars(loaded.tokenizer), json.dumps(schema)
    prompt = Prompt(loaded.tokenizer.prompt([("user", ("Who?",))]))
    requests = [
        GenerationRequest(
            prompt,
            Sampling(160, loaded.tokenizer.stop_ids, seed=seed, json_schema=text, **settings),
            grammars.of(text),
        )
        for seed in range(count)
    ]
    events = all_events(scheduler(loaded, slots=16), requests)
    deltas = [of(request, events) for request in requests]
    ids = [[token for delta in one for token in delta.ids] for one in deltas]
    special = set(loaded.tokenizer.fast.added_tokens_decoder)
    assert not any(special & set(one) for one in ids)
    texts = [loaded.tokenizer.decode(one) for one in ids]
    return [(made, str(one[-1].finish_reason)) for made, one in zip(texts, deltas, strict=True)]


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_of_many_seeds_follow_the_schema(loaded: LoadedModel, name: str) -> None:
    made = answers(loaded, SCHEMAS[name], 32, temperature=1.0)
    for text, reason in made:
        assert reason == "stop"
        value = json.loads(text)
        jsonschema.validate(value, SCHEMAS[name], format_checker=jsonschema.FormatChecker())
        assert "\n" not in text
    assert len(set(made)) >= (3 if name == "choice" else 25)


def test_bias_and_penalties_do_not_lead_out_of_the_grammar(loaded: LoadedModel) -> None:
    stops = dict.fromkeys(loaded.tokenizer.stop_ids, 100.0)
    settings = {"temperature": 2.0, "logit_bias": stops, "frequency_penalty": 2.0, "top_p": 0.5, "min_p": 0.2}
    for text, reason in answers(loaded, PERSON, 8, **settings):
        jsonschema.validate(json.loads(text), PERSON)
        assert reason == "stop"


def test_greedy_answers_follow_the_schema_too(loaded: LoadedModel) -> None:
    ((text, reason),) = answers(loaded, PERSON, 1)
    jsonschema.validate(json.loads(text), PERSON)
    assert reason == "stop"


def test_an_object_of_any_form_is_the_beginning_of_json(loaded: LoadedModel) -> None:
    for text, reason in answers(loaded, {"type": "object"}, 16, temperature=1.0):
        assert text.startswith("{")
        if reason == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            with pytest.raises(json.JSONDecodeError) as caught:
                json.loads(text)
            assert caught.value.pos >= len(text) - 8 or "Unterminated string" in caught.value.msg


def test_an_answer_without_a_schema_is_the_same_beside_one_with(loaded: LoadedModel) -> None:
    prompt = Prompt(loaded.tokenizer.prompt([("user", ("Who?",))]))
    text = json.dumps(PERSON)
    free, bound = (
        GenerationRequest(prompt, Sampling(12, frozenset(), seed=1, temperature=1.0)),
        GenerationRequest(prompt, Sampling(12, frozenset(), json_schema=text), Grammars(loaded.tokenizer).of(text)),
    )
    alone = GenerationRequest(prompt, free.sampling)
    (expected,) = [[delta.ids for delta in of(alone, all_events(scheduler(loaded), [alone]))]]
    assert [delta.ids for delta in of(free, all_events(scheduler(loaded), [free, bound]))] == expected


def test_an_answer_whose_grammar_takes_too_much_ends_alone(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The others neither end nor are computed again."""
    prompt = Prompt(loaded.tokenizer.prompt([("user", ("Who?",))]))
    sampling = Sampling(12, frozenset(), seed=1, temperature=1.0)
    alone = GenerationRequest(prompt, sampling)
    (expected,) = [[delta.ids for delta in of(alone, all_events(scheduler(loaded), [alone]))]]
    monkeypatch.setattr(grammar_module, "LIMITS", LLParserLimits(max_lexer_states=60, verbose_errors=False))
    text = json.dumps({"type": "string", "pattern": ".*a.{200}.*b.{200}"})
    hostile = GenerationRequest(prompt, Sampling(40, frozenset(), seed=2, temperature=1.0, json_schema=text),
                                Grammars(loaded.tokenizer).of(text))  # fmt: skip
    free = GenerationRequest(prompt, sampling)
    with caplog.at_level(logging.WARNING):
        events = all_events(scheduler(loaded), [free, hostile])
    assert [delta.ids for delta in of(free, events)] == expected
    (error,) = [one for request, one in events if request is hostile and isinstance(one, Exception)]
    assert isinstance(error, UnsupportedSetting)
    assert error.name == "response_format"
    assert not caplog.messages


@pytest.mark.parametrize("schema", HOSTILE, ids=range(len(HOSTILE)))
def test_no_schema_takes_long_in_an_answer(loaded: LoadedModel, schema: dict[str, Any]) -> None:
    """To be compiled, and for the tokens of an answer together."""
    text = json.dumps(schema)
    started = time.thread_time()
    try:
        made = Grammars(loaded.tokenizer).of(text)
    except ValueError:
        made = None
    assert time.thread_time() - started < CPU_SECONDS
    prompt = Prompt(loaded.tokenizer.prompt([("user", ("Who?",))]))
    sampling = Sampling(24, loaded.tokenizer.stop_ids, seed=1, temperature=2.0, json_schema=text)
    if made is not None:
        started = time.thread_time()
        all_events(scheduler(loaded), [GenerationRequest(prompt, sampling, made)])
        assert time.thread_time() - started < 24 * CPU_SECONDS
