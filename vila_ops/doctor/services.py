"""What a run needs before it works: the store, MLflow, the key of the endpoint, engines, and a device."""

from collections.abc import Iterable, Iterator

from vila_ops import tracking
from vila_ops.artifacts.store import probe
from vila_ops.cluster import device_on, gpus_of, live_nodes, may_grow
from vila_ops.config import Resources, Run
from vila_ops.device import describe, device_of
from vila_ops.doctor.finding import Finding, tried
from vila_ops.errors import VilaError
from vila_ops.generate.load import check_installed
from vila_ops.serve.credentials import check_key
from vila_ops.tracking.outbox import shown


def refuse(run: Run, findings: Iterable[Finding]) -> None:
    """Raise ValueError with every lack among the findings, and its way out."""
    if lacks := [finding.text for finding in findings if not finding.ok]:
        raise ValueError(f"recipe {run.recipe.name!r} cannot run with these resources:\n" + "\n".join(lacks))


def services(resources: Resources) -> Iterator[Finding]:
    """What every run needs: the store, evaluation's engine, and with a registry, MLflow and the key of the endpoint."""
    yield from tried(lambda: probe(resources.storage.store))
    yield from _engine(resources, resources.evaluate.engine.kind)
    if resources.tracking.uri is not None:
        yield from tried(lambda: _mlflow(resources))
        yield from tried(lambda: _key(resources))


def serving(resources: Resources) -> Iterator[Finding]:
    """What a model that is not live yet needs: the engine of the endpoint, unless an operator starts it."""
    if resources.serve.started_by == "deploy":
        yield from _engine(resources, resources.serve.engine.kind)


def device_findings(resources: Resources) -> Iterator[Finding]:
    """The device that the resources ask for: of this process with launch inline, else the GPUs of the cluster.

    Those that a cluster lacks are no fault where it may get more nodes by itself: it has none before a worker waits.
    """
    try:
        device = device_on(resources, resources.device)
        if resources.launch == "inline":
            yield Finding(ok=True, text=f"device {resources.device}: {describe(device_of(device))}")
            return
        nodes = live_nodes(resources)
    except (ValueError, VilaError) as error:
        yield Finding(ok=False, text=f"device: {error}")
        return
    if device == "cpu":
        yield Finding(ok=True, text=f"device {resources.device}: workers compute on the CPUs of the cluster")
        return
    there, kind = gpus_of(nodes), resources.accelerator_type
    usable = there.get(kind, 0.0) if kind else sum(there.values())
    stages = [resources.train, *(resources.train.for_stage(name) for name in resources.train.stages)]
    needed = max(one.num_workers for one in stages)
    text = f"device {resources.device}: {usable:g} GPUs in the cluster; the resources ask for {needed}"
    if usable < needed and may_grow(nodes):
        wait = "workers wait until an autoscaler adds the others; Ray does not tell whether one may"
        yield Finding(ok=True, text=f"{text}; {wait}")
    else:
        yield Finding(ok=usable >= needed, text=text)


def _engine(resources: Resources, kind: str) -> Iterator[Finding]:
    """With launch ray, engines run in the environment of the cluster's nodes, which is not looked at."""

    def installed() -> str:
        check_installed(kind)
        return f"the engine {kind} is installed"

    if resources.launch == "inline" and kind not in ("auto", "torch"):
        yield from tried(installed)


def _mlflow(resources: Resources) -> str:
    tracking.ask(resources)
    return f"MLflow: {shown(str(resources.tracking.uri))} answers"


def _key(resources: Resources) -> str:
    check_key(resources.serve.access)
    return "the endpoint's key is valid"
