"""Made-up names: what demonstrations and questions show, and the choice by hand."""

import io
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vila_ops.config.eval import MeasureSettings, NewNames
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.eval.benchmark import ScoreRequest
from vila_ops.eval.benchmarks.held_out import new_names
from vila_ops.eval.benchmarks.held_out.items import ImageItem
from vila_ops.eval.benchmarks.held_out.new_names import NAMES, NamedItem, fourfold, mirrored
from vila_ops.eval.rows import Response
from vila_ops.eval.runner import row_of
from vila_ops.eval.scoring import score
from vila_ops.generate.request import Prompt

COUNT = 6


def png(levels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(levels.astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


def levels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


IMAGES = [png(np.random.default_rng(number).integers(0, 256, (8, 8, 3))) for number in range(COUNT)]


def read(monkeypatch: pytest.MonkeyPatch, count: int = COUNT, **settings: Any) -> tuple[NamedItem, ...]:
    items = [
        ImageItem(id=str(n), group=str(n), image=IMAGES[n], shuffled_image=b"", caption="", distractors=())
        for n in range(count)
    ]
    monkeypatch.setattr(new_names, "image_items", lambda inputs, objects: tuple(items))
    return new_names.read(SimpleNamespace(inputs=None), NewNames(**settings))  # type: ignore[arg-type]


def asked(items: tuple[NamedItem, ...], tokenizer: Tokenizer, **settings: Any) -> list[ScoreRequest]:
    return new_names.requests(items, NewNames(**settings), lambda: tokenizer)


def shown(request: ScoreRequest, tokenizer: Tokenizer) -> tuple[list[str], list[bytes]]:
    """The sentences of the demonstrations, and all images."""
    assert isinstance(request.prompt, Prompt)
    return tokenizer.decode(request.prompt.input_ids).split("\n")[:-1], list(request.prompt.images)


def test_a_name_of_an_object_is_asked_for_its_mirror_image(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = asked(read(monkeypatch), tokenizer)
    assert len(requests) == COUNT * 2 * 2  # conditions, questions
    dax, wug = (f"This is a {name}." for name in NAMES[0])
    own, other, third, fourth = IMAGES[:4]
    assert shown(requests[0], tokenizer) == ([dax, wug, wug, dax], [own, other, other, own, mirrored(own)])
    assert shown(requests[1], tokenizer) == ([dax, wug, wug, dax], [own, other, other, own, mirrored(other)])
    assert requests[2].condition == "shuffled"
    assert shown(requests[2], tokenizer)[1] == [third, fourth, fourth, third, mirrored(own)]
    assert [tokenizer.decode(ids) for ids in requests[0].continuations] == [dax, wug]  # type: ignore[arg-type]
    blick, fep = (f"This is a {name}." for name in NAMES[1])
    assert shown(requests[4], tokenizer)[0] == [fep, blick, blick, fep]


def test_a_name_of_a_number_is_asked_for_an_object_that_no_demonstration_has(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = asked(read(monkeypatch, rule="count", shots=2), tokenizer, control="none")
    assert shown(requests[0], tokenizer)[1] == [IMAGES[1], fourfold(IMAGES[2]), IMAGES[0]]
    assert shown(requests[1], tokenizer)[1] == [IMAGES[1], fourfold(IMAGES[2]), fourfold(IMAGES[0])]
    assert len(requests) == COUNT * 2


def test_mirrored_and_fourfold_squares_have_the_pixels_of_the_square() -> None:
    assert (levels(mirrored(IMAGES[0])) == levels(IMAGES[0])[:, ::-1]).all()
    plain = png(np.full((8, 8, 3), 77))
    four = levels(fourfold(png(np.pad(np.full((4, 4, 3), 77), ((2, 2), (2, 2), (0, 0))))))
    assert four.shape == (8, 8, 3)
    parts = [four[top : top + 4, left : left + 4] for top, left in product((0, 4), (0, 4))]
    assert all((part == parts[0]).all() for part in parts)
    assert (levels(fourfold(plain)) == 77).all()


def test_a_name_has_to_gain_from_its_own_image(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model likes the second name better by 5 nats, and that must not matter."""
    items = read(monkeypatch)
    gains = {"0": 2.0, "1": 2.0, "2": 2.0, "3": 0.0, "4": -1.0, "5": -1.0}  # of a name from an image of it, in nats
    rows = []
    for request in asked(items, tokenizer):
        gain = gains[request.item] if request.condition == "matched" else 0.0
        own, other = (9.0 - gain, 4.0) if request.rotation == 0 else (9.0, 4.0 - gain)
        item = next(one for one in items if one.id == request.item)
        rows.append(row_of(item, request, Response(nats=(own, other), tokens=(5, 5))))
    metrics = score(items, rows, NewNames(), MeasureSettings()).measurement.metrics
    values = {(one.name, one.role): one.value for one in metrics}
    assert values == pytest.approx(
        {
            ("new_names", "model"): 3.5 / 6,  # an object without a difference is a guess
            ("new_names", "control"): 0.5,
            ("new_names", "gap"): 0.5 / 6,
            ("new_names", "chance"): 0.5,
            ("new_names_margin", "model"): sum(gains.values()) / 6,
            ("new_names_margin", "control"): 0.0,
            ("new_names_margin", "gap"): sum(gains.values()) / 6,
        }
    )


def test_too_few_objects_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="shows 5 held-out objects in an item, and there are 4"):
        read(monkeypatch, count=4)
