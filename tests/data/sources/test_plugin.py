"""A third-party package adds a kind of source: the package of docs/plugins.md, installed and prepared from."""

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tests.forks import output_of
from vila_ops.config import Mixture
from vila_ops.data.sources import SOURCES, SourceModule

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/plugins.md").read_text()
PREPARE = """
import json, sys
from vila_ops.artifacts.store import content
from vila_ops.config import Mixture, Resources, TextFormat
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.shards import read_index, samples_of
mixture, text, resources = json.loads(sys.argv[1])
made = prepare(*(c.model_validate(v) for c, v in ((Mixture, mixture), (TextFormat, text), (Resources, resources))))
texts = [sample.text for sample in samples_of(made, read_index(content(made)).to_pylist())]
print(json.dumps({"uri": made.uri, "texts": sorted(texts)}))
"""


def file_of_page(name: str) -> str:
    """The content that the page shows for a file."""
    shown = re.search(rf"^`{re.escape(name)}`:\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert shown, f"docs/plugins.md shows no {name}"
    return shown[1]


def install(site: Path, *, version: str | None = None, revision: int = 1) -> None:
    """Write what `pip install` writes of the page's package: its module, metadata and entry points."""
    project = tomllib.loads(file_of_page("pyproject.toml"))["project"]
    version = version or project["version"]
    info = site / "tiny_lines.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n")
    groups = [(group, points.items()) for group, points in project["entry-points"].items()]
    lines = [line for group, points in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points))]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    module = file_of_page("tiny_lines.py")
    assert module.count("REVISION = 1\n") == 1
    (site / "tiny_lines.py").write_text(module.replace("REVISION = 1\n", f"REVISION = {revision}\n"))


def run(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A fresh process that finds the packages of `site`."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    command = (sys.executable, *command)
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "a.lines").write_text("A dog.\nA cat.\n\n" + "A bird.\n" * 17)
    return folder


def mixture_of(raw: Path) -> dict[str, Any]:
    source = {"kind": "tiny_lines", "path": str(raw), "licence": "CC0-1.0"}
    return {"name": "lines", "sources": {"own": source}, "max_bad_share": 0.2}


@pytest.mark.slow
def test_the_page_s_plugin_is_prepared_from_and_its_version_and_revision_are_part_of_the_address(
    raw: Path, tmp_path: Path, make_resources: Any, make_text: Any
) -> None:
    site, configs = tmp_path / "site", [make_text(), make_resources(tmp_path / "work")]
    given = json.dumps([mixture_of(raw), *(config.model_dump(mode="json") for config in configs)])

    def prepared(**changed: Any) -> dict[str, Any]:
        install(site, **changed)
        path = os.pathsep.join((str(site), str(ROOT)))
        result: dict[str, Any] = json.loads(output_of("-c", PREPARE, given, env={"PYTHONPATH": path})[-1])
        return result

    first = prepared()
    assert first["texts"] == sorted(["A dog.", "A cat.", *["A bird."] * 17])
    uris = {first["uri"], prepared(version="1.1")["uri"], prepared(revision=2)["uri"]}
    assert len(uris) == 3, "a version or a revision of the plugin is no part of the address"


def test_data_lint_checks_a_plugin_s_format(raw: Path, tmp_path: Path) -> None:
    install(tmp_path / "site")
    words = ["-m", "vila_ops", "data", "lint", str(raw), "--format", "tiny_lines"]
    done = run(tmp_path / "site", *words)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[0].startswith(f"{raw}/a.lines:3  no_text  the line is blank; take it out")


def test_a_kind_that_no_package_adds_is_an_error(raw: Path) -> None:
    with pytest.raises(ValidationError, match=r"kind 'tiny_lines': ours are .* and no installed package adds it"):
        Mixture.model_validate(mixture_of(raw))


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_s_module_has_the_functions_of_the_protocol(kind: str) -> None:
    module = import_module(SOURCES[kind])
    for name in ("raw_files", "read"):
        promised = [*inspect.signature(getattr(SourceModule, name)).parameters][1:]
        assert [*inspect.signature(getattr(module, name)).parameters] == promised


def test_the_package_of_sources_imports_no_source() -> None:
    code = f"import sys, vila_ops.data.sources\nprint([m for m in {sorted(SOURCES.values())!r} if m in sys.modules])"
    done = run(ROOT, "-c", code)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_page_names_every_group_and_a_module_that_exists() -> None:
    rows = re.findall(r"^\| `(vila_ops\.\w+)` \|.*`(vila_ops/[\w/.]+)` \|$", PAGE, re.MULTILINE)
    assert {group for group, _ in rows} == {
        f"vila_ops.{name}" for name in ("sources", "benchmarks", "projectors", "engines")
    }
    assert [path for _, path in rows if not (ROOT / path).is_file()] == []


def test_the_page_s_source_is_a_mapping_of_the_kind() -> None:
    shown = re.search(r"`(\{kind: tiny_lines, .*?\})`", PAGE)
    assert shown
    assert yaml.safe_load(shown[1])["kind"] == "tiny_lines"
