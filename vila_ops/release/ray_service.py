"""What a RayService of KubeRay serves: a registered version as one application of Ray Serve, without our router.

`serveConfigV2` names `vila_ops.release.ray_service:application`, as infra/kubernetes/base/ray-service.yaml does. The
operator brings up the cluster and replaces it; Serve replaces the replicas when the arguments change. Light at import.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.config import Config, load
from vila_ops.registry import alias_register
from vila_ops.registry.aliases import CHAMPION, Alias
from vila_ops.serve.backends.ray_serve import replicas
from vila_ops.serve.spec import Spec

if TYPE_CHECKING:
    from ray.serve import Application


class Served(Config):
    """The arguments of the application, in `serveConfigV2`."""

    recipe: str
    """File of the recipe whose service is served."""
    resources: str
    """File of the resources."""
    version: PositiveInt | Alias = CHAMPION
    """Number of a registered version, or an alias, which is read once, when Serve builds the application."""


def application(served: Served) -> "Application":
    """The replicas of a version at the root of Serve's proxy. Only the store is asked, so MLflow may be away.

    Raises ValueError for a version that no alias has pointed to, and for a device that only the cluster could tell.
    """
    run = load(Path(served.recipe), resources=Path(served.resources))
    version = _version(run.recipe.gate.model_name, served.version, run.resources.storage.store)
    spec = Spec.of(run.recipe.service, version, run.resources)
    if spec.device in ("auto", "gpu"):
        raise ValueError(
            f"the device of replicas is {spec.device}, but their nodes may not be there yet; set serve.device to cuda, "
            f"rocm, xpu or cpu"
        )
    return replicas(spec, run.resources, spec.device, "")


def _version(name: str, wanted: int | Alias, store: str) -> ModelVersion:
    record = alias_register.read(name, store=store)
    number = wanted if isinstance(wanted, int) else record.version(wanted)
    if number is None or number not in record.checkpoints:
        raise ValueError(
            f"the register of {name!r} in {store} has no version {wanted}; `vila-ops champion {name}` lists those that "
            f"were champion or challenger"
        )
    promoted = number == record.version(CHAMPION)
    return ModelVersion(name=name, version=number, checkpoint=record.checkpoints[number], promoted=promoted)
