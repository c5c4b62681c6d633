"""The checklist of a release: what has to hold, and then the commands that make it. It changes and publishes nothing.

`make release` in a checkout of main. The version is `__version__` of vila_ops, by https://semver.org: a release with
another format of stores, or without a setting, a command or a flag that was there, raises the first number from 1.0 on,
and the second one before.
"""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.version import Version

from vila_ops import __version__
from vila_ops.artifacts.store_format import FORMAT
from vila_ops.doctor import Finding

ROOT = Path(__file__).parents[1]
LONG = ("make test", "make faults", "make gpu", "make licences", "make sbom")
"""What takes long, and is run by hand. The log of each belongs to the release."""
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)


def main() -> int:
    """Print the findings, then what is left to do by hand. Returns 1 where a finding is not ok."""
    findings = [*tree(_git("status", "--porcelain"), _git("branch", "--show-current").strip())]
    findings += version(__version__, tags=_git("tag", "--list", "v*").split())
    findings += changelog((ROOT / "CHANGELOG.md").read_text(), __version__)
    findings += stores(path.name for path in (ROOT / "tests/golden/stores").glob("*.tar.xz"))
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'BAD '} {finding.text}")
    if not all(finding.ok for finding in findings):
        return 1
    print("\nRun on a machine with a GPU, and keep the logs:")
    print("\n".join(LONG))
    print("\nThen:")
    print(f"git tag --sign v{__version__} --message 'vila-ops {__version__}'\ngit push origin v{__version__}")
    print("uv build --wheel && uv publish")
    return 0


def tree(changes: str, branch: str) -> Iterator[Finding]:
    """That everything is committed on main."""
    yield Finding(ok=branch == "main", text=f"on branch {branch or '(none)'}; a release is made from main")
    yield Finding(ok=not changes, text="nothing is uncommitted" if not changes else f"commit or remove:\n{changes}")


def version(wanted: str, *, tags: Iterable[str]) -> Iterator[Finding]:
    """That the version is one of semver, and follows all released ones."""
    released = sorted(Version(tag.removeprefix("v")) for tag in tags)
    plain = re.fullmatch(r"\d+\.\d+\.\d+", wanted) is not None
    yield Finding(ok=plain, text=f"__version__ of vila_ops is {wanted}; a release has three numbers")
    if plain and released:
        text = f"{wanted} follows {released[-1]}" + ("" if Version(wanted) > released[-1] else "? raise __version__")
        yield Finding(ok=Version(wanted) > released[-1], text=text)


def changelog(text: str, wanted: str) -> Iterator[Finding]:
    """That the first section with entries is that of the version, with a date."""
    titles = SECTION.findall(text)
    bodies = [body.strip() for body in SECTION.split(text)[2::2]]
    told = [title for title, body in zip(titles, bodies, strict=True) if body]
    first = told[0] if told else "none"
    right = re.fullmatch(re.escape(wanted) + r" - \d{4}-\d{2}-\d{2}", first) is not None
    way = f"call the section of this release `## {wanted} - YYYY-MM-DD`, and put an empty `## Unreleased` before it"
    text = f"CHANGELOG.md: the first section with entries is {first!r}"
    yield Finding(ok=right, text=text if right else f"{text}; {way}")


def stores(names: Iterable[str]) -> Iterator[Finding]:
    """That the tests have a store of every format."""
    there = set(names)
    lacks = [f"format-{number}.tar.xz" for number in range(1, FORMAT + 1) if f"format-{number}.tar.xz" not in there]
    text = f"tests/golden/stores has a store of each of {FORMAT} formats"
    if lacks:
        text = f"tests/golden/stores lacks {', '.join(lacks)}; write it by `python -m tests.golden.stores.make`"
    yield Finding(ok=not lacks, text=text)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
