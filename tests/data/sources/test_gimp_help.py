import io
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest

from vila_ops.config.package import Package
from vila_ops.config.sources import GimpHelp
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources.gimp_help import PAGES, keys

ReadAll = Callable[[GimpHelp, dict[str, Path]], list[list[Record | Dropped]]]

PACKAGE = Package(registry="debian", name="gimp-help-en", version="2-1", sha256="0" * 64, licence="GFDL")
SOURCE = GimpHelp(render="document", package=PACKAGE)
PAGE = """<?xml version="1.0" encoding="UTF-8"?>
<html xmlns="http://www.w3.org/1999/xhtml"><head><title>2.5. Blur</title></head><body>
<div class="navheader"><img src="images/wide.png"/>Next</div>
<div class="sect2"><h3 class="title">2.5. Blur</h3>
<p class="title"><strong>Figure 14.21. A blurred photo</strong></p>
<img src="images/wide.png" alt="x"/>
<p>Click the <img src="images/icon.png"/> icon,
   then <span>drag</span>.</p><ul><li><p>One</p></li><li>Two<br/>Three</li></ul>
<table><tr><td>Left</td><td>Right</td></tr></table>
<img src="images/photo.jpg"/><img src="images/gone.png"/><p>The end of 2. things.</p></div>
<div class="navfooter">Prev</div></body></html>
"""


def image(width: int, height: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, height), "red").save(buffer, kind)
    return buffer.getvalue()


WIDE, ICON, PHOTO = image(200, 64, "png"), image(200, 63, "png"), image(80, 90, "jpeg")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    root = tmp_path / PAGES
    (root / "images").mkdir(parents=True)
    (root / "images/wide.png").write_bytes(WIDE)
    (root / "images/icon.png").write_bytes(ICON)
    (root / "images/photo.jpg").write_bytes(PHOTO)
    (root / "blur.html").write_text(PAGE)
    (root / "icons.html").write_text(PAGE.replace("wide.png", "icon.png").replace("photo.jpg", "icon.png"))
    return {"gimp-help-en": tmp_path}


def test_keys_are_the_pages_with_a_figure(folders: dict[str, Path]):
    assert keys(folders["gimp-help-en"]) == ["blur"]


def test_a_page_is_text_and_figures_in_reading_order(folders: dict[str, Path], read_all: ReadAll):
    (blur,) = read_all(SOURCE, folders)
    assert blur == [
        Record(
            id="blur",
            object="blur",
            turns=(
                Turn(
                    "document",
                    (
                        "Blur\nA blurred photo",
                        Image(WIDE),
                        "Click the icon, then drag.\nOne\nTwo\nThree\nLeft Right",
                        Image(PHOTO),
                        "The end of 2. things.",
                    ),
                ),
            ),
            category="",
            licence="GFDL",
            provenance=f"debian:gimp-help-en@2-1/{PAGES}/blur.html",
        )
    ]


def test_the_orders_that_the_paper_compares_have_the_same_figures(folders: dict[str, Path], read_all: ReadAll):
    ((first,),) = read_all(SOURCE.with_changes({"order": "image_first"}), folders)
    assert isinstance(first, Record)
    text = "Blur\nA blurred photo\nClick the icon, then drag.\nOne\nTwo\nThree\nLeft Right\nThe end of 2. things."
    assert first.turns[0].parts == (Image(WIDE), Image(PHOTO), text)
    (pairs,) = read_all(SOURCE.with_changes({"order": "pairs"}), folders)
    assert [(one.id, one.object, one.turns[0].parts) for one in pairs if isinstance(one, Record)] == [
        ("blur#0", "blur", (Image(WIDE), "A blurred photo")),
        ("blur#1", "blur", (Image(PHOTO), "Left Right")),
    ]


def test_a_page_in_its_own_order_is_the_dataset_that_it_was():
    assert "order" not in SOURCE.model_dump()
    assert SOURCE.with_changes({"order": "pairs"}).model_dump()["order"] == "pairs"
