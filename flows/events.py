"""Events of ours in Prefect: a model has become the champion. An automation tells people of it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import NAMESPACE_OID, uuid5

from prefect.events import emit_event

from vila_ops.config import Run
from vila_ops.errors import VilaError
from vila_ops.pipeline.automations import PROMOTED
from vila_ops.registry import alias_register
from vila_ops.registry.aliases import CHAMPION

log = logging.getLogger(__name__)


@contextmanager
def telling_of_promotions(run: Run) -> Iterator[None]:
    """Emit an event for each move of the champion of a run's gate while the body runs, also where the body fails."""
    name, store = run.recipe.gate.model_name, run.resources.storage.store
    seen = len(alias_register.read(name, store=store).history)
    try:
        yield
    finally:
        try:
            _tell(name, store, seen)
        except (VilaError, OSError) as error:
            log.warning("nobody is told whether %s has another champion: %s", name, error)


def _tell(name: str, store: str, seen: int) -> None:
    history = alias_register.read(name, store=store).history
    champions = [move.aliases.get(CHAMPION) for move in history]
    for move, champion, before in zip(history, champions, [None, *champions], strict=False):
        if move.number > seen and champion not in (None, before):
            emit_event(
                PROMOTED,
                resource={"prefect.resource.id": f"vila.model.{name}", "prefect.resource.name": f"{name} {champion}"},
                payload={"version": champion, "reason": move.reason},
                id=uuid5(NAMESPACE_OID, move.token),
            )
