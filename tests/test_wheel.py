"""The wheel works outside the checkout: it holds the configs, which are found by name."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"

FLOWS = """
import json, sys, yaml
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL
from vila_ops import local
from vila_ops.config.local import LocalServers
from vila_ops.local.deployments import file_of
file = file_of(LocalServers())
loaded = [load_flow_from_entrypoint(one["entrypoint"]) for one in yaml.safe_load(file.read_text())["deployments"]]
flows = {flow.name: sys.modules[flow.fn.__module__].__file__ for flow in loaded}
urls = [PREFECT_API_URL.value(), local.endpoints(LocalServers()).prefect]
print(json.dumps({"file": str(file), "flows": flows, "urls": urls}))
"""
"""As `vila-ops up`, `prefect deploy` and a flow run find what they need."""

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    with zipfile.ZipFile(folder / built.stdout.split()[-1]) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def vila_ops(installed: Path, tmp_path: Path) -> Command:
    """Runs the command of the wheel in an empty folder."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vila_ops", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )

    return run


def test_every_file_of_configs_is_in_the_wheel(installed: Path) -> None:
    names = subprocess.run(["git", "ls-files", "configs"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in names.stdout.split():
        assert (installed / "vila_ops" / name).read_bytes() == (ROOT / name).read_bytes()


def test_a_shipped_recipe_is_found_by_its_name(vila_ops: Command) -> None:
    shown = vila_ops("show", "vila-7b", "-r", "vila_128", "--json")
    by_path = vila_ops("show", str(ROOT / "configs/recipes/vila-7b.yaml"), "-r", "vila_128", "--json")
    assert shown.stdout == by_path.stdout
    assert json.loads(shown.stdout)["recipe"]["name"] == "vila-7b"


def test_an_own_config_comes_before_a_shipped_one_of_its_name(vila_ops: Command, tmp_path: Path) -> None:
    own = tmp_path / "configs/resources/inline.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("launch: inline\ntrain: {num_workers: 1}\nstorage: {store: mine}\n")
    shown = json.loads(vila_ops("show", "tiny", "--json").stdout)
    assert shown["resources"]["storage"]["store"] == "mine"


def test_an_unknown_name_is_an_error_with_the_known_ones(vila_ops: Command) -> None:
    refused = vila_ops("show", "vila-7")
    assert refused.returncode == 1
    assert "did you mean 'vila-7b'?" in refused.stderr
    assert "nvila-lite-8b" in refused.stderr


@pytest.mark.slow
def test_a_project_in_an_empty_folder_has_the_flows_and_their_deployments(
    vila_ops: Command, installed: Path, tmp_path: Path
) -> None:
    assert vila_ops("init", ".").returncode == 0
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    done = subprocess.run(
        [sys.executable, "-c", FLOWS], cwd=tmp_path, env={**env, "PYTHONPATH": str(installed)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["file"] == f"{installed}/vila_ops/infra/prefect.yaml"
    assert said["flows"] == {
        "vila": f"{installed}/flows/full_pipeline.py",
        "vila-ablate": f"{installed}/flows/ablate.py",
        "vila-evaluate": f"{installed}/flows/evaluate.py",
        "vila-release": f"{installed}/flows/release.py",
        "vila-retrain": f"{installed}/flows/retrain.py",
    }
    api, server = said["urls"]
    assert api == f"{server}/api"
