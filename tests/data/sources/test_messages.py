import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vila_ops.config.sources import Messages
from vila_ops.data.raw.files import RawFile
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources import images

ReadAll = Callable[[Messages], list[list[Record | Dropped]]]
Scan = Callable[[Messages], list[RawFile]]
Json = dict[str, Any]

DATA = "data:image/png;base64," + base64.b64encode(b"inline").decode()
OK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


def image(url: str, **more: str) -> Json:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(said: str) -> Json:
    return {"type": "text", "text": said}


def user(*content: Json, answer: Any = "Yes.") -> Json:
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]}


def ask(question: str) -> Json:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Blue."}]}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Messages]:
    def made(*records: Any) -> Messages:
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images/Dog.png").write_bytes(b"dog")
        (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(record) for record in records))
        return Messages(path=str(tmp_path / "chats.jsonl"), licence="CC0-1.0", images=str(tmp_path / "images"))

    return made


def test_parts_keep_their_order(write: Callable[..., Messages], read_all: ReadAll) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [text("First: "), image("Dog.png", detail="low"), text(" Second: "), image(DATA)]},
        {"role": "assistant", "content": [text("A dog "), text("and <image>.")]},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes.", "weight": 1},
    ]
    assert read_all(write({"id": "c-1", "messages": messages})) == [
        [
            Record(
                id="c-1",
                object="dog.png",
                turns=(
                    Turn("system", ("Be brief.",)),
                    Turn("user", ("First: ", Image(b"dog"), " Second: ", Image(b"inline"))),
                    Turn("assistant", ("A dog ", "and <image>.")),
                    Turn("user", ("Sure?",)),
                    Turn("assistant", ("Yes.",)),
                ),
                category="",
                licence="CC0-1.0",
                provenance="chats.jsonl:1",
            )
        ]
    ]


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        # the standard format of LLaMA-Factory (sharegpt, roles of OpenAI) and of ms-swift
        ({**ask("<image>Which colour?"), "images": ["Dog.png"]}, (Image(b"dog"), "Which colour?")),
        (
            {**ask("1:<image>2:<image>"), "images": ["Dog.png", DATA]},
            ("1:", Image(b"dog"), "2:", Image(b"inline")),
        ),
        ({**ask("<image>Which?"), "image": "Dog.png"}, (Image(b"dog"), "Which?")),
        ({**ask("<image>Which?"), "images": [{"path": "Dog.png", "bytes": None}]}, (Image(b"dog"), "Which?")),
        # without a place: ms-swift and TRL
        ({**ask("Which colour?"), "images": ["Dog.png", DATA]}, (Image(b"dog"), Image(b"inline"), "Which colour?")),
        ({**user({"type": "image"}, text("?")), "images": ["Dog.png"]}, (Image(b"dog"), "?")),
        # Qwen
        (user({"type": "image", "image": "file://Dog.png", "max_pixels": 9}, text("?")), (Image(b"dog"), "?")),
        (user({"image": DATA}, {"text": "?"}), (Image(b"inline"), "?")),
        # no medium at all
        ({**ask("Which?"), "images": [], "videos": None, "audio": ""}, ("Which?",)),
        (ask("Write <image> in HTML."), ("Write <image> in HTML.",)),
    ],
)
def test_images_beside_the_messages_are_shown_where_they_belong(
    record: Json, parts: tuple[Any, ...], write: Callable[..., Messages], read_all: ReadAll
) -> None:
    ((made,),) = read_all(write(record))
    assert isinstance(made, Record)
    assert made.turns[0].parts == parts


def test_what_stands_beside_the_messages_is_read_or_refuses_the_record(
    write: Callable[..., Messages], read_all: ReadAll
) -> None:
    source = write({"system": "Be brief.", **ask("Q?")}, {"tools": [{"name": "f"}], **ask("Q?")})
    (made,), (dropped,) = read_all(source)
    assert isinstance(made, Record)
    assert made.turns[0] == Turn("system", ("Be brief.",))
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "tool_call"
    (bare,), (kept,) = read_all(source.with_changes({"ignore": ["system", "tools"]}))
    assert isinstance(bare, Record)
    assert isinstance(kept, Record)
    assert bare.turns[0] == kept.turns[0] == Turn("user", ("Q?",))


def test_media_that_are_left_out_on_purpose_are_named(write: Callable[..., Messages], read_all: ReadAll) -> None:
    source = write({**ask("<image>?"), "images": ["Dog.png"], "videos": ["v.mp4"]})
    ((made,),) = read_all(source.with_changes({"ignore": ["videos"]}))
    assert isinstance(made, Record)
    assert made.turns[0].parts == (Image(b"dog"), "?")


def test_images_beside_the_messages_are_part_of_the_digest(
    write: Callable[..., Messages], scan: Scan, tmp_path: Path
) -> None:
    source = write({**ask("<image>?"), "images": ["Dog.png"]})
    (before,) = scan(source)
    assert before.images == 1
    (tmp_path / "images/Dog.png").write_bytes(b"another dog")
    assert scan(source)[0].digest != before.digest


def test_a_image_without_a_name_is_split_by_its_content(write: Callable[..., Messages], read_all: ReadAll) -> None:
    (inline,), (words,) = read_all(write(user(image(DATA)), OK))
    assert isinstance(inline, Record)
    assert isinstance(words, Record)
    assert inline.object == hashlib.sha256(b"inline").hexdigest()
    assert (words.id, words.object) == ("chats.jsonl:2", hashlib.sha256(b"Hi").hexdigest())


@pytest.mark.parametrize(
    ("record", "reason", "told"),
    [
        (user(image("http://ex.test/a.png")), "remote_image", "download it first"),
        (user(image("HTTPS://ex.test/a.png")), "remote_image", "download it first"),
        (user(image("file:///etc/passwd")), "bad_image_path", "is not a path inside"),
        (user(image("s3://bucket/a.png")), "remote_image", "write a path"),
        (user(image("/etc/passwd")), "bad_image_path", "is not a path inside"),
        (user(image("../chats.jsonl")), "bad_image_path", "without '..'"),
        (user(image("gone.png")), "missing_image", "no file 'gone.png'"),
        (user(image("data:image/png,abc")), "bad_base64", "is not a data:TYPE;base64"),
        (user(image("data:image/png;base64")), "bad_base64", "is not a data:TYPE;base64"),
        (user(image("data:image/png;base64,a")), "bad_base64", "is not base64"),
        (user({"type": "image_url", "image_url": {}}), "malformed_turns", "a part is of type text or image_url"),
        (user({"type": "input_audio"}), "malformed_turns", "a part is of type text or image_url"),
        (user({"type": "video_url", "video_url": {"url": "v.mp4"}}), "video", "sample its frames"),
        (user(text("?"), answer=None), "malformed_turns", "message 2 has None as content"),
        (user(text("?"), answer=""), "no_text", "turn 2 (assistant) is empty"),
        (user(text("?"), answer=[]), "no_text", "turn 2 (assistant) is empty"),
        (user(text(" ")), "no_text", "turn 1 (user) is empty"),
        (user(text("\0")), "nul_in_text", "turn 1 (user)"),
        (user(text("?"), answer="\udfff"), "lone_surrogate", "turn 2 (assistant)"),
        ({"messages": OK["messages"][1:]}, "turn_order", "here assistant"),
        ({"messages": OK["messages"][:1] * 2}, "turn_order", "user, user"),
        ({"messages": []}, "turn_order", "here none"),
        ({"messages": "Hi"}, "malformed_turns", "a list of turns"),
        ({"conversations": []}, "malformed_turns", "a list of turns, not None"),
        ({"messages": ["Hi"]}, "malformed_turns", "turn 1 is no object"),
        ({"messages": [{"content": "Hi"}]}, "malformed_turns", "turn 1"),
        ({"messages": [{"role": "User", "content": "Hi"}]}, "unknown_role", "'User'"),
        ({"messages": [*OK["messages"], {"role": "tool", "content": "4"}]}, "tool_call", "message 3"),
        (
            {"messages": [*OK["messages"][:1], {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "tool_call", "message 2",
        ),
        (
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "weight": 0}]},
            "weight", "message 2",
        ),
        ({**ask("<image>?"), "images": ["Dog.png", "Dog.png"]}, "too_few_placeholders", "1 of <image> for 2 images"),
        ({**ask("<image><image>?"), "images": ["Dog.png"]}, "too_many_placeholders", "2 of <image> for 1 images"),
        ({**ask("<image>?"), "images": []}, "too_many_placeholders", "1 of <image> for 0 images"),
        ({**ask("?"), "images": ["gone.png"]}, "missing_image", "no file 'gone.png'"),
        ({**ask("?"), "images": ["../chats.jsonl"]}, "bad_image_path", "without '..'"),
        ({**ask("?"), "images": ["http://ex.test/a.png"]}, "remote_image", "download it first"),
        ({**ask("?"), "images": "Dog.png", "image": "Dog.png"}, "malformed_image", "not under both"),
        ({**ask("?"), "videos": ["v.mp4"]}, "video", "`videos` names video that is not read"),
        ({**ask("<image>?"), "images": ["Dog.png"], "videos": ["v.mp4"]}, "video", "sample its frames"),
        ({**ask("?"), "audios": ["a.wav"]}, "unread_media", "`audios` names audio that is not read"),
        ({**ask("<image>?"), "image_path": "Dog.png"}, "unread_media", "set `ignore: [image_path]`"),
        ({**ask("?"), "pictures": ["Dog.png"]}, "unread_media", "name images in `images`"),
    ],
)  # fmt: skip
def test_a_faulty_conversation_is_dropped_with_its_line(
    record: Json, reason: str, told: str, write: Callable[..., Messages], read_all: ReadAll
) -> None:
    (before,), (dropped,), (after,) = read_all(write(OK, {"id": "x", **record}, OK))
    assert isinstance(before, Record)
    assert isinstance(after, Record)
    assert isinstance(dropped, Dropped)
    assert (dropped.id, dropped.reason, dropped.where) == ("x", reason, "chats.jsonl:2")
    assert told in dropped.detail


def test_only_data_addresses_are_read_without_a_folder(tmp_path: Path, read_all: ReadAll) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in (user(image(DATA)), user(image("Dog.png")))))
    (inline,), (named,) = read_all(Messages(path=str(path), licence="CC0-1.0"))
    assert isinstance(inline, Record)
    assert isinstance(named, Dropped)
    assert (named.reason, named.where) == ("missing_image", "a.jsonl:2")


def test_a_image_over_the_limit_is_dropped(
    write: Callable[..., Messages], read_all: ReadAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 5)
    (inline,), (named,) = read_all(write(user(image(DATA + "AAAAAAAA")), user(image("Dog.png"))))
    assert isinstance(inline, Dropped)
    assert inline.reason == "image_too_big"
    assert isinstance(named, Record)


def test_spans_and_digest(write: Callable[..., Messages], read_all: ReadAll, scan: Scan, tmp_path: Path) -> None:
    source = write(*[{"id": str(n), **user(image("Dog.png" if n % 2 else DATA))} for n in range(40)])
    assert [record.id for (record,) in read_all(source)] == [str(n) for n in range(40)]
    (before,) = scan(source)
    assert (before.count, before.images, len(before.marks)) == (40, 40, 3)
    (tmp_path / "images/cat.png").write_bytes(b"unrelated")
    assert scan(source) == [before]
    (tmp_path / "images/Dog.png").write_bytes(b"another dog")
    assert scan(source)[0].digest != before.digest
