"""Any JSON at all is a record, a drop with a reason, or a refusal of the file; never another error."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vila_ops.config import Source
from vila_ops.config.sources import Flan, Llava, Messages, Vflan
from vila_ops.data import sources
from vila_ops.data.raw.files import Span
from vila_ops.data.records import Dropped, Image, Record

KEYS = [
    *("id", "image", "images", "video", "image_url", "path", "url", "bytes", "base64", "index", "type", "text", "role"),
    *("content", "from", "value", "user", "assistant", "weight", "loss", "messages", "conversations", "licence"),
    *("inputs", "targets", "instruction", "outputs", "question", "answer", "image_base64_str"),
]
SPEAKERS = ["user", "assistant", "system", "human", "gpt", "tool"]
WORDS = [
    *(
        *SPEAKERS,
        "image",
        "text",
        "image_url",
        "video",
        "<image>",
        "a <image>",
        "",
        " ",
        "\0",
        "\ud800",
        "a" * 300,
        "x://",
    ),
    *("a.png", "gone.png", "../a.png", "/a.png", "file:///a.png", "data:image/png;base64,aGk=", "data:,", "http://["),
]
values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=6,
)
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(SPEAKERS), "content": values})
    | st.fixed_dictionaries({"from": st.sampled_from(SPEAKERS), "value": values}, optional={"weight": values})
    | values,
    max_size=4,
)
records = st.dictionaries(st.sampled_from(KEYS), values, max_size=6).flatmap(
    lambda one: st.fixed_dictionaries(
        {key: st.just(value) for key, value in one.items()},
        optional={key: turns for key in ("messages", "conversations") if key not in one},
    )
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        lambda **own: Messages(**own),
        lambda **own: Llava(**own),
        lambda **own: Llava(**own, placement="vila"),
        lambda **own: Llava(**own, render="caption"),
        lambda **own: Vflan(**own),
        lambda path, licence, images: Flan(path=path, licence=licence),
    ],
    ids=["messages", "llava", "vila", "caption", "vflan", "flan"],
)
def test_any_json_is_a_record_or_a_drop_with_a_reason(kind: Any) -> None:
    @settings(max_examples=15, deadline=None)
    @given(stated=st.lists(records | values, min_size=1, max_size=30))
    def check(stated: list[Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "a.png").write_bytes(b"a")
            path = Path(folder) / "records.jsonl"
            path.write_text("\n".join(["{}", *map(json.dumps, stated)]))  # a file that begins with a list is an array
            source: Source = kind(path=str(path), licence="", images=folder)
            (file,) = sources.raw_files(source, {}, cache=Path(folder) / "cache")
            span = Span(name=file.name, path=file.path, digest=file.digest, start=0, stop=file.count, mark=0)
            for made in sources.read(source, {}, span):
                for one in made:
                    assert isinstance(one, Record) or (isinstance(one, Dropped) and one.reason and one.detail)
                    if isinstance(one, Record):
                        images = [part for turn in one.turns for part in turn.parts if isinstance(part, Image)]
                        assert {image.data for image in images} <= {b"a", b"hi"}

    check()
