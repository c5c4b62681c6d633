"""A gallery of answers: the worst ones first, with all that the model was shown. Bounded in bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from vila_ops.data.shards import data_url
from vila_ops.eval.benchmark import Part, Parts, Unreadable
from vila_ops.eval.prompts import ImageOf
from vila_ops.eval.shown import ShownRow, images_of, thumbnail

WORST, BEST = 9, 3
"""Rows of a gallery: those that failed or scored least, and after them those that scored most."""
IMAGE_BYTES = 6 * 2**20
"""All images of a page, as text."""
SIDE = 336
"""Pixels of the longer side of an image."""
MAX_TEXT = 1200
"""Characters of a text, its last ones: a prompt ends with its question."""


@dataclass(frozen=True)
class ShownPiece:
    """A text, an image, or what stands in the place of an image."""

    text: str = ""
    image: str = ""
    """data: URL."""
    missing: str = ""
    """Why an image is not shown."""


@dataclass(frozen=True)
class AnswerCard:
    """One answer."""

    item: str
    group: str
    status: str
    detail: str
    turns: list[tuple[str, list[ShownPiece]]]
    """(role, pieces); the demonstrations of a chat, and last the question."""
    shots: tuple[str, ...]
    """Ids of the demonstrations."""
    reference: str
    answer: str | None
    score: float | None


@dataclass(frozen=True)
class Gallery:
    """The cards of a benchmark."""

    cards: list[AnswerCard]
    rows: int
    """Number of answers that these were chosen from."""


@dataclass
class ImageBudget:
    """How many bytes of images a gallery may still have."""

    left: int

    def piece(self, part: Part, image_of: ImageOf) -> ShownPiece:
        """An image, or the reason why it is left out."""
        if isinstance(part, Unreadable):
            return ShownPiece(missing=part.reason)
        small = thumbnail(images_of((part,), image_of), SIDE)
        if small is None:
            return ShownPiece(missing="it cannot be read")
        url = data_url(small)
        if len(url) > self.left:
            return ShownPiece(missing="left out, as the page has all the images that it may have")
        self.left -= len(url)
        return ShownPiece(image=url)


def gallery(rows: Sequence[ShownRow], image_of: ImageOf, budget: int) -> Gallery:
    """The failed and the worst answers, then the best ones; images are shown while `budget` bytes of them are left."""
    asked = [row for row in rows if row.row.condition == "matched" and row.row.rotation == 0]
    ranked = sorted(asked, key=_rank)
    chosen = ranked if len(ranked) <= WORST + BEST else [*ranked[:WORST], *ranked[-BEST:]]
    images = ImageBudget(budget)
    return Gallery([_card(row, image_of, images) for row in chosen], len(asked))


def _rank(shown: ShownRow) -> tuple[bool, float]:
    """Failed rows first, then by score; rows without a score after those that have one."""
    return shown.row.ok, float("inf") if shown.score is None else shown.score


def _card(shown: ShownRow, image_of: ImageOf, images: ImageBudget) -> AnswerCard:
    row = shown.row
    return AnswerCard(
        item=row.item,
        group=row.group,
        status=row.response.status,
        detail=row.response.detail,
        turns=[(role, _pieces(parts, image_of, images)) for role, parts in shown.turns],
        shots=row.shots,
        reference=tail(shown.reference),
        answer=None if row.answer is None else tail(row.answer),
        score=shown.score,
    )


def _pieces(parts: Parts, image_of: ImageOf, images: ImageBudget) -> list[ShownPiece]:
    return [
        ShownPiece(text=tail(part)) if isinstance(part, str) else images.piece(part, image_of)
        for part in parts
        if part != "\n"  # between an image and the question
    ]


def tail(text: str) -> str:
    """The last MAX_TEXT characters of a text, with a mark where it was cut."""
    text = text.strip()
    return text if len(text) <= MAX_TEXT else f"… {text[-MAX_TEXT:]}"
