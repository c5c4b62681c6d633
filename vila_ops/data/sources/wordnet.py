"""WordNet nouns: each line of data.noun is a synset, keyed by its byte offset."""

import re
from collections.abc import Iterator
from pathlib import Path

from vila_ops.config.sources import WordNet
from vila_ops.data.raw.files import Folders, RawFile, Span
from vila_ops.data.records import Dropped, Record, Turn
from vila_ops.data.sources.packaged import packages_as_file, provenance, read_keys

DATA = "usr/share/wordnet/data.noun"
_NOUN_FILES = (
    "noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition noun.communication "
    "noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person "
    "noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time"
)
_FIRST_NOUN_FILE = 3
"""Number of the lexicographer file noun.Tops (lexnames(5WN))."""
_EXAMPLES = re.compile(r'[;:,]\s*"')


def keys(folder: Path) -> list[str]:
    """Offsets of all noun synsets, as written in data.noun, sorted."""
    with (folder / DATA).open("rb") as lines:
        return sorted(line[:8].decode() for line in lines if not line.startswith(b"  "))


def raw_files(source: WordNet, folders: Folders, *, cache: Path) -> list[RawFile]:
    """The package as one file."""
    return packages_as_file(source, keys(folders[source.package.name]))


def read(source: WordNet, folders: Folders, span: Span) -> Iterator[list[Record | Dropped]]:
    """The record of each key."""
    folder = folders[source.package.name]
    return read_keys(keys(folder), span, lambda key: synset(source, folder, key))


def synset(source: WordNet, folder: Path, key: str) -> Record | Dropped:
    """The synset at this offset, as "lemma: definition"."""
    with (folder / DATA).open("rb") as lines:
        lines.seek(int(key))
        head, _, gloss = lines.readline().decode("utf-8").partition(" | ")
    offset, file_number, _, _, lemma = head.split(" ", 5)[:5]
    if offset != key:
        raise ValueError(f"{folder / DATA}: no synset at byte {key}; keys come from keys()")
    name = lemma.replace("_", " ")
    meaning = definition(gloss)
    if not meaning:
        return Dropped(id=key, reason="no_text")
    return Record(
        id=key,
        object=name.lower(),
        turns=(Turn("document", (f"{name}: {meaning}",)),),
        category=_NOUN_FILES.split()[int(file_number) - _FIRST_NOUN_FILE],
        licence=source.package.licence,
        provenance=provenance(source.package, f"{DATA}#{key}"),
    )


def definition(gloss: str) -> str:
    """The gloss without its example sentences, which follow the definition in quotes after ; : or a comma."""
    return _EXAMPLES.split(gloss, maxsplit=1)[0].strip(" ;\n")
