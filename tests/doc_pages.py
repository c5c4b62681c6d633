"""README and docs, their blocks of code and the commands in them."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {str(file.relative_to(ROOT)): file.read_text() for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PATH = re.compile(r"(?<![\w/.-])(?:configs|flows|vila_ops|infra|tests|benchmarks|docs)/[\w./-]*\w")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Each page and the content of its fenced blocks in a language."""
    for page, text in PAGES.items():
        for name, content in FENCE.findall(text):
            if name == language:
                yield page, content


def commands_of(block: str) -> list[str]:
    """The lines of a block without their comments and their alignment."""
    joined = block.replace("\\\n", " ")
    lines = (re.sub(r"\s#.*$", "", line).strip() for line in joined.splitlines())
    return [re.sub(r"\s+", " ", line) for line in lines if line]


COMMANDS = list(dict.fromkeys(command for _, block in blocks("sh") for command in commands_of(block)))
