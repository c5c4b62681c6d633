"""The first screen of a run's report in headless Chromium."""

from pathlib import Path
from typing import Any

import pytest

from tests.report.test_page import curves, full_summary, part, urls
from vila_ops.report.page import render


@pytest.mark.parametrize(
    ("size", "scheme", "columns"), [((1280, 800), "light", 6), ((1280, 800), "dark", 6), ((390, 844), "light", 1)]
)
def test_six_captions_with_their_marks_are_in_one_row_of_the_first_screen_and_in_one_column_of_a_phone(
    browser: Any, tmp_path: Path, size: tuple[int, int], scheme: str, columns: int
) -> None:
    (tmp_path / "report.html").write_text(render({**full_summary(), "captions": [part(8)]}, curves(), urls()))
    page = browser.new_page(viewport=dict(zip(("width", "height"), size, strict=True)), color_scheme=scheme)
    page.set_default_timeout(60_000)  # ms, for a busy machine
    page.goto((tmp_path / "report.html").as_uri())
    region = page.get_by_role("region", name="captions of new objects right")
    boxes = [one.bounding_box() for one in region.get_by_role("listitem").all()]
    assert len(boxes) == 6
    assert len({round(box["x"]) for box in boxes}) == columns
    assert columns == 1 or all(box["y"] + box["height"] <= size[1] for box in boxes)
    assert region.get_by_role("term").all_inner_texts() == [
        text for number in range(6) for text in (f"Model\n{'✗ wrong' if number % 2 else '✓ right'}", "True caption")
    ]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    loaded = "images => images.every(image => image.complete && image.naturalWidth > 0)"
    assert region.get_by_role("img").evaluate_all(loaded)
    page.close()
