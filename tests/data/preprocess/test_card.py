"""A data card as a Markdown reader sees it: numbers added up by hand, and texts that do nothing but stand there."""

from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from vila_ops.config import Mixture
from vila_ops.data.preprocess.card import CHARACTERS, card
from vila_ops.data.preprocess.summary import summarise
from vila_ops.data.records import CHANGES, FIRST_ANSWER, Dropped
from vila_ops.data.shards import write_dropped

MIXTURE = Mixture.model_validate(
    {
        "name": "own",
        "split": {"validation": 0.2, "test": 0.3},
        "blend": {"kind": "weight", "unit": "tokens"},
        "sources": {
            "short": {"kind": "flan", "path": "x", "licence": "MIT", "weight": 3},
            "long": {"kind": "html", "path": "y", "licence": "MIT"},
        },
    }
)
HOSTILE = [
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "<script>alert(1)</script>\n<img src=x onerror=alert(1)>",
    "`code`, ``two`` and ```three\n```\nfence\n```\n~~~",
    "# heading\nunder\n===\nand\n---",
    "1. one\n2) two\n- three\n+ four\n* five\n- [x] six",
    "![image](http://example.com/x.png) [link](http://example.com) [ref]: http://example.com",
    "&lt;not a tag&gt; &amp; &#124;",
    "a\\|b \\ c\\\\| **bold** _it_ ~~gone~~ $x$ <http://example.com>",
    "> quoted\n>> twice\n    indented",
    "\x1b[31mred\x00 \u202eesrever",
]


def counts(records: int, samples: dict[str, int], tokens: dict[str, int], **more: Any) -> dict[str, Any]:
    """What a shard counted."""
    empty: dict[str, Any] = {
        "images": {},
        "licences": {},
        "examples": [],
        "bad": {},
        "taken_out": {},
        "images_out": {},
        "changed": {},
    }
    return {"records": records, "samples": samples, "tokens": tokens, **empty, **more}


def written(folder: Path, counted: list[tuple[str, dict[str, Any]]], dropped: list[Dropped]) -> str:
    write_dropped(dropped, "long", folder)
    return card(MIXTURE, summarise(MIXTURE, counted), folder)


def read(markdown: str) -> dict[str, list[Token]]:
    """What stands under each heading."""
    found: dict[str, list[Token]] = {}
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    heading: list[Token] = []
    for token in tokens:
        if token.type == "heading_open" or (heading and token.type == "inline"):
            heading.append(token)
        elif token.type == "heading_close":
            section = found.setdefault(heading[1].content, [])
            heading = []
        else:
            section.append(token)
    return found


def texts(tokens: list[Token]) -> list[str]:
    """What a reader sees, line by line."""
    return [text(token) for token in tokens if token.type == "inline"]


def text(token: Token) -> str:
    """What a reader sees of a line, which must be nothing but text."""
    assert token.children is not None
    assert {child.type for child in token.children} <= {"text", "code_inline", "hardbreak"}, token.children
    return "".join("\n" if child.type == "hardbreak" else child.content for child in token.children)


def rows(tokens: list[Token]) -> list[list[str]]:
    """The cells of the tables, head first."""
    found: list[list[str]] = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "tr_open":
            found.append([])
        elif before is not None and before.type in ("td_open", "th_open"):
            found[-1].append(text(token))
    return found


def test_counts_of_shards_are_added_up_and_wanted_shares_stand_beside_reached_ones(tmp_path: Path) -> None:
    left_out = {"taken_out": {"too_small": 3}, "images_out": {"too_wide": 1}, "changed": {FIRST_ANSWER: 3}}
    licences = {"MIT": 2, "CC0-1.0": 3}
    counted = [
        ("short", counts(8, {"train": 6, "test": 2}, {"train": 60, "test": 20}, licences={"MIT": 8})),
        ("long", counts(8, {"train": 5}, {"train": 300}, images={"train": 7}, licences=licences, **left_out)),
        ("short", counts(5, {"train": 4, "validation": 1}, {"train": 40, "validation": 10}, licences={"MIT": 5})),
    ]
    dropped = [
        Dropped("d1", "too_small", where="a.html:1", detail="64 x 12 pixels"),
        Dropped("d2", "too_small", where="b.html:1", detail="63 x 12 pixels"),
        Dropped("d3", "too_wide", where="", detail=""),
    ]
    seen = read(written(tmp_path, counted, dropped))
    assert texts(seen["own"]) == [
        "18 samples, 430 tokens, 7 images. Split by object: 20% for validation, 30% for test."
    ]
    assert rows(seen["Sources"])[1:] == [
        ["long", "html, document", "8", "5", "5", "0", "0", "300", "7"],
        ["short", "flan, instructions", "13", "13", "10", "1", "2", "130", "0"],
    ]
    # 400 tokens to train on: 300 of samples of 10 tokens, 100 of samples of 60, which are 1.67, so 2.
    assert rows(seen["An epoch"]) == [
        ["source", "wanted of tokens", "reached of samples", "of tokens", "samples drawn", "of", "times seen"],
        ["long", "25.00%", "6.25%", "28.57%", "2", "5", "0.40"],
        ["short", "75.00%", "93.75%", "71.43%", "30", "10", "3.00"],
    ]
    assert "source 'short' has 10 samples, too few for 75.0% of the tokens" in texts(seen["An epoch"])[-1]
    assert rows(seen["Licences"])[1:] == [["long", "CC0-1.0", "3"], ["long", "MIT", "2"], ["short", "MIT", "13"]]
    assert rows(seen["Left out"])[1:] == [
        ["long", "record, by a rule", "too_small", "3", "a.html:1: 64 x 12 pixels"],
        ["long", "image of a document, by a rule", "too_wide", "1", "d3"],
    ]
    assert rows(seen["Changed"])[1:] == [["long", FIRST_ANSWER, CHANGES[FIRST_ANSWER], "3"]]


def test_a_blend_is_said_in_words(tmp_path: Path) -> None:
    counted = [(name, counts(4, {"train": 4}, {"train": 40})) for name in ("short", "long")]
    write_dropped([], "long", tmp_path)
    plain = {name: {**MIXTURE.sources[name].model_dump(), "weight": None} for name in MIXTURE.sources}
    for blend, words in (
        ({"kind": "weight"}, "Blended by the sources' weights, in samples."),
        ({"kind": "size", "temperature": 2}, "Blended by the sources' sizes to the power 1 / 2, in samples."),
        ({"kind": "repeats"}, "Each source is seen as often as its repeats says."),
    ):
        mixture = Mixture.model_validate({**MIXTURE.model_dump(), "sources": plain, "blend": blend})
        seen = read(card(mixture, summarise(mixture, counted), tmp_path))
        assert texts(seen["An epoch"])[0] == words
        assert [row[1] for row in rows(seen["An epoch"])[1:]] == ["50.00%", "50.00%"]
        assert texts(seen["Left out"]) == ["Nothing."]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_texts_of_the_data_stand_in_the_card_as_they_are(hostile: str, tmp_path: Path) -> None:
    counted = [
        ("short", counts(5, {"train": 5}, {"train": 50}, examples=[hostile, "Plain."])),
        ("long", counts(5, {"train": 4}, {"train": 40}, licences={hostile: 4}, taken_out={"too_small": 1})),
    ]
    seen = read(written(tmp_path, counted, [Dropped("d", "too_small", where=hostile, detail=hostile)]))
    assert list(seen) == ["own", "Sources", "An epoch", "Licences", "Left out", "Changed", "Examples", "long", "short"]
    shown = [" ".join("".join(c if c.isprintable() else " " for c in line).split()) for line in hostile.splitlines()]
    assert [token.type for token in seen["short"] if token.level == 0] == ["blockquote_open", "blockquote_close"] * 2
    assert texts(seen["short"]) == ["\n".join(shown), "Plain."]
    one_line = " ".join(shown)
    assert rows(seen["Licences"])[1:] == [["long", one_line, "4"]]
    assert rows(seen["Left out"])[1][4] == f"{one_line}: {one_line}"[: CHARACTERS + 1]


def test_a_long_text_is_cut_and_says_so(tmp_path: Path) -> None:
    counted = [(name, counts(5, {"train": 5}, {"train": 50}, examples=["<" * 500])) for name in ("short", "long")]
    seen = read(written(tmp_path, counted, []))
    assert texts(seen["short"]) == ["<" * CHARACTERS + "…"]
