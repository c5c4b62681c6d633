"""Items as MLflow's tables, from the committed samples and given answers."""

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image as Pillow

from tests.eval.benchmarks.sample import config_of, rows_of, sample_items
from vila_ops.config.benchmarks import Mmmu, Pope, TextVqa
from vila_ops.data.records import Image
from vila_ops.eval import item_tables as module
from vila_ops.eval.benchmark import Item, Unreadable, benchmark_of
from vila_ops.eval.item_tables import item_tables
from vila_ops.eval.scoring import metric_values, scored_rows
from vila_ops.eval.shown import ShownRow, item_scores, shown_rows
from vila_ops.tracking.tables import LoggedTable


def shown_of(items: list[Item], config: Any, answer: Callable[[Item, int], str | None]) -> list[ShownRow]:
    rows = scored_rows(items, rows_of(items, config, answer), config)
    requests = benchmark_of(config.kind).requests(items, config, no_tokenizer)
    return shown_rows(list(requests), items, rows, item_scores(metric_values(items, rows, config)), no_tokenizer)


def no_tokenizer() -> Any:
    raise AssertionError("official benchmarks are written without a tokenizer")


def no_image(image: Any) -> bytes:
    raise AssertionError(f"the sample's images are in its items: {image}")


def tables_of(items: list[Item], config: Any, answer: Callable[[Item, int], str | None]) -> dict[str, LoggedTable]:
    return item_tables(config.kind, shown_of(items, config, answer), no_image)


def test_a_row_has_what_was_asked_and_answered_and_the_score() -> None:
    config = config_of(Pope, version=None)
    items = sample_items(config)
    tables = tables_of(items, config, lambda item, _: None if item is items[1] else "Yes, there is.")
    assert list(tables) == ["items/pope.json", "images/pope.json"]
    table = tables["items/pope.json"]
    assert len(table.rows) == 48
    first, failed = (dict(zip(table.columns, row, strict=True)) for row in table.rows[:2])
    (question,) = items[0].parts["question"]
    hint = "Answer the question using a single word or phrase."
    assert first == {
        "item": items[0].id, "group": items[0].group, "question": f"<image>\n{question}\n{hint}",
        "reference": items[0].answer, "answer": "Yes, there is.", "status": "ok",
        "score": 1.0 if items[0].answer == "Yes" else 0.0,
    }  # fmt: skip
    assert (failed["answer"], failed["status"], failed["score"]) == (None, "timeout", 0.0)


def test_the_rows_of_two_runs_are_the_same_whatever_was_answered() -> None:
    config = config_of(Pope, version=None)
    items = sample_items(config)
    first, second = (tables_of(items, config, lambda *_, text=text: text) for text in ("Yes", "No"))
    for path, table in first.items():
        assert table.columns == second[path].columns
        same = [at for at, name in enumerate(table.columns) if name not in ("answer", "score")]
        for one, other in zip(table.rows, second[path].rows, strict=True):
            assert [one[at] for at in same] == [other[at] for at in same]


def test_images_of_one_question_are_side_by_side_and_small() -> None:
    config = config_of(Mmmu)
    items = sample_items(config)
    table = tables_of(items, config, lambda *_: "A")["images/mmmu.json"]
    for row in table.rows:
        (item,) = [one for one in items if one.id == row[0]]
        images = [part for parts in item.parts.values() for part in parts if isinstance(part, Image)]
        sizes = [Pillow.open(io.BytesIO(image.data)).size for image in images]
        assert isinstance(row[1], bytes)
        small = Pillow.open(io.BytesIO(row[1]))
        scales = [min(1, module.SIDE / max(size)) for size in sizes]
        width = sum(size[0] * scale for size, scale in zip(sizes, scales, strict=True)) + 6 * (len(sizes) - 1)
        assert small.width == pytest.approx(width, abs=len(sizes))
        assert small.height <= module.SIDE
    assert any(text.count("<image>") > 1 for row in table.rows if isinstance(text := row[5], str))


def test_an_item_without_its_image_has_a_row_and_no_place_among_the_images() -> None:
    config = config_of(TextVqa)
    first, *others = sample_items(config)
    broken = Item(**{**vars(first), "parts": {**first.parts, "image": (Unreadable("a.jpg is missing"),)}})
    tables = tables_of([broken, *others], config, lambda item, _: None if item is broken else "stop")
    assert broken.id in [row[0] for row in tables["items/textvqa.json"].rows]
    groups = {item.group for item in others} - {broken.group}
    assert {row[-1] for row in tables["images/textvqa.json"].rows} == groups


def test_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 10)
    monkeypatch.setattr(module, "MAX_IMAGES", 4)
    config = config_of(Pope, version=None)
    tables = tables_of(sample_items(config), config, lambda *_: "x" * 100_000)
    assert [len(table.rows) for table in tables.values()] == [10, 4]
    groups = {row[-1] for row in tables["images/pope.json"].rows}
    assert len(groups) == 4  # one of each image
    cells = [row[2:] for row in tables["images/pope.json"].rows]
    assert len(json.dumps([*tables["items/pope.json"].rows, *cells])) < 14 * 1200
