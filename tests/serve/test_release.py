"""A canary, its promotion and the way back, by the commands: what is served, and where the aliases point."""

import contextlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from tests.serve.commands import Commands, tiny_run
from vila_ops.artifacts.kinds import Deployment, ModelVersion
from vila_ops.config import CanaryRules, Resources, Service
from vila_ops.release.canary import as_champion, promote, roll_back, start_canary, taken_back
from vila_ops.serve.backends.local_process import LocalProcess
from vila_ops.serve.deploy import deploy, undeploy
from vila_ops.serve.router.state import Canary, Rollback, ServiceState, Track
from vila_ops.serve.spec import Spec
from vila_ops.serve.tracks import with_stable

Versions = tuple[ModelVersion, ModelVersion]
SERVICE = Service(name="released", max_new_tokens=8)


@pytest.fixture
def commands(tmp_path: Path, empty_database: Path, versions: Versions) -> Iterator[Commands]:
    """Ends the service with the test."""
    resources = Resources(launch="inline").with_changes({"storage.store": str(tmp_path / "store"), "serve.port": 0})
    commands = Commands(tmp_path, empty_database, versions, tiny_run(SERVICE, resources))
    with contextlib.chdir(Path(__file__).parents[2]):  # the recipe names files of the repository
        yield commands
        undeploy(SERVICE, commands.resources)


def served(url: str) -> list[tuple[str, int]]:
    """Digest and version of what answers."""
    models = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]
    return [(model["digest"], model["version"]) for model in models]


@pytest.mark.slow
def test_a_canary_that_is_promoted_is_the_champion_and_a_rollback_moves_no_alias(
    commands: Commands, versions: Versions
) -> None:
    first, second = (version.checkpoint.digest for version in versions)
    url = deploy(SERVICE, versions[0], commands.resources).url
    assert "has no canary; start one with `vila-ops canary`" in commands.refused("promote")
    assert "has neither a canary nor a former version" in commands.refused("rollback")
    assert "serves version 1 already; name another one" in commands.refused("canary", "--version", "1")

    canary = commands.said("canary", "--version", "2", "--share", "0.5")
    assert canary == {"url": url, "model": second, "version": 2}
    state = LocalProcess(SERVICE.name, commands.resources).register.load()
    assert state.canary is not None
    assert state.canary.rules.share == 0.5
    assert commands.aliases() == {"champion": 1}
    assert served(url) == [(first, 1)]

    assert commands.said("promote") == canary
    assert served(url) == [(second, 2)]
    assert commands.aliases() == {"champion": 2, "previous": 1}
    assert commands.history()[-1].reason == "promoted after it ran as a canary"

    assert commands.said("rollback") == {"url": url, "model": first, "version": 1}
    assert served(url) == [(first, 1)]
    assert commands.aliases() == {"champion": 2, "previous": 1}


def test_a_canary_that_a_person_takes_back_is_told_apart_from_one_that_a_deployment_ended(versions: Versions) -> None:
    stable, track = (
        Track(spec=Spec.of(SERVICE, version, Resources(launch="inline")), url=f"http://{version.version}")
        for version in versions
    )
    state = ServiceState(stable=stable, canary=Canary(track=track, rules=CanaryRules(), salt=""))
    after = taken_back(state, at="2036-01-01")
    assert (after.canary, after.retired, after.stable) == (None, (track,), stable)
    last = after.rolled_back
    assert last is not None
    assert (last.digest, last.reason) == (versions[1].checkpoint.digest, "a person took it back")
    assert taken_back(after, at="2036-01-02") == after
    assert with_stable(state, stable).rolled_back is None


def test_a_champion_that_is_promoted_again_moves_no_alias(commands: Commands, versions: Versions) -> None:
    for version, moves in ((1, 1), (2, 2), (2, 2)):
        answered = Deployment(url="http://h", model=versions[version - 1].checkpoint.digest, version=version)
        as_champion(commands.gate, answered, commands.resources)
        assert commands.aliases()["champion"] == version
        assert len(commands.history()) == moves


@pytest.mark.parametrize("change", [promote, roll_back])
def test_why_a_canary_was_taken_back_is_told(
    commands: Commands, versions: Versions, change: Callable[[Service, Resources], Deployment]
) -> None:
    """And a version is no canary where nothing is served."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    taken = Rollback(version=2, digest="d", reason="it is not ready any more (status 503)", at=now)
    LocalProcess(SERVICE.name, commands.resources).register.change(
        lambda state: state.with_changes({"rolled_back": taken})
    )
    with pytest.raises(ValueError, match=r"version 2 was rolled back at .*: it is not ready any more \(status 503\)"):
        change(SERVICE, commands.resources)
    with pytest.raises(ValueError, match="serves no version that a canary could be compared with; deploy one first"):
        start_canary(SERVICE, versions[0], commands.resources)
