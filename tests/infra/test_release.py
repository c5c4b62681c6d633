"""The checklist of a release says what is not ready."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from vila_ops.artifacts.store_format import FORMAT

SCRIPT = Path(__file__).parents[2] / "infra/release.py"
LOG = "# Changelog\n\n## Unreleased\n\n{new}\n\n## 0.2.0 - 2026-12-01\n\n- A.\n\n## 0.1.0 - 2026-01-01\n\n- B.\n"


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def oks(findings: object) -> list[bool]:
    return [finding.ok for finding in findings]  # type: ignore[attr-defined]


def test_everything_has_to_be_committed_on_main(release: ModuleType) -> None:
    assert oks(release.tree("", "main")) == [True, True]
    assert oks(release.tree(" M README.md\n", "feature")) == [False, False]
    assert oks(release.tree("", "")) == [False, True]


@pytest.mark.parametrize(
    ("version", "tags", "expected"),
    [
        ("0.2.0", ["v0.1.0", "v0.1.9"], [True, True]),
        ("0.10.0", ["v0.9.0"], [True, True]),
        ("0.9.0", ["v0.10.0"], [True, False]),
        ("0.2.0", ["v0.2.0"], [True, False]),
        ("0.2.0.dev1", [], [False]),
        ("0.1.0", [], [True]),
    ],
)
def test_a_version_has_three_numbers_and_follows_all_others(
    version: str, tags: list[str], expected: list[bool], release: ModuleType
) -> None:
    assert oks(release.version(version, tags=tags)) == expected


def test_the_changelog_has_a_dated_section_of_the_version_and_nothing_unreleased(release: ModuleType) -> None:
    assert oks(release.changelog(LOG.format(new=""), "0.2.0")) == [True]
    (unreleased,) = release.changelog(LOG.format(new="- New."), "0.2.0")
    assert unreleased.text.startswith("CHANGELOG.md: the first section with entries is 'Unreleased'; call the section")
    assert oks(release.changelog(LOG.format(new=""), "0.3.0")) == [False]
    assert oks(release.changelog("# Changelog\n", "0.3.0")) == [False]


def test_the_tests_need_a_store_of_every_format(release: ModuleType) -> None:
    there = [f"format-{number}.tar.xz" for number in range(1, FORMAT + 1)]
    assert oks(release.stores(there)) == [True]
    (lacking,) = release.stores(there[:-1])
    assert lacking.text.startswith(f"tests/golden/stores lacks format-{FORMAT}.tar.xz; write it by")
