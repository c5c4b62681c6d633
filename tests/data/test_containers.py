import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import PngImagePlugin

from vila_ops.data.containers import exif_orientation, strip

XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


def saved(kind: str, **more: Any) -> bytes:
    out = io.BytesIO()
    Pillow.linear_gradient("L").resize((24, 16)).convert("RGB").save(out, kind, **more)
    return out.getvalue()


def table(order: str, *entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF: a TIFF header, then entries of tag, type, count and value."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HLH", 42, 8, len(entries))
    return head + b"".join(struct.pack(order + "HHL4s", *entry) for entry in entries) + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "letter"), [(3, "H"), (4, "L"), (6, "b"), (8, "h"), (9, "l")])
def test_the_orientation_is_the_one_that_pillow_reads(order: str, kind: int, letter: str) -> None:
    for turn in (0, 1, 6, 8, 9):
        value = struct.pack(order + letter, turn)
        data = table(order, (0x010F, 2, 4, b"ACME"), (0x0112, kind, 1, value), (0x0131, 2, 2, b"x\0"))
        theirs = Pillow.Exif()
        theirs.load(data)
        assert exif_orientation(data) == exif_orientation(b"Exif\0\0" + data) == theirs[0x0112] == turn


def test_broken_exif_names_no_orientation() -> None:
    good = table("<", (0x0112, 3, 1, b"\6\0\0\0"))
    assert exif_orientation(good) == 6
    assert exif_orientation(table("<", (0x0112, 3, 2, b"\6\0\6\0"))) is None
    assert exif_orientation(table("<", (0x0112, 1, 1, b"\6\0\0\0"))) is None
    for bad in (b"", b"II", b"XX" + good[2:], good[:4] + b"\xff\xff\xff\xff" + good[8:], good[:20], b"Exif\0\0"):
        assert exif_orientation(bad) is None


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_xmp_tells_the_orientation_where_exif_does_not(kind: str) -> None:
    def with_xmp(turn: int, **more: Any) -> bytes:
        if kind != "PNG":
            return saved(kind, xmp=XMP.format(turn).encode(), **more)
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP.format(turn))
        return saved(kind, pnginfo=info, **more)

    exif = Pillow.Exif()
    exif[0x0112] = 3
    assert strip(with_xmp(8)).orientation == 8
    assert strip(with_xmp(8, exif=exif)).orientation == 3


def private(kind: str) -> bytes:
    """A file that says `secret` in every place that its format has for words."""
    exif = Pillow.Exif()
    exif[0x010E] = "secret"
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("secret", "secret")
        info.add_itxt("secret", "secret")
        return saved(kind, pnginfo=info, exif=exif, icc_profile=b"secret")
    if kind == "JPEG":
        return saved(kind, exif=exif, icc_profile=b"secret", comment="secret", xmp=b"secret")
    return saved(kind, comment=b"secret")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_a_stripped_file_is_the_image_and_nothing_else(kind: str) -> None:
    data = private(kind)
    stripped = strip(data)
    assert b"secret" in data
    assert b"secret" not in stripped.data
    assert (stripped.format, stripped.width, stripped.height, stripped.orientation) == (kind, 24, 16, 1)
    with Pillow.open(io.BytesIO(data)) as whole, Pillow.open(io.BytesIO(stripped.data)) as left:
        assert set(left.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi", "version", "background"}
        assert (np.asarray(whole.convert("RGB")) == np.asarray(left.convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF", "MPO"])
def test_one_frame_is_left(kind: str) -> None:
    data = saved(kind, save_all=True, append_images=[Pillow.new("RGB", (24, 16))])
    with Pillow.open(io.BytesIO(data)) as whole, Pillow.open(io.BytesIO(strip(data).data)) as left:
        assert (getattr(whole, "n_frames", 1), getattr(left, "n_frames", 1)) == (2, 1)
