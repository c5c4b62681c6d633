"""The manifests are valid by the schemas of Kubernetes and of the CRDs, and by KubeRay's rules beyond them."""

import copy

import kubernetes_validate
import pytest

from tests.infra import crds, kuberay_rules
from tests.infra.manifests import OVERLAYS, Manifest, every_overlay, name_of, rendered

KUBERNETES = "1.37"
with_crds = pytest.mark.skipif(crds.folder() is None, reason="VILA_CRDS does not name a folder of CRDs")


def is_builtin(manifest: Manifest) -> bool:
    group = manifest["apiVersion"].partition("/")[0]
    return "." not in group or group.endswith(".k8s.io")


def first(kind: str) -> Manifest:
    """A copy of the first object of a kind that `prod` has, to be changed."""
    return copy.deepcopy(next(each for each in rendered("prod") if each["kind"] == kind))


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
