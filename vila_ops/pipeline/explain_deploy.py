"""What `deploy` would make and change, told before it does."""

from collections.abc import Iterator

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.config import Run
from vila_ops.pipeline.explain import UNMADE, Step, Steps
from vila_ops.pipeline.stages import Weights
from vila_ops.registry import alias_register
from vila_ops.registry.aliases import CHAMPION
from vila_ops.serve.backends.backend import ServiceBackend
from vila_ops.serve.credentials import check_key
from vila_ops.serve.spec import Spec
from vila_ops.serve.tracks import backend_of


def explain_deploy(run: Run) -> list[Step]:
    """The tasks that make and measure the last stage's model, and what is live that `deploy` would change.

    Raises ValueError for a recipe without a stage, without a registry, and for what `deploy` refuses before it changes
    anything: an operator's service, a missing key, a port that cannot be used.
    """
    recipe, resources, steps = run.recipe, run.resources, Steps(run)
    if not recipe.stages:
        raise ValueError(f"recipe {recipe.name!r} has no stage, so there is nothing to register")
    if resources.tracking.uri is None:
        raise ValueError("the registry is MLflow's: set resources.tracking.uri (a server or sqlite:///FILE)")
    backend = backend_of(recipe.service.name, resources)
    check_key(resources.serve.access)
    model = steps.candidate()
    champion = alias_register.read(recipe.gate.model_name, store=resources.storage.store).model_version(
        recipe.gate.model_name, CHAMPION
    )
    live = {
        "register": (recipe.gate.model_name, _champion_lines(champion, model)),
        "deploy": (recipe.service.name, _service_lines(run, backend, champion, model)),
    }
    for task, (name, why) in live.items():
        steps.listed.append(Step(task=task, name=name, status="reconciles", why=tuple(why), uri=None))
    return steps.listed


def _champion_lines(champion: ModelVersion | None, model: Weights) -> Iterator[str]:
    """What the gate compares the model with."""
    if champion is None:
        yield "there is no champion, so the gate compares the model with none"
    elif champion.checkpoint.digest == model.digest:
        yield f"the model is version {champion.version}, the champion"
    else:
        digest = champion.checkpoint.digest[:12]
        yield f"the champion is version {champion.version} ({digest}), which the gate compares the model with"


def _service_lines(run: Run, backend: ServiceBackend, champion: ModelVersion | None, model: Weights) -> Iterator[str]:
    """What serves, and what the replicas of another version would load beside it."""
    service, serve, url = run.recipe.service, run.resources.serve, backend.url()
    state = backend.register.load()
    if state.stable is None or url is None:
        yield f"nothing serves; it will listen at {url or f'http://{serve.host}:{serve.port}'}"
    elif champion is not None and champion.checkpoint.digest == model.digest:
        serving = state.stable.spec.version.version
        if serving != champion.version:  # as after a rollback
            then = f" until version {champion.version}, the champion, takes over"
        elif state.stable.spec.identity() == Spec.of(service, champion, run.resources).identity():
            then = ", and stays as it is"
        else:
            then = ", and is started again, with the changed settings"
        yield f"version {serving} serves at {url}{then} unless the gate changed"
    else:
        yield f"version {state.stable.spec.version.version} serves at {url} until one that passed the gate answers"
    if state.canary is not None:
        yield f"version {state.canary.track.spec.version.version}, a canary, ends if another version takes over"
    if not model.digest.startswith(UNMADE):
        size = sum(file["size"] for file in store.manifest_of(model)["files"].values())
        replicas = "a replica" if serve.replicas == 1 else f"each of {serve.replicas} replicas"
        yield f"{replicas} would load {size / 1e6:,.0f} MB of files"
