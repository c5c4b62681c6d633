"""Events that ask for retraining: deliveries, and ratings. Each is a create-only key, STORE/events/<recipe>/<key>.

A schedule of minutes looks here first, which costs a listing, and ends where nothing is new.
"""

from datetime import datetime

from vila_ops.artifacts.store import probe, root_of
from vila_ops.config import Run, fingerprint
from vila_ops.config.retrain import RetrainPolicy
from vila_ops.pipeline.windows import FlowRun, claimed
from vila_ops.retrain.deliveries import settled
from vila_ops.retrain.feedback import num_ratings
from vila_ops.retrain.traffic import place_of


def begin_event(run: Run, policy: RetrainPolicy, flow_run: FlowRun, *, now: datetime) -> str | None:
    """Claim what is new since the last event: None where the run may work, else why it has to end.

    New are deliveries that have settled, and every `feedback.event_ratings` ratings. A run that asks again, after it
    was retried, still has its event. Raises what `probe` and `ready` raise.
    """
    store = run.resources.storage.store
    probe(store)
    deliveries = {watch: settled(source, policy, now=now.timestamp()) for watch, source in policy.watch.items()}
    kept = place_of(run.recipe.service, run.resources)
    ratings = num_ratings(kept) // policy.feedback.event_ratings if policy.feedback and kept else 0
    if not any(deliveries.values()) and not ratings:
        return "nothing was delivered, and too few answers were rated"
    key = fingerprint([deliveries, ratings])[:32]
    place = f"{root_of(store)}/events/{run.recipe.name}/{key}.json"
    why = claimed(place, flow_run, now)
    return f"what is there of {run.recipe.name} {why}" if why else None
