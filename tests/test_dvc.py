"""DVC: stages know what their data is made from, and an old revision's data comes back to be trained on."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.dvc_repository import ROOT, TABLES, clone_into, commit, digests, run_dvc, run_program, run_vila_ops
from vila_ops.artifacts.exports import export
from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.store import address, begin, find_in, seal, verify
from vila_ops.config import load

DEMO = ("align", "pretrain", "sft", "held_out")
TINY = """\
recipe: configs/recipes/tiny.yaml
resources: configs/resources/inline.yaml
mixtures:
  tiny_align: &tiny {file: configs/recipes/tiny.yaml, reader: configs/recipes/tiny.yaml, raw: tests/tiny}
  tiny_pretrain: *tiny
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh clone, as far as DVC reads it; `vila-ops` itself is the one under test."""
    clone_into(tmp_path)
    commit(tmp_path, "as cloned")
    return tmp_path


@pytest.fixture
def reproduced(clone: Path) -> Path:
    """A clone in which DVC was told that these are the outputs of the demo's stages."""
    for name in DEMO:
        (clone / "data" / name).mkdir(parents=True)
        (clone / f"data/{name}/manifest.json").write_text(name)
        (clone / f"data/{name}.json").write_text("{}")
        (clone / f"data/{name}.md").write_text(f"# {name}")
        for table in TABLES:
            (clone / f"data/{name}.{table}.csv").write_text(f"part,{table}\n")
    run_dvc(clone, "commit", "-q", "--force")
    commit(clone, "as reproduced")
    return clone


def test_dvc_finds_one_pipeline_in_the_repository() -> None:
    """It parses every dvc.yaml that git does not ignore, and one that it cannot parse fails all its commands."""
    assert run_program(ROOT, "git", "ls-files", ":(glob)**/dvc.yaml").split() == ["dvc.yaml"]


def test_a_clone_has_a_stage_for_each_mixture_of_its_recipe(clone: Path) -> None:
    names = run_dvc(clone, "stage", "list", "--name-only").split()
    recipe = load(ROOT / "configs/recipes/demo.yaml", resources=ROOT / "configs/resources/inline.yaml").recipe
    read = [*recipe.stages.values(), recipe.final_suite]
    assert sorted(names) == sorted(f"prepare@{reader.mixture.name}" for reader in read)
    assert sorted(names) == sorted(f"prepare@{name}" for name in DEMO)


@pytest.mark.slow
def test_a_change_is_seen_by_the_stages_that_it_concerns(reproduced: Path) -> None:
    assert _changed(reproduced) == set()
    concerned = {
        ("configs/mixtures/pretrain.yaml", "sources.gcompris.weight"): {"pretrain"},
        ("configs/mixtures/held_out.yaml", "sources.wordnet.limit"): {"held_out"},
        ("configs/suites/demo.yaml", "max_tokens"): {"held_out"},
        ("configs/recipes/demo.yaml", "max_tokens"): set(DEMO),
        ("configs/mixtures/split.yaml", "split.test"): set(DEMO),
        ("configs/models/demo.yaml", "image_size"): set(DEMO),
        ("configs/sources/tux_paint.yaml", "sources.tux_paint.package.version"): set(DEMO),
    }
    for (file, key), stages in concerned.items():
        _set(reproduced / file, key.split("."), 7)
        assert _changed(reproduced) == stages, file
        if file.split("/")[1] not in ("models", "sources"):
            assert json.loads(run_dvc(reproduced, "params", "diff", "--json"))[file][key]["new"] == 7
        run_program(reproduced, "git", "checkout", "-q", ".")
    revisions = (("prepare", "REVISION"), ("identity", "SHARD_REVISION"), ("identity", "SURVEY_REVISION"))
    for module, key in revisions:
        task = reproduced / f"vila_ops/data/preprocess/{module}.py"
        task.write_text(re.sub(rf"^{key} = .*$", f"{key} = 1000", task.read_text(), flags=re.MULTILINE))
        assert _changed(reproduced) == set(DEMO), key
        run_program(reproduced, "git", "checkout", "-q", ".")


@pytest.mark.slow
def test_what_a_stage_does_not_watch_says_nothing_of_its_data(reproduced: Path) -> None:
    versioned = yaml.safe_load((reproduced / "configs/versioned.yaml").read_text())
    files = set(_extended(reproduced / versioned["recipe"]))
    for name, stage in yaml.safe_load((reproduced / "dvc.lock").read_text())["stages"].items():
        watched = [reproduced / place for place in (*(dep["path"] for dep in stage["deps"]), *stage["params"])]
        others = {reproduced / m["file"] for key, m in versioned["mixtures"].items() if name != f"prepare@{key}"}
        for file in files - others:
            if not any(file.is_relative_to(place) for place in watched):
                assert not re.search(r"\b(mixture|sources|model):", file.read_text()), f"{name} does not watch {file}"


@pytest.mark.slow
def test_git_checkout_and_dvc_checkout_bring_back_the_data_that_is_trained_on(
    clone: Path, s3_store: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (clone / "configs/versioned.yaml").write_text(TINY)
    run_dvc(clone, "repro", "-q")
    commit(clone, "first data")
    assert "Data and pipelines are up to date" in run_dvc(clone, "repro")
    first = digests(clone)

    records = clone / "tests/tiny/pairs/records.jsonl"
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:40]))
    run_dvc(clone, "repro", "-q")
    commit(clone, "fewer pairs")
    assert not set(digests(clone).items()) & set(first.items())
    changed = json.loads(run_dvc(clone, "metrics", "diff", "--json", "HEAD~1"))
    assert changed["data/tiny_align.json"]["num_samples"] == {"old": 48, "new": 40, "diff": -8}
    plots = json.loads(run_dvc(clone, "plots", "show", "--json"))["data"]
    assert sorted(plots) == sorted(f"data/{name}.{table}.csv" for name in first for table in TABLES)
    (plot,) = plots["data/tiny_align.samples.csv"]
    bars = {bar["part"]: int(bar["samples"]) for bar in plot["content"]["data"]["values"]}
    assert sorted(bars) == ["pairs test", "pairs train", "pairs validation"]
    assert sum(bars.values()) == 40

    run_program(clone, "git", "checkout", "-q", "HEAD~1")
    run_dvc(clone, "checkout", "-q")
    shutil.rmtree(clone / "store")  # nothing but the checked-out data is left to train on
    models = [_train(clone, stage) for stage in ("align", "pretrain")]
    for stage, model in zip(("align", "pretrain"), models, strict=True):
        assert first[f"tiny_{stage}"] in model["parents"]
    assert not (clone / "store/shard").exists(), "it is copied into the store, not prepared"

    team = tmp_path_factory.mktemp("team")
    for name, place in {"folder": str(team / "dvc"), "bucket": f"{s3_store}/dvc"}.items():
        run_dvc(clone, "remote", "add", "-q", name, place)
        run_dvc(clone, "push", "-q", "-r", name)
    commit(clone, "remotes")
    run_program(team, "git", "clone", "-q", str(clone), "colleague")
    for name in ("folder", "bucket"):
        shutil.rmtree(team / "colleague/.dvc/cache", ignore_errors=True)
        shutil.rmtree(team / "colleague/data/tiny_align", ignore_errors=True)
        run_dvc(team / "colleague", "pull", "-q", "-r", name)
        assert digests(team / "colleague") == first
    assert _train(team / "colleague", "align")["digest"] == models[0]["digest"]


@pytest.mark.slow
def test_a_dataset_comes_back_from_s3_into_an_empty_cache(s3_store: str, tmp_path: Path) -> None:
    at = address(Dataset, revision=1, recipe={}, parents=())
    attempt = begin(at, store=f"{s3_store}/store")
    for number in range(3):
        (attempt / f"{number}.tar").write_bytes(os.urandom(2**20))
    made = seal(Dataset, at, attempt, facts={"num_samples": 3, "num_tokens": 3}, execution={})
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    run_program(one, "git", "init", "-q")
    run_dvc(one, "init", "-q")
    run_dvc(one, "remote", "add", "-q", "--default", "team", f"{s3_store}/dvc")
    export(made, one / "data/mixture")
    run_dvc(one, "add", "-q", "data/mixture")
    commit(one, "data")
    run_dvc(one, "push", "-q")
    run_program(tmp_path, "git", "clone", "-q", str(one), str(other))
    assert not (other / "data/mixture").exists()
    run_dvc(other, "pull", "-q")
    whole = {path.name: path.read_bytes() for path in (one / "data/mixture").rglob("*") if path.is_file()}
    assert {p.name: p.read_bytes() for p in (other / "data/mixture").rglob("*") if p.is_file()} == whole
    assert len(whole) == 4
    found = find_in(Dataset, at, str(other / "data/mixture"))
    assert found is not None
    verify(found)
    assert found.digest == made.digest


def _train(repository: Path, stage: str) -> dict[str, Any]:
    """The model of a stage of the tiny recipe."""
    asked = ("train", "configs/recipes/tiny.yaml", "--stage", stage, "-r", "configs/resources/inline.yaml")
    made: dict[str, Any] = json.loads(run_vila_ops(repository, *asked, "--json"))
    return made


def _changed(repository: Path) -> set[str]:
    """The mixtures whose stages would run again."""
    said: dict[str, Any] = json.loads(run_dvc(repository, "status", "--json"))
    return {stage.removeprefix("prepare@") for stage in said}


def _extended(file: Path) -> Iterator[Path]:
    """A config file and everything that it extends."""
    yield file
    for bases in re.findall(r"\bextends: \[(.*?)\]", file.read_text()):
        for base in bases.split(","):
            yield from _extended((file.parent / base.strip()).resolve())


def _set(file: Path, path: list[str], value: int) -> None:
    tree = node = yaml.safe_load(file.read_text())
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
