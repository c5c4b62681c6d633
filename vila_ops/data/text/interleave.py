"""MMC4's documents to parts: interleaved as in the paper's recipe, and the two orders that the paper compares. Pure.

Each function takes the sentences of a document and its images in the order of the file, each with the index of the
sentence that it is matched to. The first `max_images` images are used, sorted by their sentence; images of one sentence
keep their order. A match that is not the index of a sentence raises ValueError.
"""

from collections.abc import Sequence

from vila_ops.data.records import Image, Part

MAX_IMAGES = 6
"""The limit of VILA's loader."""

Match = tuple[int, Image]
"""Index of the matched sentence, and the image."""


def place(sentences: Sequence[str], images: Sequence[Match], *, max_images: int = MAX_IMAGES) -> tuple[Part, ...]:
    """The interleaved order: each image directly before its sentence.

    Sentences are joined by one space, and one space on either side of an image is removed (VILA's LazyMMC4Dataset,
    which also keeps an image that no text follows: the end of the text does).
    """
    chosen = _chosen(sentences, images, max_images)
    parts: list[Part] = []
    text = ""
    for number, sentence in enumerate(sentences):
        text += " " if number else ""
        if own := [image for match, image in chosen if match == number]:
            parts += [_after(parts, text).removesuffix(" "), *own]
            text = ""
        text += sentence
    return _without_empty([*parts, _after(parts, text)])


def pairs(
    sentences: Sequence[str], images: Sequence[Match], *, max_images: int = MAX_IMAGES
) -> list[tuple[Image, str]]:
    """MMC4-pairs: each image with its matched sentence as one sample; the other text is left out.

    "text1 img1 text2 text3 img2 text4" gives (img1, text2) and (img2, text4). Each image of a
    sentence makes a pair; an image whose sentence is blank makes none.
    """
    chosen = _chosen(sentences, images, max_images)
    return [(image, sentences[match].removeprefix(" ")) for match, image in chosen if sentences[match].strip()]


def image_first(sentences: Sequence[str], images: Sequence[Match], *, max_images: int = MAX_IMAGES) -> tuple[Part, ...]:
    """All images, in the order of `place`, then all text."""
    chosen = _chosen(sentences, images, max_images)
    text = " ".join(sentences)
    in_order = [image for _, image in chosen]
    return _without_empty([*in_order, _after(in_order, text)])


def _chosen(sentences: Sequence[str], images: Sequence[Match], max_images: int) -> list[Match]:
    for number, (match, _) in enumerate(images):
        if type(match) is not int or not 0 <= match < len(sentences):
            raise ValueError(
                f"image {number} is matched to sentence {match!r}, but a match is the index of one of the "
                f"{len(sentences)} sentences, from 0; fix it or leave the image out"
            )
    return sorted(images[:max_images], key=lambda pair: pair[0])


def _after(parts: Sequence[Part], text: str) -> str:
    """The text without its first space if it follows an image."""
    return text.removeprefix(" ") if parts else text


def _without_empty(parts: Sequence[Part]) -> tuple[Part, ...]:
    return tuple(part for part in parts if part != "")
