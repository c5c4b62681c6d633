"""A flow that cannot run says so before it works: what is missing, each with its way out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.ablate import ablate
from flows.evaluate import evaluate
from flows.full_pipeline import vila
from flows.release import promote
from flows.retrain import retrain
from tests.pipeline.sealed import ROOT, seal_all
from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.artifacts.listing import sealed
from vila_ops.config import Resources, load
from vila_ops.pipeline.promotion import deploy_champion
from vila_ops.registry import alias_register

TINY = "configs/recipes/tiny.yaml"
FLOWS = [vila.fn, evaluate.fn, promote.fn, retrain.fn]
"""Those that work on a recipe as soon as they are started."""


def overrides(folder: Path, **changes: str) -> tuple[str, ...]:
    own = {"storage.store": f"{folder}/store", "storage.cache": f"{folder}/cache", **changes}
    return tuple(f"resources.{key}={value}" for key, value in own.items())


@pytest.mark.parametrize("work", FLOWS)
def test_every_lack_is_told_at_once(
    work: Callable[..., Any], tmp_path: Path, free_ports: Callable[[int], list[int]]
) -> None:
    """A store that is a file, an MLflow that does not answer, and a key that is not there."""
    (tmp_path / "store").write_text("")
    (port,) = free_ports(1)
    away = f"http://127.0.0.1:{port}"
    wrong = overrides(tmp_path, **{"tracking.uri": away, "serve.access.key_file": f"{tmp_path}/keys"})
    with pytest.raises(ValueError, match="cannot run with these resources") as raised:
        work(TINY, "inline", overrides=wrong)
    told = str(raised.value).splitlines()
    assert len(told) == 4
    for lack, line in zip((f"{tmp_path}/store", away, f"{tmp_path}/keys"), told[1:], strict=True):
        assert lack in line


@pytest.mark.parametrize("work", FLOWS)
def test_a_device_that_is_not_there_is_refused_before_anything_is_made(
    work: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"cannot run with these resources:\ndevice: "):
        work("tiny", "inline", overrides=overrides(tmp_path, device="gpu"))
    assert not (tmp_path / "store/pretrained").exists()


@pytest.mark.parametrize(
    ("work", "registry", "lacks"),
    [
        (evaluate.fn, True, ["device"]),
        (vila.fn, False, ["device"]),
        (vila.fn, True, ["device", "the engine vllm needs vLLM, which is not installed in "]),
        (promote.fn, True, ["device", "the engine vllm needs vLLM, which is not installed in "]),
        (retrain.fn, True, ["device", "the engine vllm needs vLLM, which is not installed in "]),
    ],
)
def test_the_engine_of_the_endpoint_is_looked_for_where_the_flow_serves(
    work: Callable[..., Any], registry: bool, lacks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("vila_ops.generate.load.find_spec", lambda _: None)
    monkeypatch.setattr("vila_ops.tracking.ask", lambda _: None)
    more = {"tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"} if registry else {}
    with pytest.raises(ValueError, match="cannot run with these resources") as raised:
        work("tiny", "inline", overrides=overrides(tmp_path, device="gpu", **{"serve.engine.kind": "vllm"}, **more))
    told = str(raised.value).splitlines()[1:]
    assert len(told) == len(lacks)
    for lack, line in zip(lacks, told, strict=True):
        assert line.startswith(lack)


def test_what_is_sealed_and_served_needs_no_engine_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both go on, until they lack a registry."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("vila_ops.generate.load.find_spec", lambda _: None)
    wanted = overrides(tmp_path, **{"serve.engine.kind": "vllm"})
    run = load(Path(TINY), resources=Path("configs/resources/inline.yaml"), overrides=wanted)
    with pytest.raises(ValueError, match="the engine vllm needs vLLM"):
        deploy_champion(run)
    seal_all(run)
    with pytest.raises(ValueError, match=r"set resources\.tracking\.uri"):
        deploy_champion(run)
    with pytest.raises(ValueError, match=r"set resources\.tracking\.uri"):
        promote.fn(TINY, "inline", overrides=wanted)


def test_a_device_that_only_the_champion_needs_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model and its reports are sealed. Without a champion the flow goes on, until it lacks a registry."""
    monkeypatch.chdir(ROOT)
    wanted = overrides(tmp_path, device="gpu")
    run = load(Path(TINY), resources=Path("configs/resources/inline.yaml"), overrides=wanted)
    seal_all(run)
    with pytest.raises(ValueError, match=r"set resources\.tracking\.uri"):
        promote.fn(TINY, "inline", overrides=wanted)
    place = run.resources.storage.store
    model = next(one for one in sealed(Checkpoint, store=place) if one.stage == "align")
    name = run.recipe.gate.model_name
    version = ModelVersion(name=name, version=1, checkpoint=model, promoted=True)
    alias_register.move(name, {"champion": version}, over=None, reason="a test", store=place)
    with pytest.raises(ValueError, match=r"cannot run with these resources:\ndevice: "):
        promote.fn(TINY, "inline", overrides=wanted)


def test_an_unknown_name_is_told_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config of that name in configs/recipes .*did you mean 'tiny'\?"):
        vila.fn("tinny", "inline")


def test_a_grid_is_refused_as_a_recipe_is(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    where = {f"storage.{name}": str(tmp_path / name) for name in ("store", "cache")}
    with pytest.raises(ValueError, match="cannot run with these resources"):
        ablate.fn("tiny", Resources(launch="inline").with_changes(where))
    with pytest.raises(ValueError, match=r"no config of that name in configs/grids .*did you mean 'tiny'\?"):
        ablate.fn("tinny", "inline")
