"""The task `assemble`: the untrained model as one sealed folder, which the first stage starts from."""

import logging
import time
from pathlib import Path
from typing import Any

from vila_ops.artifacts import attempts, store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.folders import folder_digest
from vila_ops.artifacts.kinds import Pretrained
from vila_ops.artifacts.leases import Lease, hold
from vila_ops.artifacts.progress import Reporter
from vila_ops.config import NO_CONTEXT, Model, Resources, RunContext
from vila_ops.config.model import (
    HubLanguageModel,
    HubTower,
    LanguageModel,
    PackagedLanguageModel,
    PackagedTower,
    VisionTower,
)
from vila_ops.model.projectors import plugin_of

REVISION = 6
log = logging.getLogger(__name__)


def assemble(model: Model, resources: Resources, context: RunContext = NO_CONTEXT) -> Pretrained:
    """Build the model of a recipe, or copy the folder that it starts from, unless the store already has the result.

    Local folders are parents by their content, so moving them does not change the address. Raises ValueError if the
    folder holds another model than the recipe describes, and CorruptArtifact if it is damaged.
    """
    at = address_of(model)
    if done := store.find(Pretrained, at, store=resources.storage.store):
        return done
    with hold(at, store=resources.storage.store) as lease:
        lease.report = Reporter("assemble", f"{_label(model.vision_tower)} + {_label(model.language_model)}")
        return store.find(Pretrained, at, store=resources.storage.store) or _assemble(at, model, resources, lease)


def assembled(model: Model, resources: Resources) -> Pretrained | None:
    """The model of a recipe before its first stage; None where it was not assembled yet. Nothing is made."""
    return store.find(Pretrained, address_of(model), store=resources.storage.store)


def address_of(model: Model) -> store.Address:
    """Where the model of a recipe is before its first stage."""
    recipe, parents = _identity(model)
    return store.address(Pretrained, revision=REVISION, recipe=recipe, parents=parents)


def _identity(model: Model) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The recipe without paths of this machine, and the digests of the folders at those paths."""
    recipe = model.model_dump(mode="json")
    if plugin := plugin_of(model.projector.kind):
        recipe["projector_plugin"] = plugin
    folders: list[str] = []
    if model.weights is not None:
        folders.append(recipe["weights"].pop("path"))
    for component in (recipe["vision_tower"], recipe["language_model"]):
        if component["kind"] == "hub" and Path(component["name"]).is_dir():
            folders.append(component.pop("name"))
            component.pop("revision")  # any label: the content decides
        elif "tokenizer" in component:
            folders.append(component.pop("tokenizer"))
    digests = {folder: folder_digest(Path(folder)) for folder in dict.fromkeys(folders)}
    return recipe, tuple(digests[folder] for folder in folders)


def _assemble(at: store.Address, model: Model, resources: Resources, lease: Lease) -> Pretrained:
    from vila_ops.model.start import start_from  # heavy: torch, transformers

    started = time.monotonic()
    cache = resources.storage.cache_folder()
    with attempts.attempt(at, store=resources.storage.store, lease=lease) as attempt:
        if model.weights is not None:
            start_from(model, Path(model.weights.path), attempt, cache=cache)
        else:
            _build(model, attempt, cache=cache)
    log.info("assembled %s + %s", _label(model.vision_tower), _label(model.language_model))
    return store.seal(
        Pretrained,
        at,
        attempt,
        facts={},
        execution=execution(launch="inline", seconds=time.monotonic() - started, ran=[]),
    )


def _label(component: VisionTower | LanguageModel) -> str:
    """The name of a tower or language model for the log: of its package, of the hub, or its kind."""
    match component:
        case PackagedTower() | PackagedLanguageModel():
            return component.package.name
        case HubTower() | HubLanguageModel():
            return component.name
        case _:
            return component.kind


def _build(model: Model, out: Path, *, cache: Path) -> None:
    from vila_ops.model import build, folder, processing  # heavy: torch, transformers
    from vila_ops.packages.normalisation import mean_std
    from vila_ops.packages.tokenizer import IMAGE_TOKEN, build_tokenizer

    tokenizer = build_tokenizer(model.language_model, chat_template=model.chat_template, cache=cache)
    whole = build.build_model(
        model,
        vocabulary=len(tokenizer),
        image_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        eos_id=tokenizer.eos_token_id,
        cache=cache,
    )
    processor = processing.build_processor(whole.config, tokenizer, mean_std=mean_std(model.vision_tower))
    folder.save(whole, out, processor=processor)
