"""Records that are taken down: no byte of them is in the new revision, and what holds them is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from tests.pipeline.sealed import make
from vila_ops.artifacts.kinds import Checkpoint, Dataset, ModelVersion
from vila_ops.artifacts.store import address, content, verify
from vila_ops.cli import app
from vila_ops.config import Resources, load
from vila_ops.data.shards import read_index
from vila_ops.pipeline.stages import prepare_named
from vila_ops.registry.alias_register import move

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/recipes/tiny.yaml"
NAME = "tiny_pretrain"


@pytest.fixture
def own(make_resources: Callable[..., Resources], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A recipe of a user's own, and resources."""
    monkeypatch.chdir(ROOT)
    recipe, resources = tmp_path / "own.yaml", tmp_path / "resources.yaml"
    services = ROOT / "configs/services/default.yaml"
    recipe.write_text(TINY.read_text().replace("../services/default.yaml", str(services)))
    resources.write_text(yaml.safe_dump(make_resources(tmp_path).model_dump(mode="json", exclude_none=True)))
    return recipe, resources


def ids(data: Dataset) -> set[tuple[str, str]]:
    return {(row["source"], row["id"]) for row in read_index(content(data)).to_pylist()}


def bytes_of(data: Dataset) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(content(data).glob("*.tar")))


def test_what_is_taken_down_is_in_no_byte_of_the_new_revision_and_its_holders_are_told(own: tuple[Path, Path]) -> None:
    recipe, resources = own
    run = load(recipe, resources=resources)
    was = prepare_named(run, NAME)
    at = address(Checkpoint, revision=1, recipe={}, parents=(was.digest,))
    model = make(Checkpoint, at, run, stage="pretrain", step=6)
    version = ModelVersion(name="tiny", version=3, checkpoint=model, promoted=False)
    move("tiny", {"champion": version}, over=None, reason="", store=run.resources.storage.store)

    def remove(*what: str) -> dict[str, Any]:
        done = CliRunner().invoke(
            app, ["data", "remove", str(recipe), "--mixture", NAME, "-r", str(resources), "--json", *what]
        )
        assert done.exit_code == 0, (done.output, done.exception)
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    assert b'"id": "dog"' in bytes_of(was)
    told = remove("--id", "dog")
    made = Dataset.model_validate(told["data"])
    verify(made)
    assert told["removed"] == {"pairs": ["id=dog"]}
    assert ids(made) == ids(was) - {("pairs", "dog")}
    assert b'"id": "dog"' not in bytes_of(made)
    held = {(one["node"]["kind"], one["node"]["digest"]): one for one in told["holders"]}
    assert set(held) == {("dataset", was.digest), ("checkpoint", model.digest)}
    assert held["dataset", was.digest]["samples"] == sum(
        row["id"] == "dog" for row in read_index(content(was)).to_pylist()
    )
    assert held["checkpoint", model.digest]["node"]["versions"] == ["tiny 3 (champion)"]

    again = remove("--id", "dog")
    assert (again["files"], again["data"]["digest"]) == ([], made.digest)
    licence = remove("--licence", "MIT AND WordNet3.0")
    assert licence["removed"] == {"documents": ["licence=MIT AND WordNet3.0"]}
    assert ids(Dataset.model_validate(licence["data"])) == {one for one in ids(made) if one[0] == "pairs"}
    source = remove("--source", "documents")
    assert ids(Dataset.model_validate(source["data"])) == {one for one in ids(made) if one[0] == "pairs"}
    mixture = load(recipe, resources=resources).recipe.stages["pretrain"].mixture
    assert (list(mixture.sources), mixture.removed) == (["pairs"], {"pairs": ("id=dog",)})


def test_what_the_mixture_does_not_have_is_refused_and_changes_no_file(own: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, resources = own
    for what, said in (
        (("--id", "nobody"), "no record of id 'nobody'"),
        (("--licence", "GPL"), "no record of licence 'GPL'"),
        (("--source", "pears"), "no source 'pears'.*did you mean 'pairs'"),
        ((), "say what to remove"),
    ):
        with pytest.raises(ValueError, match=said):
            CliRunner().invoke(
                app,
                ["data", "remove", str(recipe), "--mixture", NAME, "-r", str(resources), *what],
                catch_exceptions=False,
            )
    assert not (tmp_path / "quarantine").exists()


def test_a_mixture_of_which_nothing_was_taken_down_is_asked_for_as_before(make_mixture: Any) -> None:
    assert "removed" not in make_mixture("pairs").model_dump(mode="json")
    for wrong, said in (
        ({"pears": ["id=a"]}, "no sources"),
        ({"pairs": ["a"]}, "match pattern"),
        ({"pairs": ["all"]}, "removed"),
    ):
        with pytest.raises(ValidationError, match=said):
            make_mixture("pairs", removed=wrong)
