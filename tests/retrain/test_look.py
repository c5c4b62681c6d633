"""A look at real deliveries: what each one holds, what is decided, and what is sealed."""

import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.retrain.conftest import again, drawn, good
from vila_ops.artifacts.kinds import Checkpoint, Decision
from vila_ops.artifacts.listing import sealed
from vila_ops.artifacts.store import file, manifest_of
from vila_ops.cli import app
from vila_ops.config import Run
from vila_ops.config.retrain import RetrainPolicy
from vila_ops.pipeline.retrain import look
from vila_ops.registry import alias_register
from vila_ops.retrain.deliveries import DeliveryCounts, settled

NOW = datetime(2036, 1, 1, 12, tzinfo=UTC)


def by_name(deliveries: Sequence[DeliveryCounts]) -> dict[str, DeliveryCounts]:
    """Without the prefix of sources."""
    return {one.name.removeprefix("zz.inbox."): one for one in deliveries}


def test_a_delivery_whose_copy_keeps_old_times_settles_like_any_other(policy: RetrainPolicy) -> None:
    """`rsync -a` and `cp -p` set the times of the files that they copy."""
    source = policy.watch["inbox"]
    folder = Path(source.path) / "1"  # type: ignore[union-attr]
    folder.mkdir()
    (folder / "1.png").write_bytes(drawn(1))
    os.utime(folder / "1.png", (10**9, 10**9))
    slow = policy.with_changes({"settle_minutes": 10})
    assert settled(source, slow, now=time.time()) == {}
    assert list(settled(source, slow, now=time.time() + 601)) == ["1"]


@pytest.mark.slow
def test_each_delivery_is_told_by_what_it_holds_and_the_good_one_is_enough(run: Run, policy: RetrainPolicy) -> None:
    good(run, policy, "1-good")
    again(run, policy, "2-duplicated", split="train")
    again(run, policy, "3-leaking", split="test")
    broken = good(run, policy, "4-broken", start=2000) / "records.jsonl"
    broken.write_text(broken.read_text().replace('"turns"', '"turn"', 3))
    (broken.parents[1] / "5-empty").mkdir()
    (broken.parents[1] / "5-empty/notes.txt").write_text("later")
    made = look(run, policy.with_changes({"num_steps": 5, "budget.hours": 24}), trigger="test", when=NOW)
    assert made.evidence is not None
    deliveries = by_name(made.evidence.deliveries)
    assert {name: one.status for name, one in deliveries.items()} == {
        "1-good": "new",
        "2-duplicated": "refused",
        "3-leaking": "refused",
        "4-broken": "refused",
        "5-empty": "refused",
    }
    assert (deliveries["1-good"].train_samples, deliveries["1-good"].records) == (10, 10)
    assert deliveries["2-duplicated"].reason.startswith("duplicated: 8 of 8 records repeat earlier ones")
    assert deliveries["3-leaking"].reason.startswith("leaking: 8 of 8 records overlap with held-out objects")
    assert deliveries["4-broken"].reason.startswith("broken: 3 of 10 records cannot be read")
    assert deliveries["5-empty"].reason.startswith("broken: no records.jsonl in 'zz.inbox.5-empty'")
    assert (made.decided.verdict, made.decided.rule) == ("retrain", "new data")
    streams = {one.stream: one for one in made.evidence.drift}
    assert streams["new data, images"].drifted
    assert streams["new data, images"].now == 10
    root = run.resources.storage.store
    (decision,) = sealed(Decision, store=root)
    assert (decision.verdict, decision.rule, decision.subject) == ("retrain", "new data", "retrain")
    (trained,) = sealed(Checkpoint, store=root)
    assert made.evidence.estimate is not None
    seconds = manifest_of(trained)["execution"]["seconds"] * 5 / 2  # five steps, where the champion's stage had two
    assert made.evidence.estimate.hours == pytest.approx(seconds / 3600)
    assert "| zz.inbox.3-leaking | refused | 8 |" in file(decision, "decision.md").read_text()


@pytest.mark.slow
def test_looks_follow_each_other(run: Run, policy: RetrainPolicy) -> None:
    few = policy.with_changes({"drift": None})
    root = run.resources.storage.store
    good(run, policy, "1", count=5)
    dry = look(run, few, trigger="test", when=NOW, dry_run=True)
    assert not list(sealed(Decision, store=root))
    assert (dry.decided.verdict, dry.decided.rule) == ("not now", "no reason")
    assert dry.decided.change == "3 more usable samples"
    good(run, policy, "2", count=5, start=3000)
    first = look(run, few, trigger="test", when=NOW)
    assert first.decided.verdict == "retrain"
    soon = look(run, few, trigger="test", when=NOW + timedelta(hours=23))
    assert (soon.decided.rule, soon.decided.change) == ("cool-down", "wait until 2036-01-02T12:00:00+00:00")
    assert [one.verdict for one in sealed(Decision, store=root)].count("not now") == 1


@pytest.mark.slow
def test_without_a_champion_nothing_is_measured(run: Run, policy: RetrainPolicy) -> None:
    name, root = run.recipe.gate.model_name, run.resources.storage.store
    alias_register.remove(name, reason="test", store=root)
    made = look(run, policy, trigger="test", when=NOW)
    assert (made.decided.verdict, made.decided.rule) == ("not now", "champion")
    with pytest.raises(ValueError, match=r"the policy names stage 'sft'; recipe 'tiny' has \['align'\]"):
        look(run, policy.with_changes({"stage": "sft"}), trigger="test", when=NOW)


@pytest.mark.slow
def test_the_command_prints_the_decision_and_a_dry_run_seals_nothing(
    run: Run, policy: RetrainPolicy, tmp_path: Path
) -> None:
    good(run, policy, "1", count=5)
    files = {"recipe": run.recipe, "resources": run.resources, "policy": policy.with_changes({"drift": None})}
    for name, one in files.items():
        (tmp_path / f"{name}.yaml").write_text(one.model_dump_json(exclude_unset=True))
    recipe, resources, rules = (str(tmp_path / f"{name}.yaml") for name in files)
    done = CliRunner().invoke(app, ["retrain", recipe, "--policy", rules, "-r", resources, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("# tiny: retrain: not now\n")
    assert "What would have to change: 3 more usable samples." in done.stdout
    assert "| zz.inbox.1 | new | 5 | 0 | 0 | 0 | 0 | 5 |" in done.stdout
    assert not list(sealed(Decision, store=run.resources.storage.store))
