"""The page of samples shows what the shards hold: every image in its place, the target tokens and no others."""

import base64
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.store import content
from vila_ops.config import Resources, TextFormat
from vila_ops.data.inspect.show import show
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.preprocess.shard_writer import tokenizer_of
from vila_ops.data.shards import Sample, read_index, read_sample
from vila_ops.data.text.conversation import Tokenizer

HOSTILE = """</span><script>alert("1")</script>'&<img src=x onerror=alert(1)>"""


class Page(HTMLParser):
    """The samples of a page: pieces in their order, (class, title, text) or the image's address."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.samples: list[list[Any]] = []
        self.facts: list[str] = []
        self.counts: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.attributes |= given.keys()
        self._inside = given.get("class") or tag
        match self._inside:
            case "sample":
                self.samples.append([])
            case "facts":
                self.facts.append("")
            case "target" | "context" if self.samples:
                self.samples[-1].append([self._inside, given["title"], ""])
            case "img":
                self.samples[-1].append(given["src"])

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        match self._inside:
            case "target" | "context" if self.samples:
                self.samples[-1][-1][2] += data
            case "facts":
                self.facts[-1] += data
            case "figcaption":
                self.counts.append(data)


@pytest.fixture
def resources(tmp_path: Path, make_resources: Any) -> Resources:
    return make_resources(tmp_path / "work")


def page_of(made: Dataset, text: TextFormat, resources: Resources, *, per_source: int) -> tuple[str, Tokenizer]:
    tokenizer = tokenizer_of(text, cache=Path(resources.storage.cache))
    out = show(made, tokenizer, Path(resources.storage.store).parent / "samples.html", per_source=per_source)
    return out.read_text(encoding="utf-8"), tokenizer


def shown_rows(made: Dataset, *, per_source: int) -> list[dict[str, Any]]:
    """The first of each source and split, sources and splits in the order of their names."""
    rows = read_index(content(made)).to_pylist()
    groups = sorted({(row["source"], row["split"]) for row in rows})
    return [row for group in groups for row in [r for r in rows if (r["source"], r["split"]) == group][:per_source]]


def sample_of(made: Dataset, row: dict[str, Any]) -> Sample:
    return read_sample(content(made), shard=row["shard"], offset=row["offset"], key=row["key"])


def test_each_sample_is_shown_as_it_lies_in_its_shard(resources: Resources, make_mixture: Any, make_text: Any) -> None:
    text = make_text()
    made = prepare(make_mixture("pairs", "documents", "instructions"), text, resources)
    html, tokenizer = page_of(made, text, resources, per_source=4)
    page, rows = Page(html), shown_rows(made, per_source=4)
    assert len(page.samples) == len(rows) > 20
    assert sum(row["num_images"] for row in rows) > 12
    for row, pieces, facts in zip(rows, page.samples, page.facts, strict=True):
        sample = sample_of(made, row)
        images = [piece for piece in pieces if isinstance(piece, str)]
        assert [base64.b64decode(url.split(",", 1)[1]) for url in images] == list(sample.images)
        assert all(url.startswith("data:image/webp;base64,") for url in images)
        ids = [t for t, on in zip(sample.input_ids, sample.is_target, strict=True) if on]
        targets = [piece for piece in pieces if piece[0] == "target"]
        assert "".join(piece[2] for piece in targets) == tokenizer.fast.decode(ids)
        assert sum(int(piece[1].removesuffix(" tokens")) for piece in targets) == sum(sample.is_target)
        written = "".join("<image>" if isinstance(piece, str) else piece[2] for piece in pieces)
        assert written == tokenizer.fast.decode(sample.input_ids).replace(
            tokenizer.fast.decode([tokenizer.image_id]) * tokenizer.image_tokens, "<image>"
        )
        tokens = sum(
            tokenizer.image_tokens if isinstance(piece, str) else int(piece[1].removesuffix(" tokens"))
            for piece in pieces
        )
        assert tokens == row["num_tokens"]
        assert facts.startswith(f"{row['split']} · {row['num_tokens']} tokens, {row['num_targets']} targets, ")
        assert sample.provenance in facts
    assert set(page.counts) == {f"{tokenizer.image_tokens} tokens"}


def test_what_the_data_says_is_text_on_the_page_and_nothing_else(
    resources: Resources, make_mixture: Any, make_text: Any, tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny / "instructions", tmp_path / "instructions")
    records = tmp_path / "instructions/records.jsonl"
    lines = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line |= {"licence": HOSTILE, "provenance": HOSTILE}
        for turn in line["turns"]:
            turn["parts"] = [{"text": HOSTILE}]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    chosen = make_mixture("instructions").model_dump()
    chosen["sources"]["instructions"]["path"] = str(tmp_path / "instructions")
    text = make_text()
    made = prepare(type(make_mixture("pairs")).model_validate(chosen), text, resources)
    html, _ = page_of(made, text, resources, per_source=1)
    page = Page(html)
    assert page.tags.isdisjoint({"script", "img", "iframe", "object"})
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "default-src 'none'" in html
    for pieces, facts in zip(page.samples, page.facts, strict=True):
        assert any(HOSTILE in piece[2] for piece in pieces if piece[0] == "target")
        assert facts.count(HOSTILE) == 2
