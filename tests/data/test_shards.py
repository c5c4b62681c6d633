import base64
import io
import json
import shutil
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from vila_ops.artifacts.store import read_manifest
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.shards import (
    CorruptShard,
    Sample,
    ShardWriter,
    data_url,
    index_of,
    mask,
    named,
    read_index,
    read_sample,
    runs,
    samples_of,
    write_index,
)


def sample(number: int, *, images: tuple[bytes, ...] = ()) -> Sample:
    return Sample(
        id=f"r{number}", key=f"00000-{number:06d}", source="s", object="dög", category="a/b", text="Ein Hund — 犬.",
        licence="CC0-1.0", provenance="here", input_ids=[1, 40, 41, 2, number],
        is_target=[False, True, True, False, True], images=images,
    )  # fmt: skip


SAMPLES = [sample(0), sample(1, images=(b"one", b"two" * 300)), sample(2, images=(b"x" * 512,))]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "s-00000.tar"
    writer = ShardWriter(path, name=path.name, suffix="webp")
    for one in SAMPLES:
        writer.add(one, split="train")
    write_index(writer.close(), tmp_path)
    return path


def read(folder: Path, number: int) -> Sample:
    row = read_index(folder).to_pylist()[number]
    return read_sample(folder, shard=row["shard"], offset=row["offset"], key=row["key"])


def test_samples_come_back_in_any_order(shard: Path) -> None:
    for number in (2, 0, 1, 1):
        assert read(shard.parent, number) == SAMPLES[number]
    rows = read_index(shard.parent).to_pylist()
    assert [(r["num_tokens"], r["num_targets"], r["num_images"]) for r in rows] == [(5, 3, 0), (5, 3, 2), (5, 3, 1)]
    assert {(r["split"], r["source"], r["object"]) for r in rows} == {("train", "s", "dög")}


def test_the_same_samples_give_the_same_bytes(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    writer = ShardWriter(tmp_path / "again/s-00000.tar", name="s-00000.tar", suffix="webp")
    for one in SAMPLES:
        writer.add(one, split="train")
    write_index(writer.close(), tmp_path / "again")
    for name in ("s-00000.tar", "index.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_shard_is_a_plain_webdataset_tar(shard: Path) -> None:
    with tarfile.open(shard) as tar:
        assert tar.getnames() == [
            "00000-000000.json",
            "00000-000001.json", "00000-000001.0.webp", "00000-000001.1.webp",
            "00000-000002.json", "00000-000002.0.webp",
        ]  # fmt: skip
        member = tar.extractfile("00000-000001.1.webp")
        assert member is not None
        assert member.read() == b"two" * 300
        head = tar.extractfile("00000-000001.json")
        assert head is not None
        assert json.loads(head.read())["input_ids"] == [1, 40, 41, 2, 1]
        assert {(m.mtime, m.uid, m.uname) for m in tar.getmembers()} == {(0, 0, "")}


@pytest.mark.parametrize("damage", ["gone", "short", "head", "json", "swapped"])
def test_a_damaged_shard_is_named_with_a_way_out(damage: str, shard: Path) -> None:
    whole = shard.read_bytes()
    row = read_index(shard.parent).to_pylist()[1]
    offset, key = row["offset"], row["key"]
    match damage:
        case "gone":
            shard.unlink()
        case "short":
            shard.write_bytes(whole[: offset + 600])
        case "head":
            shard.write_bytes(whole[: offset + 3] + b"\xff" + whole[offset + 4 :])
        case "json":
            shard.write_bytes(whole[: offset + 512] + b"[" + whole[offset + 513 :])
        case "swapped":
            key = "00000-000002"
    said = "is gone; something removed it" if damage == "gone" else r"at byte .* run again: all of it is compared"
    with pytest.raises(CorruptShard, match=rf"s-00000\.tar {said}"):
        read_sample(shard.parent, shard=shard.name, offset=offset, key=key)


def test_the_webdataset_library_reads_a_shard(shard: Path) -> None:
    read = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [one["__key__"] for one in read] == [one.key for one in SAMPLES]
    assert [[one[f"{n}.webp"] for n in range(len(s.images))] for one, s in zip(read, SAMPLES, strict=True)] == [
        list(one.images) for one in SAMPLES
    ]
    assert json.loads(read[1]["json"])["text"] == "Ein Hund — 犬."


def test_a_dataset_that_was_replaced_is_read_again(shard: Path, tmp_path: Path) -> None:
    """A flow's process lives on while `data/<mixture>` is replaced."""
    assert read(tmp_path, 0).input_ids[-1] == 0
    shard.unlink()
    writer = ShardWriter(shard, name=shard.name, suffix="webp")
    writer.add(Sample(**{**vars(SAMPLES[0]), "input_ids": [1, 40, 41, 2, 9]}), split="train")
    write_index(writer.close(), tmp_path)
    assert read(tmp_path, 0).input_ids[-1] == 9


@given(flags=st.lists(st.booleans(), max_size=40))
def test_runs_are_the_flags(flags: list[bool]) -> None:
    spans = runs(flags)
    assert mask(spans, len(flags)) == flags
    assert all(start < stop for start, stop in spans)
    assert all(stop < start for (_, stop), (start, _) in pairwise(spans))


def test_names_do_not_depend_on_the_keys_of_shards() -> None:
    def names(*keys: str) -> list[str]:
        records = [("pairs", "cat"), ("pairs", "cat"), ("pairs", "dog"), ("words", "cat")]
        rows = [{"key": key, "source": source, "id": of} for key, (source, of) in zip(keys, records, strict=True)]
        return sorted(row["name"] for row in named(rows))

    expected = ["pairs/cat", "pairs/cat#2", "pairs/dog", "words/cat"]
    assert names("aa-000000", "aa-000001", "bb-000000", "cc-000000") == expected
    assert names("cc-000000", "cc-000001", "aa-000000", "bb-000000") == expected


def test_runs_by_hand() -> None:
    assert runs([True, True, False, True]) == [(0, 2), (3, 4)]
    assert runs([]) == []


def test_samples_of_a_dataset_on_s3_bring_only_their_shards(
    s3_store: str, make_mixture: Any, make_text: Any, make_resources: Any, tmp_path: Path
) -> None:
    made = prepare(make_mixture("pairs"), make_text(), make_resources(tmp_path / "work", **{"storage.store": s3_store}))
    assert len([name for name in read_manifest(made.uri)["files"] if name.endswith(".tar")]) == 3
    shutil.rmtree(tmp_path / "copies")  # as on another machine
    rows = index_of(made).to_pylist()
    wanted = [row for row in rows if row["shard"] == rows[-1]["shard"]][::-2]
    assert [sample.id for sample in samples_of(made, wanted)] == [row["id"] for row in wanted]
    copies = [path.suffix for path in (tmp_path / "copies/s3").rglob("*") if path.is_file() and path.stat().st_size]
    assert sorted(copies) == [".parquet", ".tar"]


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_a_image_as_a_url_says_its_true_type(kind: str) -> None:
    file = io.BytesIO()
    Pillow.new("RGB", (4, 4)).save(file, kind)
    head, _, data = data_url(file.getvalue()).partition(",")
    assert head == f"data:image/{kind};base64"
    assert base64.b64decode(data) == file.getvalue()
