"""Hostile images in the decoder process of an endpoint: each is answered or refused, and the next one is decoded."""

from contextlib import closing
from typing import get_args

import pytest

from tests.data.hostile_images import named
from tests.data.test_images_fuzz import EXPECTED
from tests.serve.app.live import png
from vila_ops.config.images import ImageReading
from vila_ops.config.serve import ImageFormat
from vila_ops.serve.app.decoder import DecoderSettings
from vila_ops.serve.app.media import DecodeFailed, Decoder

SETTINGS = DecoderSettings(
    size=32, fit="pad", mean=(0.5, 0.5, 0.5), max_pixels=ImageReading().max_pixels, formats=get_args(ImageFormat)
)
REFUSED = {name for name, outcome in EXPECTED.items() if outcome != "image"} | {"tall_png"}
"""An endpoint's longest side follows from its pixels, and is shorter than that of prepared data."""


def answer(decoder: Decoder, data: bytes) -> bytes | str:
    """The square, or why there is none."""
    try:
        return decoder.square(data, timeout_seconds=120)
    except DecodeFailed as error:
        return str(error)


@pytest.mark.slow
def test_every_named_attack_is_answered_or_refused_and_good_images_after_it_are_decoded() -> None:
    with closing(Decoder(SETTINGS)) as decoder:
        good = answer(decoder, png(9, 9))
        assert isinstance(good, bytes)
        for name, make in named():
            made = answer(decoder, make())
            assert made, name
            assert isinstance(made, str) == (name in REFUSED), (name, made)
            assert answer(decoder, png(9, 9)) == good, name
