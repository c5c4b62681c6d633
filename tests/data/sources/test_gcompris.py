import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from vila_ops.config.package import Package
from vila_ops.config.sources import GCompris
from vila_ops.data.records import Dropped, Image, Record, Turn
from vila_ops.data.sources.gcompris import RESOURCES, keys, resource_nodes

ReadAll = Callable[[GCompris, dict[str, Path]], list[list[Record | Dropped]]]

PACKAGE = Package(
    registry="debian", name="gcompris-qt-data", version="3.1-2", sha256="0" * 64, licence="GPL-3.0-or-later"
)
SOURCE = GCompris(render="document", package=PACKAGE)
ROOT = "gcompris/src/activities/zoo"
BOARD = """QtObject { property var tab: [
  { "image": "qrc:/gcompris/src/activities/zoo/question.svg", "title": qsTr("Polar bear"),
    "text": qsTr("It is \\"white\\".\\nIt swims."), "image2": "qrc:/gcompris/src/activities/zoo/animals/bear.webp" },
  { "title": qsTr("No text") },
  { "title": qsTr("Moose"), "text": qsTr("It is tall."), "image2": "qrc:/gcompris/src/activities/words/moose.webp" },
  { "title": qsTr("Owl"), "text": qsTr("It flies."), "image": "qrc:/gcompris/src/activities/zoo/animals/owl.webp" }
] }"""
README = """Copyright: Somebody
License: CC0-1.0
Files:
bear.webp

Copyright: Somebody else
License: CC-BY-SA 4.0
Files:
other.webp
"""


def resource_file(files: dict[str, bytes]) -> bytes:
    """A Qt resource file of version 3; content of more than 60 bytes is deflated."""
    tree: dict[str, object] = {}
    for path, content in files.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})  # type: ignore[assignment]
        place[name] = content
    names, data, nodes = b"", b"", []
    queue: list[tuple[str, object]] = [("", tree)]
    position = 0
    while position < len(queue):
        name, content = queue[position]
        name_offset, names = len(names), names + struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if isinstance(content, dict):
            nodes.append(struct.pack(">IHII", name_offset, 2, len(content), len(queue)))
            queue += list(content.items())
        else:
            assert isinstance(content, bytes)
            deflated = len(content) > 60
            stored = struct.pack(">I", len(content)) + zlib.compress(content) if deflated else content
            nodes.append(struct.pack(">IHHHI", name_offset, int(deflated), 0, 1, len(data)))
            data += struct.pack(">I", len(stored)) + stored
        position += 1
    table = b"".join(node + bytes(8) for node in nodes)
    return struct.pack(">4s4I", b"qres", 3, 20, 20 + len(table), 20 + len(table) + len(data)) + table + data + names


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    zoo = {
        f"{ROOT}/resource/board/board1.qml": BOARD.encode(),
        f"{ROOT}/Other.qml": BOARD.encode(),
        f"{ROOT}/animals/bear.webp": b"bear",
        f"{ROOT}/animals/owl.webp": b"owl",
        f"{ROOT}/animals/README": README.encode(),
    }
    path = tmp_path / RESOURCES / "zoo.rcc"
    path.parent.mkdir(parents=True)
    path.write_bytes(resource_file(zoo))
    return {"gcompris-qt-data": tmp_path}


def key(number: int) -> str:
    return f"zoo.rcc/{ROOT}/resource/board/board1.qml#{number:03d}"


def test_keys_are_the_entries_with_title_and_text(folders: dict[str, Path]):
    assert keys(folders["gcompris-qt-data"]) == [key(0), key(2), key(3)]


def test_an_entry_is_its_photo_title_and_paragraph(folders: dict[str, Path], read_all: ReadAll):
    assert read_all(SOURCE, folders)[0] == [
        Record(
            id=key(0),
            object="bear",
            turns=(Turn("document", (Image(b"bear"), 'Polar bear. It is "white". It swims.')),),
            category="zoo",
            licence="GPL-3.0-or-later (text), CC0-1.0 (photo)",
            provenance=f"debian:gcompris-qt-data@3.1-2/{RESOURCES}/{key(0)}",
        )
    ]


def test_an_entry_whose_photo_is_not_in_the_package_is_text(folders: dict[str, Path], read_all: ReadAll):
    ((moose,),) = read_all(SOURCE, folders)[1:2]
    assert isinstance(moose, Record)
    assert moose.turns == (Turn("document", ("Moose. It is tall.",)),)
    assert moose.licence == "GPL-3.0-or-later"


def test_a_photo_of_which_no_readme_speaks_has_the_packages_licence(folders: dict[str, Path], read_all: ReadAll):
    ((owl,),) = read_all(SOURCE, folders)[2:]
    assert isinstance(owl, Record)
    assert owl.turns[0].parts[0] == Image(b"owl")
    assert owl.licence == "GPL-3.0-or-later (text), GPL-3.0-or-later (photo)"


def test_another_kind_of_file_is_refused():
    with pytest.raises(ValueError, match="not a Qt resource file"):
        resource_nodes(b"PK\x03\x04" + bytes(40))
