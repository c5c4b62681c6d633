"""Retraining goes on from the champion, meets it in the gate and then in a canary; data is versioned on a branch."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.dvc_repository import ENV, run_program
from tests.retrain.conftest import good
from vila_ops.artifacts.kinds import Checkpoint, Dataset, ModelCard, ModelVersion
from vila_ops.artifacts.listing import of_digest, sealed
from vila_ops.artifacts.store import file, manifest_of, read_manifest
from vila_ops.config import Run
from vila_ops.config.retrain import RetrainPolicy
from vila_ops.pipeline.retrain import Retraining, look, step
from vila_ops.registry import alias_register
from vila_ops.retrain import decisions

NOW = datetime(2036, 1, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with DVC, in which a person is at work on a file."""
    for key, value in ENV.items():
        monkeypatch.setenv(key, value)
    folder = tmp_path / "repository"
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (folder / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (folder / "notes.txt").write_text("committed")
    run_program(folder, "git", "init", "-q")
    run_program(folder, "git", "add", "--all")
    run_program(folder, "git", "commit", "-qm", "start")
    (folder / ".git/hooks/post-checkout").write_text("#!/bin/sh\nexit 1\n")  # as `dvc install`'s, which finds no cache
    (folder / ".git/hooks/post-checkout").chmod(0o755)
    (folder / "notes.txt").write_text("at work")
    (folder / "new.txt").write_text("not added")
    return folder


@pytest.mark.slow
def test_training_goes_on_from_the_champion_and_the_data_is_a_revision_on_its_own_branch(
    registered: Run, policy: RetrainPolicy, repository: Path, tmp_path: Path
) -> None:
    run, root = registered, registered.resources.storage.store
    before = (
        run_program(repository, "git", "status", "--porcelain"),
        run_program(repository, "git", "rev-parse", "HEAD"),
    )
    good(run, policy, "1")
    quiet = policy.with_changes({"drift": None})
    made = step(Retraining(run, quiet, "test", lambda: NOW, repository=repository))
    assert (made.subject, made.decided.verdict, made.version) == ("gate", "passed", 2)
    aliases = alias_register.read("tiny", store=root)
    assert aliases.aliases() == {"champion": 2, "previous": 1}
    asked, judged = (record for _, record in decisions.history("tiny", root=root))
    assert (asked.decided.verdict, judged.subject, judged.data) == ("retrain", "gate", asked.data)
    champion, former = aliases.checkpoints[2], aliases.checkpoints[1]
    assert champion.parents == (asked.data, former.digest)
    data = of_digest(Dataset, champion.parents[0], store=root)
    assert data is not None
    weights = {name: one["weight"] for name, one in manifest_of(data)["recipe"]["mixture"]["sources"].items()}
    assert weights == {"pairs": 0.5, "zz.inbox.1": 0.5}

    card = next(file(one, "README.md").read_text() for one in sealed(ModelCard, store=root) if one.version == 2)
    assert "| vision tower | random weights | none |" in card
    assert re.search(
        r"^\| caption\\_loss \| model \| [\d.]+ \| [\d.]+ to [\d.]+ \| \d+ \| lower \|$", card, re.MULTILINE
    )
    assert "| zz.inbox.1 | CC0-1.0 | 10 |" in card
    assert "- The data of align was compared with no evaluation set" in card

    now = run_program(repository, "git", "status", "--porcelain"), run_program(repository, "git", "rev-parse", "HEAD")
    assert now == before
    assert len(run_program(repository, "git", "worktree", "list").splitlines()) == 1
    assert asked.revision is not None
    assert "+| zz.inbox.1 | jsonl, caption | 10 |" in asked.revision.card_diff
    copy = tmp_path / "copy"
    run_program(tmp_path, "git", "clone", "-q", "--branch", str(asked.revision.branch), str(repository), str(copy))
    assert run_program(copy, "git", "rev-parse", "HEAD").strip() == asked.revision.commit
    run_program(copy, "dvc", "cache", "dir", "--local", str(repository / ".dvc/cache"))
    run_program(copy, "dvc", "checkout", "-q")
    assert read_manifest(str(copy / "data/tiny_align.retrain"))["digest"] == data.digest

    soon = step(Retraining(run, quiet, "test", lambda: NOW + DAY / 2, repository=repository))
    assert (soon.decided.rule, soon.evidence and soon.evidence.deliveries[0].status) == ("no reason", "trained on")


@pytest.mark.slow
def test_a_refused_model_sets_its_deliveries_aside_and_says_what_would_have_to_change(
    registered: Run, policy: RetrainPolicy, tmp_path: Path
) -> None:
    strict = registered.with_changes({"recipe.gate.rules": [{"metric": "text_loss", "at_most": 0.001}]})
    quiet = policy.with_changes({"drift": None, "cool_down_hours": 0})
    good(strict, policy, "1")
    made = step(Retraining(strict, quiet, "test", lambda: NOW, repository=tmp_path))
    assert (made.decided.verdict, made.decided.rule) == ("refused", "gate")
    assert "is not at most 0.001" in made.decided.reason
    assert made.decided.change.startswith("a model that the rules let through: correct the deliveries")
    root = strict.resources.storage.store
    assert alias_register.read("tiny", store=root).version("champion") == 1
    asked = decisions.history("tiny", root=root)[0][1]
    assert asked.revision is not None
    assert asked.revision.branch is None
    assert asked.revision.reason.startswith("Git cannot be written: `git rev-parse --show-toplevel` failed")
    later = step(Retraining(strict, quiet, "test", lambda: NOW + DAY, repository=tmp_path))
    assert later.decided.rule == "no reason"
    assert later.evidence is not None
    assert [one.status for one in later.evidence.deliveries] == ["set aside"]
    slower = look(strict, quiet.with_changes({"learning_rate": 1e-5}), trigger="test", when=NOW + DAY, dry_run=True)
    assert slower.evidence is not None
    assert [one.status for one in slower.evidence.deliveries] == ["new"]

    refused = of_digest(Checkpoint, str(made.model), store=root)
    assert refused is not None
    version = ModelVersion(name="tiny", version=2, checkpoint=refused, promoted=True)
    alias_register.move("tiny", {"champion": version}, over=1, reason="a person decided so", store=root)
    last = step(Retraining(strict, quiet, "test", lambda: NOW + 2 * DAY, repository=tmp_path))
    assert last.evidence is not None
    assert [one.status for one in last.evidence.deliveries] == ["trained on"]
