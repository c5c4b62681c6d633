import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vila_ops.config.sources import Html
from vila_ops.data.raw.files import RawFile
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources import html

Found = list[list[Record | Dropped]]
ReadAll = Callable[[Html], Found]
Scan = Callable[[Html], list[RawFile]]


def image(width: int, height: int, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, height), "red").save(buffer, kind)
    return buffer.getvalue()


WIDE, ICON, PHOTO = image(200, 64), image(200, 63), image(80, 90, "jpeg")
PAGE = """<!DOCTYPE html><html><head><title>Blur</title><style>p {color: red}</style>
<link rel=icon href=icon.png><body class=x>
<nav><ul><li><a href=/>Home</a> <img src=img/wide.png></ul></nav>
<h1>Blur &amp; sharpen</h1>
<p>A <b>blurred</b>
   photo:<img alt="not read" src="img/wide.png">
<p>Click the <img src=../guide/img/icon.png> icon
<ul><li>One<li>Two<br>Three</ul>
<script>document.write("<p>no</p>")</script>
<table><tr><td>Left<td>Right</table>
<div role="navigation"><div>Next</div></div>
<IMG SRC='/guide/img/my%20photo.jpg?size=1#top'><!-- <img src=no.png> -->
The end."""


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Html]:
    """A folder with guide/page.html and its images."""

    def make(text: str | bytes, **settings: Any) -> Html:
        folder = tmp_path / "site/guide/img"
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in {
            "wide.png": WIDE,
            "icon.png": ICON,
            "my photo.jpg": PHOTO,
            "text.png": b"no image",
        }.items():
            (folder / name).write_bytes(data)
        (tmp_path / "secret.png").write_bytes(WIDE)
        (folder.parent / "page.html").write_bytes(text if isinstance(text, bytes) else text.encode())
        return Html(path=str(tmp_path / "site"), licence="CC-BY-SA-4.0", **settings)

    return make


def parts(found: Found) -> tuple[Any, ...]:
    ((record,),) = found
    assert isinstance(record, Record), record
    (turn,) = record.turns
    return turn.parts


def test_a_page_is_text_and_figures_in_reading_order_without_icons_and_navigation(
    read_all: ReadAll, made: Callable[..., Html]
):
    assert read_all(made(PAGE)) == [
        [
            Record(
                id="guide/page.html",
                object="guide/page.html",
                turns=(
                    Turn(
                        "document",
                        (
                            "Blur & sharpen\nA blurred photo:",
                            Image(WIDE),
                            "Click the\nicon\nOne\nTwo\nThree\nLeft Right",
                            Image(PHOTO),
                            "The end.",
                        ),
                    ),
                ),
                category="",
                licence="CC-BY-SA-4.0",
                provenance="guide/page.html",
            )
        ]
    ]


def test_images_in_data_addresses_are_read(read_all: ReadAll, made: Callable[..., Html]):
    photo, icon = (base64.b64encode(data).decode() for data in (PHOTO, ICON))
    page = f"""<p>a<img src='data:image/jpeg;base64,{photo[:9]}
    {photo[9:]}'>b<img src='data:image/png;base64,{icon}'>c"""
    assert parts(read_all(made(page))) == ("a", Image(PHOTO), "b\nc")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("Bär".encode(), "Bär"),
        (b"\xef\xbb\xbf" + "Bär".encode(), "Bär"),
        (b"\xff\xfe" + "Bär".encode("utf-16-le"), "Bär"),
        (b"\xfe\xff" + "Bär".encode("utf-16-be"), "Bär"),
        (b"<meta charset=ISO-8859-1>B\xe4r \x80", "Bär €"),
        (b"<META http-equiv='Content-Type' content='text/html; charset=windows-1251'>\xc1\xe5\xeb\xfb\xe9", "Белый"),
        ('<meta charset="Shift_JIS">猫'.encode("shift_jis"), "猫"),
        ('<meta charset="gb2312">熊猫'.encode("gbk"), "熊猫"),
        ('<meta charset="utf-16">Bär'.encode(), "Bär"),
        (b"\xef\xbb\xbf<meta charset=windows-1251>" + "Bär".encode(), "Bär"),
    ],
)
def test_the_encoding_is_that_of_the_mark_or_the_declaration(
    data: bytes, text: str, read_all: ReadAll, made: Callable[..., Html]
):
    assert parts(read_all(made(data))) == (text,)


@pytest.mark.parametrize(
    ("page", "reason", "detail"),
    [
        ("<p>a<img src=http://ex.test/a.png>", "remote_image", "http://ex.test/a.png"),
        ("<p>a<img src=//ex.test/a.png>", "remote_image", "//ex.test/a.png"),
        ("<p>a<img src=file:///etc/a.png>", "remote_image", "file:"),
        ("<p>a<img src=\\\\ex.test\\a.png>", "remote_image", ""),
        ("<p>a<img src=http://[::1/a.png>", "bad_url", ""),
        ("<p>a<img src=../../secret.png>", "bad_image_path", "../secret.png"),
        ("<p>a<img src=/../secret.png>", "bad_image_path", "../secret.png"),
        ("<p>a<img src=%2e%2e/%2e%2e/secret.png>", "bad_image_path", "../secret.png"),
        ("<p>a<img src=%2Fetc%2Fpasswd>", "missing_image", "etc/passwd"),
        ("<p>a<img src=img/a%00.png>", "bad_image_path", ""),
        (f"<p>a<img src={'a' * 300}.png>", "bad_image_path", "aaa"),
        (f"<p>a<img src={'a/' * 3000}a.png>", "bad_image_path", "aaa"[:1]),
        ("<p>a<img src=img/gone.png>", "missing_image", "guide/img/gone.png"),
        ("<p>a<img src=img>", "missing_image", "guide/img"),
        ("<p>a<img src=img/text.png>", "bad_image_not_an_image", ""),
        ("<p>a<img src=link.png>", "bad_image_path", "link"),
        ("<p>a<img src=data:image/png,abc>", "bad_url", "base64"),
        ("<p>a<img src=data:image/png;base64,a>", "bad_base64", ""),
    ],
)  # fmt: skip
def test_a_image_that_cannot_be_had_costs_the_page_or_itself(
    page: str, reason: str, detail: str, read_all: ReadAll, made: Callable[..., Html], tmp_path: Path
):
    source = made(page)
    (tmp_path / "site/guide/link.png").symlink_to(tmp_path / "secret.png")
    ((fault,),) = read_all(source)
    assert isinstance(fault, Dropped)
    assert (fault.reason, fault.id, fault.where) == (reason, "guide/page.html", "guide/page.html")
    assert detail in fault.detail
    assert parts(read_all(made(page, missing_images="drop_image"))) == ("a",)


@pytest.mark.parametrize(
    ("page", "reason", "detail"),
    [
        (b"a \xff b", "bad_encoding", "byte 2 is not utf-8"),
        (b"<meta charset=utf-7>+ADw-", "bad_encoding", "'utf-7' is not in the WHATWG"),
        (b"<meta charset=unicode_escape>\\u0041", "bad_encoding", ""),
        (b"<meta charset=rot13>a", "bad_encoding", ""),
        (b"a\0b", "nul_in_text", ""),
        (b"", "no_text", ""),
        (b"<title>a</title><nav>b</nav><script>c</script>", "no_text", ""),
        (b"<img src=img/wide.png>", "no_text", ""),
    ],
)
def test_a_faulty_page_is_dropped(page: bytes, reason: str, detail: str, read_all: ReadAll, made: Callable[..., Html]):
    ((fault,),) = read_all(made(page))
    assert isinstance(fault, Dropped)
    assert fault.reason == reason
    assert detail in fault.detail


def test_a_page_beyond_the_limit_is_dropped_unread(
    read_all: ReadAll, made: Callable[..., Html], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(html, "MAX_PAGE_BYTES", 100)
    assert parts(read_all(made("a" * 100))) == ("a" * 100,)
    ((fault,),) = read_all(made("a" * 101))
    assert isinstance(fault, Dropped)
    assert fault.reason == "oversized"


def test_a_page_may_be_named_alone(read_all: ReadAll, made: Callable[..., Html], tmp_path: Path):
    made("a<img src=img/wide.png>b")
    found = read_all(Html(path=str(tmp_path / "site/guide/page.html"), licence="x"))
    assert parts(found) == ("a", Image(WIDE), "b")


def test_the_digest_is_of_the_page_and_its_images_and_of_no_other_file(
    scan: Scan, made: Callable[..., Html], tmp_path: Path
):
    source = made("a<img src=img/wide.png><img src=img/late.png>")
    (before,) = scan(source)
    (tmp_path / "site/guide/other.html").write_text("b<img src=img/icon.png>")
    (tmp_path / "site/guide/img/icon.png").write_bytes(PHOTO)
    other, same = scan(source)
    assert same == before
    assert (same.count, same.images) == (1, 2)
    assert other.digest != before.digest
    (tmp_path / "site/guide/img/late.png").write_bytes(WIDE)
    late = scan(source)[1]
    assert late.digest != before.digest
    (tmp_path / "site/guide/img/wide.png").write_bytes(PHOTO)
    assert scan(source)[1].digest != late.digest


TAGS = ["<p>", "</p>", "<nav>", "</nav>", "<img src=img/wide.png>", "<img src='", "<img>", "<table><td>", "utf-8",
        "<meta charset=", ">", "<script>", "</script>", "<!--", "-->", "&#0;", "&#xD800;", "a", "\u00e4", "<title>",
        "<div role=navigation>", "data:;base64,", "src=../../x", "\0", "big5"]  # fmt: skip


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(page=st.lists(st.sampled_from(TAGS).map(str.encode) | st.binary(max_size=3), max_size=12).map(b"".join))
def test_any_page_is_one_record_or_one_drop(page: bytes, read_all: ReadAll, made: Callable[..., Html]):
    ((one,),) = read_all(made(page, missing_images="drop_image"))
    if isinstance(one, Record):
        assert all(part and "\0" not in part for part in one.turns[0].parts if isinstance(part, str))
