from collections.abc import Callable
from pathlib import Path

import pytest

from vila_ops.config.package import Package
from vila_ops.config.sources import TuxPaint
from vila_ops.data import sources
from vila_ops.data.preprocess.units import plan_units
from vila_ops.data.raw.files import RawFile
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources.tux_paint import STAMPS, category, clean_caption, keys

ReadAll = Callable[[TuxPaint, dict[str, Path]], list[list[Record | Dropped]]]
Scan = Callable[[TuxPaint, dict[str, Path]], list[RawFile]]

PACKAGE = Package(registry="debian", name="stamps", version="1-2", sha256="0" * 64, licence="GPL-2.0-or-later")
SOURCE = TuxPaint(render="caption", package=PACKAGE)
TUX, OWL, SILENT = "animals/birds/cartoon/tux.png", "animals/birds/owl.png", "town/silent.png"


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    files = {
        "animals/birds/owl.png": b"owl",
        "animals/birds/owl.txt": b"An  owl.\nfr.utf8=Un hibou.\n",
        "animals/birds/cartoon/tux.png": b"tux",
        "animals/birds/cartoon/tux.txt": "Tux—the Linux mascot!\n".encode(),
        "town/silent.png": b"silent",
        "town/silent.txt": b"",
        "town/no_caption.png": b"no",
        "town/vector.svg": b"<svg/>",
        "town/vector.txt": b"A vector.",
        "symbols/letters/a.png": b"a",
        "symbols/letters/a.txt": b"The letter a.",
    }
    for name, data in files.items():
        path = tmp_path / STAMPS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return {"stamps": tmp_path}


def test_keys_are_captioned_png_stamps_without_symbols(folders: dict[str, Path]):
    assert keys(folders["stamps"]) == [TUX, OWL, SILENT]


def test_a_package_is_one_file_of_as_many_records_as_keys(folders: dict[str, Path], scan: Scan, read_all: ReadAll):
    (file,) = scan(SOURCE, folders)
    assert (file.name, file.count, file.marks) == ("package", 3, ())
    assert [record.id for found in read_all(SOURCE, folders) for record in found] == [TUX, OWL, SILENT]


@pytest.mark.parametrize(("limit", "taken"), [(1, [TUX]), (2, [TUX, OWL]), (3, [TUX, OWL, SILENT])])
def test_a_limit_takes_evenly_spaced_stamps(limit: int, taken: list[str], folders: dict[str, Path], scan: Scan):
    units = plan_units("stamps", scan(SOURCE, folders), shard_bytes=10**6, image_bytes=1, limit=limit)
    found = [sources.read(SOURCE, folders, span) for unit in units for span in unit.spans]
    assert [record.id for span in found for records in span for record in records] == taken


def test_a_stamp_is_a_image_and_its_english_sentence(folders: dict[str, Path], read_all: ReadAll):
    assert read_all(SOURCE, folders)[1] == [
        Record(
            id=OWL,
            object="owl",
            turns=(Turn("document", (Image(b"owl"), "An owl.")),),
            category="animals/birds",
            licence="GPL-2.0-or-later",
            provenance="debian:stamps@1-2/usr/share/tuxpaint/stamps/animals/birds/owl.png",
        )
    ]


def test_a_stamp_without_words_is_dropped(folders: dict[str, Path], read_all: ReadAll):
    assert read_all(SOURCE, folders)[2] == [Dropped(SILENT, "no_text")]


def test_its_package_is_all_it_needs():
    assert SOURCE.packages() == (PACKAGE,)


def test_folders_of_style_are_no_category():
    assert category("animals/birds/cartoon/tux.png") == "animals/birds"
    assert category("sports/soccer.png") == "sports"


@pytest.mark.parametrize(
    ("line", "caption"),
    [
        ("A cat", "A cat."),
        (" Boom!!! ", "Boom."),
        ("– Because a brain…", "Because a brain."),
        ("One, or two?", "One, or two."),
        (" … ", ""),
    ],
)
def test_captions_end_with_one_full_stop(line: str, caption: str):
    assert clean_caption(line) == caption
