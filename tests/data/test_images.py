import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageFile, ImageOps
from sklearn.datasets import load_sample_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vila_ops.config.images import Decoding, ImageEncoding, ImageReading, Jpeg, Webp
from vila_ops.data.containers import BadImage
from vila_ops.data.images import MOST_CROPPED, Fit, square, suffix
from vila_ops.model.pixels import Pixels

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of openai/clip-vit-large-patch14's preprocessor_config.json."""
CLIP_COLOUR = (122, 116, 104)
"""255 times that mean, rounded down."""
FITS = [Fit("pad", CLIP_MEAN), Fit("resize", CLIP_MEAN), Fit("crop", CLIP_MEAN)]
PAD = FITS[0]
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]
TURNED = [(kind, turn) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF") for turn in range(1, 9)]
LOSSLESS: dict[str, Any] = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}


def encoded(image: Pillow.Image, kind: str = "PNG", **more: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


def squared(data: bytes, *, size: int, fit: Fit = PAD, decode: Decoding = "exact") -> NDArray[np.uint8]:
    """The pixels of the lossless square."""
    return opened(square(data, size=size, fit=fit, encoding=Webp(), reading=ImageReading(decode=decode)), "WEBP")


def opened(data: bytes, kind: str) -> NDArray[np.uint8]:
    with Pillow.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode) == (kind, "RGB")
        return np.asarray(image).copy()


def noise(*shape: int, seed: int = 0, depth: Any = np.uint8) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, np.iinfo(depth).max, shape, dtype=depth, endpoint=True)


def exif(turn: int) -> Pillow.Exif:
    tags = Pillow.Exif()
    tags[0x0112] = turn
    return tags


def plain(data: bytes, size: int) -> NDArray[np.uint8]:
    """What a padded square is, in Pillow's own words: upright, on white, padded to a square, resized."""
    with Pillow.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            upright = Pillow.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        if "transparency" in upright.info or upright.mode in ("RGBA", "LA"):
            rgba = upright.convert("RGBA")
            upright = Pillow.alpha_composite(Pillow.new("RGBA", rgba.size, "white"), rgba)
        rgb = upright.convert("RGB")
    side = max(rgb.size)
    padded = Pillow.new("RGB", (side, side), CLIP_COLOUR)
    padded.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
    return np.asarray(padded.resize((size, size), Pillow.Resampling.BICUBIC))


KINDS = {
    "RGB": FORMATS[:3] + FORMATS[4:], "RGBA": ["PNG", "WEBP", "TIFF", "AVIF"], "L": FORMATS, "LA": ["PNG", "TIFF"],
    "P": ["PNG", "GIF", "BMP", "TIFF"], "1": ["PNG", "BMP", "TIFF"], "CMYK": ["JPEG", "TIFF"], "I;16": ["PNG", "TIFF"],
}  # fmt: skip


@pytest.mark.parametrize(("mode", "kind"), [(mode, kind) for mode, kinds in KINDS.items() for kind in kinds])
@pytest.mark.parametrize(("width", "height"), [(333, 250), (97, 401), (300, 300), (1, 1), (20, 11)])
def test_the_pixels_are_those_of_padding_then_resizing(mode: str, kind: str, width: int, height: int) -> None:
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2, "P": 3, "1": 3, "CMYK": 4, "I;16": 1}[mode]
    array = noise(height, width, channels, depth=np.uint16 if mode == "I;16" else np.uint8)
    drawn = None if channels == 1 else {"P": "RGB", "1": "RGB"}.get(mode, mode)
    image = Pillow.fromarray(array.squeeze(2) if channels == 1 else array, drawn)
    more: dict[str, Any] = {"exif": exif(1 + width % 8)} if kind in ("JPEG", "WEBP", "TIFF", "AVIF") else {}
    more |= {"transparency": 3} if mode == "P" and kind in ("PNG", "GIF") else {}
    data = encoded(image.convert(mode), kind, **more)
    for size in (8, 56, 336):
        assert (squared(data, size=size) == plain(data, size)).all()


ASPECTS = [(333, 250), (97, 401), (300, 300), (1, 1), (20, 11), (1, 64), (64, 1), (7, 440), (447, 7), (1031, 640)]


@pytest.mark.slow
@pytest.mark.parametrize("fit", FITS, ids=lambda fit: fit.kind)
@pytest.mark.parametrize(("width", "height"), ASPECTS)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_the_pixels_are_those_of_the_stock_processor(fit: Fit, width: int, height: int, mode: str) -> None:
    channels = {"RGB": (3,), "L": (), "RGBA": (4,)}[mode]
    image = Pillow.fromarray(noise(height, width, *channels), mode)
    for size in (8, 57, 336):
        both = {"height": size, "width": size}
        kept: Any = {"do_normalize": False, "do_rescale": False, "image_mean": CLIP_MEAN}
        stock = {
            "pad": LlavaImageProcessorPil(do_pad=True, do_center_crop=False, size=both, **kept),
            "resize": CLIPImageProcessorPil(size=both, do_center_crop=False, **kept),
            "crop": CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=both, **kept),
        }[fit.kind]
        expected = np.asarray(stock(image)["pixel_values"][0]).transpose(1, 2, 0)
        assert expected.shape == (size, size, 3)
        assert (squared(encoded(image), size=size, fit=fit) == expected).all()


@pytest.mark.parametrize("fit", FITS, ids=lambda fit: fit.kind)
def test_a_square_of_the_asked_size_is_left_alone(fit: Fit) -> None:
    array = noise(8, 8, 3)
    assert (squared(encoded(Pillow.fromarray(array)), size=8, fit=fit) == array).all()


def test_transparency_is_laid_on_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (10, 20, 30, 0)
    rgba[1, 0] = (0, 0, 0, 51)  # a fifth of black: four fifths of 255 are left
    found = squared(encoded(Pillow.fromarray(rgba)), size=2)
    assert found.tolist() == [[[10, 20, 30], [255, 255, 255]], [[204, 204, 204], [255, 255, 255]]]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_with_a_transparent_colour(kind: str) -> None:
    palette = Pillow.fromarray(np.array([[0, 1], [1, 2]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    found = squared(encoded(palette, kind, transparency=1), size=2)
    assert found.tolist() == [[[255, 0, 0], [255, 255, 255]], [[255, 255, 255], [0, 0, 255]]]


def test_grey_with_alpha() -> None:
    grey = Pillow.fromarray(np.array([[[7, 255], [7, 0]], [[9, 0], [9, 255]]], np.uint8), "LA")
    assert squared(encoded(grey), size=2)[..., 0].tolist() == [[7, 255], [255, 9]]


def test_padding_has_the_mean_colour_and_is_centred() -> None:
    for turned in (False, True):
        image = Pillow.new("RGB", (2, 6) if turned else (6, 2), (0, 0, 9))
        found = squared(encoded(image), size=6)
        found = found.transpose(1, 0, 2) if turned else found
        assert (found[[0, 1, 4, 5]] == CLIP_COLOUR).all()
        assert (found[2:4] == (0, 0, 9)).all()


@pytest.mark.parametrize("decode", ["exact", "scaled"])
@pytest.mark.parametrize(("kind", "turn"), TURNED)
def test_exif_turns_are_undone(kind: str, turn: int, decode: Decoding) -> None:
    upright = np.full((96, 128, 3), 128, np.uint8)
    upright[:48, :64], upright[:48, 64:], upright[48:, :64] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    # how a camera held that way stores the same scene (EXIF 2.3, tag 0x0112)
    stored = [
        upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1], upright.transpose(1, 0, 2),
        np.rot90(upright, 1), upright[::-1, ::-1].transpose(1, 0, 2), np.rot90(upright, -1),
    ][turn - 1]  # fmt: skip
    lossless: dict[str, Any] = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(
        kind, {}
    )
    data = encoded(Pillow.fromarray(np.ascontiguousarray(stored)), kind, exif=exif(turn), **lossless)
    expected = np.full((16, 16, 3), CLIP_COLOUR, np.uint8)
    expected[2:14] = upright[::8, ::8]
    centres = np.ix_([3, 4, 10, 11], [1, 5, 10, 14])  # away from edges, where bicubic overshoots
    error = np.abs(squared(data, size=16, decode=decode)[centres].astype(int) - expected[centres])
    assert error.max() <= (8 if kind in ("JPEG", "AVIF") else 2)


def test_sixteen_bits_of_grey_are_scaled() -> None:
    deep = Pillow.fromarray(np.array([[0, 65535], [32768, 257 * 7]], np.uint16))
    assert squared(encoded(deep), size=2)[..., 0].tolist() == [[0, 255], [128, 7]]


def test_cmyk_and_one_bit() -> None:
    """Pillow writes CMYK as Adobe does, inverted, with its marker."""
    cmyk = Pillow.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = squared(encoded(cmyk, "JPEG", quality=100), size=8)[4, 4].astype(int)
    assert np.abs(red - (255, 0, 0)).max() <= 4
    assert squared(encoded(Pillow.new("1", (2, 2), 1)), size=2).min() == 255


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "MPO"])
def test_the_first_frame_is_taken(kind: str) -> None:
    red, blue = (Pillow.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 0, 250)))
    lossless: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(red, kind, save_all=True, append_images=[blue], **lossless)
    with Pillow.open(io.BytesIO(data)) as animated:
        assert getattr(animated, "n_frames", 1) == 2
    assert np.abs(squared(data, size=8).astype(int) - (250, 0, 0)).max() <= 3


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_bytes_give_the_same_square(kind: str) -> None:
    data = encoded(Pillow.new("RGB", (8, 8), (0, 128, 0)), kind)
    assert square(data, size=8, fit=PAD, encoding=Jpeg()) == square(data, size=8, fit=PAD, encoding=Jpeg())
    assert np.abs(squared(data, size=8)[4, 4].astype(int) - (0, 128, 0)).max() <= 3


def photo(name: str) -> Pillow.Image:
    """A real photo, mirrored side by side to the size of a camera's: with detail down to the pixel."""
    tile = np.asarray(load_sample_image(name))
    tile = np.concatenate([tile, tile[:, ::-1]], axis=1)
    return Pillow.fromarray(np.tile(np.concatenate([tile, tile[::-1]]), (4, 2, 1))[:1920, :2560])


@pytest.mark.parametrize("fit", FITS, ids=lambda fit: fit.kind)
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_scaled_decoding_errs_as_little_as_stated(name: str, fit: Fit) -> None:
    for turn in (1, 6):
        data = encoded(photo(name), "JPEG", quality=92, exif=exif(turn))
        error = np.abs(squared(data, size=224, fit=fit, decode="scaled").astype(int) - squared(data, size=224, fit=fit))
        assert 0 < error.max() <= 12
        assert error.mean() < 1


def test_scaled_decoding_changes_nothing_where_it_has_nothing_to_win() -> None:
    small, odd = Pillow.fromarray(noise(480, 640, 3)), Pillow.fromarray(noise(1501, 2000, 3))
    for data in (encoded(small, "JPEG"), encoded(odd, "JPEG"), encoded(odd, "PNG", compress_level=0)):
        assert (squared(data, size=336, decode="scaled") == squared(data, size=336)).all()


@pytest.mark.parametrize(
    ("encoding", "kind", "name", "error"),
    [(Jpeg(), "JPEG", "jpg", 2.0), (Jpeg(quality=50), "JPEG", "jpg", 8.0), (Webp(), "WEBP", "webp", 0.0),
     (Webp(quality=90), "WEBP", "webp", 4.0)],
)  # fmt: skip
def test_squares_are_kept_as_asked(encoding: ImageEncoding, kind: str, name: str, error: float) -> None:
    data = encoded(photo("china.jpg").crop((0, 0, 640, 427)))
    found = opened(square(data, size=336, fit=PAD, encoding=encoding), kind)
    assert np.abs(found.astype(int) - plain(data, 336)).mean() <= error
    assert suffix(encoding) == name


def test_kept_jpegs_have_all_of_their_colour() -> None:
    """One column red, one blue: halved chroma would mix them to purple."""
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::2, 0] = stripes[:, 1::2, 2] = 200
    found = opened(square(encoded(Pillow.fromarray(stripes)), size=16, fit=PAD, encoding=Jpeg()), "JPEG")
    assert np.abs(found.astype(int) - stripes).max() <= 25


@pytest.mark.parametrize("kind", [*FORMATS, "progressive"])
def test_a_cut_file_is_refused_or_lost_nothing(kind: str) -> None:
    more: dict[str, Any] = {"format": "JPEG", "progressive": True} if kind == "progressive" else {"format": kind}
    out = io.BytesIO()
    Pillow.fromarray(noise(12, 16, 3)).save(out, **more)
    whole = out.getvalue()
    expected = squared(whole, size=8)
    refused = 0
    for length in range(len(whole)):
        try:
            assert (squared(whole[:length], size=8) == expected).all(), f"{length} of {len(whole)} bytes"
        except BadImage:
            refused += 1
    assert refused >= len(whole) - 16


def test_lost_data_is_noticed_although_the_end_marker_is_there() -> None:
    """libjpeg would fill the lower half with grey."""
    data = encoded(Pillow.fromarray(noise(64, 64, 3)), "JPEG")
    for share in (0.5, 0.9, 0.98):
        with pytest.raises(BadImage) as refused:
            squared(data[: int(len(data) * share)] + b"\xff\xd9", size=8)
        assert refused.value.reason == "truncated"


def test_the_pixel_limit_is_exact() -> None:
    image = encoded(Pillow.new("L", (30, 20)))
    assert read(image, max_pixels=600).shape == (8, 8, 3)
    with pytest.raises(BadImage, match=r"30 x 20 pixels, more than 599 \(max_pixels\)") as refused:
        read(image, max_pixels=599)
    assert refused.value.reason == "too_many_pixels"
    assert read(image, max_side=30).shape == (8, 8, 3)
    with pytest.raises(BadImage, match=r"so narrow that a side has more than 29 \(max_side\)") as refused:
        read(image, max_side=29)
    assert refused.value.reason == "too_narrow"


def read(data: bytes, *, fit: Fit = PAD, size: int = 8, **limits: Any) -> NDArray[np.uint8]:
    """The pixels of the lossless square, read with these settings."""
    return opened(square(data, size=size, fit=fit, encoding=Webp(), reading=ImageReading(**limits)), "WEBP")


PHONES = [(8160, 6120), (8064, 6048), (9248, 6936)]
"""Sides of photos of phones with 50, 48 and 64 megapixels."""


@functools.cache
def large() -> tuple[bytes, bytes]:
    """A photo of a phone, and a screenshot of a long page."""
    photo = encoded(Pillow.new("RGB", PHONES[0], (9, 90, 9)), "JPEG")
    return photo, encoded(Pillow.new("RGB", (1000, 12_000), (90, 9, 9)), compress_level=1)


@pytest.mark.slow
@pytest.mark.parametrize(("fit", "decode"), [(0, "exact"), (2, "exact"), (1, "scaled"), (2, "scaled")])
def test_a_photo_of_a_phone_and_a_screenshot_are_read(fit: int, decode: Decoding) -> None:
    phone, screenshot = (read(data, fit=FITS[fit], decode=decode).astype(int) for data in large())
    assert np.abs(phone[4, 4] - (9, 90, 9)).max() <= 2
    if FITS[fit].kind == "pad":
        assert (screenshot[:, 0] == CLIP_COLOUR).all()
        assert (screenshot[:, 4] != CLIP_COLOUR).all()
    else:
        assert (screenshot == (90, 9, 9)).all()


def test_the_default_limits_admit_what_phones_make() -> None:
    limits = ImageReading()
    assert all(width * height <= limits.max_pixels for width, height in PHONES)


@pytest.mark.parametrize("kind", ["baseline", "progressive", "ended", "restarts"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_truncated_jpeg_is_read_as_vilas_loader_reads_it(
    kind: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VILA sets PIL.ImageFile.LOAD_TRUNCATED_IMAGES (llava/data/dataset.py)."""
    more: dict[str, Any] = {"progressive": {"progressive": True}, "restarts": {"restart_marker_blocks": 2}}.get(
        kind, {}
    )
    whole = encoded(photo("china.jpg").crop((0, 0, 320, 240)), "JPEG", **more)
    cut = whole[: int(len(whole) * share)] + (b"\xff\xd9" if kind == "ended" else b"")
    for lost in (cut, whole[:-1]):  # one byte, as in huggingface/datasets#6558
        with pytest.raises(BadImage) as refused:
            read(lost, size=240)
        assert refused.value.reason == "truncated"
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        expected = plain(lost, 240)
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
        assert (read(lost, size=240, truncated="read") == expected).all()
    assert (read(whole, size=240, truncated="read") == plain(whole, 240)).all()


def test_a_tiff_of_sixteen_bits_is_scaled_in_either_byte_order() -> None:
    """github.com/unslothai/unsloth/pull/10094: convert("RGB") clips it to white."""
    ramp = np.arange(0, 65_536, 64, dtype=np.uint16).reshape(32, 32)
    for order in ("<u2", ">u2"):
        data = encoded(Pillow.fromarray(ramp.astype(order)), "TIFF")
        assert data[:2] == (b"II" if order == "<u2" else b"MM")
        assert (squared(data, size=32)[..., 0] == ramp >> 8).all()


TIFFS = ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4"]


@pytest.mark.parametrize("compression", TIFFS)
def test_a_tiff_is_read_in_each_coding_that_is_listed(compression: str) -> None:
    image = Pillow.fromarray(noise(40, 60) if compression == "group4" else noise(40, 60, 3))
    image = image.convert("1") if compression == "group4" else image
    data = encoded(image, "TIFF", compression=compression)
    assert (squared(data, size=56) == plain(data, 56)).all()


@pytest.mark.parametrize(
    ("make", "reason", "told"),
    [
        (lambda: encoded(Pillow.new("F", (9, 9)), "TIFF"), "unsupported", "a TIFF of pixels 'F'; save it as 8-bit RGB"),
        (lambda: encoded(Pillow.new("I", (9, 9)), "TIFF"), "unsupported", "a TIFF of pixels 'I'"),
        (lambda: encoded(Pillow.new("LAB", (9, 9)), "TIFF"), "unsupported", "a TIFF of pixels 'LAB'"),
        (lambda: encoded(Pillow.new("L", (9, 9)), "TIFF", compression="zstd"), "unsupported", "of compression 50000"),
        (lambda: encoded(Pillow.new("L", (9, 9)), "TIFF", big_tiff=True), "not_an_image", "a BigTIFF"),
        (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(9), "not_an_image", "'heic' .HEIC photos"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid", "not_an_image", "git lfs pull"),
        (lambda: b"<!DOCTYPE html><title>404", "not_an_image", "a web page, none of the formats PNG, JPEG"),
        (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'>", "not_an_image", "an SVG drawing"),
    ],
)
def test_what_is_not_read_is_told_what_it_is(make: Callable[[], bytes], reason: str, told: str) -> None:
    with pytest.raises(BadImage, match=told) as refused:
        read(make())
    assert refused.value.reason == reason


@pytest.mark.parametrize("sides", [(MOST_CROPPED + 1, 1), (1, MOST_CROPPED + 1)])
def test_a_strip_is_not_cropped_to_its_middle(sides: tuple[int, int]) -> None:
    image = encoded(Pillow.new("L", sides))
    pad, resize, crop = FITS
    assert squared(image, size=8, fit=pad).shape == squared(image, size=8, fit=resize).shape == (8, 8, 3)
    with pytest.raises(BadImage, match="so narrow that its middle") as refused:
        squared(image, size=8, fit=crop)
    assert refused.value.reason == "too_narrow"


@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), CLIP_MEAN])
@pytest.mark.parametrize("encoding", [Jpeg(), Webp()])
def test_pixels_are_normalised_as_by_the_stock_processor(
    mean: tuple[float, ...], encoding: ImageEncoding, tiny: Path
) -> None:
    paths = sorted((tiny / "pairs").glob("*.png"))[:8]
    squares = [square(path.read_bytes(), size=28, fit=PAD, encoding=encoding) for path in paths]
    size = {"height": 28, "width": 28}
    stock = CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=list(mean), image_std=list(CLIP_STD))
    expected = stock([Pillow.open(io.BytesIO(data)) for data in squares], return_tensors="np")["pixel_values"]
    actual = Pixels(mean, CLIP_STD)(squares).numpy()
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape == (8, 3, 28, 28)
    assert np.abs(actual - expected).max() <= 1e-6
