"""How pages are written: templates of this folder, every text escaped, one frame and one style."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vila_ops.report import words

FILTERS = {
    "number": words.number,
    "signed": words.signed,
    "duration": words.duration,
    "short": words.short,
    "moment": words.moment,
    "web": words.web,
    "workers": words.workers,
    "where": words.where,
    "same": words.same_words,
    "plain": words.plain,
}


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= FILTERS


def rendered(template: str, **content: Any) -> str:
    """A page of a template. The same content gives the same bytes."""
    return TEMPLATES.get_template(template).render(**content)


def check_images(images: Iterable[str]) -> None:
    """Raise ValueError for an image that is not a data URL: a page loads nothing."""
    for image in images:
        if not image.startswith("data:image/"):
            raise ValueError(f"image {image[:60]!r} is not in the page; give a data:image/... URL")
