"""Equality of short answers. Pure."""

import string
import unicodedata

_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def half_width(text: str) -> str:
    """The text with full-width ASCII as ASCII; other compatible characters, such as superscripts, stay."""
    return text.translate(_HALF_WIDTH)


def normalised(text: str) -> str:
    """The text by which two answers are compared: without case, without blanks and punctuation at its ends.

    Blanks between words count as one. NFKC makes compatible characters equal, such as full-width letters.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(string.punctuation + string.whitespace)
