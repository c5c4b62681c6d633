"""The manifests by rules of our own: images, rights, secrets, probes, budgets, commands and configs."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command

import vila_ops
from tests.infra.manifests import OVERLAYS, ROOT, containers, every_overlay, name_of, pods, ray, rendered, selects
from vila_ops.cli import app
from vila_ops.config import load, load_resources
from vila_ops.local.servers import TELEMETRY_OFF
from vila_ops.release.ray_service import Served
from vila_ops.serve.backends.ray_serve import CONTROLLER_ENV

SILENCED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("ray-head", "ray-worker", "prefect-worker"), ("DO_NOT", "DVC", "MLFLOW", "RAY")),
    "mlflow": ("DO_NOT", "MLFLOW"),
    "prefect-server": ("DO_NOT", "PREFECT"),
    **dict.fromkeys(("metrics", "sweeper"), ("DO_NOT",)),
    **dict.fromkeys(("postgres", "submitter"), ()),
}
"""By the name of a container: whose reports of use it has to turn off, by the start of the variable."""
PROBES = {"startupProbe", "readinessProbe", "livenessProbe"}
"""Of what listens. What has no port ends by an error, and is then started again."""
CONFIGS = "/opt/vila-ops/"
"""Where the image has the checkout."""


@every_overlay
def test_images_are_pinned_and_ours_is_of_this_release(overlay: str) -> None:
    images = {container["image"] for manifest in rendered(overlay) for container in containers(manifest)}
    assert images
    for image in images:
        name, _, tag = image.rpartition(":")
        assert name.count("/") >= 1, image
        assert tag not in ("", "latest"), image
        if name.endswith("/vila-ops"):
            assert tag == vila_ops.__version__, image
        if overlay == "prod" and "vila-ops" in name:
            assert name.endswith("@sha256"), image


@every_overlay
def test_no_container_is_root_or_can_write_its_image_and_each_has_limits(overlay: str) -> None:
    checked = 0
    for manifest in rendered(overlay):
        for pod in pods(manifest):
            where, spec = name_of(manifest), pod["spec"]
            assert spec["securityContext"]["runAsNonRoot"] is True, where
            assert spec["securityContext"]["runAsUser"] > 0, where
            assert not {"hostNetwork", "hostPID", "hostIPC"} & {*spec}, where
            assert not any("hostPath" in volume for volume in spec["volumes"]), where
            for container in (*spec["containers"], *spec.get("initContainers", ())):
                security = container["securityContext"]
                assert security["allowPrivilegeEscalation"] is False, where
                assert security["readOnlyRootFilesystem"] is True, where
                assert security["capabilities"] == {"drop": ["ALL"]}, where
                assert "memory" in container["resources"]["limits"], where
                assert {"cpu", "memory"} <= {*container["resources"]["requests"]}, where
                checked += 1
    assert checked >= 8


@every_overlay
def test_only_the_head_that_scales_the_cluster_has_a_token_for_kubernetes(overlay: str) -> None:
    with_token = [
        pod["metadata"]["labels"]
        for manifest in rendered(overlay)
        for pod in pods(manifest)
        if pod["spec"].get("automountServiceAccountToken") is not False
    ]
    assert with_token == [ray("training", "head"), ray("endpoint", "head")]


@every_overlay
def test_no_secret_stands_in_clear(overlay: str) -> None:
    """Neither as an object, nor as the value of a variable whose name says that it is one, nor within a URL."""
    for manifest in rendered(overlay):
        assert manifest["kind"] != "Secret", name_of(manifest)
        for container in containers(manifest):
            for variable in container.get("env", ()):
                if any(word in variable["name"] for word in ("PASSWORD", "TOKEN", "SECRET", "_KEY", "AUTH_STRING")):
                    assert variable.get("valueFrom", {}).get("secretKeyRef"), variable["name"]
        if manifest["kind"] == "ConfigMap":
            assert not any("://" in value and "@" in value for value in manifest["data"].values())


@every_overlay
def test_the_sweeper_and_the_exporter_run_commands_that_parse(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter's resources are a file of the image, and name a store that every pod reaches."""
    (settings,) = (each["data"] for each in rendered(overlay) if each["metadata"]["name"] == "vila-settings")
    monkeypatch.setenv("PREFECT_API_URL", settings["PREFECT_API_URL"])
    told = {one["name"]: one["args"] for each in rendered(overlay) for one in containers(each) if "args" in one}
    ours = [told[name] for name in ("sweeper", "metrics") if name in told]
    assert len(ours) == (1 if overlay == "dev" else 2)
    for program, name, *options in ours:
        group = get_command(app)
        assert isinstance(group, TyperGroup)
        given = group.commands[name].make_context(name, options).params
        assert program == "vila-ops"
        if "resources" in given:
            assert load_resources(ROOT / given["resources"]).storage.store.startswith("s3://")


@every_overlay
def test_every_secret_and_setting_that_a_pod_names_is_made(overlay: str) -> None:
    """External Secrets makes those of `prod` and `air-gapped`; for `dev` the page gives the commands."""
    made = {
        (each["kind"].removeprefix("External"), each["metadata"]["name"])
        for each in rendered(overlay)
        if each["kind"] in ("ConfigMap", "ExternalSecret")
    }
    used = {reference for manifest in rendered(overlay) for pod in pods(manifest) for reference in references(pod)}
    assert ("Secret", "ray-token") in used
    by_hand = {name for kind, name in used - made if kind == "Secret"}
    assert {("Secret", name) for name in by_hand} == used - made
    if overlay != "dev":
        assert not by_hand
    page = (ROOT / "docs/kubernetes.md").read_text()
    for name in by_hand:
        assert f"create secret generic {name} " in page, name


@every_overlay
def test_every_secret_has_the_keys_that_a_pod_reads(overlay: str) -> None:
    made = {
        (each["metadata"]["name"], one["secretKey"])
        for each in rendered(overlay)
        if each["kind"] == "ExternalSecret"
        for one in each["spec"]["data"]
    }
    if overlay == "dev":
        page = (ROOT / "docs/kubernetes.md").read_text()
        for name, options in re.findall(r"create secret generic (\S+) (.*)", page):
            made |= {(name, key) for key in re.findall(r"--from-(?:literal|file)=([\w.-]+)", options)}
    read = {pair for manifest in rendered(overlay) for pod in pods(manifest) for pair in keys_read(pod)}
    assert ("endpoint-keys", "keys.json") in made
    assert ("databases", "mlflow-auth.ini") in read
    assert read <= made


def keys_read(value: Any) -> Iterator[tuple[str, str]]:
    """The keys of secrets that a pod names one by one: (secret, key)."""
    if isinstance(value, list):
        for inner in value:
            yield from keys_read(inner)
    if isinstance(value, dict):
        if "secretKeyRef" in value:
            yield value["secretKeyRef"]["name"], value["secretKeyRef"]["key"]
        if "secretName" in value:
            yield from ((value["secretName"], item["key"]) for item in value.get("items", ()))
        for inner in value.values():
            yield from keys_read(inner)


def references(value: Any) -> Iterator[tuple[str, str]]:
    """The secrets and config maps that a pod names: (kind, name)."""
    if isinstance(value, list):
        for inner in value:
            yield from references(inner)
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("secretKeyRef", "secretRef"):
                yield "Secret", inner["name"]
            elif key in ("configMapKeyRef", "configMapRef", "configMap"):
                yield "ConfigMap", inner["name"]
            elif key == "secretName":
                yield "Secret", str(inner)
            else:
                yield from references(inner)


@every_overlay
def test_no_process_reports_its_use_to_anybody(overlay: str) -> None:
    (settings,) = (each["data"] for each in rendered(overlay) if each["metadata"]["name"] == "vila-settings")
    for manifest in rendered(overlay):
        for container in containers(manifest):
            common = any(
                "vila-settings" in each.get("configMapRef", {}).values() for each in container.get("envFrom", ())
            )
            own = {each["name"]: each.get("value") for each in container.get("env", ())}
            off = {**(settings if common else {}), **own}.items()
            wanted = {key: value for key, value in TELEMETRY_OFF.items() if key.startswith(SILENCED[container["name"]])}
            assert wanted.items() <= off, name_of(manifest)


@every_overlay
def test_every_server_has_probes_and_a_disruption_budget(overlay: str) -> None:
    budgets = [each["spec"] for each in rendered(overlay) if each["kind"] == "PodDisruptionBudget"]
    for manifest in rendered(overlay):
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            labels = manifest["spec"]["template"]["metadata"]["labels"]
            assert any(selects(budget["selector"], labels) for budget in budgets), name_of(manifest)
            for container in containers(manifest):
                assert ({*container} >= PROBES) == ("ports" in container), name_of(manifest)
        elif manifest["kind"] in ("RayCluster", "RayService"):
            for container in containers(manifest):
                assert "livenessProbe" in container, name_of(manifest)
                assert "readinessProbe" in container or container["name"] == "prefect-worker", name_of(manifest)


@every_overlay
def test_a_budget_of_pods_without_a_controller_of_kubernetes_is_a_least_number(overlay: str) -> None:
    """Kubernetes counts such pods by an integer minAvailable alone (its page on disruption budgets)."""
    of_ray = {
        tuple(pod["metadata"]["labels"].items())
        for manifest in rendered(overlay)
        if manifest["kind"].startswith("Ray")
        for pod in pods(manifest)
    }
    counted = 0
    for manifest in rendered(overlay):
        if manifest["kind"] == "PodDisruptionBudget":
            spec = manifest["spec"]
            if any(selects(spec["selector"], dict(labels)) for labels in of_ray):
                assert isinstance(spec.get("minAvailable"), int), name_of(manifest)
                counted += 1
    assert counted == 4


def test_jobs_and_endpoints_use_configs_that_are_there() -> None:
    """Their files load, and say what the manifests have: pods, the folder of keys, the names of servers."""
    for overlay in OVERLAYS:
        kinds = {manifest["kind"]: manifest for manifest in rendered(overlay)}
        words = shlex.split(kinds["RayJob"]["spec"]["entrypoint"].replace(CONFIGS, f"{ROOT}/"))
        assert words[:2] + words[3:4] == ["vila-ops", "register", "-r"]
        job = load(Path(words[2]), resources=Path(words[4])).resources
        worker = kinds["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
        cpus = int(worker["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        assert job.train.num_workers * job.train.cpus_per_worker <= cpus

        service = kinds["RayService"]["spec"]
        (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
        served = Served.model_validate(application["args"])
        given = [Path(path.replace(CONFIGS, f"{ROOT}/")) for path in (served.recipe, served.resources)]
        resources = load(given[0], resources=given[1]).resources
        (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
        container = group["template"]["spec"]["containers"][0]
        assert {each["name"]: each["value"] for each in container["env"]} == CONTROLLER_ENV
        serve = resources.serve
        assert serve.started_by == "operator"
        assert str(Path(str(serve.access.key_file)).parent) in [each["mountPath"] for each in container["volumeMounts"]]
        most = serve.replicas if serve.autoscale is None else serve.autoscale.max_replicas
        assert (group["minReplicas"], group["maxReplicas"]) == (serve.replicas, most)
        assert serve.cpus_per_replica == int(container["resources"]["limits"]["cpu"])
        assert (resources.device == "cuda") == ("nvidia.com/gpu" in container["resources"]["limits"])
        assert resources.ray_address == f"{kinds['RayCluster']['metadata']['name']}-head-svc:6379"
