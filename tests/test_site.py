"""The documentation site: built without a warning, whole, and readable and searchable without a network."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vila_ops.cli.examples import EXAMPLES

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


class Loaded(HTMLParser):
    """What a browser loads with a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        loads = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
        if tag in loads and not (tag == "link" and given.get("rel") in ("next", "prev", "index", "search")):
            self.places.append(given.get(loads[tag]) or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    out = tmp_path_factory.mktemp("site")
    command = ["-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "docs", str(out)]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def test_the_start_leads_to_every_page(site: Path) -> None:
    start = (site / "index.html").read_text()
    for page in (ROOT / "docs").iterdir():
        if page.suffix in (".md", ".rst") and page.stem != "index":
            assert (site / f"{page.stem}.html").is_file()
            assert f'href="{page.stem}.html"' in start
    for kind in ("Tutorial", "How-to", "Reference", "Explanation"):
        assert kind in start


def test_a_link_to_a_page_has_its_title(site: Path) -> None:
    shown = re.findall(r"<a [^>]*>(?:<[^>]*>)*([^<]*)</", (site / "upgrade.html").read_text())
    assert "Formats" in shown
    assert not [text for text in shown if text.endswith(".md")]


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert loaded.places, page.name
        assert not [place for place in loaded.places if re.match(r"(https?:)?//", place)], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style.name


def test_the_search_is_a_script_that_knows_the_words_of_the_pages(site: Path) -> None:
    """A script and not a file to fetch, so that a browser loads it without a server."""
    assert 'src="searchindex.js"' in (site / "search.html").read_text()
    script = (site / "searchindex.js").read_text()
    index = json.loads(script.removeprefix("Search.setIndex(").removesuffix(")"))
    for word, page in {"quarantin": "your-data", "fingerprint": "exactness", "slurm": "cluster"}.items():
        places = index["terms"][word]
        assert index["docnames"].index(page) in (places if isinstance(places, list) else [places]), word


def test_the_reference_has_what_the_code_has(site: Path) -> None:
    api = (site / "api.html").read_text()
    for name in ("vila_ops.config.load", "vila_ops.train.stage.train_stage", "vila_ops.errors.VilaError.retryable"):
        assert f'id="{name}"' in api
    options = (site / "options.html").read_text()
    for command in EXAMPLES.keys() - {"", "data", "train", "benchmark", "keys"}:
        assert f"<h2>vila-ops {command}<" in options
    for words in re.findall(r"<(?:p|dd)>([^<]*)", api):
        assert "`" not in words, "a docstring's Markdown was not read"
