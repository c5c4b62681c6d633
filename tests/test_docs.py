"""README and docs: links lead somewhere, every page is linked, and what they list is what is there."""

import json
import re

import yaml

from tests.doc_pages import FENCE, LINK, PAGES, ROOT, blocks


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for link in LINK.findall(FENCE.sub("", text)):
            if link.startswith("https://"):
                continue
            name, _, anchor = link.partition("#")
            target = (ROOT / page).parent / name if name else ROOT / page
            assert target.exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors(target.read_text()), f"{page}: {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(LINK.findall(PAGES["README.md"]))
    assert {page for page in PAGES if page.startswith("docs/")} <= linked


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = re.findall(r"^   (\S+)$", (ROOT / "docs/index.rst").read_text(), flags=re.MULTILINE)
    docs = ROOT / "docs"
    paths = [
        path for pattern in ("*.md", "*.rst", "*/README.md", "findings/*/README.md") for path in docs.glob(pattern)
    ]
    assert sorted([*listed, "index"]) == sorted(path.relative_to(docs).with_suffix("").as_posix() for path in paths)


def test_yaml_blocks_are_yaml() -> None:
    for page, block in blocks("yaml"):
        assert yaml.safe_load(block), page


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_the_readme_lists_the_package_as_it_is() -> None:
    tree = next(block for page, block in blocks("text") if page == "README.md")
    listed = set(re.findall(r"^  (\w+(?:/|\.py)) ", tree.partition("vila_ops/\n")[2], flags=re.MULTILINE))
    parts = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "vila_ops").iterdir()}
    assert listed == {part for part in parts if not part.startswith("__")}
    for top in re.findall(r"^(\w[\w.]*/?)", tree, flags=re.MULTILINE):
        assert (ROOT / top).exists(), top


def test_the_table_of_quantised_weights_is_the_result() -> None:
    result = json.loads((ROOT / "benchmarks/results/quantised.json").read_text())
    rows = re.findall(
        r"^\| (\w+) \| (\d+) MB \| ([\d.]+) \| ([\d.]+) \|$", PAGES["docs/serving.md"], flags=re.MULTILINE
    )
    assert rows == [
        (one, f"{bytes_ / 1e6:.0f}", f"{result['tokens_per_second'][one]:.1f}", f"{result['nats_per_token'][one]:.3f}")
        for one, bytes_ in result["memory_bytes"].items()
    ]
