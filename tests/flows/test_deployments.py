"""The files of deployments name flows that there are, whose parameters say what they are."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.utilities.callables import parameter_schema

ROOT = Path(__file__).parents[2]
FILES = ("infra/prefect.yaml", "infra/prefect.kubernetes.yaml")


def deployments(file: str) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = yaml.safe_load((ROOT / file).read_text())["deployments"]
    return listed


def same(deployment: dict[str, Any]) -> dict[str, Any]:
    """What a deployment of one pool has in common with that of another."""
    name = deployment["name"].removesuffix("-kubernetes")
    return {**{key: deployment.get(key) for key in ("description", "tags", "entrypoint", "schedules")}, "name": name}


@pytest.mark.parametrize("file", FILES)
def test_every_parameter_of_a_flow_has_help_in_prefects_form(file: str) -> None:
    for deployment in deployments(file):
        module, _, name = deployment["entrypoint"].rpartition(".")
        flow = getattr(import_module(module), name)
        properties = parameter_schema(flow.fn).properties
        assert {"grid", "resources"} <= properties.keys() or {"recipe", "resources", "overrides"} <= properties.keys()
        assert all(one.get("description") for one in properties.values()), deployment["name"]


def test_both_pools_run_the_same_flows_and_none_has_a_limit_that_ends_it_in_an_outage() -> None:
    local, kubernetes = (deployments(file) for file in FILES)
    assert [same(one) for one in local] == [same(one) for one in kubernetes]
    assert {one["work_pool"]["name"] for one in kubernetes} == {"kubernetes"}
    assert not any("concurrency_limit" in one for one in (*local, *kubernetes))


def test_flow_runs_on_kubernetes_work_in_the_folder_of_the_image() -> None:
    folder = re.findall(r"^WORKDIR (\S+)$", (ROOT / "infra/docker/Dockerfile").read_text(), flags=re.MULTILINE)[-1]
    step = {"prefect.deployments.steps.set_working_directory": {"directory": folder}}
    assert all(one["pull"] == [step] for one in deployments(FILES[1]))
