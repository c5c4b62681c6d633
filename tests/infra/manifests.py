"""The manifests as kustomize renders them, and what the tests of them ask for."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = ("dev", "prod", "air-gapped")
Manifest = dict[str, Any]
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@cache
def rendered(overlay: str) -> list[Manifest]:
    """The objects of an overlay."""
    kubectl = Path(sys.executable).with_name("kubectl")
    command = [str(kubectl), "kustomize", str(ROOT / "infra/kubernetes/overlays" / overlay)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return list(yaml.load_all(text, yaml.CSafeLoader))


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def pods(value: Any) -> Iterator[Manifest]:
    """Every pod template in a manifest, however deep."""
    if isinstance(value, dict):
        if isinstance(value.get("spec"), dict) and "containers" in value["spec"]:
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


def containers(manifest: Manifest) -> Iterator[Manifest]:
    for pod in pods(manifest):
        yield from pod["spec"]["containers"]
        yield from pod["spec"].get("initContainers", ())


def selects(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """Whether a label selector of Kubernetes, with operator In alone, selects labels."""
    expressions = selector.get("matchExpressions", ())
    assert all(each["operator"] == "In" for each in expressions)
    same = selector.get("matchLabels", {}).items() <= labels.items()
    return same and all(labels.get(each["key"]) in each["values"] for each in expressions)


def ray(instance: str, component: str) -> dict[str, str]:
    """The labels of a pod of Ray."""
    names = {"name": "ray", "instance": instance, "component": component}
    return {f"app.kubernetes.io/{key}": value for key, value in names.items()}


PREFECT, MLFLOW, POSTGRES, SWEEPER, METRICS = (
    {"app.kubernetes.io/name": name} for name in ("prefect-server", "mlflow", "postgres", "sweeper", "metrics")
)
