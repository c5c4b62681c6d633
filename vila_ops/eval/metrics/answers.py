"""Equality of short answers. Pure."""

import string
import unicodedata


def normalised(text: str) -> str:
    """The text by which two answers are compared: without case, without blanks and punctuation at its ends.

    Blanks between words count as one. NFKC makes compatible characters equal, such as full-width letters.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(string.punctuation + string.whitespace)
