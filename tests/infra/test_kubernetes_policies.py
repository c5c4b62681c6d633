"""The network policies of the manifests: who needs a server reaches it, and nobody else."""

from collections.abc import Mapping

import pytest

from tests.infra.manifests import (
    METRICS,
    MLFLOW,
    POSTGRES,
    PREFECT,
    ROOT,
    SWEEPER,
    every_overlay,
    name_of,
    pods,
    ray,
    rendered,
    selects,
)


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
        (SWEEPER, ray("training", "head"), 8265),
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
        (SWEEPER, ray("training", "head"), 6379),
        (SWEEPER, ray("endpoint", "head"), 8265),
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
