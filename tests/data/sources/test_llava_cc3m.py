import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vila_ops.config.sources import LlavaCc3m
from vila_ops.data.raw.files import RawFile
from vila_ops.data.records import Dropped, Image, Record, Turn

ReadAll = Callable[[LlavaCc3m], list[list[Record | Dropped]]]
Scan = Callable[[LlavaCc3m], list[RawFile]]

NAME = "GCC_train_000000123"


def chat(name: str = NAME, question: str = "Give a brief description.\n<image>") -> dict[str, Any]:
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": "a blue cup on a table"}]
    return {"id": name, "image": f"{name}.jpg", "conversations": said}


def metadata(name: str = NAME, **more: str) -> dict[str, str]:
    url = f"http://ex.test/{name}.jpg"
    return {"id": name, "image": f"{name}.jpg", "url": url, "caption": "a blue cup on a table", **more}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., LlavaCc3m]:
    def made(chats: list[Any], facts: list[Any] | None, **settings: Any) -> LlavaCc3m:
        (tmp_path / "images").mkdir(exist_ok=True)
        for one in chats:
            (tmp_path / "images" / one["image"]).write_bytes(one["image"].encode())
        (tmp_path / "chat.json").write_text(json.dumps(chats))
        if facts is not None:
            (tmp_path / "metadata.json").write_text(json.dumps(facts))
        return LlavaCc3m(path=str(tmp_path), images=str(tmp_path / "images"), licence="other", **settings)

    return made


def test_a_record_is_the_image_and_its_raw_caption(write: Callable[..., LlavaCc3m], read_all: ReadAll) -> None:
    assert read_all(write([chat()], [metadata(blip_caption="a cup")])) == [
        [
            Record(
                id=NAME,
                object=f"{NAME.lower()}.jpg",
                turns=(Turn("document", (Image(f"{NAME}.jpg".encode()), "a blue cup on a table")),),
                category="",
                licence="other",
                provenance=f"chat.json:1[0] http://ex.test/{NAME}.jpg",
            )
        ]
    ]


@pytest.mark.parametrize(
    ("question", "parts"),
    [
        ("Give a brief description.\n<image>", ("Give a brief description.\n", Image(f"{NAME}.jpg".encode()))),
        ("<image>\nWhat is this?", (Image(f"{NAME}.jpg".encode()), "\nWhat is this?")),
    ],
)
def test_a_conversation_keeps_the_instruction_and_the_image_before_or_after_it(
    question: str, parts: tuple[Any, ...], write: Callable[..., LlavaCc3m], read_all: ReadAll
) -> None:
    ((record,),) = read_all(write([chat(question=question)], [metadata()], render="conversation"))
    assert isinstance(record, Record)
    assert record.turns == (Turn("user", parts), Turn("assistant", ("a blue cup on a table",)))


def test_addresses_are_found_by_name_and_what_has_none_is_kept(
    write: Callable[..., LlavaCc3m], read_all: ReadAll
) -> None:
    names = [f"GCC_train_{number:09}" for number in range(40)]
    facts = [metadata(name) for name in reversed(names) if name != names[17]]  # in another order, one missing
    found = read_all(write([chat(name) for name in names], facts))
    assert [record.provenance for (record,) in found if isinstance(record, Record)] == [
        f"chat.json:1[{number}]" + ("" if number == 17 else f" http://ex.test/{name}.jpg")
        for number, name in enumerate(names)
    ]


def test_without_metadata_the_provenance_is_the_place(write: Callable[..., LlavaCc3m], read_all: ReadAll) -> None:
    ((record,),) = read_all(write([chat()], None))
    assert isinstance(record, Record)
    assert record.provenance == "chat.json:1[0]"


def test_a_missing_image_is_dropped_with_its_line(
    tmp_path: Path, write: Callable[..., LlavaCc3m], read_all: ReadAll
) -> None:
    source = write([chat(), chat("GCC_train_000000124")], [metadata()])
    (tmp_path / "images" / f"{NAME}.jpg").unlink()
    (dropped,), (record,) = read_all(source)
    assert isinstance(dropped, Dropped)
    assert (dropped.id, dropped.reason, dropped.where) == (NAME, "missing_image", "chat.json:1[0]")
    assert isinstance(record, Record)


def test_metadata_that_comes_later_changes_the_digest(write: Callable[..., LlavaCc3m], scan: Scan) -> None:
    (without,) = scan(write([chat()], None))
    (beside,) = scan(write([chat()], [metadata()]))
    assert without.digest != beside.digest


def test_the_digest_covers_the_metadata(tmp_path: Path, write: Callable[..., LlavaCc3m], scan: Scan) -> None:
    (before,) = scan(write([chat()], [metadata()]))
    (other,) = scan(write([chat()], [metadata(url="http://ex.test/moved.jpg")]))
    assert (before.name, before.count, before.images) == ("chat.json", 1, 1)
    assert before.digest != other.digest
    (tmp_path / "README.md").write_text("unrelated")
    assert scan(write([chat()], [metadata()]))[0].digest == before.digest


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_folder_without_an_array_of_chats_is_an_error(content: str | None, tmp_path: Path, scan: Scan) -> None:
    if content is not None:
        (tmp_path / "chat.json").write_text(content)
    with pytest.raises(ValueError, match=r"no chat\.json with a JSON array"):
        scan(LlavaCc3m(path=str(tmp_path), images=str(tmp_path), licence="other"))


def test_metadata_that_was_cut_off_is_an_error_before_anything_is_read(
    tmp_path: Path, write: Callable[..., LlavaCc3m], scan: Scan
) -> None:
    source = write([chat()], None)
    (tmp_path / "metadata.json").write_text('[{"id": "GCC')
    with pytest.raises(ValueError, match=r"metadata\.json:1 \(byte 1\)"):
        scan(source)
