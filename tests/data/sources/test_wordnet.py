from collections.abc import Callable
from pathlib import Path

import pytest

from vila_ops.config.package import Package
from vila_ops.config.sources import WordNet
from vila_ops.data.records import Dropped, Record, Turn
from vila_ops.data.sources.wordnet import DATA, definition, keys, synset

ReadAll = Callable[[WordNet, dict[str, Path]], list[list[Record | Dropped]]]

PACKAGE = Package(registry="debian", name="wordnet-base", version="1:3.0-37", sha256="0" * 64, licence="WordNet")
SOURCE = WordNet(render="document", package=PACKAGE)
HEADER = "  1 This software and database is being provided to you  \n"
LINES = (
    '{:08d} 05 n 02 polar_bear 0 ice_bear 0 001 @ 02131653 n 0000 | white bear of the Arctic; "it swims"; "so"  \n',
    "{:08d} 18 n 01 Einstein 0 001 @ 02131653 n 0000 | physicist of relativity (1879-1955); born in Ulm  \n",
    "{:08d} 03 n 01 blank 0 001 @ 02131653 n 0000 | \n",
)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    text = HEADER
    for line in LINES:
        text += line.format(len(text))
    path = tmp_path / DATA
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return {"wordnet-base": tmp_path}


def test_keys_are_the_offsets_of_the_synsets(folders: dict[str, Path]):
    first = len(HEADER)
    second = first + len(LINES[0].format(0))
    assert keys(folders["wordnet-base"])[:2] == [f"{first:08d}", f"{second:08d}"]


def test_a_synset_is_its_first_lemma_and_its_definition(folders: dict[str, Path], read_all: ReadAll):
    bear, einstein, blank = keys(folders["wordnet-base"])
    of_bear, (record,), of_blank = read_all(SOURCE, folders)
    assert of_bear == [
        Record(
            id=bear,
            object="polar bear",
            turns=(Turn("document", ("polar bear: white bear of the Arctic",)),),
            category="noun.animal",
            licence="WordNet",
            provenance=f"debian:wordnet-base@1:3.0-37/{DATA}#{bear}",
        )
    ]
    assert isinstance(record, Record)
    assert record.id == einstein
    assert record.object == "einstein"
    assert record.category == "noun.person"
    assert record.turns[0].parts == ("Einstein: physicist of relativity (1879-1955); born in Ulm",)
    assert of_blank == [Dropped(blank, "no_text")]


def test_a_key_that_is_no_synset_is_an_error(folders: dict[str, Path]):
    with pytest.raises(ValueError, match="no synset at byte 00000060"):
        synset(SOURCE, folders["wordnet-base"], "00000060")


@pytest.mark.parametrize(
    ("gloss", "expected"),
    [
        (
            'a tangible entity; one with a shadow; "it was full of objects"; "and more"  \n',
            "a tangible entity; one with a shadow",
        ),
        ('a complete extent: "a gamut of emotions"', "a complete extent"),
        ('quick earnings, "they make a fast buck"', "quick earnings"),
        ('a workplace; as in the expression "on the job";', 'a workplace; as in the expression "on the job"'),
        ("a plain one", "a plain one"),
    ],
)
def test_examples_are_cut_off(gloss: str, expected: str):
    assert definition(gloss) == expected
