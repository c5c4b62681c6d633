"""What a RayService is built from: the register of aliases, and settings that do not ask a cluster."""

import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.config import Resources, Service, load
from vila_ops.pipeline.promotion import deploy_champion
from vila_ops.registry import alias_register
from vila_ops.release.ray_service import Served, application
from vila_ops.serve.spec import Spec

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/recipes/tiny.yaml"
VERSION = ModelVersion(
    name="tiny",
    version=3,
    checkpoint=Checkpoint(uri="s3://bucket/checkpoint", digest="d" * 64, stage="sft", step=1),
    promoted=True,
)


def resources_file(folder: Path, **serve: object) -> Path:
    """Resources of an endpoint that an operator starts, with a store in a folder."""
    file = folder / "resources.yaml"
    given = {
        "launch": "ray",
        "ray_address": "127.0.0.1:1",
        "storage": {"store": str(folder / "store")},
        "serve": {"started_by": "operator", **serve},
    }
    file.write_text(yaml.safe_dump(given))
    return file


def served(file: Path, version: object) -> Served:
    return Served.model_validate({"recipe": str(TINY), "resources": str(file), "version": version})


def test_a_version_that_no_alias_pointed_to_is_refused_by_name(tmp_path: Path) -> None:
    file = resources_file(tmp_path, device="cpu")
    name = load(TINY, resources=file).recipe.gate.model_name
    for version in ("champion", 3):
        with pytest.raises(ValueError, match=f"register of '{name}' in .* has no version {version}"):
            application(served(file, version))
    with pytest.raises(ValidationError, match="version"):
        served(file, "newest")


@pytest.mark.parametrize("device", ["auto", "gpu"])
def test_a_device_that_only_nodes_could_tell_is_refused(device: str, tmp_path: Path) -> None:
    file = resources_file(tmp_path, device=device)
    run = load(TINY, resources=file)
    store = run.resources.storage.store
    alias_register.move(run.recipe.gate.model_name, {"champion": VERSION}, over=None, reason="first", store=store)
    with pytest.raises(ValueError, match=f"the device of replicas is {device}"):
        application(served(file, "champion"))


def test_deploy_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    run = load(TINY, resources=resources_file(tmp_path, device="cpu"))
    with pytest.raises(ValueError, match="started_by is operator"):
        deploy_champion(run)
    assert not (tmp_path / "store").exists()


def test_a_file_of_keys_behind_a_link_that_moves_is_followed(tmp_path: Path) -> None:
    """Kubernetes mounts a secret as links, and changes where they lead when the secret changes."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first/keys.json").write_text("{}")
    os.symlink("first", tmp_path / "data")
    os.symlink("data/keys.json", tmp_path / "keys.json")
    resources = Resources.model_validate(
        {"launch": "inline", "serve": {"access": {"key_file": str(tmp_path / "keys.json")}}}
    )
    spec = Spec.of(Service(name="tiny"), VERSION, resources)
    assert spec.capacity.access.key_file == str(tmp_path / "keys.json")
