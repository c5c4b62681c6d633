from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila_ops.data.sources.html_tokens import End, Start, tokens


def joined(text: str) -> list[Start | End | str]:
    """Neighbouring pieces of text as one."""
    found: list[Start | End | str] = []
    for token in tokens(text):
        if isinstance(token, str) and found and isinstance(found[-1], str):
            found[-1] += token
        elif token != "":
            found.append(token)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a &amp; b &lt;c&gt; &#228; &auml &#x1F600;", ["a & b <c> ä ä \U0001f600"]),
        ("<P Class=x>a</P >", [Start("p", {"class": "x"}), "a", End("p")]),
        ("<img src='a b.png' alt=\"x > y\">", [Start("img", {"src": "a b.png", "alt": "x > y"})]),
        ("<img src=a/b.png/>", [Start("img", {"src": "a/b.png/"})]),
        ("<img src = 'a&amp;b' SRC=c hidden>", [Start("img", {"src": "a&b", "hidden": ""})]),
        ("<br/><a/b=c>", [Start("br"), Start("a", {"b": "c"})]),
        ("a <!-- <b> --> c<!doctype html><?xml a?></>d", ["a  cd"]),
        ("<!--> a <!---> b <!-- c --!> d", [" a  b  d"]),
        ("1 < 2 <3 <", ["1 < 2 <3 <"]),
        ("<script>if (a<b) '</p>'</script >c", [Start("script"), "if (a<b) '</p>'", End("script"), "c"]),
        ("<title>a <b> &amp;</TITLE>", [Start("title"), "a <b> &", End("title")]),
        ("<style>a", [Start("style"), "a"]),
        ("a<img src='b", ["a"]),
        ("a<!-- b", ["a"]),
        ("a<b c", ["a"]),
        ("a</b", ["a"]),
        ("&#" + "9" * 5000 + ";&#xffffffffff;", ["\ufffd\ufffd"]),
    ],
)  # fmt: skip
def test_pages_are_read_as_browsers_do(text: str, expected: list[object]):
    assert joined(text) == expected


class Official(HTMLParser):
    """Python's own reader, as tokens."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[Start | End | str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(Start(tag, {name: value or "" for name, value in reversed(attrs)}))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        self.found.append(End(tag))

    def handle_data(self, data: str) -> None:
        if self.found and isinstance(self.found[-1], str):
            self.found[-1] += data
        else:
            self.found.append(data)


NAMES = st.sampled_from(["p", "div", "img", "B", "h1", "td"])
VALUES = st.text(st.characters(codec="utf-8", exclude_characters="\0\r<>\"'&", exclude_categories=["Cc"]), max_size=6)
ATTRIBUTES = st.dictionaries(st.sampled_from(["src", "alt", "class"]), VALUES, max_size=3).map(
    lambda found: "".join(f' {name}="{value}"' for name, value in found.items())
)
PIECES = st.one_of(
    VALUES,
    st.builds("<{}{}>".format, NAMES, ATTRIBUTES),
    st.builds("<{}{} />".format, NAMES, ATTRIBUTES),
    st.builds("</{}>".format, NAMES),
    VALUES.filter(lambda text: "-" not in text).map("<!-- {} -->".format),
    st.sampled_from(["<!DOCTYPE html>", "&amp;", "&copy;", "&#65;", "<script>a < b</script>", "<style>p {}</style>"]),
)


@pytest.mark.slow
@given(st.lists(PIECES, max_size=12).map("".join))
def test_well_formed_pages_are_read_as_python_reads_them(text: str):
    official = Official()
    official.feed(text)
    official.close()
    assert joined(text) == official.found


@given(
    st.lists(st.sampled_from([*"<>/!-='\"& a", "<!--", "-->", "<a", "</", "<script>", "</script", "<![CDATA["])).map(
        "".join
    )
)
def test_any_page_is_read_to_its_end(text: str):
    for token in tokens(text):
        assert isinstance(token, Start | End | str)


HOSTILE = ("<", "<a", "<a b=", "<a b='", '<a b="', "<!--", "<!--a-->", "<![CDATA[", "<?", "</", "</a ", "<a/", "<a =",
           "<a <", "&", "&#", "<script>", "<script></scrip", "<title>", "<div>", "--", "<!")  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("piece", HOSTILE)
def test_a_page_that_is_meant_badly_is_read_in_time_that_grows_with_its_length(piece: str):
    """Python's html.parser takes hours for the third of them."""
    page = piece * (2_000_000 // len(piece))
    assert sum(len(token) for token in tokens(page) if isinstance(token, str)) <= len(page)
