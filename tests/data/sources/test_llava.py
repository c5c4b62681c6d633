import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vila_ops.config.sources import Llava
from vila_ops.data import sources
from vila_ops.data.raw.files import RawFile, Span, Thinned
from vila_ops.data.records import FIRST_ANSWER, Dropped, Image, Record, Turn

ReadAll = Callable[[Llava], list[list[Record | Dropped]]]
Scan = Callable[[Llava], list[RawFile]]

SINGLE: dict[str, Any] = {
    "id": "s-000001", "image": "img/000001.png",
    "conversations": [
        {"from": "human", "value": "<image>\nHow many squares?"},
        {"from": "gpt", "value": "Three."},
    ],
}  # fmt: skip
SEVERAL = {
    "id": "m-7", "image": ["a.png", "b.png"],
    "conversations": [
        {"from": "human", "value": "Image 1: <image>\nImage 2: <image>\nWhat differs?"},
        {"from": "gpt", "value": "The circle is red in the second."},
    ],
}  # fmt: skip
TEXT = {
    "id": "T-1",
    "conversations": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}],
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "img").mkdir(parents=True)
    for name in ("img/000001.png", "a.png", "b.png"):
        (folder / name).write_bytes(name.encode())
    return folder


def source(path: Path, images: Path | None, **settings: Any) -> Llava:
    return Llava(path=str(path), licence="CC-BY-4.0", images=None if images is None else str(images), **settings)


def array(folder: Path, *records: Any, name: str = "train.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def only(found: list[list[Record | Dropped]]) -> Record | Dropped:
    ((record,),) = found
    return record


def test_images_stand_where_their_placeholders_stood(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    found = read_all(source(array(tmp_path, SINGLE, SEVERAL, TEXT), images))
    assert found == [
        [
            Record(
                id="s-000001",
                object="000001.png",
                turns=(
                    Turn("user", (Image(b"img/000001.png"), "\nHow many squares?")),
                    Turn("assistant", ("Three.",)),
                ),
                category="",
                licence="CC-BY-4.0",
                provenance="train.json:2[0]",
            )
        ],
        [
            Record(
                id="m-7",
                object="a.png",
                turns=(
                    Turn(
                        "user",
                        ("Image 1: ", Image(b"a.png"), "\nImage 2: ", Image(b"b.png"), "\nWhat differs?"),
                    ),
                    Turn("assistant", ("The circle is red in the second.",)),
                ),
                category="",
                licence="CC-BY-4.0",
                provenance="train.json:16[1]",
            )
        ],
        [
            Record(
                id="T-1",
                object="t-1",
                turns=(Turn("user", ("What is 2 + 2?",)), Turn("assistant", ("4",))),
                category="",
                licence="CC-BY-4.0",
                provenance="train.json:33[2]",
            )
        ],
    ]


def test_images_of_later_turns_stay_there(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    said = [
        ("system", "Be brief."),
        ("human", "Look: <image>"),
        ("gpt", "A."),
        ("human", "And <image> this?"),
        ("gpt", "B."),
    ]
    record = {**SEVERAL, "conversations": [{"from": role, "value": text} for role, text in said]}
    made = only(read_all(source(array(tmp_path, record), images)))
    assert isinstance(made, Record)
    assert [(turn.role, turn.parts) for turn in made.turns] == [
        ("system", ("Be brief.",)),
        ("user", ("Look: ", Image(b"a.png"))),
        ("assistant", ("A.",)),
        ("user", ("And ", Image(b"b.png"), " this?")),
        ("assistant", ("B.",)),
    ]


def test_one_object_a_line_reads_like_an_array(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    lines = tmp_path / "train.jsonl"
    lines.write_text("\n".join(["", json.dumps(SINGLE), json.dumps({**TEXT, "conversations": []}), ""]))
    blank, (single,), (empty,) = read_all(source(lines, images))
    assert blank == []
    assert isinstance(single, Record)
    assert single.provenance == "train.jsonl:2"
    assert isinstance(empty, Dropped)
    assert (empty.reason, empty.where) == ("turn_order", "train.jsonl:3")


def test_caption_is_the_image_and_the_answer(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    plain, text, several = read_all(source(array(tmp_path, SINGLE, TEXT, SEVERAL), images, render="caption"))
    (record,) = plain
    assert isinstance(record, Record)
    assert record.turns == (Turn("document", (Image(b"img/000001.png"), "Three.")),)
    for (dropped,) in (text, several):
        assert isinstance(dropped, Dropped)
        assert dropped.reason == "not_a_caption"


@pytest.mark.parametrize(
    ("placement", "parts"),
    [("as_written", ("How many?\n", Image(b"a.png"))), ("vila", (Image(b"a.png"), "\nHow many?"))],
)
def test_the_place_of_an_image_is_the_sources_choice(
    placement: str, parts: tuple[Any, ...], tmp_path: Path, images: Path, read_all: ReadAll
) -> None:
    record = {"images": ["a.png"], "conversations": turns(("human", "How many?\n<image>"), ("gpt", "3"))}
    made = only(read_all(source(array(tmp_path, record), images, placement=placement)))
    assert isinstance(made, Record)
    assert made.turns[0].parts == parts


def test_an_image_without_a_place_is_shown_before_the_first_question_of_vilas_placement(
    tmp_path: Path, images: Path, read_all: ReadAll
) -> None:
    record = {"image": "a.png", "conversations": turns(("human", "How many?"), ("gpt", "3"))}
    path = array(tmp_path, record)
    made = only(read_all(source(path, images, placement="vila")))
    assert isinstance(made, Record)
    assert made.turns[0].parts == (Image(b"a.png"), "\nHow many?")
    caption = only(read_all(source(path, images, render="caption")))
    assert isinstance(caption, Record)
    assert caption.turns == (Turn("document", (Image(b"a.png"), "3")),)


def test_a_placement_of_captions_has_no_effect_and_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="placement has no effect with render caption"):
        source(tmp_path, None, render="caption", placement="vila")


def test_a_greeting_is_left_out_and_noted(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    greeted = {**SINGLE, "conversations": [*turns(("gpt", "Hello.")), *SINGLE["conversations"]]}
    plain, made = read_all(source(array(tmp_path, SINGLE, greeted), images))
    ((one,), (other,)) = plain, made
    assert isinstance(one, Record)
    assert isinstance(other, Record)
    assert other.turns == one.turns
    assert (one.notes, other.notes) == ((), (FIRST_ANSWER,))


def test_what_an_object_says_of_itself_wins(tmp_path: Path, images: Path, read_all: ReadAll) -> None:
    stated = {**SINGLE, "id": 7, "licence": "CC0-1.0", "url": "http://ex.test/1", "model": "gpt-4", "width_list": [1]}
    unnamed = {key: value for key, value in TEXT.items() if key != "id"}
    (record,), (place,) = read_all(source(array(tmp_path, stated, unnamed), images))
    assert isinstance(record, Record)
    assert (record.id, record.licence, record.provenance) == ("7", "CC0-1.0", "train.json:2[0] http://ex.test/1")
    assert isinstance(place, Record)
    assert place.id == "train.json:22[1]"
    assert place.object == hashlib.sha256(b"What is 2 + 2?").hexdigest()


def turns(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in said]


@pytest.mark.parametrize(
    ("change", "reason", "told"),
    [
        ({"image": ["a.png", "b.png"]}, "too_few_placeholders", "1 of <image> for 2 images"),
        ({"conversations": turns(("human", "How many?"), ("gpt", "3"))}, "too_few_placeholders", "0 of <image> for 1"),
        ({"image": None}, "too_many_placeholders", "1 of <image> for 0 images"),
        ({"conversations": turns(("human", "<image><image>?"), ("gpt", "3"))}, "too_many_placeholders", "2 of <image>"),
        ({"image": "gone.png"}, "missing_image", "no file 'gone.png'"),
        ({"image": "img\\a.png"}, "missing_image", "write / in the record"),  # roboflow/supervision#2581
        ({"image": "A.PNG"}, "missing_image", "there is 'a.png': write the name in the same case"),
        ({"image": "a.PNG"}, "missing_image", "there is 'a.png'"),
        ({"image": " a.png"}, "missing_image", "blanks around the name"),
        ({"image": "\u0130" * 125 + ".png"}, "missing_image", "put it there"),  # longer than a name may be in NFD
        ({"image": "../secret.png"}, "bad_image_path", "'../secret.png' is not a path inside"),
        ({"image": "img/../../secret.png"}, "bad_image_path", "without '..'"),
        ({"image": "/etc/passwd"}, "bad_image_path", "is not a path inside"),
        ({"image": ""}, "too_many_placeholders", "1 of <image> for 0 images"),
        ({"image": [""]}, "malformed_image", "not ['']"),
        ({"image": "a\0.png"}, "bad_image_path", "is not a path inside"),
        ({"image": "\ud800.png"}, "bad_image_path", "is not a path inside"),
        ({"image": "linked.png"}, "bad_image_path", "is a link out of"),
        ({"image": "img"}, "missing_image", "no file 'img'"),
        ({"image": 7}, "malformed_image", "a path or a list of paths, not 7"),
        ({"image": [None]}, "malformed_image", "not [None]"),
        ({"video": "v.mp4"}, "video", "sample its frames"),
        ({"image": None, "video": "v.mp4"}, "video", "`video` names video"),
        ({"images": ["a.png"]}, "malformed_image", "not under both"),
        ({"image": None, "images": ["a.png", "b.png"]}, "too_few_placeholders", "1 of <image> for 2"),
        ({"audios": ["a.wav"]}, "unread_media", "`audios` names audio"),
        ({"image": None, "image_file": "a.png"}, "unread_media", "`image_file` names image"),
        ({"tools": "[{}]"}, "tool_call", "`tools` describes tools"),
        ({"rejected": {"from": "gpt", "value": "4"}}, "preference", "set `ignore: [rejected]` of the source"),
        ({"conversations": None}, "malformed_turns", "a list of turns, not None"),
        ({"conversations": ["hello"]}, "malformed_turns", "turn 1"),
        ({"conversations": [{"from": "human", "value": None}]}, "malformed_turns", "turn 1"),
        ({"conversations": turns(("human", "<image>?"), ("bing", "3"))}, "unknown_role", "the role 'bing'"),
        ({"conversations": turns(("gpt", "<image> 3"), ("human", "?"))}, "turn_order", "has an image"),
        ({"image": None, "conversations": turns(("gpt", "3"), ("human", "?"))}, "turn_order", "here user"),
        ({"conversations": turns(("human", "<image>"), ("human", "?"))}, "turn_order", "user, user"),
        ({"conversations": turns(("human", "<image>"))}, "turn_order", "here user"),
        ({"conversations": []}, "turn_order", "here none"),
        ({"conversations": turns(("human", "<image>?"), ("gpt", " \n"))}, "no_text", "turn 2 (assistant) is empty"),
        ({"conversations": turns(("human", "<image>\0"), ("gpt", "3"))}, "nul_in_text", "turn 1 (user)"),
        ({"conversations": turns(("human", "<image>"), ("gpt", "\ud800"))}, "lone_surrogate", "turn 2 (assistant)"),
    ],
)  # fmt: skip
def test_a_faulty_record_is_dropped_with_its_line_and_stops_no_other(
    change: dict[str, Any], reason: str, told: str, tmp_path: Path, images: Path, read_all: ReadAll
) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    (images / "linked.png").symlink_to(tmp_path / "secret.png")
    path = array(tmp_path, TEXT, {**SINGLE, **change}, SINGLE)
    line = path.read_text().split("\n").index('  "id": "s-000001",')  # its object begins one line above
    (before,), (dropped,), (after,) = read_all(source(path, images))
    assert isinstance(before, Record)
    assert isinstance(after, Record)
    assert isinstance(dropped, Dropped)
    assert (dropped.id, dropped.reason, dropped.where) == ("s-000001", reason, f"train.json:{line}[1]")
    assert told in dropped.detail


@pytest.mark.parametrize(
    ("element", "reason"), [(b"[1]", "not_an_object"), (b'{"id": }', "bad_json"), (b'{"id": "\xff"}', "invalid_utf8")]
)
def test_an_element_that_is_no_object_is_dropped(
    element: bytes, reason: str, tmp_path: Path, images: Path, read_all: ReadAll
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[\n" + element + b",\n" + json.dumps(TEXT).encode() + b"]")
    (dropped,), (record,) = read_all(source(path, images))
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.where) == (reason, "a.json:2[0]")
    assert isinstance(record, Record)


def test_a_image_without_a_folder_of_images_says_what_to_set(tmp_path: Path, read_all: ReadAll) -> None:
    dropped = only(read_all(source(array(tmp_path, SINGLE), None)))
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "missing_image"
    assert "set that folder" in dropped.detail


@pytest.mark.slow
def test_a_turn_of_a_million_characters_is_kept_and_one_of_ten_megabytes_is_dropped(
    tmp_path: Path, read_all: ReadAll
) -> None:
    long, huge = ({**TEXT, "conversations": turns(("human", "?"), ("gpt", "ä" * n))} for n in (1_000_000, 5_000_000))
    (record,), (dropped,) = read_all(source(array(tmp_path, long, huge), None))
    assert isinstance(record, Record)
    assert record.turns[1].parts == ("ä" * 1_000_000,)
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.where) == ("huge_turn", "train.json:15[1]")
    assert "turn 2 (assistant) has 5,000,000 characters, more than 1,000,000" in dropped.detail


def test_files_of_a_folder_are_read_in_the_order_of_their_names(
    tmp_path: Path, images: Path, scan: Scan, read_all: ReadAll
) -> None:
    data = tmp_path / "data"
    (data / "b").mkdir(parents=True)
    array(data, SINGLE, name="c.json")
    array(data, *[{**TEXT, "id": str(number)} for number in range(40)], name="b/a.json")
    array(data, TEXT, name="half.json.part")
    files = scan(source(data, images))
    assert [(file.name, file.count, file.images, len(file.marks)) for file in files] == [
        ("b/a.json", 40, 0, 3),
        ("c.json", 1, 1, 1),
    ]
    ids = [record.id for (record,) in read_all(source(data, images))]
    assert ids == [*map(str, range(40)), "s-000001"]


def test_of_a_thinned_source_only_the_wanted_records_are_read(tmp_path: Path, images: Path, scan: Scan) -> None:
    ours = source(array(tmp_path, *[{**SINGLE, "id": str(number)} for number in range(40)]), images)
    (file,) = scan(ours)
    thinned = Thinned(first=0, total=40, limit=4)
    place = {"name": file.name, "path": file.path, "digest": file.digest, "thinned": thinned}
    span = Span(**place, start=16, stop=40, mark=file.marks[1])
    assert [record.id for (record,) in sources.read(ours, {}, span)] == ["20", "30"]


def test_the_digest_is_that_of_the_records_and_of_the_images_that_they_name(
    tmp_path: Path, images: Path, scan: Scan
) -> None:
    ours = source(array(tmp_path, SINGLE, {**SINGLE, "image": "gone.png"}, {**SINGLE, "image": "../x.png"}), images)
    (before,) = scan(ours)
    assert before.images == 2
    (images / "b.png").write_bytes(b"another image, which no record names")
    (images / "new.txt").write_text("unrelated")
    assert scan(ours) == [before]
    (images / "img/000001.png").write_bytes(b"repainted")
    (repainted,) = scan(ours)
    assert repainted.digest != before.digest
    (images / "gone.png").write_bytes(b"found")
    (found,) = scan(ours)
    assert found.digest not in (before.digest, repainted.digest)


@pytest.mark.parametrize("content", ["", '[{"id": "s', "[] []"])
def test_a_file_that_is_not_whole_is_an_error_that_names_it(content: str, tmp_path: Path, scan: Scan) -> None:
    path = tmp_path / "cut.json"
    path.write_text(content)
    if content:
        with pytest.raises(ValueError, match=r"cut\.json"):
            scan(source(path, None))
    else:
        assert scan(source(path, None))[0].count == 0


def test_an_object_over_several_lines_is_refused_with_the_way_out(
    tmp_path: Path, images: Path, read_all: ReadAll
) -> None:
    """huggingface/datasets#8086, and LLaMA-Factory's dataset_info.json beside the data that it names."""
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json"}}, indent=2))
    with pytest.raises(ValueError, match=r"dataset_info.json has an object over several lines; .* move the file"):
        read_all(Llava(path=str(tmp_path), images=str(images), licence="MIT"))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("around", [{"data": ...}, {"version": "1.0", "info": [{"a": 1}], "data": ...}])
def test_a_list_inside_an_object_is_refused_with_the_way_out(
    around: dict[str, Any], indent: int | None, tmp_path: Path, scan: Scan
) -> None:
    records = [{"id": "1", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}]
    whole = {key: records if value is ... else value for key, value in around.items()}
    (tmp_path / "a.json").write_text(json.dumps(whole, indent=indent))
    with pytest.raises(
        ValueError, match=r"a\.json is one object, with its records in the list 'data'; .*jq '\.\[\"data\"\]'"
    ):
        scan(Llava(path=str(tmp_path), licence="CC0-1.0"))


def test_one_record_on_a_line_is_no_list_inside_an_object(tmp_path: Path, read_all: ReadAll) -> None:
    told = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"tags": [{"name": "turns"}], "conversations": told}))
    ((record,),) = read_all(Llava(path=str(tmp_path), licence="CC0-1.0"))
    assert isinstance(record, Record)
