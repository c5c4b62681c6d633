from typing import Any

import pytest

from vila_ops.data.sources.faults import Fault
from vila_ops.data.sources.media import refuse_unread, stated_images


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        ({"videos": ["v.mp4"]}, "video"),
        ({"video": "v.mp4"}, "video"),
        ({"video_path": "clips/v"}, "video"),
        ({"audios": ["a.wav"]}, "unread_media"),
        ({"images": ["a.png"]}, "unread_media"),
        ({"image": {"path": "a.png", "bytes": None}}, "unread_media"),
        ({"image_2": "b.png"}, "unread_media"),
        ({"imagePath": "a.png"}, "unread_media"),
        ({"img": "iVBORw0KGgo="}, "unread_media"),
        ({"image_url": "https://ex.test/a.png"}, "unread_media"),
        ({"pictures": [["a", "b"]]}, "unread_media"),
        ({"media": [{"type": "image", "url": "x"}]}, "unread_media"),
        ({"file_name": "0001.jpg"}, "unread_media"),
        ({"attachments": [{"path": "scan.TIFF"}]}, "unread_media"),
        ({"frames": ["f/1.jpeg", "f/2.jpeg"]}, "unread_media"),
        ({"clip": "v.webm"}, "video"),
        ({"speech": "a.flac"}, "unread_media"),
        ({"thumb": "data:image/png;base64,AAAA"}, "unread_media"),
        ({"mask": {"bytes": b"\x89PNG", "path": None}}, "unread_media"),
    ],
)
def test_a_key_with_media_refuses_the_record_unless_it_is_read_or_ignored(stated: dict[str, Any], reason: str) -> None:
    (key,) = stated
    with pytest.raises(Fault, match=rf"`{key}` names .*`ignore: \[{key}\]`") as raised:
        refuse_unread({"id": "1", **stated}, read=("messages",), ignore=())
    assert raised.value.reason == reason
    refuse_unread(stated, read=(key,))
    refuse_unread(stated, read=(), ignore=[key])


@pytest.mark.parametrize(
    "stated",
    [
        {"images": None, "image": "", "videos": [], "audios": [None, ""], "media": {"image": None}},
        {"image_id": "000000033471", "video_id": "v_xyz", "sample_id": "coco/1.jpg", "id": "img/1.jpg"},
        {"num_images": 2, "has_image": True, "image_size": [336, 336], "width_list": [1], "image": 7},
        {"image_caption": "A dog.", "image_source": "coco", "image_sha256": "00ff", "video_fps": "2"},
        {"url": "https://ex.test/a.png", "license": "see a.png", "source": "A page on dogs.", "imagery": "rich"},
        {"metadata": {"created": "2024", "file": "shard-1.jpg"}, "conversations": []},
        {"note": "It is in a.png", "model": "llava.v1.5", "ref": "e.g.", "dot": ".png", "version": "1.2"},
    ],
)
def test_what_is_said_about_media_is_none(stated: dict[str, Any]) -> None:
    refuse_unread(stated, read=())


def test_another_key_may_name_what_is_shown_or_where_it_came_from() -> None:
    refuse_unread(
        {"image_path": "/data/coco/a.png", "coco_url": "https://ex.test/1.jpg", "file_name": "a.png"},
        read=("image",),
        shown=["train/a.png"],
    )
    refuse_unread({"image_path": "anything.png"}, read=("image",), shown=[""])
    with pytest.raises(Fault, match="`image_path` names image"):
        refuse_unread({"image_path": "b.png"}, read=("image",), shown=["a.png"])
    with pytest.raises(Fault, match="`video` names video"):
        refuse_unread({"video": "https://ex.test/v.mp4"}, read=("image",), shown=["a.png"])


@pytest.mark.parametrize(
    ("stated", "images"),
    [
        ({}, []),
        ({"image": None, "images": []}, []),
        ({"image": ""}, []),
        ({"image": "a.png", "images": None}, ["a.png"]),
        ({"images": ["a.png", {"path": "b.png"}, {"url": "c.png"}]}, ["a.png", "b.png", "c.png"]),
        ({"images": {"bytes": "AAAA", "path": None}}, ["data:;base64,AAAA"]),
    ],
)
def test_images_are_named_under_image_or_images(stated: dict[str, Any], images: list[str]) -> None:
    assert stated_images(stated) == images


@pytest.mark.parametrize(
    "stated", [{"image": 7}, {"images": ["a.png", ""]}, {"images": [None]}, {"image": "a.png", "images": ["b.png"]}]
)
def test_images_that_cannot_be_told_refuse_the_record(stated: dict[str, Any]) -> None:
    with pytest.raises(Fault) as raised:
        stated_images(stated)
    assert raised.value.reason == "malformed_image"
