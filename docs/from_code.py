"""What the site takes from the code: docstrings, which are Markdown, and by the directive `commands` all commands.

And what it shows otherwise than GitHub does: a link to a page has its title.
"""

import posixpath
import re
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.core import TyperGroup
from typer.main import get_command

from vila_ops.cli import app as program

CODE = re.compile(r"`([^`]+)`")
MARKS = re.compile(r"([\\*|]|(?<=\w)_(?!\w))")
"""What reStructuredText takes for markup, and our prose does not."""


def as_restructured_text(prose: str) -> str:
    """Prose with code between backticks."""
    parts = CODE.split(prose)
    parts[::2] = [MARKS.sub(r"\\\1", words) for words in parts[::2]]
    parts[1::2] = [rf"\ ``{code}``\ " for code in parts[1::2]]
    return "".join(parts)


def commands(group: TyperGroup, name: str) -> Iterator[tuple[str, Any]]:
    """Each command below a group by its whole name, those of groups included."""
    for word, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, f"{name} {word}")
        else:
            yield f"{name} {word}", command


def described(name: str, command: Any) -> Iterator[str]:
    """The lines of a command's section: what it does, its arguments and options, an example."""
    yield from (name, "-" * len(name), "")
    yield from (*as_restructured_text(command.help).splitlines(), "")
    yield from (f".. program:: {name}", "")
    for parameter in command.params:
        value = (parameter.metavar or parameter.name).upper()
        if parameter.param_type_name == "option":
            named = ", ".join(parameter.opts) + ("" if parameter.is_flag else f" {value}")
        else:
            named = value
        told = [parameter.help or "", "Required" if parameter.required else ""]
        if not parameter.required and parameter.default not in (None, False, ""):
            told.append(f"Default: `{parameter.default}`")
        text = as_restructured_text(" ".join(one.rstrip(".") + "." for one in told if one))
        yield from (f".. option:: {named}", "", f"   {text}", "")
    example = command.epilog.removeprefix("Example: ")
    yield from (".. code-block:: sh", "", f"   {example}", "")


class CommandsDirective(SphinxDirective):
    """All commands of the program, a section each."""

    def run(self) -> list[Any]:
        """Sphinx calls this where the directive stands."""
        group = get_command(program)
        assert isinstance(group, TyperGroup)
        lines = [line for name, command in commands(group, "vila-ops") for line in described(name, command)]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def name_pages(app: Sphinx, doctree: Any, page: str) -> None:
    """Replace the name of a file in a link, which GitHub's readers know, by the title of its page."""
    for link in list(doctree.findall(lambda node: node.tagname == "reference")):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link.astext().removesuffix(".md")))
        if link.astext().endswith(".md") and target in app.env.titles:
            (text,) = link.findall(lambda node: node.tagname == "#text")
            text.parent.replace(text, type(text)(app.env.titles[target].astext()))


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.add_directive("commands", CommandsDirective)
    app.connect("doctree-resolved", name_pages)

    def read_docstring(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
        lines[:] = as_restructured_text("\n".join(lines)).splitlines()

    app.connect("autodoc-process-docstring", read_docstring)
