"""No file leads to a traceback: of damaged, foreign and odd raw files each source gives records, drops, or an error.

Every kind that reads files is drawn upon: bytes of its files are damaged, records get values of other shapes, and
columns other types. VILA_FUZZ sets how many files of each kind are tried (`make faults`: 10 000).
"""

import contextlib
import copy
import gzip
import io
import json
import os
import random
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow
from pydantic import TypeAdapter

from vila_ops.config.sources import Source
from vila_ops.data.download.sources import urls_of
from vila_ops.data.inspect.guess import guess
from vila_ops.data.inspect.lint import LintSummary, lint
from vila_ops.data.sources import SOURCES

TRIES = max(20, int(os.environ.get("VILA_FUZZ", "1000")) // 50)
URL = "http://ex.test/a.png"
Download = Callable[[Path, Mapping[str, Any]], None]


def png() -> bytes:
    out = io.BytesIO()
    Pillow.new("RGB", (70, 66), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


IMAGE = png()
TALK = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "Red."}]
TURNS = [
    {"role": "user", "parts": [{"image": "a.png"}, {"text": "Which colour?"}]},
    {"role": "assistant", "parts": [{"text": "Red."}]},
]
OURS = {"id": "1", "object": "x", "category": "", "licence": "CC0-1.0", "provenance": "p", "turns": TURNS}
CONTENT = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "Which colour?"}]
CHAT = {"messages": [{"role": "user", "content": CONTENT}, {"role": "assistant", "content": "Red."}]}
MMC4 = {
    "url": "http://ex.test/p", "text_list": ["Intro.", "A ball."], "similarity_matrix": [[0.1, 0.2]],
    "image_info": [{"raw_url": URL, "matched_text_index": 1, "matched_sim": 0.2}],
}  # fmt: skip
INTERLEAVED = {
    "general_metadata": {"url": "http://ex.test/p", "score": 0.5}, "texts": ["Intro.", None], "images": [None, URL],
    "metadata": [None, {"score": 0.5}],
}  # fmt: skip
RECORDS: dict[str, tuple[str, Any]] = {
    "jsonl": ("records.jsonl", OURS),
    "llava": ("a.json", {"id": "1", "image": "a.png", "conversations": TALK}),
    "llava_cc3m": ("chat.json", {"id": "1", "image": "a.png", "conversations": TALK}),
    "mmc4": ("a.jsonl", MMC4),
    "interleaved": ("a.jsonl", INTERLEAVED),
    "flan": ("a.jsonl", {"inputs": "Translate: cat", "targets": "chat"}),
    "vflan": ("a.jsonl", {"question": "Which colour?", "answer": "Red.", "image": ["a.png"]}),
    "messages": ("a.jsonl", CHAT),
}
"""File and record of each kind that reads JSON."""
TABLES: dict[str, dict[str, Any]] = {
    "coyo": {"id": [1, 2], "url": [URL, URL], "text": ["A ball.", "B"], "clip_similarity_vitb32": [0.3, 0.4]},
    "hf_parquet": {"image": [{"bytes": IMAGE, "path": "a.png"}] * 2, "text": ["A ball.", "B"], "score": [0.3, 0.4]},
    "flan": {"inputs": ["Translate: cat"] * 2, "targets": ["chat"] * 2},
    "interleaved": {key: [value] * 2 for key, value in INTERLEAVED.items()},
}
"""The columns of each kind that reads Parquet."""
OTHERS = ("webdataset", "html", "table")


def members() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        files = {"1.png": IMAGE, "1.json": b'{"caption": "A ball.", "score": NaN}', "2.png": IMAGE, "2.txt": b"B"}
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


WHOLE: dict[str, tuple[str, bytes]] = {
    "webdataset": ("a.tar", members()),
    "html": ("a.html", b"<h1>Page</h1><img src='a.png'><p>A ball."),
    "table": ("a.csv", b'image,text,score\na.png,"A ball.",0.5\na.png,"Two\nlines.",\n"a.png",B,1\n'),
}


def parquet(columns: Mapping[str, Any]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), out, row_group_size=1)
    return out.getvalue()


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in records).encode()


def files_of(kind: str) -> Iterator[tuple[str, bytes]]:
    """A whole file of each container of a kind: name and content."""
    if kind in RECORDS:
        name, record = RECORDS[kind]
        yield name, json.dumps([record, record], indent=1).encode() if name.endswith(".json") else lines(record, record)
        if kind not in ("jsonl", "llava_cc3m"):
            yield "a.jsonl.gz", gzip.compress(lines(record, record))
    if kind == "mmc4":
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jsonl", lines(RECORDS[kind][1]))
        yield "a.jsonl.zip", packed.getvalue()
    if kind in TABLES:
        yield "a.parquet", parquet(TABLES[kind])
    if kind in OTHERS:
        yield WHOLE[kind]


KINDS = sorted({*RECORDS, *TABLES, *OTHERS})


@pytest.fixture
def check(tmp_path: Path, download: Download) -> Callable[..., LintSummary]:
    """Writes a raw file, and reads the source of its kind: for text as a conversation where the kind has both."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    (raw / "a.png").write_bytes(IMAGE)
    download(out / "a", {URL: IMAGE})

    def check(kind: str, name: str, content: bytes, **settings: Any) -> LintSummary:
        for old in raw.iterdir():
            if old.name != "a.png":
                old.unlink()
        (raw / name).write_bytes(content)
        if kind == "llava_cc3m":
            (raw / "metadata.json").write_text('[{"image": "a.png", "url": "http://ex.test/"}]')
        images = str(out) if kind in ("mmc4", "coyo", "interleaved") else str(raw)
        chosen = {"kind": kind, "path": str(raw), "licence": "CC0-1.0", "images": images, **settings}
        if kind == "jsonl":
            chosen = {"kind": kind, "path": str(raw), "render": "conversation"}
        if kind in ("flan", "webdataset", "hf_parquet", "html"):
            del chosen["images"]
        source: Source = TypeAdapter(Source).validate_python(chosen)
        *_, summary = lint(source, cache=tmp_path / "cache")
        assert isinstance(summary, LintSummary)
        with contextlib.suppress(ValueError):
            guess(str(raw / name))
        with contextlib.suppress(ValueError):
            urls_of(source, raw / name)
        return summary

    return check


def test_every_kind_that_reads_files_is_tried() -> None:
    assert SOURCES.keys() - set(KINDS) == {
        "tux_paint",
        "fluent_emoji",
        "emoji_datasource",
        "gimp_help",
        "gcompris",
        "wordnet",
        "gnome_help",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_file_has_no_fault_but_a_repeated_id(kind: str, check: Callable[..., LintSummary]) -> None:
    for name, content in files_of(kind):
        summary = check(kind, name, content)
        assert summary.records >= 1, name
        assert set(summary.faults) <= {"duplicate_id", "bad_image_not_an_image"}, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_and_foreign_bytes(kind: str, check: Callable[..., LintSummary]) -> None:
    draw = random.Random(kind)
    for name, whole in files_of(kind):
        for _ in range(TRIES):
            check(kind, name, damaged(whole, draw))
        for content in FOREIGN:
            check(kind, name, content)


FOREIGN = [
    b"", b"\n", b"\0" * 999, b"[", b"{", b"[]", b"{}", b"null", b"[null]", b"\xff\xfe[\0]\0", b"\xef\xbb\xbf", b"PAR1",
    b"PK\x03\x04", b"\x1f\x8b", b"\x1f\x8b\x08" + bytes(20), IMAGE, b"<", b"a.png", b'"', b"," * 99, b"image,text\n",
    b"image,text\n\xff,\xff\n", b"%PDF-1.7", b"ustar" * 99, b"[" * 99_999, b'{"a":' * 9_999, gzip.compress(IMAGE),
    b"-----BEGIN", "äöü".encode("latin-1") * 9, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
]  # fmt: skip
"""Files of no format, of another, and the beginnings of some."""


INSERTED = (b'"', b"\n", b"\0", b"[", b"}", b",", b"\xed\xa0\x80", b"\\ud800")


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """The file with some bits flipped, cut, with bytes put in or left out, or with a part of it twice."""
    data = bytearray(whole)
    for _ in range(draw.choice([1, 1, 2, 8])):
        place = draw.randrange(len(data) + 1)
        other = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0 if data:
                data[min(place, len(data) - 1)] ^= 1 << draw.randrange(8)
            case 1:
                del data[place:]
            case 2:
                data[place:place] = draw.choice(
                    [draw.randbytes(5), b'"', b"\n", b"\0", b"[", b"}", b",", b"\xed\xa0\x80"]
                )
            case 3:
                del data[place : place + draw.choice([1, 9, 99])]
            case 4:
                data[place:place] = data[min(place, other) : max(place, other)]
            case _:
                data[place : place + 4] = draw.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
    return bytes(data)


ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1e400, float("nan"), 2**70, "", " ", "\0", "\ud800", "<image>", "a" * 300, "é" * 200, "a.png",
    "../a.png", "/etc/passwd", "data:image/png;base64,AA==", "data:,", "http://[", "file:///a.png", [], {}, [[]], [{}],
    [None], {"a": {"b": [1]}}, {"url": None}, {"path": "a.png"}, {"type": "image"}, [["a.png"]], "🦙", "\u202e",
)  # fmt: skip
"""Values that a key may have in somebody's file."""


MORE = ("image", "images", "video", "url", "weight", "name", "metadata", "\0")


def odd(value: Any, draw: random.Random) -> Any:
    """The value with another one somewhere inside: odd, absent, doubled, wrapped or under another key."""
    value = copy.deepcopy(value)
    place, key = None, None
    inside = value
    while isinstance(inside, dict | list) and inside and (place is None or draw.random() < 0.7):
        place = inside
        key = draw.choice(list(inside)) if isinstance(inside, dict) else draw.randrange(len(inside))
        inside = inside[key]
    if place is None or key is None:
        return draw.choice(ODD)
    match draw.randrange(6):
        case 0:
            del place[key]
        case 1:
            place[key] = [inside]
        case 2:
            place[key] = {"value": inside}
        case 3 if isinstance(place, list):
            place.append(copy.deepcopy(inside))
        case 3:
            place[draw.choice(["image", "images", "video", "url", "weight", "name", "metadata", "\0"])] = draw.choice(
                ODD
            )
        case _:
            place[key] = draw.choice(ODD)
    return value if draw.random() < 0.7 else odd(value, draw)


@pytest.mark.parametrize("kind", sorted(RECORDS))
def test_records_of_other_shapes(kind: str, check: Callable[..., LintSummary]) -> None:
    draw = random.Random(kind)
    name, record = RECORDS[kind]
    for _ in range(TRIES):
        some = [odd(record, draw) for _ in range(5)]
        content = json.dumps(some).encode() if name.endswith(".json") else lines(record, *some)
        settings = {"render": "caption"} if kind in ("llava", "llava_cc3m") and draw.random() < 0.3 else {}
        check(kind, name, content, **settings)


COLUMNS: tuple[pa.Array, ...] = (
    pa.array([None, None], pa.string()), pa.array([1, None]), pa.array([0.5, float("nan")]), pa.array(["", "a\0"]),
    pa.array([b"\xff", None]), pa.array([["a"], None]), pa.array([[None], []], pa.list_(pa.string())),
    pa.array([{"bytes": None, "path": None}, None], pa.struct({"bytes": pa.binary(), "path": pa.string()})),
    pa.array([{"bytes": b"x", "path": "../a"}, None]), pa.array([[{"bytes": IMAGE, "path": "a"}], []]),
    pa.array([TALK, None]), pa.array([[{"role": "user", "content": "Hi"}], []]), pa.array([True, False]),
    pa.array(["a", "b"]).dictionary_encode(), pa.array([[[1]], []]), pa.nulls(2), pa.array(["{", "[1]"]),
    pa.array(["a", "b"], pa.large_string()), pa.array([["a", "b"]] * 2, pa.list_(pa.string(), 2)),
)  # fmt: skip


@pytest.mark.parametrize("kind", sorted(TABLES))
def test_columns_of_other_types(kind: str, check: Callable[..., LintSummary]) -> None:
    draw = random.Random(kind)
    for _ in range(TRIES):
        columns = {name: pa.array(values) for name, values in TABLES[kind].items()}
        for _ in range(draw.choice([1, 1, 2])):
            columns[draw.choice([*columns, "more"])] = draw.choice(COLUMNS)
        if draw.random() < 0.2:
            columns.pop(draw.choice(list(columns)))
        settings = {"render": "conversation"} if kind == "hf_parquet" and draw.random() < 0.4 else {}
        check(kind, "a.parquet", parquet(columns), **settings)
