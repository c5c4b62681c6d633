"""The manifests, as kustomize renders them: valid by every schema, and by rules of our own."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import vila_ops
from tests.infra import crds, kuberay_rules

ROOT = Path(__file__).parents[2]
OVERLAYS = ("dev", "prod", "air-gapped")
KUBERNETES = "1.37"
OURS = ("Deployment", "StatefulSet", "RayCluster", "RayJob")
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


@every_overlay
def test_objects_of_kubernetes_are_valid_by_its_schema_and_have_no_other_fields(overlay: str) -> None:
    checked = 0
    for manifest in filter(is_builtin, rendered(overlay)):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        checked += 1
    assert checked > 20


@with_crds
@every_overlay
def test_custom_resources_are_valid_by_their_closed_crd_and_its_rules(overlay: str) -> None:
    custom = [manifest for manifest in rendered(overlay) if not is_builtin(manifest)]
    assert {"RayCluster", "RayJob"} <= {manifest["kind"] for manifest in custom}
    assert {name_of(manifest): crds.faults(manifest) for manifest in custom if crds.faults(manifest)} == {}


@every_overlay
def test_rules_of_the_operator_beyond_its_schema_hold(overlay: str) -> None:
    for manifest in rendered(overlay):
        if manifest["apiVersion"] == "ray.io/v1":
            assert kuberay_rules.faults(manifest) == [], name_of(manifest)


@with_crds
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "ExternalSecret", "SecretStore"])
def test_a_misspelt_field_of_a_custom_resource_is_named(kind: str) -> None:
    manifest = copy.deepcopy(next(each for each in rendered("prod") if each["kind"] == kind))
    inner = manifest["spec"]
    while any(isinstance(value, dict) for value in inner.values()):
        inner = next(value for value in inner.values() if isinstance(value, dict))
        if "{" in str(inner) and all(isinstance(value, str) for value in inner.values()):
            break
    manifest["spec"]["mispelt"] = 1
    assert any("mispelt" in fault for fault in crds.faults(manifest))


@pytest.mark.parametrize("kind", ["Deployment", "NetworkPolicy", "PodDisruptionBudget", "PriorityClass", "Service"])
def test_a_misspelt_field_of_an_object_of_kubernetes_is_named(kind: str) -> None:
    manifest = copy.deepcopy(next(each for each in rendered("prod") if each["kind"] == kind))
    manifest.get("spec", manifest)["mispelt"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="mispelt"):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@with_crds
def test_a_broken_cel_rule_is_told() -> None:
    job = copy.deepcopy(next(each for each in rendered("prod") if each["kind"] == "RayJob"))
    job["spec"]["deletionStrategy"] = {"onSuccess": {"policy": "DeleteSelf"}}
    assert any("requires either BOTH onSuccess and onFailure" in fault for fault in crds.faults(job))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rayVersion": "2.51.0"}, "minimum Ray version is 2.52.0"),
        ({"authOptions": {"enableK8sTokenAuth": True}}, "authOptions.mode not set to 'token'"),
        ({"networkPolicy": {}}, "requires a feature gate"),
    ],
)
def test_a_cluster_that_the_operator_refuses_is_refused_here(change: Manifest, told: str) -> None:
    cluster = copy.deepcopy(next(each for each in rendered("prod") if each["kind"] == "RayCluster"))
    cluster["spec"] |= change
    assert any(told in fault for fault in kuberay_rules.faults(cluster))


def test_a_job_that_cannot_be_suspended_is_refused() -> None:
    job = copy.deepcopy(next(each for each in rendered("prod") if each["kind"] == "RayJob"))
    job["spec"]["shutdownAfterJobFinishes"] = False
    assert any("not allowed to be suspended" in fault for fault in kuberay_rules.faults(job))


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
    with_token = {
        pod["metadata"]["labels"].get("app.kubernetes.io/component")
        for manifest in rendered(overlay)
        for pod in pods(manifest)
        if pod["spec"].get("automountServiceAccountToken") is not False
    }
    assert with_token == {"head"}


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
def test_every_service_has_a_policy_and_everything_else_is_closed(overlay: str) -> None:
    policies = [manifest["spec"] for manifest in rendered(overlay) if manifest["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    for manifest in rendered(overlay):
        if manifest["kind"] == "Service":
            labels = manifest["spec"]["selector"].items()
            chosen = [policy for policy in policies if policy["podSelector"].get("matchLabels", {}).items() >= labels]
            ports = {
                port["port"] for policy in chosen for rule in policy.get("ingress", ()) for port in rule.get("ports", ())
            }
            assert {port["port"] for port in manifest["spec"]["ports"]} <= ports, name_of(manifest)


@every_overlay
def test_no_policy_opens_a_port_to_everybody(overlay: str) -> None:
    for manifest in rendered(overlay):
        if manifest["kind"] == "NetworkPolicy":
            assert all(rule.get("from") for rule in manifest["spec"].get("ingress", ())), name_of(manifest)


@every_overlay
def test_every_secret_and_setting_that_a_pod_names_is_made_or_listed_in_the_docs(overlay: str) -> None:
    """The overlays with External Secrets make theirs; for `dev` the page gives the commands."""
    made = {
        (each["kind"].removeprefix("External"), each["metadata"]["name"])
        for each in rendered(overlay)
        if each["kind"] in ("ConfigMap", "ExternalSecret")
    }
    page = (ROOT / "docs/kubernetes.md").read_text()
    used = {reference for manifest in rendered(overlay) for pod in pods(manifest) for reference in references(pod)}
    assert used
    for kind, name in used - made:
        assert (overlay, kind) != ("prod", "ConfigMap")
        assert f"create secret generic {name} " in page, f"{kind} {name} of {overlay}"


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
def test_every_server_has_probes_and_a_disruption_budget(overlay: str) -> None:
    budgets = [each["spec"]["selector"]["matchLabels"] for each in rendered(overlay) if each["kind"].endswith("Budget")]
    for manifest in rendered(overlay):
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            labels = manifest["spec"]["template"]["metadata"]["labels"]
            assert any(budget.items() <= labels.items() for budget in budgets), name_of(manifest)
            for container in containers(manifest):
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= {*container}, name_of(manifest)
