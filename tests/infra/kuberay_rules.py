"""Rules of KubeRay's operator beyond its schema, at commit feeaf72fa (2026-08-19).

From ray-operator/controllers/ray/utils/validation.go, and common/service.go for the port `serve`: what concerns the
fields that our manifests use, with its words in short.
"""

from collections.abc import Iterator
from typing import Any

MOST = {"RayCluster": 63, "RayJob": 47, "RayService": 47}
"""Longest name (MaxRayClusterNameLength, MaxRayJobNameLength, MaxRayServiceNameLength of constant.go)."""


def faults(resource: dict[str, Any]) -> list[str]:
    """What the operator says against a RayCluster, RayJob or RayService."""
    kind, spec = resource["kind"], resource["spec"]
    named = [] if len(resource["metadata"]["name"]) <= MOST[kind] else [f"{kind} name is longer than {MOST[kind]}"]
    match kind:
        case "RayCluster":
            return named + list(_cluster(spec))
        case "RayJob":
            return named + list(_job(spec))
        case _:
            return named + list(_service(spec))


def _cluster(spec: dict[str, Any]) -> Iterator[str]:
    scales = spec.get("enableInTreeAutoscaling", False)
    groups = [("Head", spec["headGroupSpec"]), *((group["groupName"], group) for group in spec["workerGroupSpecs"])]
    for name, group in groups:
        if not group["template"]["spec"].get("containers"):
            yield f"{name} should have at least one container"
        if "labels" in group["rayStartParams"]:
            yield f"rayStartParams['labels'] is not supported for {name} group"
        if {"num-cpus", "num-gpus", "memory", "resources"} & {*group["rayStartParams"]} and group.get("resources"):
            yield f"resource fields should not be set in both rayStartParams and Resources for {name} group"
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        if name != "Head" and not scales and None in (least, most):
            yield f"worker group {name} must set both minReplicas and maxReplicas when autoscaling is disabled"
        if least is not None and most is not None and not 0 <= least <= most:
            yield f"worker group {name} has minReplicas {least} greater than maxReplicas {most}"
        if group.get("suspend"):
            yield f"worker group {name} cannot be suspended"
        policy = group["template"]["spec"].get("restartPolicy", "Never")
        if scales and spec.get("autoscalerOptions", {}).get("version") == "v2" and policy != "Never":
            yield f"restartPolicy for {name} should be Never or unset when using autoscaler V2"
    yield from _auth(spec)
    for field in ("networkPolicy", "tlsOptions", "historyServerOptions"):
        if field in spec:
            yield f"spec.{field} requires a feature gate"


def _auth(spec: dict[str, Any]) -> Iterator[str]:
    auth = spec.get("authOptions", {})
    version = tuple(int(part) for part in spec.get("rayVersion", "0").split(".")[:2])
    if auth.get("mode") == "token" and version < (2, 52):
        yield f"authOptions.mode is 'token' but minimum Ray version is 2.52.0, got {spec.get('rayVersion')}"
    if auth.get("enableK8sTokenAuth") and auth.get("mode") != "token":
        yield "authOptions.enableK8sTokenAuth is enabled but authOptions.mode not set to 'token'"
    if auth.get("enableK8sTokenAuth") and version < (2, 55):
        yield f"enableK8sTokenAuth is enabled but minimum Ray version is 2.55.0, got {spec.get('rayVersion')}"
    if auth.get("enableK8sTokenAuth") and auth.get("secretName"):
        yield "authOptions.enableK8sTokenAuth is enabled and authOptions.secretName is also set"


def _job(spec: dict[str, Any]) -> Iterator[str]:
    ends = spec.get("shutdownAfterJobFinishes", False)
    if spec.get("suspend") and not ends:
        yield "a RayJob with shutdownAfterJobFinishes set to false is not allowed to be suspended"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not ends:
        yield "a RayJob with shutdownAfterJobFinishes set to false cannot have TTLSecondsAfterFinished"
    chosen = bool(spec.get("clusterSelector"))
    if spec.get("suspend") and chosen:
        yield "the ClusterSelector mode doesn't support the suspend operation"
    if "rayClusterSpec" not in spec and not chosen:
        yield "one of RayClusterSpec or ClusterSelector must be set"
    if chosen and spec.get("backoffLimit", 0) > 0:
        yield "BackoffLimit is incompatible with ClusterSelector mode"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit must be a positive integer"
    if cluster := spec.get("rayClusterSpec"):
        if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
            yield "K8s token auth mode is currently not supported for RayJob"
        yield from _cluster(cluster)


def _service(spec: dict[str, Any]) -> Iterator[str]:
    cluster, strategy = spec["rayClusterConfig"], spec.get("upgradeStrategy", {})
    if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "K8s token auth mode is currently not supported for RayService"
    head = cluster["headGroupSpec"]
    if head.get("headService", {}).get("metadata", {}).get("name"):
        yield "spec.rayClusterConfig.headGroupSpec.headService.metadata.name should not be set"
    if not any(port["name"].startswith("serve") for port in head["template"]["spec"]["containers"][0].get("ports", ())):
        yield "Please specify a port named 'serve' in the Ray head container"
    if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
        options = strategy.get("clusterUpgradeOptions", {})
        if not cluster.get("enableInTreeAutoscaling"):
            yield "Ray Autoscaler is required for NewClusterWithIncrementalUpgrade"
        if not options.get("gatewayClassName"):
            yield "gatewayClassName is required for NewClusterWithIncrementalUpgrade"
        if options.get("stepSizePercent", 0) > options.get("maxSurgePercent", 100):
            yield "stepSizePercent must be less than or equal to maxSurgePercent"
    yield from _cluster(cluster)
