from collections.abc import Callable
from pathlib import Path

import pytest

from vila_ops.config.package import Package
from vila_ops.config.sources import GnomeHelp
from vila_ops.data.records import Dropped, Record, Turn
from vila_ops.data.sources.gnome_help import PAGES, keys, question

ReadAll = Callable[[GnomeHelp, dict[str, Path]], list[list[Record | Dropped]]]

PACKAGE = Package(registry="debian", name="gnome-user-docs", version="43", sha256="0" * 64, licence="CC-BY-SA-3.0")
SOURCE = GnomeHelp(render="instructions", package=PACKAGE)
RENAME = """<page xmlns="http://projectmallard.org/1.0/" xmlns:if="http://projectmallard.org/if/1.0/"
  type="topic" style="task" id="files-rename">
<info><desc>Change a name.</desc></info>
<title>Rename your file</title>
<p>Use <app>Files</app>; see <link xref="other"/> or <link xref="other#part">this</link>.</p>
<media type="image" src="x.svg"><p>An image</p></media>
<steps><title>To rename:</title>
  <item><p>Press <keyseq><key>Ctrl</key><key>F2</key></keyseq>.</p></item>
  <item><p>Choose <guiseq><gui>File</gui><gui>Save</gui></guiseq>.</p><p>Wait.</p></item>
</steps>
<if:choose><if:when test="platform:gnome-classic"><p>Classic.</p></if:when>
  <if:when test="!platform:gnome-classic"><p>Plain.</p></if:when></if:choose>
<p if:test="action:install">Install it.</p>
<section id="s"><title>Problems</title>
  <terms><item><title>It is in use</title><p>Close it.</p></item></terms>
  <list><item><p>One.</p></item></list>
  <note><p>Take care.</p></note></section>
</page>"""
OTHER = """<page xmlns="http://projectmallard.org/1.0/" type="guide" id="other"><title>Other things</title></page>"""
EMPTY = """<page xmlns="http://projectmallard.org/1.0/" type="topic" id="empty"><title>Empty</title></page>"""


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    root = tmp_path / PAGES
    root.mkdir(parents=True)
    for name, text in {"files-rename": RENAME, "other": OTHER, "empty": EMPTY}.items():
        (root / f"{name}.page").write_text(text)
    return {"gnome-user-docs": tmp_path}


def test_keys_are_the_topic_pages(folders: dict[str, Path]):
    assert keys(folders["gnome-user-docs"]) == ["empty", "files-rename"]


def test_a_page_is_a_question_and_its_answer(folders: dict[str, Path], read_all: ReadAll):
    answer = (
        "Use Files; see Other things or this.\n"
        "To rename:\n"
        "1. Press Ctrl+F2.\n"
        "2. Choose File > Save. Wait.\n"
        "Plain.\n"
        "Problems:\n"
        "- It is in use: Close it.\n"
        "- One.\n"
        "Take care."
    )
    assert read_all(SOURCE, folders)[1] == [
        Record(
            id="files-rename",
            object="files-rename",
            turns=(Turn("user", ("How do I rename my file?",)), Turn("assistant", (answer,))),
            category="task",
            licence="CC-BY-SA-3.0",
            provenance=f"debian:gnome-user-docs@43/{PAGES}/files-rename.page",
        )
    ]


def test_a_page_without_text_is_dropped(folders: dict[str, Path], read_all: ReadAll):
    assert read_all(SOURCE, folders)[0] == [Dropped("empty", "no_text")]


@pytest.mark.parametrize(
    ("title", "problem", "expected"),
    [
        ("What is a driver?", False, "What is a driver?"),
        ("Change which language you use", False, "How do I change which language I use?"),
        ("How to back up", False, "How do I back up?"),
        ("Where to store your backup", False, "Where should I store my backup?"),
        ("Middle-click", False, "How do I middle-click?"),
        ("Cancel, pause or release a print job", False, "How do I cancel, pause or release a print job?"),
        ("The laptop fan is always running", True, "The laptop fan is always running. What can I do?"),
        (
            "My computer connects to the wrong network",
            False,
            "My computer connects to the wrong network. What can I do?",
        ),
        ("Keyboard navigation", False, "What should I know about keyboard navigation?"),
        ("IRC", False, "What should I know about IRC?"),
    ],
)
def test_a_title_becomes_a_question(title: str, problem: bool, expected: str):
    assert question(title, problem=problem) == expected
