"""A scripted fortnight: what is delivered, what drifts, and what each day decides. The clock is the script's.

Good data is promoted after its canary; broken, repeated, leaking and poor data is refused, each for its reason; a drift
asks for retraining with less data; and a canary that breaks is rolled back.
"""

import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.retrain.conftest import again, deliver, drawn, good, new_objects, record
from vila_ops.artifacts.kinds import Decision
from vila_ops.artifacts.listing import sealed
from vila_ops.artifacts.store import file
from vila_ops.config import Run
from vila_ops.config.retrain import RetrainPolicy
from vila_ops.data.shards import data_url
from vila_ops.pipeline.retrain import Retraining, step
from vila_ops.registry import alias_register
from vila_ops.registry.register import champion
from vila_ops.retrain import decisions
from vila_ops.retrain.decisions import DecisionRecord
from vila_ops.serve.deploy import deploy, undeploy
from vila_ops.serve.tracks import backend_of

FIRST = datetime(2036, 1, 7, tzinfo=UTC)
RULES = [{"metric": "caption_loss", "max_regression": 0.1}]
POLICY = {
    "schedule.window_hours": 24,
    "cool_down_hours": 20,
    "num_steps": 12,
    "learning_rate": 0.01,
    "drift": {"false_alarms_per_year": 1, "min_effect": 0.05, "max_samples": 60},
    "canary": {"hours": 12},
}
SHORT, LONG = "What is this?", "How many words does this long sentence have in all?"


class Fortnight:
    """The recipe, its policy and its service, day by day."""

    def __init__(self, run: Run, policy: RetrainPolicy, kept: Path) -> None:
        self.run, self.policy, self.kept = run, policy, kept

    def at(self, day: int, hour: int = 12) -> datetime:
        """A time of the script."""
        return FIRST + timedelta(days=day - 1, hours=hour)

    def step(self, day: int, hour: int = 12, **resources: Any) -> DecisionRecord:
        """What the schedule does at a time, outside of any git repository. Training and the gate take an hour each."""
        run = self.run.with_changes({f"resources.{key}": value for key, value in resources.items()})
        hours = itertools.count(hour)
        one = Retraining(run, self.policy, "schedule", lambda: self.at(day, next(hours)), repository=self.kept)
        return step(one)

    def requests(self, day: int, count: int, question: str) -> None:
        """Requests that the service kept on a day."""
        (self.kept / "records").mkdir(parents=True, exist_ok=True)
        for seed in range(1000 * day, 1000 * day + count):
            name = f"chatcmpl-{'0' * 16}-{seed:032x}"
            parts = [
                {"type": "image_url", "image_url": {"url": data_url(drawn(seed))}},
                {"type": "text", "text": question},
            ]
            turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": f"Thing {seed % 1000}."}]
            path = self.kept / f"records/{name}.json"
            path.write_text(json.dumps({"id": name, "at": 0, "messages": turns}) + "\n")
            os.utime(path, (self.at(day).timestamp(),) * 2)

    def rolled_back(self) -> str:
        """Wait until the router has taken the canary back; its reason."""
        register = backend_of(self.run.recipe.service.name, self.run.resources).register
        while (last := register.load().rolled_back) is None:
            time.sleep(0.1)
        return last.reason


@pytest.fixture
def fortnight(registered: Run, policy: RetrainPolicy, tmp_path: Path) -> Iterator[Fortnight]:
    """The champion is served. A retraining may change its language model too."""
    samples = {"share": 1, "place": str(tmp_path / "kept")}
    run = registered.with_changes(
        {
            "recipe.gate.rules": RULES,
            "recipe.stages.align.trainable": ["projector", "language_model"],
            "resources.serve.port": 0,
            "resources.serve.samples": samples,
        }
    )
    service, resources = run.recipe.service, run.resources
    served = champion(run.recipe.gate, resources)
    assert served is not None
    deploy(service, served, resources)
    yield Fortnight(run, policy.with_changes(POLICY), tmp_path / "kept")
    undeploy(service, resources)


def told(made: DecisionRecord) -> tuple[str, str, str]:
    """Subject, verdict and rule."""
    return made.subject, made.decided.verdict, made.decided.rule


@pytest.mark.slow
def test_a_fortnight_ends_with_the_right_promotions_refusals_and_one_rollback(fortnight: Fortnight) -> None:
    _first_week(fortnight)
    _second_week(fortnight)
    _check_the_end(fortnight)


def _first_week(fortnight: Fortnight) -> None:
    """Good data on day 2 and poor data on day 7, of which a model is trained; refused data on the days between."""
    run, policy = fortnight.run, fortnight.policy
    assert told(fortnight.step(1)) == ("retrain", "not now", "no reason")

    good(run, policy, "02-good", 12)
    assert told(fortnight.step(2)) == ("canary", "started", "canary")
    waits = fortnight.step(2, 20)
    assert told(waits) == ("canary", "not now", "canary")
    assert waits.decided.change == "wait until 2036-01-09T02:00:00+00:00"
    assert told(fortnight.step(3)) == ("canary", "promoted", "canary")

    broken = good(run, policy, "04-broken", 12, start=1000) / "records.jsonl"
    broken.write_text(broken.read_text().replace('"turns"', '"turn"', 6))
    _refused(fortnight.step(4), "zz.inbox.04-broken", "broken: 6 of 12")
    again(run, policy, "05-duplicated", split="train")
    _refused(fortnight.step(5), "zz.inbox.05-duplicated", "duplicated: 8 of 8")
    again(run, policy, "06-leaking", split="test")
    _refused(fortnight.step(6), "zz.inbox.06-leaking", "leaking: 8 of 8")

    names = new_objects(run, 12, start=2000)
    poor = [record(name, f"{place}.png", "qq zz xx vv " * 4) for place, name in enumerate(names)]
    deliver(policy, "07-poor", poor, {f"{place}.png": drawn(2000 + place) for place in range(12)})
    refused = fortnight.step(7)
    assert told(refused) == ("gate", "refused", "gate")
    assert "is maybe more than 0.1 worse" in refused.decided.reason


def _second_week(fortnight: Fortnight) -> None:
    """Requests of day 10 are unlike those of days 7 and 8, and the canary that follows breaks."""
    run, policy = fortnight.run, fortnight.policy
    fortnight.requests(7, 15, SHORT)
    _refused(fortnight.step(8), "zz.inbox.07-poor", "a model trained on it was refused")
    fortnight.requests(8, 15, SHORT)
    good(run, policy, "09-few", 6, start=3000)
    same = fortnight.step(9)
    assert told(same) == ("retrain", "not now", "no reason")
    assert same.evidence is not None
    assert [(one.stream, one.before, one.now, one.drifted) for one in same.evidence.drift] == [
        ("traffic, images", 15, 15, False),
        ("traffic, texts", 15, 15, False),
    ]
    assert told(fortnight.step(10)) == ("retrain", "not now", "no reason")

    fortnight.requests(10, 15, LONG)
    assert told(fortnight.step(11, **{"serve.max_memory_bytes": 1})) == ("canary", "started", "canary")
    asked = [one for _, one in decisions.history("tiny", root=run.resources.storage.store) if one.subject == "retrain"]
    assert told(asked[-1]) == ("retrain", "retrain", "drift")
    assert "traffic, texts drifted" in asked[-1].decided.reason
    assert fortnight.rolled_back() == "it is not ready any more (status 503)"
    assert told(fortnight.step(12)) == ("canary", "refused", "canary")
    for day in (13, 14):
        assert told(fortnight.step(day)) == ("retrain", "not now", "no reason")


def _refused(made: DecisionRecord, name: str, reason: str) -> None:
    """A look at which one delivery more is not used."""
    assert told(made) == ("retrain", "not now", "no reason")
    assert made.evidence is not None
    delivery = next(one for one in made.evidence.deliveries if one.name == name)
    assert delivery.status in ("refused", "set aside")
    assert delivery.reason.startswith(reason)
    assert f"{name} ({reason}" in made.decided.reason


def _check_the_end(fortnight: Fortnight) -> None:
    """Version 2 answers and is the champion; each decision follows from one before it, and its page tells why."""
    root = fortnight.run.resources.storage.store
    assert alias_register.read("tiny", store=root).aliases() == {"champion": 2, "previous": 1}
    state = backend_of(fortnight.run.recipe.service.name, fortnight.run.resources).register.load()
    assert state.stable is not None
    assert (state.stable.spec.version.version, state.canary) == (2, None)
    history = decisions.history("tiny", root=root)
    digests = {digest for digest, _ in history}
    assert Counter(told(one)[:2] for _, one in history) == {
        ("retrain", "retrain"): 3,
        ("retrain", "not now"): 9,
        ("gate", "passed"): 2,
        ("gate", "refused"): 1,
        ("canary", "started"): 2,
        ("canary", "not now"): 1,
        ("canary", "promoted"): 1,
        ("canary", "refused"): 1,
    }
    assert all((one.cause in digests) is (one.subject != "retrain") for _, one in history)
    pages = {one.digest: file(one, decisions.PAGE).read_text() for one in sealed(Decision, store=root)}
    for digest, one in history:
        assert one.decided.reason in pages[digest]
        assert ("What would have to change" in pages[digest]) is (one.decided.verdict in ("not now", "refused"))
