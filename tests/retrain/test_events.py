"""An event is what is new at watched places: it starts one run, and nothing else does."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from prefect.states import State

from flows.retrain import retrain
from tests.retrain.conftest import drawn, tiny
from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.artifacts.s3_calls import client
from vila_ops.config import Resources
from vila_ops.config.retrain import RetrainPolicy
from vila_ops.pipeline.events import begin_event
from vila_ops.pipeline.retrain import begin_step
from vila_ops.pipeline.windows import FlowRun
from vila_ops.registry import alias_register
from vila_ops.retrain.deliveries import settled

NOON = datetime(2036, 1, 1, 12, tzinfo=UTC)


def delivered(policy: RetrainPolicy, name: str, *, at: datetime) -> None:
    """A delivery of one file, which changed at this time."""
    folder = Path(policy.watch["inbox"].path) / name  # type: ignore[union-attr]
    folder.mkdir()
    (folder / "1.png").write_bytes(drawn(1))
    os.utime(folder / "1.png", (at.timestamp(), at.timestamp()))
    os.utime(folder, (at.timestamp(), at.timestamp()))


def test_each_state_of_the_watched_places_starts_one_run(tmp_path: Path, policy: RetrainPolicy) -> None:
    run = tiny(Resources(launch="inline").with_changes({"storage.store": str(tmp_path / "store")}))
    slow = policy.with_changes({"settle_minutes": 30})

    def asked(flow_run: str, *, hour: int = 12, minute: int = 0) -> str | None:
        return begin_event(run, slow, FlowRun(flow_run, NOON), now=NOON.replace(hour=hour, minute=minute))

    assert asked("a") == "nothing was delivered, and too few answers were rated"
    delivered(policy, "1", at=NOON)
    assert asked("a", minute=29) == "nothing was delivered, and too few answers were rated"
    assert asked("a", minute=30) is None
    assert asked("a", minute=31) is None
    assert "belongs to run a" in (asked("b", minute=40) or "")
    delivered(policy, "2", at=NOON.replace(hour=13))
    assert "belongs to run a" in (asked("b", hour=13) or "")
    assert asked("b", hour=14) is None


def test_deliveries_in_s3_are_events_too(s3_store: str, tmp_path: Path, policy: RetrainPolicy) -> None:
    """Half an hour after the last object of a folder arrived, by the clock of the bucket."""
    run = tiny(Resources(launch="inline").with_changes({"storage.store": str(tmp_path / "store")}))
    bucket = s3_store.split("/")[2]
    rules = policy.with_changes({"watch.inbox.path": f"s3://{bucket}/inbox", "settle_minutes": 30})

    def put(key: str) -> datetime:
        client().put_object(Bucket=bucket, Key=key, Body=drawn(1))
        arrived: datetime = client().head_object(Bucket=bucket, Key=key)["LastModified"]
        return arrived

    def asked(flow_run: str, now: datetime) -> str | None:
        return begin_event(run, rules, FlowRun(flow_run, NOON), now=now)

    put("inbox/beside a delivery.png")
    arrived = put("inbox/.hidden/1.png")
    assert "nothing was delivered" in (asked("a", arrived + timedelta(minutes=30)) or "")
    put("inbox/1/1.png")
    arrived = put("inbox/1/2.png")
    assert "nothing was delivered" in (asked("a", arrived + timedelta(minutes=29)) or "")
    assert asked("a", arrived + timedelta(minutes=30)) is None
    assert "belongs to run a" in (asked("b", arrived + timedelta(minutes=31)) or "")
    (source,) = rules.watch.values()
    (delivery,) = settled(source, rules, now=(arrived + timedelta(minutes=30)).timestamp()).values()
    assert (delivery.num_files, delivery.num_bytes) == (2, 2 * len(drawn(1)))


def test_ratings_are_an_event_every_so_often(tmp_path: Path, policy: RetrainPolicy) -> None:
    places = {"storage.store": str(tmp_path / "store"), "serve.samples": {"share": 1, "place": str(tmp_path / "kept")}}
    run = tiny(Resources(launch="inline").with_changes(places))
    rules = policy.with_changes({"feedback": {"event_ratings": 3}})
    (tmp_path / "kept/ratings").mkdir(parents=True)
    started = []
    for number in range(7):
        (tmp_path / f"kept/ratings/{number}.json").write_text("{}")
        started.append(begin_event(run, rules, FlowRun(str(number), NOON), now=NOON) is None)
    assert started == [False, False, True, False, False, True, False]


def test_a_canary_is_looked_at_in_a_window_that_another_run_has(tmp_path: Path, policy: RetrainPolicy) -> None:
    run = tiny(Resources(launch="inline").with_changes({"storage.store": str(tmp_path / "store")}))
    name, store = run.recipe.gate.model_name, run.resources.storage.store

    def asked(flow_run: str, day: int) -> str | None:
        due = NOON.replace(day=day)
        return begin_step(run, policy, FlowRun(flow_run, due), trigger="schedule", now=due)

    assert asked("a", 1) is None
    assert "belongs to run a" in (asked("b", 2) or "")
    model = Checkpoint(uri="checkpoint/1", digest="1", parents=("data", "init"), stage="align", step=1)
    challenger = ModelVersion(name=name, version=2, checkpoint=model, promoted=False)
    alias_register.move(name, {"challenger": challenger}, over=None, reason="", store=store)
    assert asked("c", 3) is None
    assert asked("d", 4) is None
    alias_register.remove(name, reason="", store=store)
    assert "belongs to run a" in (asked("e", 5) or "")


def test_a_flow_without_an_event_is_skipped(tmp_path: Path, policy: RetrainPolicy) -> None:
    run = tiny(Resources(launch="inline").with_changes({"storage.store": str(tmp_path / "store")}))
    state = retrain.fn(run.recipe, run.resources, policy, "event")
    assert isinstance(state, State)
    assert (state.name, state.message) == ("Skipped", "nothing was delivered, and too few answers were rated")
