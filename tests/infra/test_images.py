"""What builds and starts containers: linted, valid by schema, in step with the files beside it. Nothing is built."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import vila_ops
from vila_ops.config import load_resources

ROOT = Path(__file__).parents[2]
DOCKERFILE, COMPOSE = ROOT / "infra/docker/Dockerfile", ROOT / "infra/compose.yaml"
WORKFLOW = ROOT / ".github/workflows/ci.yml"
SCHEMAS = {WORKFLOW: "vendor.github-workflows", COMPOSE: "vendor.compose-spec"}
SCRIPTS = (ROOT / ".ci/run", ROOT / "infra/slurm/ray.sbatch")
MAKEFILE = (ROOT / "Makefile").read_text()


def tool(name: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """What a program beside this Python says."""
    command = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def instructions(name: str) -> list[str]:
    """The arguments of an instruction of the Dockerfile, wherever it stands."""
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    return re.findall(rf"^{name} (.*)$", joined, flags=re.MULTILINE)


def variable(name: str) -> str:
    """A variable of the Makefile."""
    stated = re.search(rf"^{name} := (\S+)$", MAKEFILE, flags=re.MULTILINE)
    assert stated is not None
    return stated[1]


def test_the_dockerfile_is_linted_without_a_finding(tmp_path: Path) -> None:
    done = tool("hadolint", DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM docker.io/library/python:latest\n")
    assert "DL3007" in tool("hadolint", tmp_path / "Dockerfile").stdout


def test_the_image_is_of_the_versions_of_the_makefile_and_of_its_system_packages() -> None:
    given = dict(one.split("=") for one in instructions("ARG") if "=" in one)
    assert given["UV"] == variable("UV_VERSION")
    assert given["CYCLONEDX"] == variable("CYCLONEDX_VERSION")
    assert given["PYTHON"].startswith("3.11-")
    installed = {word for line in instructions("RUN") if "apt-get install" in line for word in line.split()}
    wanted = {word for line in re.findall(r'need\+=" ([^"]*)"', MAKEFILE) for word in line.split()}
    assert {word for word in wanted if not word.startswith("python")} <= installed


def test_what_the_image_copies_is_there_and_is_sent_to_the_builder() -> None:
    copied = [word for line in instructions("COPY") if "--from" not in line for word in line.split()[:-1]]
    sent = [
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    ]
    assert sorted(copied) == sorted(sent)
    assert all((ROOT / path).exists() for path in copied)
    passwords = [(ROOT / file).read_text().splitlines() for file in (".dockerignore", ".gitignore")]
    assert ("**/.env" in passwords[0], ".env" in passwords[1]) == (True, True)


def test_the_image_runs_as_the_user_and_in_the_folder_of_the_manifests() -> None:
    manifest = yaml.safe_load((ROOT / "infra/kubernetes/base/prefect-server.yaml").read_text().partition("\n---")[0])
    security = manifest["spec"]["template"]["spec"]["securityContext"]
    assert instructions("USER") == [f"{security['runAsUser']}:{security['runAsGroup']}"]
    assert instructions("WORKDIR")[-1] == "/opt/vila-ops"
    assert len(instructions("HEALTHCHECK")) == 1


@pytest.mark.parametrize("file", SCHEMAS, ids=lambda file: file.name)
def test_a_file_is_valid_by_its_schema_which_finds_a_misspelt_key(file: Path, tmp_path: Path) -> None:
    done = tool("check-jsonschema", "--builtin-schema", SCHEMAS[file], file)
    assert done.returncode == 0, done.stdout
    key = {WORKFLOW: "runs-on:", COMPOSE: "healthcheck:"}[file]
    (tmp_path / file.name).write_text(file.read_text().replace(key, f"mis{key}", 1))
    done = tool("check-jsonschema", "--builtin-schema", SCHEMAS[file], tmp_path / file.name)
    assert done.returncode == 1
    assert f"mis{key[:-1]}" in done.stdout


def test_the_workflow_pins_its_actions_and_may_only_read() -> None:
    text = WORKFLOW.read_text()
    workflow: dict[str, Any] = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    uses = re.findall(r"uses: (\S+)", text)
    assert uses
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", one) for one in uses)
    assert "pull_request_target" not in text
    assert {"run": ".ci/run"} in workflow["jobs"]["test"]["steps"]


def test_containers_of_one_machine_listen_on_loopback_and_write_no_image_and_no_password() -> None:
    compose: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        tag = re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", service["image"]).rpartition(":")[2]
        assert tag not in ("", "latest"), name
        if name != "postgres":
            assert tag == vila_ops.__version__, name
            assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
        for key, value in service["environment"].items():
            if any(word in key for word in ("PASSWORD", "TOKEN", "SECRET", "AUTH_STRING", "DATABASE", "STORE_URI")):
                assert "${" in value, key


def test_the_user_of_the_image_owns_what_volumes_of_ours_cover() -> None:
    """A new volume has the owner of the image's folder in its place; where the image has none it is root's."""
    compose: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    ours = [service for name, service in compose["services"].items() if name != "postgres"]
    covered = {volume.partition(":")[2] for service in ours for volume in service.get("volumes", ())}
    made = re.findall(r"install --directory --owner=vila --group=vila ([^&]*)", " ".join(instructions("RUN")))
    assert covered == {"/home/vila", *made[0].split()}


def test_the_worker_of_the_containers_finds_the_servers_by_the_resources_of_their_name() -> None:
    compose: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    resources = load_resources(ROOT / "configs/resources/compose.yaml")
    worker = compose["services"]["worker"]
    assert resources.tracking.uri == worker["environment"]["MLFLOW_TRACKING_URI"]
    assert worker["network_mode"] == "service:ray"
    assert resources.ray_address == "127.0.0.1:6379"
    assert Path(resources.storage.store).parent == Path("/store")
    for name in ("worker", "ray", "sweeper"):
        assert "store:/store" in compose["services"][name]["volumes"], name


def test_the_sweeper_of_the_containers_has_the_secrets_of_prefect_and_of_rays_jobs_alone() -> None:
    compose: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    environment, of_worker = (compose["services"][name]["environment"] for name in ("sweeper", "worker"))
    assert environment.keys() == {"PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
    assert all(value == re.sub(r":\?[^}]*", "", of_worker[key]) for key, value in environment.items())


def test_scripts_pass_shellcheck() -> None:
    done = tool("shellcheck", *SCRIPTS)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_page_of_licences_is_that_of_what_is_installed(docs_script: Callable[[str], ModuleType]) -> None:
    script = docs_script("licences")
    assert script.page() == script.PAGE.read_text(), "run `make licences`"
    assert {"torch", "ray", "prefect", "psycopg"} <= set(script.closure())
    assert "pytest" not in script.closure()
