"""A page as a browser reads it: its text, its tags, and what it would load."""

from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br"}
HOSTILE = """<script>alert("1")</script>'&<img src=x onerror=alert(1)>"""


class Page(HTMLParser):
    """Text, tags and attributes of a page; refuses tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        """The texts of the cells of every row of a table."""
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("th", "td", "dt", "dd"):
            self.words.append(" ")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if "th" in self.open or "td" in self.open:
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def check_loads_nothing(html: str) -> None:
    """No script, no handler, and every image and icon in the page itself."""
    page = Page(html)
    assert not page.all("script")
    assert "url(" not in html
    assert "@import" not in html
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        assert (attrs.get("src") or "data:").startswith("data:")
        if tag == "link":
            assert attrs["href"] == "data:,"


def check_accessible(html: str) -> None:
    """One heading of the page, names of tables and images, and links that lead somewhere."""
    page = Page(html)
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(image["alt"] for image in page.all("img"))
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {(a["href"] or "")[1:] for a in page.all("a") if (a["href"] or "").startswith("#")} <= ids
