import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vila_ops.config.sources import HfParquet
from vila_ops.data import sources
from vila_ops.data.raw.files import RawFile, Span
from vila_ops.data.records import Dropped, Image, Record, Turn

Found = list[list[Record | Dropped]]
ReadAll = Callable[[HfParquet], Found]
Scan = Callable[[HfParquet], list[RawFile]]

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
"""How `datasets` stores its Image feature."""
SPEAKER = pa.list_(pa.struct({"from": pa.string(), "value": pa.string()}))
MESSAGES = pa.list_(
    pa.struct({"content": pa.list_(pa.struct({"text": pa.string(), "type": pa.string()})), "role": pa.string()})
)
EXCHANGES = pa.list_(pa.struct({"user": pa.string(), "assistant": pa.string(), "source": pa.string()}))


def features(**columns: Any) -> dict[bytes, bytes]:
    """The note that `datasets` leaves in a file's schema."""
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


def write(path: Path, rows: list[dict[str, Any]], group: int = 100, **columns: pa.DataType) -> None:
    schema = pa.schema(columns, metadata=features(image={"_type": "Image"}, text={"dtype": "string", "_type": "Value"}))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group)


def source(path: Path, **more: Any) -> HfParquet:
    return HfParquet(path=str(path), licence="MIT", **more)


def embedded(data: bytes, path: str | None = None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def turns(found: Found) -> tuple[Turn, ...]:
    ((record,),) = found
    assert isinstance(record, Record), record
    return record.turns


def test_a_row_of_the_image_feature_and_text_is_a_captioned_image(read_all: ReadAll, tmp_path: Path):
    row = {"image": embedded(b"cat", "Cat.JPG"), "text": "a cat\n", "score": 0.5, "label": 3, "ok": True}
    kinds = {"score": pa.float64(), "label": pa.int64(), "ok": pa.bool_()}
    write(tmp_path / "train-00000-of-00001.parquet", [row], image=IMAGE, text=pa.string(), **kinds)
    assert read_all(source(tmp_path)) == [
        [
            Record(
                id="train-00000-of-00001.parquet:1",
                object="cat.jpg",
                turns=(Turn("document", (Image(b"cat"), "a cat")),),
                category="",
                licence="MIT",
                provenance="train-00000-of-00001.parquet:1",
                scores={"score": 0.5, "label": 3.0},
            )
        ]
    ]


@pytest.mark.parametrize(
    ("kind", "cell", "images"),
    [
        (pa.binary(), b"a", [b"a"]),
        (pa.large_binary(), b"a", [b"a"]),
        (pa.list_(IMAGE), [embedded(b"a"), embedded(b"b")], [b"a", b"b"]),
        (pa.large_list(pa.binary()), [b"a", b"b"], [b"a", b"b"]),
    ],
)
def test_images_may_be_plain_bytes_and_several(
    kind: pa.DataType, cell: Any, images: list[bytes], read_all: ReadAll, tmp_path: Path
):
    write(tmp_path / "a.parquet", [{"jpg": cell, "caption": "x"}], jpg=kind, caption=pa.large_string())
    ((record,),) = read_all(source(tmp_path, image="jpg", text="caption"))
    assert isinstance(record, Record)
    assert record.turns == (Turn("document", (*map(Image, images), "x")),)
    assert hashlib.sha256(b"a").hexdigest().startswith(record.object)


def test_conversations_of_the_cauldron_show_their_images_before_the_first_question(read_all: ReadAll, tmp_path: Path):
    texts = [
        {"user": "Question: what?", "assistant": "Two cats.", "source": "x"},
        {"user": "And?", "assistant": "A dog.", "source": "x"},
    ]
    row = {"images": [embedded(b"a"), embedded(b"b")], "texts": texts}
    write(tmp_path / "a.parquet", [row], images=pa.list_(IMAGE), texts=EXCHANGES)
    found = read_all(source(tmp_path, image="images", text="texts", render="conversation"))
    assert turns(found) == (
        Turn("user", (Image(b"a"), Image(b"b"), "Question: what?")),
        Turn("assistant", ("Two cats.",)),
        Turn("user", ("And?",)),
        Turn("assistant", ("A dog.",)),
    )


@pytest.mark.parametrize(
    ("texts", "images"),
    [
        (pa.array(["a cup"], pa.string_view()), pa.array([b"x"], pa.binary_view())),
        (pa.array(["a cup"]).dictionary_encode(), pa.array([b"x"], pa.large_binary())),
    ],
)
def test_texts_of_polars_and_pandas_are_read(texts: pa.Array, images: pa.Array, read_all: ReadAll, tmp_path: Path):
    """kuzudb/kuzu#1917 and pola-rs/polars#26427 (views); a categorical column of pandas is a dictionary."""
    pq.write_table(pa.table({"image": images, "text": texts}), tmp_path / "a.parquet")
    assert turns(read_all(source(tmp_path))) == (Turn("document", (Image(b"x"), "a cup")),)


SEQUENCE = pa.struct({"from": pa.list_(pa.string()), "value": pa.list_(pa.string())})
"""Sequence({"from": ..., "value": ...}) of `datasets` (huggingface/datasets#888, #7137, #7569)."""


def test_a_sequence_of_turns_is_stored_as_a_mapping_of_lists(read_all: ReadAll, tmp_path: Path):
    good = {"from": ["human", "gpt"], "value": ["<image>Q?", "A"]}
    bad = {"from": ["human", "gpt"], "value": ["<image>Q?"]}
    rows = [{"image": embedded(b"a"), "said": said} for said in (good, bad, None)]
    write(tmp_path / "a.parquet", rows, image=IMAGE, said=SEQUENCE)
    (record,), *dropped = read_all(source(tmp_path, text="said", render="conversation"))
    assert isinstance(record, Record)
    assert record.turns == (Turn("user", (Image(b"a"), "Q?")), Turn("assistant", ("A",)))
    assert [one.reason for (one,) in dropped if isinstance(one, Dropped)] == ["malformed_turns", "malformed_turns"]


def test_turns_may_be_json_text(read_all: ReadAll, tmp_path: Path):
    good = json.dumps([{"from": "human", "value": "<image>Q?"}, {"from": "gpt", "value": "A"}])
    texts = [good, "What is it?", good[:-1], '{"from": "human"}', "[" * 100_000, None]
    rows = [{"image": embedded(b"a"), "said": text} for text in texts]
    write(tmp_path / "a.parquet", rows, image=IMAGE, said=pa.string())
    (record,), *dropped = read_all(source(tmp_path, text="said", render="conversation"))
    assert isinstance(record, Record)
    assert record.turns == (Turn("user", (Image(b"a"), "Q?")), Turn("assistant", ("A",)))
    reasons = [one.reason for (one,) in dropped if isinstance(one, Dropped)]
    assert reasons == ["bad_json", "bad_json", "malformed_turns", "bad_json", "malformed_turns"]


def test_columns_beside_the_turns_are_read_or_refuse_the_row(read_all: ReadAll, tmp_path: Path):
    said = [{"from": "human", "value": "<image>Q?"}, {"from": "gpt", "value": "A"}]
    rows = [{"image": embedded(b"a"), "said": said, "system": "Be brief.", "tools": "[]"},
            {"image": embedded(b"a"), "said": said, "system": None, "tools": '[{"name": "f"}]'}]  # fmt: skip
    write(tmp_path / "a.parquet", rows, image=IMAGE, said=SPEAKER, system=pa.string(), tools=pa.string())
    (record,), (dropped,) = read_all(source(tmp_path, text="said", render="conversation"))
    assert isinstance(record, Record)
    assert record.turns[:2] == (Turn("system", ("Be brief.",)), Turn("user", (Image(b"a"), "Q?")))
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "tool_call"


def test_chat_messages_keep_images_where_their_parts_stand(read_all: ReadAll, tmp_path: Path):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Is <image> this"}, {"type": "image", "text": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    row = {"images": [embedded(b"a")], "messages": messages}
    write(tmp_path / "a.parquet", [row], images=pa.list_(IMAGE), messages=MESSAGES)
    found = read_all(source(tmp_path, image="images", text="messages", render="conversation"))
    assert turns(found) == (
        Turn("system", ("Be brief.",)),
        Turn("user", ("Is <image> this", Image(b"a"))),
        Turn("assistant", ("Yes.",)),
    )


def test_llavas_turns_keep_images_where_their_placeholders_stand(read_all: ReadAll, tmp_path: Path):
    said = [{"from": "human", "value": "What is\n<image>?"}, {"from": "gpt", "value": "A cup."}]
    rows = [
        {"image": embedded(b"a"), "conversations": said},
        {"image": None, "conversations": [{**said[0], "value": "Hi"}, said[1]]},
    ]
    write(tmp_path / "a.parquet", rows, image=IMAGE, conversations=SPEAKER)
    (first,), (second,) = read_all(source(tmp_path, text="conversations", render="conversation"))
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert first.turns == (Turn("user", ("What is\n", Image(b"a"), "?")), Turn("assistant", ("A cup.",)))
    assert second.turns == (Turn("user", ("Hi",)), Turn("assistant", ("A cup.",)))


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"image": embedded(b"", "/data/cat.jpg"), "text": "x"}, "external_image", "/data/cat.jpg"),
        ({"image": {"bytes": None, "path": "cat.jpg"}, "text": "x"}, "external_image", "embedded"),
        ({"image": {"bytes": None, "path": None}, "text": "x"}, "no_image", "without bytes"),
        ({"image": None, "text": "x"}, "no_image", "'image'"),
        ({"image": embedded(b"a"), "text": None}, "no_text", "'text'"),
        ({"image": embedded(b"a"), "text": " \n"}, "no_text", ""),
        ({"image": embedded(b"a"), "text": "a\0"}, "nul_in_text", ""),
    ],
)
def test_a_faulty_row_is_dropped_with_its_number_and_its_neighbours_are_not(
    row: dict[str, Any], reason: str, detail: str, read_all: ReadAll, tmp_path: Path
):
    good = {"image": embedded(b"a"), "text": "x"}
    write(tmp_path / "a.parquet", [good, row, good], image=IMAGE, text=pa.string())
    first, (fault,), last = read_all(source(tmp_path))
    assert isinstance(fault, Dropped)
    assert (fault.reason, fault.where) == (reason, "a.parquet:2")
    assert detail in fault.detail
    assert isinstance(first[0], Record)
    assert isinstance(last[0], Record)


def test_a_damaged_row_group_costs_its_rows_and_no_others(read_all: ReadAll, tmp_path: Path):
    rows = [{"image": embedded(b"<%d>" % n * 300), "text": f"t{n}"} for n in range(40)]
    schema = pa.schema({"image": IMAGE, "text": pa.string()})
    pq.write_table(
        pa.Table.from_pylist(rows, schema=schema), tmp_path / "a.parquet", row_group_size=10, use_dictionary=False
    )
    path = tmp_path / "a.parquet"
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start : start + 8] = b"\xff" * 8
    path.write_bytes(data)
    found = [held[0] for held in read_all(source(tmp_path))]
    assert [one.reason if isinstance(one, Dropped) else "" for one in found] == [""] * 20 + ["damaged_rows"] * 10 + [
        ""
    ] * 10


def test_spans_are_slices_of_the_whole_across_row_groups(read_all: ReadAll, scan: Scan, tmp_path: Path):
    rows = [{"image": embedded(b"%d" % n), "text": f"t{n}"} for n in range(75)]
    write(tmp_path / "a.parquet", rows, group=7, image=IMAGE, text=pa.string())
    found = read_all(source(tmp_path))  # which compares spans of 16 with the whole
    assert [one.turns[0].parts[1] for (one,) in found if isinstance(one, Record)] == [f"t{n}" for n in range(75)]
    (file,) = scan(source(tmp_path))
    assert (file.count, file.images) == (75, 75)


def test_pages_and_not_row_groups_are_held_in_memory(scan: Scan, tmp_path: Path):
    schema = pa.schema({"image": IMAGE, "text": pa.string()})
    rows = [{"image": embedded(bytes([n]) * 2**20), "text": "x"} for n in range(64)]
    small_pages = {"write_batch_size": 4, "use_dictionary": False, "compression": "none"}
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "a.parquet", **small_pages)
    del rows
    (file,) = scan(source(tmp_path))
    span = Span(name=file.name, path=file.path, digest=file.digest, start=0, stop=64, mark=0)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in sources.read(source(tmp_path), {}, span)]
    assert len(held) == 64
    assert max(held) < 32 * 2**20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": "photo"}, r"a\.parquet has no column 'photo' but image, text, paths, score; name"),
        ({"image": "paths"}, r"column 'paths' is string, not images"),
        ({"text": "image"}, r"column 'image' is struct<.*>, not text"),
        ({"render": "conversation", "text": "score"}, r"column 'score' is double, not a list of \{role, content\}"),
    ],
)
def test_columns_of_another_kind_are_an_error_that_names_them(
    settings: dict[str, Any], message: str, scan: Scan, tmp_path: Path
):
    row = {"image": embedded(b"a"), "text": "x", "paths": "a.jpg", "score": 0.5}
    write(tmp_path / "a.parquet", [row], image=IMAGE, text=pa.string(), paths=pa.string(), score=pa.float64())
    with pytest.raises(ValueError, match=message):
        scan(source(tmp_path, **settings))


def test_a_new_shard_leaves_the_digests_of_others_alone(scan: Scan, tmp_path: Path):
    write(tmp_path / "a.parquet", [{"image": embedded(b"a"), "text": "x"}], image=IMAGE, text=pa.string())
    (before,) = scan(source(tmp_path))
    write(tmp_path / "b.parquet", [{"image": embedded(b"b"), "text": "x"}], image=IMAGE, text=pa.string())
    same, other = scan(source(tmp_path))
    assert same == before
    assert other.digest != before.digest


PARTS = pa.list_(
    pa.struct(
        {
            "content": pa.list_(pa.struct({"index": pa.int64(), "text": pa.string(), "type": pa.string()})),
            "role": pa.string(),
        }
    )
)
"""The messages of llava-instruct-mix-vsft."""


def test_image_parts_show_the_image_of_their_index(read_all: ReadAll, tmp_path: Path):
    question = [
        {"index": 1, "text": None, "type": "image"},
        {"index": None, "text": "then", "type": "text"},
        {"index": 0, "text": None, "type": "image"},
        {"index": 0, "text": None, "type": "image"},
    ]
    answer = {"role": "assistant", "content": [{"index": None, "text": "Yes.", "type": "text"}]}
    row = {
        "images": [embedded(b"red"), embedded(b"blue")],
        "messages": [{"role": "user", "content": question}, answer],
    }
    write(tmp_path / "a.parquet", [row], images=pa.list_(IMAGE), messages=PARTS)
    found = read_all(source(tmp_path, image="images", text="messages", render="conversation"))
    assert turns(found)[0].parts == (Image(b"blue"), "then", Image(b"red"), Image(b"red"))


@pytest.mark.parametrize(
    ("column", "kind", "cell", "reason"),
    [
        ("image_2", IMAGE, embedded(b"b"), "unread_media"),
        ("mask", IMAGE, embedded(b"b"), "unread_media"),
        ("others", pa.list_(IMAGE), [embedded(b"b"), None], "unread_media"),
        ("sound", IMAGE, embedded(b"b", "a.wav"), "unread_media"),  # the type of the Audio feature
        ("video", pa.string(), "v.mp4", "video"),
        ("picture", pa.binary(), b"b", "unread_media"),
    ],
)
@pytest.mark.parametrize("render", ["caption", "conversation"])
def test_a_column_of_media_that_is_not_read_drops_the_rows_that_have_it(
    column: str, kind: pa.DataType, cell: Any, reason: str, render: str, read_all: ReadAll, tmp_path: Path
):
    said: Any = "x"
    if render == "conversation":
        said = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A cup."}]
    good = {"image": embedded(b"a"), "text": said, column: None}
    text = SPEAKER if render == "conversation" else pa.string()
    write(tmp_path / "a.parquet", [good, {**good, column: cell}], image=IMAGE, text=text, **{column: kind})
    ours = source(tmp_path, render=render)
    (kept,), (fault,) = read_all(ours)
    assert isinstance(kept, Record)
    assert isinstance(fault, Dropped)
    assert (fault.reason, fault.where) == (reason, "a.parquet:2")
    assert f"set `ignore: [{column}]`" in fault.detail
    assert all(isinstance(one, Record) for (one,) in read_all(ours.with_changes({"ignore": [column]})))


def test_where_an_embedded_image_came_from_is_no_other_image(read_all: ReadAll, tmp_path: Path):
    row = {"image": embedded(b"a"), "text": "x", "image_path": "coco/7.jpg", "image_url": "http://ex.test/7.jpg"}
    texts = {"image_path": pa.string(), "image_url": pa.string()}
    lost = {**row, "image": embedded(b"a", "8.jpg"), "image_path": "coco/7.jpg"}
    write(tmp_path / "a.parquet", [row, lost], image=IMAGE, text=pa.string(), **texts)
    (kept,), (fault,) = read_all(source(tmp_path))
    assert isinstance(kept, Record)
    assert isinstance(fault, Dropped)
    assert fault.reason == "unread_media"
