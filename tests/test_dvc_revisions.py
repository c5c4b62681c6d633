"""Revisions of raw data that `vila-ops data watch` makes: what DVC tells of them, and what stays of the one before."""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

from tests.dvc_repository import ENV, ROOT, TABLES, clone_into, commit, digests, run_dvc, run_program, run_vila_ops
from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.s3_calls import client
from vila_ops.artifacts.store import opened
from vila_ops.cli import app
from vila_ops.config import Run, load
from vila_ops.data import revisions
from vila_ops.data.loading.loader import RowLoader
from vila_ops.model.assemble import assemble
from vila_ops.pipeline.stages import model_after, prepare_named
from vila_ops.plan.plan import plan_run
from vila_ops.train.stage import train_stage

OWN = {
    "name": "own",
    "split": {"salt": "tiny", "validation": 0.2, "test": 0.3},
    "shard_bytes": 40_000,
    "sources": {
        "grows": {"kind": "flan", "path": "raw/grows", "licence": "MIT"},
        "shrinks": {"kind": "jsonl", "path": "raw/shrinks", "render": "instructions"},
        "spoils": {"kind": "jsonl", "path": "raw/spoils", "render": "caption"},
        "tars": {"kind": "webdataset", "path": "raw/tars", "licence": "MIT"},
    },
}
"""64 texts in 2 shards, 24 texts in 1, 48 images in 3, 32 in 2: what `revised` then does is in the names."""
OWN_VERSIONED = """\
recipe: configs/recipes/own.yaml
resources: configs/resources/inline.yaml
mixtures:
  own: {file: configs/recipes/own.yaml, reader: configs/recipes/own.yaml, raw: raw}
"""
WATCH = ("data", "watch", "configs/recipes/own.yaml", "--mixture", "own", "--once", "--settle", "0", "--json")

KILLED_BEFORE_IT_REPLACES = """
import os, signal, sys

def kill(event, arguments):
    if event == "os.rename" and ".own-old-" in str(arguments[1]):
        os.killpg(0, signal.SIGKILL)

sys.addaudithook(kill)
"""
"""Every process of a look has it; the one that prepares ends them all when the new revision is whole beside the old."""


class Revised(NamedTuple):
    """A clone that `data watch` committed three revisions in, one a look, and what it left after each.

    `dvc repro` made the last one by hand before the look.
    """

    folder: Path
    looks: list[dict[str, Any]]
    """What it printed."""
    shards: list[dict[str, tuple[int, int]]]
    """Inode and time of the manifest of every shard in the store."""

    def diff(self, command: str, *options: str) -> dict[str, Any]:
        """What `dvc COMMAND` says of the first and the second revision."""
        revisions = [look["commit"] for look in self.looks[:2]]
        said: dict[str, Any] = json.loads(run_dvc(self.folder, *command.split(), *options, "--json", *revisions))
        return said


@pytest.fixture(scope="module")
def revised(tmp_path_factory: pytest.TempPathFactory) -> Revised:
    """A first revision; one source grows, one loses records, of one two images are cut; then two files are whole."""
    folder = tmp_path_factory.mktemp("revised")
    clone_into(folder)
    recipe = yaml.safe_load((folder / "configs/recipes/tiny.yaml").read_text())
    recipe["stages"]["align"]["mixture"] = OWN
    (folder / "configs/recipes/own.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "configs/versioned.yaml").write_text(OWN_VERSIONED)
    commit(folder, "as cloned")
    raw, made = folder / "raw", Revised(folder, [], [])
    shutil.copytree(ROOT / "tests/tiny/instructions", raw / "shrinks")
    shutil.copytree(ROOT / "tests/tiny/pairs", raw / "spoils")
    _flan(raw / "grows/a.jsonl", 64)
    _tar(raw / "tars/a.tar", sorted((ROOT / "tests/tiny/pairs").glob("*.png"))[:32])
    _look(made)

    _flan(raw / "grows/b.jsonl", 48)
    (raw / "grows/c.jsonl.part").write_text('{"id": "c-0", "inp')
    (raw / "tars/b.tar.part").write_bytes((raw / "tars/a.tar").read_bytes()[:5000])
    records = raw / "shrinks/records.jsonl"
    records.write_text("".join(records.read_text().splitlines(keepends=True)[4:]))
    for image in sorted((raw / "spoils").glob("*.png"))[:2]:
        image.write_bytes(image.read_bytes()[:100])
    _look(made)

    _flan(raw / "grows/c.jsonl.part", 16)
    _tar(raw / "tars/b.tar.part", sorted((ROOT / "tests/tiny/pairs").glob("*.png"))[-32:])
    for path in raw.glob("*/*.part"):
        path.rename(path.with_suffix(""))
    run_dvc(folder, "repro", "-q", "prepare@own")
    _look(made)
    return made


@pytest.mark.slow
def test_metrics_of_two_revisions_say_what_changed_of_each_source(revised: Revised) -> None:
    changed = revised.diff("metrics diff")["data/own.json"]

    def of(key: str) -> dict[str, int]:
        """What is more or less of it now, by source."""
        total: Counter[str] = Counter()
        for name, one in changed.items():
            if re.fullmatch(rf"sources\.\w+\.{key}(\.\w+)?", name):
                total[name.split(".")[1]] += one["diff"]
        return dict(total)

    assert changed["num_samples"] == {"old": 64 + 24 + 48 + 32, "new": 112 + 20 + 46 + 32, "diff": 42}
    assert changed["num_images"] == {"old": 48 + 32, "new": 46 + 32, "diff": -2}
    assert of("records") == {"grows": 48, "shrinks": -4}
    assert of("samples") == {"grows": 48, "shrinks": -4, "spoils": -2}
    assert of("images") == {"spoils": -2}
    assert changed["sources.grows.licences.MIT"] == {"old": 64, "new": 112, "diff": 48}
    assert changed["sources.spoils.bad.bad_image_truncated"] == {"old": None, "new": 2}
    assert of("tokens").keys() == {"grows", "shrinks", "spoils"}
    assert sum(of("tokens").values()) == changed["num_tokens"]["diff"]
    sides = {side: changed[f"sources.grows.tokens.{side}"] for side in ("train", "validation", "test")}
    old, new = (sum(one[when] for one in sides.values()) for when in ("old", "new"))
    assert new * 64 == old * 112, "all its texts have as many tokens"


@pytest.mark.slow
def test_plots_of_two_revisions_draw_what_changed_of_each_source(revised: Revised) -> None:
    plots = revised.diff("plots diff")["data"]
    assert sorted(plots) == sorted(f"data/own.{table}.csv" for table in TABLES)
    bars: dict[str, dict[str, dict[str, int]]] = {}
    for table in TABLES:
        (plot,) = plots[f"data/own.{table}.csv"]
        for bar in plot["content"]["data"]["values"]:
            source = bars.setdefault(table, {}).setdefault(bar["part"].split()[0], {})
            source[bar["rev"]] = source.get(bar["rev"], 0) + int(bar[table])
    first, second = (look["commit"] for look in revised.looks[:2])
    assert bars["samples"] == {
        "grows": {first: 64, second: 112},
        "shrinks": {first: 24, second: 20},
        "spoils": {first: 48, second: 46},
        "tars": {first: 32, second: 32},
    }
    assert bars["images"]["spoils"] == {first: 48, second: 46}
    assert bars["left_out"] == {"spoils": {second: 2}}
    for when, look in ((first, revised.looks[0]), (second, revised.looks[1])):
        assert sum(source[when] for source in bars["tokens"].values()) == look["num_tokens"]
    page = run_dvc(revised.folder, "plots", "diff", first, second).strip()
    html = Path(page.removeprefix("file://")).read_text()
    assert html.count("vegaEmbed(") == len(TABLES)
    assert "Records left out of own by source and reason" in html


@pytest.mark.slow
def test_raw_files_that_arrive_make_a_revision_that_uses_every_unchanged_shard_again(revised: Revised) -> None:
    assert [look["num_samples"] for look in revised.looks] == [168, 210, 258]
    assert len({look["digest"] for look in revised.looks}) == 3
    assert [len(shards) for shards in revised.shards] == [8, 8 + 2 + 1 + 3, 14 + 1 + 2], "unchanged ones were made"
    for before, after in pairwise(revised.shards):
        assert before.items() <= after.items(), "a sealed shard was made again"
    added = {one["path"] for one in revised.diff("diff")["added"]}
    assert sorted(Path(path).name.split("-")[0] for path in added) == [*["grows"] * 2, "shrinks", *["spoils"] * 3]
    commits = [look["commit"] for look in revised.looks]
    assert run_program(revised.folder, "git", "rev-list", "--reverse", "HEAD").split()[1:] == commits
    files = run_program(revised.folder, "git", "show", "--name-only", "--format=", commits[2]).split()
    assert set(files) <= {"dvc.lock", "data/own.json", "data/own.md", *(f"data/own.{table}.csv" for table in TABLES)}
    assert run_program(revised.folder, "git", "status", "--short").split() == ["??", "raw/"]


@pytest.mark.slow
def test_an_earlier_revision_comes_back_and_a_look_at_nothing_new_makes_none(revised: Revised) -> None:
    assert run_vila_ops(revised.folder, *WATCH, "--commit") == ""
    assert run_program(revised.folder, "git", "rev-parse", "HEAD").strip() == revised.looks[2]["commit"]
    for look in (revised.looks[1], revised.looks[2]):
        run_program(revised.folder, "git", "checkout", "-q", look["commit"])
        run_dvc(revised.folder, "checkout", "-q")
        assert digests(revised.folder) == {"own": look["digest"]}
        assert f"{look['num_samples']:,} samples" in (revised.folder / "data/own.md").read_text()


@pytest.mark.slow
def test_the_last_good_revision_stays_until_the_next_one_is_whole(
    revised: Revised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raw data that is refused, a look that is killed; and what a stage reads outlives the revision."""
    folder, raw = revised.folder, revised.folder / "raw"
    before, good = _outputs(folder), digests(folder)["own"]
    monkeypatch.chdir(folder)
    run = _first_stage(folder)
    stage, data = run.recipe.stages["align"], prepare_named(run, "own")
    assert data.digest == good
    rows = RowLoader(opened(data).file, digest=good, stage=stage, cache=tmp_path / "plans")
    rows.batch(0)

    images = {image: image.read_bytes() for image in sorted((raw / "spoils").glob("*.png"))[:9]}
    for image, whole in images.items():
        image.write_bytes(whole[:100])
    refused = subprocess.run(
        ["vila-ops", *WATCH], cwd=folder, env={**os.environ, **ENV}, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "more than max_bad_share" in refused.stderr
    assert f"data/own is still the revision before, data {good[:12]}" in refused.stderr
    assert _outputs(folder) == before
    assert run_program(folder, "git", "status", "--short").split() == ["??", "raw/"], (
        "also data/.gitignore is as before"
    )
    for image, whole in images.items():
        image.write_bytes(whole)

    _flan(raw / "grows/d.jsonl", 16)
    (tmp_path / "sitecustomize.py").write_text(KILLED_BEFORE_IT_REPLACES)
    env = {**os.environ, **ENV, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    killed = subprocess.run(
        ["vila-ops", *WATCH], cwd=folder, env=env, capture_output=True, check=False, start_new_session=True
    )
    assert killed.returncode == -signal.SIGKILL
    assert _outputs(folder) == before

    with subprocess.Popen(["sleep", "600"]) as other:  # stands for a command of DVC that writes the dataset
        held = {"write": {str(folder / "data/own"): {"pid": other.pid, "cmd": "dvc checkout"}}}
        (folder / ".dvc/tmp/rwlock").write_text(json.dumps(held))

        def end() -> None:
            other.kill()
            other.wait()

        with _when_it_waits(end):
            look = json.loads(run_vila_ops(folder, *WATCH, "--commit"))
    assert look["digest"] == digests(folder)["own"] != good
    assert f"{look['num_samples']:,} samples" in (folder / "data/own.md").read_text()
    assert len({key for step in range(40) for row in rows.batch(step)[0] for key in row.keys}) > 40
    init = assemble(run.recipe.model, run.resources)
    assert train_stage(stage, run.recipe.model, data, init, run.resources).parents == (good, init.digest)


@contextlib.contextmanager
def _when_it_waits(act: Callable[[], None]) -> Iterator[None]:
    """Act when a look begins to wait for another command of DVC, as it must."""
    said: list[str] = []

    class Acts(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("waiting: "):
                said.append(record.getMessage())
                act()

    handler, log = Acts(), logging.getLogger(revisions.__name__)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
    assert said
    assert "dvc checkout" in said[0]


@pytest.mark.slow
def test_a_clone_with_pulled_data_alone_shows_plans_and_trains(
    revised: Revised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone, remote = tmp_path / "clone", tmp_path / "remote"
    run_program(tmp_path, "git", "clone", "-q", str(revised.folder), str(clone))
    config = f"['remote \"team\"']\n    url = {remote}\n[core]\n    remote = team\n"
    for folder in (revised.folder, clone):
        (folder / ".dvc/config.local").write_text(config)
    run_dvc(revised.folder, "push", "-q")
    run_dvc(clone, "pull", "-q")
    assert not (clone / "raw").exists()
    digest = digests(clone)["own"]
    assert digest == digests(revised.folder)["own"]
    monkeypatch.chdir(clone)
    run = _first_stage(clone)
    (planned,) = plan_run(run).stages
    assert (planned.lengths, planned.steps) == ("prepared", 2)
    asked = ["data", "show", "configs/recipes/own.yaml", "--mixture", "own", "--out", "page.html", "--json"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert Dataset.model_validate_json(shown.stdout).uri == str(clone / "data/own")
    assert "<figure" in Path("page.html").read_text()
    trained = model_after(run, "align")
    assert digest in trained.parents
    assert not list(clone.glob("store/shard/*"))


def _flan(path: Path, count: int) -> None:
    """Conversations that differ in nothing but their ids."""
    path.parent.mkdir(exist_ok=True)
    lines = [
        json.dumps({"id": f"{path.name[0]}-{number}", "inputs": "Is it so?", "targets": "Yes."})
        for number in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")


def _tar(path: Path, images: list[Path]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for image in images:
            caption = tarfile.TarInfo(f"{image.stem}.txt")
            caption.size = len(image.stem)
            tar.add(image, image.name)
            tar.addfile(caption, io.BytesIO(image.stem.encode()))


@pytest.mark.slow
def test_objects_that_arrive_in_s3_make_a_revision(s3_store: str, tmp_path: Path) -> None:
    """Six captioned images make the first one; DVC, which a look asks, sees that two more have arrived."""
    bucket = s3_store.split("/")[2]
    raw = {**OWN, "sources": {"pairs": {"kind": "jsonl", "path": f"s3://{bucket}/pairs", "render": "caption"}}}
    clone_into(tmp_path)
    recipe = yaml.safe_load((tmp_path / "configs/recipes/tiny.yaml").read_text())
    recipe["stages"]["align"]["mixture"] = raw
    (tmp_path / "configs/recipes/own.yaml").write_text(yaml.safe_dump(recipe))
    versioned = yaml.safe_load(OWN_VERSIONED)
    versioned["mixtures"]["own"]["raw"] = f"s3://{bucket}/pairs"
    (tmp_path / "configs/versioned.yaml").write_text(yaml.safe_dump(versioned))
    commit(tmp_path, "as cloned")
    lines = (ROOT / "tests/tiny/pairs/records.jsonl").read_text().splitlines(keepends=True)

    def deliver(count: int) -> None:
        images = [json.loads(line)["turns"][0]["parts"][0]["image"] for line in lines[:count]]
        files = {name: (ROOT / "tests/tiny/pairs" / name).read_bytes() for name in images}
        for name, content in {**files, "records.jsonl": "".join(lines[:count]).encode()}.items():
            client().put_object(Bucket=bucket, Key=f"pairs/{name}", Body=content)

    deliver(6)
    look = json.loads(run_vila_ops(tmp_path, *WATCH))
    assert look["num_samples"] == 6
    assert digests(tmp_path) == {"own": look["digest"]}
    assert json.loads(run_dvc(tmp_path, "status", "--json")) == {}
    deliver(8)
    assert json.loads(run_dvc(tmp_path, "status", "--json")).keys() == {"prepare@own"}


def _look(made: Revised) -> None:
    """One look at the raw data, and what is there after it."""
    made.looks.append(json.loads(run_vila_ops(made.folder, *WATCH, "--commit")))
    manifests = made.folder.glob("store/shard/*/manifest.json")
    made.shards.append({str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in manifests})


def _outputs(repository: Path) -> dict[str, bytes]:
    """The dataset `own` and the files beside it."""
    files = [*(repository / "data").glob("own.*"), *(repository / "data/own").rglob("*")]
    return {str(path.relative_to(repository)): path.read_bytes() for path in files if path.is_file()}


def _first_stage(repository: Path) -> Run:
    """The recipe `own` with its first stage alone, two steps."""
    settings = ("stages.align.num_steps=2", "resources.train.threads_per_worker=1")
    inline = repository / "configs/resources/inline.yaml"
    run = load(repository / "configs/recipes/own.yaml", resources=inline, overrides=settings)
    recipe = run.recipe.model_dump()
    return Run.model_validate(
        {**run.model_dump(), "recipe": {**recipe, "stages": {"align": recipe["stages"]["align"]}}}
    )
