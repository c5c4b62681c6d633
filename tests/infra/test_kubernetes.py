"""The manifests, as kustomize renders them: valid by every schema, and by rules of our own."""

import copy
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command

import vila_ops
from tests.infra import crds, kuberay_rules
from vila_ops.cli import app
from vila_ops.config import load, load_resources
from vila_ops.local.servers import TELEMETRY_OFF
from vila_ops.release.ray_service import Served
from vila_ops.serve.backends.ray_serve import CONTROLLER_ENV

ROOT = Path(__file__).parents[2]
OVERLAYS = ("dev", "prod", "air-gapped")
KUBERNETES = "1.37"
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
Manifest = dict[str, Any]


@cache
def rendered(overlay: str) -> list[Manifest]:
    """The objects of an overlay."""
    kubectl = Path(sys.executable).with_name("kubectl")
    command = [str(kubectl), "kustomize", str(ROOT / "infra/kubernetes/overlays" / overlay)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return list(yaml.load_all(text, yaml.CSafeLoader))


def is_builtin(manifest: Manifest) -> bool:
    group = manifest["apiVersion"].partition("/")[0]
    return "." not in group or group.endswith(".k8s.io")


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


every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
with_crds = pytest.mark.skipif(crds.folder() is None, reason="VILA_CRDS does not name a folder of CRDs")


def test_objects_of_kubernetes_are_valid_by_its_schema_and_have_no_other_fields() -> None:
    distinct = {str(each): each for overlay in OVERLAYS for each in rendered(overlay) if is_builtin(each)}
    assert len(distinct) > 20
    for manifest in distinct.values():
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@with_crds
@every_overlay
def test_custom_resources_are_valid_by_their_closed_crd_and_its_rules(overlay: str) -> None:
    custom = [manifest for manifest in rendered(overlay) if not is_builtin(manifest)]
    assert {"RayCluster", "RayJob", "RayService"} <= {manifest["kind"] for manifest in custom}
    assert {name_of(manifest): faults for manifest in custom if (faults := crds.faults(manifest))} == {}


@every_overlay
def test_rules_of_the_operator_beyond_its_schema_hold(overlay: str) -> None:
    for manifest in rendered(overlay):
        if manifest["apiVersion"] == "ray.io/v1":
            assert kuberay_rules.faults(manifest) == [], name_of(manifest)


def first(kind: str) -> Manifest:
    """A copy of the first object of a kind that `prod` has, to be changed."""
    return copy.deepcopy(next(each for each in rendered("prod") if each["kind"] == kind))


@with_crds
@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("RayCluster", ("headGroupSpec", "template", "spec", "containers", 0, "securityContext")),
        ("RayJob", ("rayClusterSpec", "workerGroupSpecs", 0)),
        ("RayService", ("rayClusterConfig", "autoscalerOptions")),
        ("ExternalSecret", ("data", 0, "remoteRef")),
        ("SecretStore", ("provider", "vault", "auth")),
    ],
)
def test_a_misspelt_field_of_a_custom_resource_is_named(kind: str, path: tuple[str | int, ...]) -> None:
    manifest = first(kind)
    assert crds.faults(manifest) == []
    inner = manifest["spec"]
    for step in path:
        inner = inner[step]
    inner["mispelt"] = 1
    assert any("mispelt" in fault for fault in crds.faults(manifest))


def test_a_misspelt_field_of_an_object_of_kubernetes_is_named() -> None:
    kinds = {each["kind"]: each for overlay in OVERLAYS for each in rendered(overlay) if is_builtin(each)}
    assert len(kinds) >= 14
    for manifest in map(copy.deepcopy, kinds.values()):
        manifest.get("spec", manifest)["mispelt"] = 1
        with pytest.raises(kubernetes_validate.ValidationError, match="mispelt"):
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@with_crds
def test_a_broken_cel_rule_is_told() -> None:
    job = first("RayJob")
    job["spec"]["deletionStrategy"] = {"onSuccess": {"policy": "DeleteSelf"}}
    assert any("requires either BOTH onSuccess and onFailure" in fault for fault in crds.faults(job))


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("RayCluster", {"rayVersion": "2.51.0"}, "minimum Ray version is 2.52.0"),
        ("RayCluster", {"authOptions": {"enableK8sTokenAuth": True}}, "authOptions.mode not set to 'token'"),
        ("RayCluster", {"networkPolicy": {}}, "requires a feature gate"),
        ("RayJob", {"shutdownAfterJobFinishes": False}, "not allowed to be suspended"),
        ("RayJob", {"clusterSelector": {"ray.io/cluster": "vila"}}, "doesn't support the suspend operation"),
        (
            "RayService",
            {"upgradeStrategy": {"type": "NewClusterWithIncrementalUpgrade"}},
            "gatewayClassName is required",
        ),
    ],
)
def test_what_the_operator_refuses_is_refused_here(kind: str, change: Manifest, told: str) -> None:
    manifest = first(kind)
    manifest["spec"] |= change
    assert any(told in fault for fault in kuberay_rules.faults(manifest))


def test_a_service_whose_head_has_no_port_to_serve_is_refused() -> None:
    service = first("RayService")
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"] = []
    assert any("a port named 'serve'" in fault for fault in kuberay_rules.faults(service))


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


def selects(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """Whether a label selector of Kubernetes, with operator In alone, selects labels."""
    expressions = selector.get("matchExpressions", ())
    assert all(each["operator"] == "In" for each in expressions)
    same = selector.get("matchLabels", {}).items() <= labels.items()
    return same and all(labels.get(each["key"]) in each["values"] for each in expressions)


def passes(overlay: str, source: Mapping[str, str], target: Mapping[str, str], port: int) -> bool:
    """Whether policies let a pod of the namespace, by its labels, open a TCP connection to another one.

    As Kubernetes says it: the policies that select a pod add up, for each direction by itself.
    """
    specs = [each["spec"] for each in rendered(overlay) if each["kind"] == "NetworkPolicy"]

    def one_way(own: Mapping[str, str], other: Mapping[str, str], direction: str, peers: str) -> bool:
        rules = [
            rule
            for spec in specs
            if direction in spec["policyTypes"] and selects(spec["podSelector"], own)
            for rule in spec.get(direction.lower(), ())
        ]
        return any(
            ("ports" not in rule or any((each["protocol"], each["port"]) == ("TCP", port) for each in rule["ports"]))
            and (
                peers not in rule
                or any("namespaceSelector" not in peer and selects(peer["podSelector"], other) for peer in rule[peers])
            )
            for rule in rules
        )

    return one_way(source, target, "Egress", "to") and one_way(target, source, "Ingress", "from")


def ray(instance: str, component: str) -> dict[str, str]:
    """The labels of a pod of Ray."""
    names = {"name": "ray", "instance": instance, "component": component}
    return {f"app.kubernetes.io/{key}": value for key, value in names.items()}


PREFECT, MLFLOW, POSTGRES, SWEEPER, METRICS = (
    {"app.kubernetes.io/name": name} for name in ("prefect-server", "mlflow", "postgres", "sweeper", "metrics")
)


@pytest.mark.parametrize("overlay", ["dev", "air-gapped"])
@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (ray("training", "driver"), PREFECT, 4200),
        (ray("training", "driver"), MLFLOW, 5000),
        (ray("training", "driver"), ray("training", "head"), 6379),
        (ray("training", "driver"), ray("training", "head"), 8265),
        (ray("training", "gpu-worker"), ray("training", "gpu-worker"), 29500),
        (ray("job", "submitter"), ray("job", "head"), 8265),
        (ray("endpoint", "replica"), ray("endpoint", "head"), 6379),
        (PREFECT, POSTGRES, 5432),
        (MLFLOW, POSTGRES, 5432),
        (SWEEPER, PREFECT, 4200),
    ],
)
def test_who_needs_a_server_reaches_it(overlay: str, source: dict[str, str], target: dict[str, str], port: int) -> None:
    assert passes(overlay, source, target, port)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (MLFLOW, PREFECT, 4200),
        (PREFECT, MLFLOW, 5000),
        (PREFECT, ray("training", "head"), 6379),
        (ray("training", "driver"), POSTGRES, 5432),
        (ray("training", "driver"), PREFECT, 22),
        (SWEEPER, MLFLOW, 5000),
        (SWEEPER, ray("training", "head"), 8265),
        ({"app": "another"}, MLFLOW, 5000),
        ({"app": "another"}, ray("endpoint", "replica"), 8000),
    ],
)
def test_nobody_else_does(source: dict[str, str], target: dict[str, str], port: int) -> None:
    assert not passes("dev", source, target, port)


def test_without_a_network_outside_no_pod_but_those_that_ask_kubernetes_or_a_database_reaches_every_address() -> None:
    """Addresses of Kubernetes' API server and of PostgreSQL differ between clusters; the store's are inside."""
    policies = [each["spec"] for each in rendered("air-gapped") if each["kind"] == "NetworkPolicy"]
    reached: dict[str, set[int]] = {}
    for labels in (pod["metadata"]["labels"] for manifest in rendered("air-gapped") for pod in pods(manifest)):
        rules = [
            rule
            for policy in policies
            if "Egress" in policy["policyTypes"] and selects(policy["podSelector"], labels)
            for rule in policy.get("egress", ())
        ]
        name = "/".join(labels[key] for key in sorted(labels))
        reached[name] = {port["port"] for rule in rules if "to" not in rule for port in rule["ports"]}
    assert {pod: ports for pod, ports in reached.items() if ports} == {
        "head/endpoint/ray": {443, 6443},
        "head/training/ray": {443, 6443},
        "mlflow": {5432},
        "prefect-server": {5432},
    }
    assert "metrics" in reached


def open_to_namespaces(overlay: str, target: Mapping[str, str], port: int) -> list[dict[str, str]]:
    """The labels by which pods of other namespaces may open a TCP connection to a pod."""
    return [
        peer["namespaceSelector"]["matchLabels"]
        for each in rendered(overlay)
        if each["kind"] == "NetworkPolicy" and selects(each["spec"]["podSelector"], target)
        for rule in each["spec"].get("ingress", ())
        if "ports" not in rule or {"protocol": "TCP", "port": port} in rule["ports"]
        for peer in rule["from"]
        if "namespaceSelector" in peer
    ]


def test_prometheus_reaches_the_exporter_and_the_nodes_of_ray_and_nobody_in_the_namespace_does() -> None:
    label = {"vila-ops/metrics": "true"}
    (service,) = (
        each for each in rendered("prod") if each["kind"] == "Service" and each["metadata"]["name"] == "metrics"
    )
    (port,) = (each["port"] for each in service["spec"]["ports"])
    assert open_to_namespaces("prod", METRICS, port) == [label]
    assert open_to_namespaces("prod", ray("training", "gpu-worker"), 8080) == [label]
    assert open_to_namespaces("dev", ray("training", "gpu-worker"), 8080) == []
    assert not passes("prod", ray("training", "driver"), METRICS, port)
    page = (ROOT / "docs/monitoring.md").read_text()
    assert f"metrics.vila.svc:{port}" in page
    assert "vila-ops/metrics=true" in page


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
def test_every_pod_has_labels_that_the_tests_of_policies_know(overlay: str) -> None:
    components = {("training", each) for each in ("head", "driver", "cpu-worker", "gpu-worker")}
    components |= {
        ("endpoint", "head"),
        ("endpoint", "replica"),
        ("job", "submitter"),
        ("job", "head"),
        ("job", "worker"),
    }
    known = [PREFECT, MLFLOW, POSTGRES, SWEEPER, METRICS, *(ray(*each) for each in sorted(components))]
    for manifest in rendered(overlay):
        for pod in pods(manifest):
            assert pod["metadata"]["labels"] in known, name_of(manifest)


@every_overlay
def test_every_service_has_a_policy_for_its_ports_and_everything_else_is_closed(overlay: str) -> None:
    policies = [manifest["spec"] for manifest in rendered(overlay) if manifest["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    for manifest in rendered(overlay):
        if manifest["kind"] == "Service":
            chosen = [policy for policy in policies if selects(policy["podSelector"], manifest["spec"]["selector"])]
            ports = {
                port["port"]
                for policy in chosen
                for rule in policy.get("ingress", ())
                for port in rule.get("ports", ())
            }
            assert {port["port"] for port in manifest["spec"]["ports"]} <= ports, name_of(manifest)


@every_overlay
def test_no_policy_opens_a_port_to_everybody(overlay: str) -> None:
    for manifest in rendered(overlay):
        if manifest["kind"] == "NetworkPolicy":
            assert all(rule.get("from") for rule in manifest["spec"].get("ingress", ())), name_of(manifest)


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
