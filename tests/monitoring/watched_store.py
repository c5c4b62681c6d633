"""A store in which a stage trains, another one is done, a model is the champion, two decisions are sealed, and two
services answer, one with a canary."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.artifacts.leases import hold
from vila_ops.artifacts.progress import ProgressRecord
from vila_ops.artifacts.store import Address
from vila_ops.config import CanaryRules, Resources, Service
from vila_ops.registry import alias_register
from vila_ops.retrain import decisions
from vila_ops.retrain.decide import Decided, Evidence, Spent
from vila_ops.retrain.drift import Drift
from vila_ops.serve.router.state import Canary, Register, Rollback, ServiceState, Track
from vila_ops.serve.spec import Spec

INLINE = Resources(launch="inline")
TRAINED = {
    "loss": 2.5, "loss/pairs": 2.25, "validation_loss": 2.75, "validation_loss/pairs": 2.625, "grad_norm": 0.5,
    "learning_rate/projector": 0.001, "seconds_per_step": 2.0, "train/tokens_per_s": 1000.0,
    "train/target_tokens_per_s": 400.0, "train/padding_fraction": 0.125, "train/mfu": 0.375, "train/cost": 0.5,
    "data/wait_fraction": 0.0625, "ckpt/stall_s": 0.25, "ckpt/saved_at": 1900.0, "memory/peak_rss_gib": 1.5,
    "num_steps": 48.0,
}  # fmt: skip
LABELS = {"task": "train_stage", "name": "align", "address": "000000000000", "host": "node-1"}
DRIFT = Drift(
    stream="images", before=100, now=100, mmd2=0.1, p_value=0.001, level=0.01, effect=0.25, psi=0.3, psi_by_chance=0.1,
    drifted=True,
)  # fmt: skip


@contextmanager
def filled(place: str) -> Iterator[None]:
    """Fill a store; the stage trains while the body runs."""
    told = ProgressRecord(
        task="train_stage", name="align", host="node-1", began=1000.0, advanced=2000.0, done=12, total=48, unit="steps",
        workers=2, price_per_hour=8.0, metrics=TRAINED,
    )  # fmt: skip
    with hold(Address("checkpoint", "1" * 32, None, ()), store=place) as done:
        done.report = lambda: told.with_changes({"name": "earlier"})
    checkpoint = Checkpoint(uri=f"{place}/checkpoint/3", digest="3" * 64, stage="align", step=3)
    version = ModelVersion(name="vila", version=3, checkpoint=checkpoint, promoted=True)
    alias_register.move("vila", {"champion": version}, over=None, reason="test", store=place)
    tracks = [
        Track(spec=Spec.of(Service(name="vila"), version.with_changes({"version": number}), INLINE), url="http://a")
        for number in (3, 4)
    ]
    canary = Canary(track=tracks[1], rules=CanaryRules(share=0.25), salt="s")
    Register(f"{place}/serve/vila.state").change(lambda _: ServiceState(stable=tracks[0], canary=canary))
    taken_back = Rollback(version=4, digest="4" * 64, reason="slower", at="2026-01-12T00:00:00+00:00")
    other = ServiceState(stable=tracks[0], rolled_back=taken_back)
    Register(f"{place}/services/other@head-6379").change(lambda _: other)
    for day, verdict in ((5, "not now"), (12, "retrain")):
        when = datetime(2026, 1, day, tzinfo=UTC)
        decided = Decided(verdict=verdict, rule="drift", reason="r", change="", checks=())
        evidence = Evidence(spent=Spent(), drift=(DRIFT,) if day == 12 else ())
        record = decisions.DecisionRecord(
            name="demo", subject="retrain", when=when, window=when, trigger="schedule", decided=decided, policy={},
            evidence=evidence,
        )  # fmt: skip
        decisions.seal(record, root=place)
    with hold(Address("checkpoint", "0" * 32, None, ()), store=place) as lease:
        lease.report = lambda: told
        lease.heartbeat()
        yield
