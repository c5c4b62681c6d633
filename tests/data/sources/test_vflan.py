import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vila_ops.config.sources import Vflan
from vila_ops.data.raw.files import RawFile
from vila_ops.data.records import Dropped, Image, Record, Turn

ReadAll = Callable[[Vflan], list[list[Record | Dropped]]]
Scan = Callable[[Vflan], list[RawFile]]


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


A, B = encoded(b"image a"), encoded(b"image b")
M3IT = {"instruction": "Answer the question. ", "inputs": "What is it?\n", "image_base64_str": [A], "outputs": "A cat."}
VFLAN = {"question": "What is it?", "answer": "A cat. ", "image": [A, B]}


def write(folder: Path, *records: Any, **settings: Any) -> Vflan:
    (folder / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return Vflan(path=str(folder), licence="CC-BY-4.0", **settings)


def only(found: list[list[Record | Dropped]]) -> Record | Dropped:
    ((record,),) = found
    return record


def test_m3it_joins_instruction_and_inputs_behind_the_image(tmp_path: Path, read_all: ReadAll) -> None:
    assert only(read_all(write(tmp_path, M3IT))) == Record(
        id="a.jsonl:1",
        object="a854f481d4cb2479ff869f3a33763e4c3e8d6b5727f909d774fdd5f37690baeb",  # sha256 of "image a"
        turns=(
            Turn("user", (Image(b"image a"), "\n", "Answer the question. What is it?")),
            Turn("assistant", ("A cat.",)),
        ),
        category="",
        licence="CC-BY-4.0",
        provenance="a.jsonl:1",
    )


@pytest.mark.parametrize(
    "keys", [("answer", "image"), ("answer:", "image"), ("answer", "image:"), ("answer:", "image:")]
)
def test_vflan_puts_every_image_before_the_question(keys: tuple[str, str], tmp_path: Path, read_all: ReadAll) -> None:
    answer, image = keys
    record = only(read_all(write(tmp_path, {"question": "What is it?", answer: "A cat. ", image: [A, B]})))
    assert isinstance(record, Record)
    assert record.turns == (
        Turn("user", (Image(b"image a"), "\n", Image(b"image b"), "\n", "What is it?")),
        Turn("assistant", ("A cat.",)),
    )


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("<image>\nWhat is it?", "What is it?"),
        ("What is it?\n<image>", "What is it?"),
        ("Compare <image> and <image>.", "Compare  and ."),
        ("One\n<image>\ntwo", "One\ntwo"),
    ],
)
def test_placeholders_in_the_text_are_taken_out(written: str, read: str, tmp_path: Path, read_all: ReadAll) -> None:
    record = only(read_all(write(tmp_path, {**VFLAN, "question": written, "image": A})))
    assert isinstance(record, Record)
    assert record.turns[0].parts == (Image(b"image a"), "\n", read)


def test_text_only_records_are_split_by_their_id(tmp_path: Path, read_all: ReadAll) -> None:
    record = only(read_all(write(tmp_path, {**VFLAN, "id": "Text_flan_1", "image": []})))
    assert isinstance(record, Record)
    assert (record.id, record.object) == ("Text_flan_1", "text_flan_1")
    assert record.turns[0].parts == ("What is it?",)


def test_a_visual_dialog_becomes_its_turns(tmp_path: Path, read_all: ReadAll) -> None:
    question = (
        "Read the Image Descriptions.\nImage Descriptions: a dog.\nQuestion: Is it brown?\nAnswer: Yes."
        "\nQuestion: Is it\n big?"
    )
    record = only(read_all(write(tmp_path, {"question": question, "answer": "No.", "image": [A]})))
    assert isinstance(record, Record)
    assert [(turn.role, turn.parts) for turn in record.turns] == [
        ("user", (Image(b"image a"), "\n", "Is it brown?")),
        ("assistant", ("Yes.",)),
        ("user", ("Is it big?",)),
        ("assistant", ("No.",)),
    ]


def test_an_entry_with_a_dot_is_a_file(tmp_path: Path, read_all: ReadAll, scan: Scan) -> None:
    (tmp_path / "Frame.jpg").write_bytes(b"frame")
    source = write(tmp_path, {**VFLAN, "image": ["Frame.jpg", A]}, images=str(tmp_path))
    record = only(read_all(source))
    assert isinstance(record, Record)
    assert record.object == "frame.jpg"
    assert record.turns[0].parts[:3] == (Image(b"frame"), "\n", Image(b"image a"))
    (before,) = scan(source)
    assert before.images == 2
    (tmp_path / "other.jpg").write_bytes(b"unrelated")
    assert scan(source) == [before]
    (tmp_path / "Frame.jpg").write_bytes(b"other")
    assert scan(source)[0].digest != before.digest


def test_more_images_than_the_recipe_takes_are_dropped(tmp_path: Path, read_all: ReadAll) -> None:
    (kept,), (dropped,) = read_all(write(tmp_path, {**VFLAN, "image": [A] * 8}, {**VFLAN, "image": [A] * 9}))
    assert isinstance(kept, Record)
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.where) == ("too_many_images", "a.jsonl:2")
    assert "9 images; max_images is 8" in dropped.detail


@pytest.mark.parametrize(
    ("change", "reason", "told"),
    [
        ({"image": ["not base64!"]}, "bad_base64", "'not base64!'"),
        ({"image": [A[:-1]]}, "bad_base64", "padding"),
        ({"image": ["ä"]}, "bad_base64", "'ä'"),
        ({"image": [""]}, "bad_base64", "no bytes"),
        ({"image": [{"bytes": A}]}, "malformed_image", "a list of it"),
        ({"image": ["frame.jpg"]}, "missing_image", "set that folder"),
        ({"question": 3}, "malformed_turns", "'question' is missing or not text"),
        ({"answer": None}, "malformed_turns", "'answer' is missing or not text"),
        ({"answer": " "}, "no_text", "turn 2 (assistant)"),
        ({"answer": "\0"}, "nul_in_text", "turn 2 (assistant)"),
        ({"question": "\udc00"}, "lone_surrogate", "turn 1 (user)"),
        ({"question": "Image Descriptions without a dialog"}, "malformed_turns", "visual dialog"),
    ],
)
def test_a_faulty_record_is_dropped_with_its_line(
    change: dict[str, Any], reason: str, told: str, tmp_path: Path, read_all: ReadAll
) -> None:
    (before,), (dropped,), (after,) = read_all(write(tmp_path, M3IT, {**VFLAN, **change}, VFLAN))
    assert isinstance(before, Record)
    assert isinstance(after, Record)
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.where) == (reason, "a.jsonl:2")
    assert told in dropped.detail


def test_wrapped_base64_is_read(tmp_path: Path, read_all: ReadAll) -> None:
    record = only(read_all(write(tmp_path, {**VFLAN, "image": base64.encodebytes(b"x" * 200).decode()})))
    assert isinstance(record, Record)
    assert record.turns[0].parts[0] == Image(b"x" * 200)


@pytest.mark.parametrize("name", ["vqa_train.pkl", "sub/a.PICKLE"])
def test_a_pickle_is_refused_and_never_opened(name: str, tmp_path: Path, scan: Scan) -> None:
    source = write(tmp_path, VFLAN)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    path.chmod(0)
    for place in (source, Vflan(path=str(path), licence="x")):
        with pytest.raises(ValueError, match=r"is a pickle.*write it as jsonl"):
            scan(place)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"video": "v.mp4"}, "video"),
        ({"image": A}, "unread_media"),
        ({"image_base64_str": None, "images": [A]}, "unread_media"),
        ({"image_base64_str": None, "image_path": "a.png"}, "unread_media"),
    ],
)
def test_media_under_another_key_drop_the_record(
    change: dict[str, Any], reason: str, tmp_path: Path, read_all: ReadAll
) -> None:
    (kept,), (fault,) = read_all(write(tmp_path, {**M3IT, "image": None, "video": []}, {**M3IT, **change}))
    assert isinstance(kept, Record)
    assert isinstance(fault, Dropped)
    assert (fault.reason, fault.where) == (reason, "a.jsonl:2")
