import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vila_ops.config.sources import WebDataset
from vila_ops.data.raw.files import RawFile
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources.webdataset import MAX_TEXT_BYTES

Found = list[list[Record | Dropped]]
ReadAll = Callable[[WebDataset], Found]
Scan = Callable[[WebDataset], list[RawFile]]


def source(path: Path, render: str = "caption") -> WebDataset:
    return WebDataset.model_validate({"path": str(path), "licence": "CC-BY-4.0", "render": render})


def write(path: Path, *samples: dict[str, Any]) -> None:
    """By the official library, which encodes text and JSON by the suffix."""
    with webdataset.TarWriter(str(path)) as sink:
        for sample in samples:
            sink.write(sample)


def write_members(path: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def only(found: Found) -> Record:
    ((record,),) = found
    assert isinstance(record, Record)
    return record


def dropped(found: Found) -> list[Dropped]:
    return [one for held in found for one in held if isinstance(one, Dropped)]


def test_image_and_text_of_a_key_are_a_captioned_image(read_all: ReadAll, tmp_path: Path):
    write(tmp_path / "pairs-000.tar", {"__key__": "Animals/0001", "jpg": b"\xff\xd8bear", "txt": "Ein Bär.\n"})
    assert read_all(source(tmp_path)) == [
        [
            Record(
                id="pairs-000.tar:Animals/0001",
                object="animals/0001",
                turns=(Turn("document", (Image(b"\xff\xd8bear"), "Ein Bär.")),),
                category="",
                licence="CC-BY-4.0",
                provenance="pairs-000.tar:Animals/0001",
            )
        ]
    ]


def test_json_as_img2dataset_writes_it_gives_caption_licence_address_and_scores(read_all: ReadAll, tmp_path: Path):
    said = {"caption": "a cup", "url": "http://ex.test/c.jpg", "key": "000000012", "status": "success", "width": 640,
            "similarity": 0.31, "license": "CC0-1.0", "is_ok": True, "nothing": None}  # fmt: skip
    write(tmp_path / "a.tar", {"__key__": "000000012", "webp": b"cup", "json": said})
    record = only(read_all(source(tmp_path)))
    assert record.turns == (Turn("document", (Image(b"cup"), "a cup")),)
    assert (record.licence, record.provenance) == ("CC0-1.0", "a.tar:000000012 http://ex.test/c.jpg")
    assert record.scores == {"width": 640.0, "similarity": 0.31}


def test_several_images_of_a_key_stand_in_the_order_of_their_numbers(read_all: ReadAll, tmp_path: Path):
    numbered = {f"{number}.jpg": b"%d" % number for number in (10, 0, 2, 1)}
    write(tmp_path / "a.tar", {"__key__": "k", **numbered, "txt": "four"})
    assert only(read_all(source(tmp_path))).turns[0].parts == (*map(Image, (b"0", b"1", b"2", b"10")), "four")


def test_llava_conversations_keep_their_images_where_the_placeholders_stand(read_all: ReadAll, tmp_path: Path):
    conversations = [
        {"from": "human", "value": "Image 1: <image>\nImage 2: <image>\nWhat differs?"},
        {"from": "gpt", "value": "The circle is red in the second."},
    ]
    write(tmp_path / "a.tar", {"__key__": "k", "0.png": b"a", "1.png": b"b", "json": {"conversations": conversations}})
    assert only(read_all(source(tmp_path, "conversation"))).turns == (
        Turn("user", ("Image 1: ", Image(b"a"), "\nImage 2: ", Image(b"b"), "\nWhat differs?")),
        Turn("assistant", ("The circle is red in the second.",)),
    )


def test_a_system_prompt_beside_the_conversations_is_read(read_all: ReadAll, tmp_path: Path):
    said = [{"from": "human", "value": "<image>Q?"}, {"from": "gpt", "value": "A"}]
    write(tmp_path / "a.tar", {"__key__": "k", "png": b"a", "json": {"conversations": said, "system": "Be brief."}})
    assert only(read_all(source(tmp_path, "conversation"))).turns[0] == Turn("system", ("Be brief.",))


def test_keys_are_those_of_the_webdataset_library(read_all: ReadAll, tmp_path: Path):
    names = ["a/b.c/001.jpg", "a/b.c/001.txt", "a/b.c/002.seg.png", "a/b.c/002.TXT", "a/003.0.jpg", "a/003.txt",
             "__meta__/x.txt", "./004.jpeg", "./004.txt", "README"]  # fmt: skip
    write_members(tmp_path / "a.tar", *((name, name.encode()) for name in names))
    official = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    theirs = [sample["__key__"] for sample in official]
    assert [record.id for (record,) in read_all(source(tmp_path))] == [f"a.tar:{key}" for key in theirs]
    assert len(theirs) == 4


@pytest.mark.parametrize("key_ends", ["first_dot", "last_dot"])
def test_what_macos_puts_beside_a_file_is_left_out(key_ends: str, read_all: ReadAll, tmp_path: Path):
    """Hidden members, such as the AppleDouble ._0.jpg of bsdtar (RFC 1740), are no samples: NVIDIA/DALI#3306."""
    apple = bytes.fromhex("00051607000200004d6163204f532058")
    members = ("./._0.1.jpg", apple), ("./0.1.jpg", b"photo"), ("./._0.1.txt", apple), ("./0.1.txt", b"A dog.")
    write_members(tmp_path / "a.tar", *members)
    ours = WebDataset(path=str(tmp_path), licence="MIT", key_ends=key_ends)
    suffix = {"image_members": ["1.jpg"], "text_member": "1.txt"} if key_ends == "first_dot" else {}
    assert only(read_all(ours.with_changes(suffix))).turns == (Turn("document", (Image(b"photo"), "A dog.")),)


def test_a_companion_is_no_image_of_the_record(read_all: ReadAll, scan: Scan, tmp_path: Path):
    members = [
        ("1.jpg", b"photo"),
        ("1.seg.png", b"mask"),
        ("1.depth.png", b"depth"),
        ("1.cls", b"3"),
        ("1.txt", b"A dog."),
    ]
    write_members(tmp_path / "a.tar", *members)
    assert only(read_all(source(tmp_path))).turns == (Turn("document", (Image(b"photo"), "A dog.")),)
    assert scan(source(tmp_path))[0].images == 1


def test_the_source_may_name_the_members_that_are_images(read_all: ReadAll, scan: Scan, tmp_path: Path):
    write_members(
        tmp_path / "a.tar", ("1.left.png", b"l"), ("1.right.png", b"r"), ("1.jpg", b"both"), ("1.txt", b"Two.")
    )
    ours = source(tmp_path).with_changes({"image_members": ["right.png", "left.png"]})
    assert only(read_all(ours)).turns == (Turn("document", (Image(b"r"), Image(b"l"), "Two.")),)
    assert scan(ours)[0].images == 2


def test_keys_with_dots_are_told_and_can_be_read(read_all: ReadAll, tmp_path: Path):
    """For the webdataset library the key of all four is IMG."""
    names = ["IMG.0001.jpg", "IMG.0001.txt", "IMG.0002.jpg", "IMG.0002.txt"]
    write_members(tmp_path / "a.tar", *((name, name.encode()) for name in names))
    (fault,) = dropped(read_all(source(tmp_path)))
    assert fault.reason == "no_text"
    assert "IMG.0001.txt" in fault.detail
    assert "key_ends: last_dot" in fault.detail
    found = read_all(source(tmp_path).with_changes({"key_ends": "last_dot"}))
    assert [record.turns[0].parts for (record,) in found if isinstance(record, Record)] == [
        (Image(b"IMG.0001.jpg"), "IMG.0001.txt"),
        (Image(b"IMG.0002.jpg"), "IMG.0002.txt"),
    ]


def test_members_with_names_of_their_own_are_told_and_can_be_read(read_all: ReadAll, tmp_path: Path):
    """github.com/mlfoundations/open_clip/issues/480: shards of KEY.input.jpg and KEY.outputs.txt, all skipped."""
    write(tmp_path / "a.tar", {"__key__": "sample00000000", "input.jpg": b"bird", "outputs.txt": "a bird"})
    (fault,) = dropped(read_all(source(tmp_path)))
    assert fault.reason == "no_image"
    assert "sample00000000.input.jpg" in fault.detail
    ours = source(tmp_path).with_changes({"image_members": ["input.jpg"]})
    (fault,) = dropped(read_all(ours))
    assert "`text_member` names another" in fault.detail
    record = only(read_all(ours.with_changes({"text_member": "outputs.txt"})))
    assert record.turns[0].parts == (Image(b"bird"), "a bird")


def test_nan_as_img2dataset_writes_it_costs_its_number_only(read_all: ReadAll, tmp_path: Path):
    said = b'{"caption": "a cup", "similarity": NaN, "pwatermark": 0.25, "status": "success"}'
    write_members(tmp_path / "a.tar", ("000000012.jpg", b"cup"), ("000000012.json", said))
    record = only(read_all(source(tmp_path)))
    assert (record.turns[0].parts, record.scores) == ((Image(b"cup"), "a cup"), {"pwatermark": 0.25})


def test_a_caption_in_utf_16_is_read(read_all: ReadAll, tmp_path: Path):
    write_members(tmp_path / "a.tar", ("k.jpg", b"j"), ("k.txt", "Ein Bär.".encode("utf-16")))
    assert only(read_all(source(tmp_path))).turns[0].parts[1] == "Ein Bär."


def test_spans_of_many_keys_are_slices_of_the_whole(read_all: ReadAll, scan: Scan, tmp_path: Path):
    write(
        tmp_path / "a.tar", *({"__key__": f"{n:05}", "jpg": bytes([n]) * n * 40, "txt": f"t{n}"} for n in range(1, 71))
    )
    found = read_all(source(tmp_path))  # which compares spans of 16 with the whole
    assert [record.turns[0].parts[1] for (record,) in found if isinstance(record, Record)] == [
        f"t{n}" for n in range(1, 71)
    ]
    (file,) = scan(source(tmp_path))
    assert (file.count, file.images, len(file.marks)) == (70, 70, 5)


@pytest.mark.parametrize(
    ("members", "reason", "detail"),
    [
        ([("k.jpg", b"j")], "no_text", "no KEY.txt, and no caption"),
        ([("k.jpg", b"j"), ("k.txt", b"  \n")], "no_text", ""),
        ([("k.txt", b"text")], "no_image", "jpg"),
        ([("k.jpg", b"j"), ("k.txt", b"ok \xff")], "invalid_utf8", "byte 3"),
        ([("k.jpg", b"j"), ("k.txt", b"a\0b")], "nul_in_text", "caption"),
        ([("k.jpg", b"j"), ("k.json", b'{"caption": "\\ud800"}')], "lone_surrogate", "caption"),
        ([("k.jpg", b"j"), ("k.json", b'{"caption": "x"')], "bad_json", "k.json"),
        ([("k.jpg", b"j"), ("k.json", b'{"caption": "x", "caption": "y"}')], "bad_json", "twice"),
        ([("k.jpg", b"j"), ("k.json", b"[" * 50_000)], "bad_json", "k.json"),
        ([("k.jpg", b"j"), ("k.json", b"[1]")], "not_an_object", "list"),
        ([("k.jpg", b"j"), ("k.JPG", b"j"), ("k.txt", b"t")], "duplicate_member", "k.JPG"),
        ([("k.jpg", b"j"), ("k.txt", b"t" * (MAX_TEXT_BYTES + 1))], "oversized", f"{MAX_TEXT_BYTES} at most"),
    ],
)  # fmt: skip
def test_a_faulty_key_is_dropped_with_its_place_and_its_neighbours_are_not(
    members: list[tuple[str, bytes]], reason: str, detail: str, read_all: ReadAll, tmp_path: Path
):
    before, after = [("j.jpg", b"j"), ("j.txt", b"t")], [("l.jpg", b"j"), ("l.txt", b"t")]
    write_members(tmp_path / "a.tar", *before, *members, *after)
    first, (fault,), last = read_all(source(tmp_path))
    assert isinstance(fault, Dropped)
    assert (fault.id, fault.where, fault.reason) == ("a.tar:k", "a.tar:k", reason)
    assert detail in fault.detail
    assert isinstance(first[0], Record)
    assert isinstance(last[0], Record)


@pytest.mark.parametrize(
    ("conversations", "reason"),
    [
        (None, "malformed_turns"),
        ([], "turn_order"),
        ([{"from": "narrator", "value": "x"}], "unknown_role"),
        ([{"from": "human", "value": "x"}], "turn_order"),
        ([{"from": "gpt", "value": "x"}, {"from": "human", "value": "x"}], "turn_order"),
        ([{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "x"}], "too_many_placeholders"),
        ([{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " "}], "no_text"),
        ([{"from": "human", "value": "<image>a\0"}, {"from": "gpt", "value": "x"}], "nul_in_text"),
    ],
)
def test_a_faulty_conversation_is_dropped(conversations: object, reason: str, read_all: ReadAll, tmp_path: Path):
    write(tmp_path / "a.tar", {"__key__": "k", "png": b"a", "json": {"conversations": conversations}})
    assert [one.reason for one in dropped(read_all(source(tmp_path, "conversation")))] == [reason]


@pytest.mark.parametrize(
    ("name", "message"),
    [("../a.jpg", "absolute, empty or has"), ("/etc/a.jpg", "absolute, empty or has")],
)
def test_a_hostile_tar_is_an_error_that_names_the_file(name: str, message: str, scan: Scan, tmp_path: Path):
    write_members(tmp_path / "good.tar", ("a.jpg", b"a"))
    write_members(tmp_path / "hostile.tar", (name, b"a"))
    with pytest.raises(ValueError, match=rf"hostile\.tar: .*{message}"):
        scan(source(tmp_path))


def test_a_key_that_comes_back_is_an_error(scan: Scan, tmp_path: Path):
    write_members(tmp_path / "a.tar", ("a.jpg", b"a"), ("b.jpg", b"b"), ("a.txt", b"a"))
    with pytest.raises(ValueError, match=r"the key 'a' occurs again at byte 2048; sort the members by name"):
        scan(source(tmp_path))


def test_a_compressed_tar_is_an_error_that_says_what_to_do(scan: Scan, tmp_path: Path):
    write_members(tmp_path / "a.tar", ("a.jpg", b"a"))
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as file:
        file.add(tmp_path / "a.tar", "a.tar")
    with pytest.raises(ValueError, match=r"b\.tar\.gz is compressed, but .* unpack it to a plain \.tar"):
        scan(source(tmp_path))


def test_a_new_tar_leaves_the_digests_of_others_alone(scan: Scan, tmp_path: Path):
    write_members(tmp_path / "a.tar", ("a.jpg", b"a"))
    (before,) = scan(source(tmp_path))
    write_members(tmp_path / "b.tar", ("a.jpg", b"b"))
    (tmp_path / "notes.md").write_text("not a shard")
    same, other = scan(source(tmp_path))
    assert same == before
    assert other.digest != before.digest


NAMES = st.text(st.sampled_from("ab./_0\u00e4 "), min_size=1, max_size=12)
MEMBERS = st.lists(
    st.tuples(
        st.tuples(NAMES, st.sampled_from([".jpg", ".txt", ".json", ".0.png", ""])).map("".join), st.binary(max_size=40)
    ),
    max_size=8,
)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=MEMBERS, render=st.sampled_from(["caption", "conversation"]))
def test_any_members_are_records_drops_or_a_refusal(
    members: list[tuple[str, bytes]], render: str, read_all: ReadAll, tmp_path: Path
):
    write_members(tmp_path / "a.tar", *members)
    try:
        found = read_all(source(tmp_path, render))
    except ValueError:
        return
    assert all(len(held) == 1 for held in found)


def test_media_that_the_json_of_a_key_names_and_nothing_reads_drop_it(read_all: ReadAll, tmp_path: Path):
    said = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]
    good = {"conversations": said, "image": "elsewhere/0.png", "image_id": 7, "url": "http://ex.test/0.png"}
    bad = {"conversations": said, "videos": ["v.mp4"]}
    members = [{"__key__": "a", "png": b"a", "json": good}, {"__key__": "b", "png": b"b", "json": bad}]
    write(tmp_path / "a.tar", *members)
    (record,), (fault,) = read_all(source(tmp_path, "conversation"))
    assert isinstance(record, Record)
    assert isinstance(fault, Dropped)
    assert (fault.reason, fault.where) == ("video", "a.tar:b")
    ignoring = source(tmp_path, "conversation").with_changes({"ignore": ["videos"]})
    assert all(isinstance(one, Record) for (one,) in read_all(ignoring))
