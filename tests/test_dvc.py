"""DVC: stages know what their data is made from, and an old revision's data comes back to be trained on."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.store import address, begin, export, find_in, opened, seal, verify
from vila_ops.cli import app
from vila_ops.config import Run, load
from vila_ops.data.loading.loader import RowLoader
from vila_ops.model.assemble import assemble
from vila_ops.pipeline.stages import model_after, prepare_named
from vila_ops.plan.plan import plan_run
from vila_ops.train.stage import train_stage

ROOT = Path(__file__).parents[1]
CLONED = (
    *(".dvc", ".dvcignore", ".gitignore", "configs", "dvc.yaml", "tests/tiny"),
    *("vila_ops/data/preprocess/prepare.py", "vila_ops/data/preprocess/identity.py"),
)
ENV = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    **{f"GIT_{who}_{what}": "vila@example.invalid" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}
TABLES = ("samples", "tokens", "images", "left_out")
DEMO = ("align", "pretrain", "sft", "held_out")
TINY = """\
recipe: configs/recipes/tiny.yaml
resources: configs/resources/inline.yaml
mixtures:
  tiny_align: &tiny {file: configs/recipes/tiny.yaml, reader: configs/recipes/tiny.yaml, raw: tests/tiny}
  tiny_pretrain: *tiny
  tiny_sft: *tiny
  tiny_held_out: *tiny
"""
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
WATCH = (
    "vila-ops",
    "data",
    "watch",
    "configs/recipes/own.yaml",
    "--mixture",
    "own",
    "--once",
    "--settle",
    "0",
    "--json",
)

KILLED_BEFORE_IT_REPLACES = """
import os, signal, sys

def kill(event, arguments):
    if event == "os.rename" and ".own-old-" in str(arguments[1]):
        os.killpg(0, signal.SIGKILL)

sys.addaudithook(kill)
"""
"""Every process of a look has it; the one that prepares ends them all when the new revision is whole beside the old."""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh clone, as far as DVC reads it; `vila-ops` itself is the one under test."""
    _clone(tmp_path)
    _commit(tmp_path, "as cloned")
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
    _run(clone, "dvc", "commit", "-q", "--force")
    _commit(clone, "as reproduced")
    return clone


class Revised(NamedTuple):
    """A clone that `data watch` committed three revisions in, one a look, and what it left after each."""

    folder: Path
    looks: list[dict[str, Any]]
    """What it printed."""
    shards: list[dict[str, tuple[int, int]]]
    """Inode and time of the manifest of every shard in the store."""

    def diff(self, command: str, *options: str) -> dict[str, Any]:
        """What `dvc COMMAND` says of the first and the second revision."""
        revisions = [look["commit"] for look in self.looks[:2]]
        said: dict[str, Any] = json.loads(_run(self.folder, "dvc", *command.split(), *options, "--json", *revisions))
        return said


@pytest.fixture(scope="module")
def revised(tmp_path_factory: pytest.TempPathFactory) -> Revised:
    """A first revision; one source grows, one loses records, of one two images are cut; then two files are whole."""
    folder = tmp_path_factory.mktemp("revised")
    _clone(folder)
    recipe = yaml.safe_load((folder / "configs/recipes/tiny.yaml").read_text())
    recipe["stages"]["align"]["mixture"] = OWN
    (folder / "configs/recipes/own.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "configs/versioned.yaml").write_text(OWN_VERSIONED)
    _commit(folder, "as cloned")
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
    _look(made)
    return made


def test_a_clone_has_a_stage_for_each_mixture_of_its_recipe(clone: Path) -> None:
    names = _run(clone, "dvc", "stage", "list", "--name-only").split()
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
            assert json.loads(_run(reproduced, "dvc", "params", "diff", "--json"))[file][key]["new"] == 7
        _run(reproduced, "git", "checkout", "-q", ".")
    revisions = (("prepare", "REVISION"), ("identity", "SHARD_REVISION"), ("identity", "SURVEY_REVISION"))
    for module, key in revisions:
        task = reproduced / f"vila_ops/data/preprocess/{module}.py"
        task.write_text(re.sub(rf"^{key} = .*$", f"{key} = 1000", task.read_text(), flags=re.MULTILINE))
        assert _changed(reproduced) == set(DEMO), key
        _run(reproduced, "git", "checkout", "-q", ".")


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
def test_git_checkout_and_dvc_checkout_bring_back_the_data_that_is_trained_on(clone: Path) -> None:
    (clone / "configs/versioned.yaml").write_text(TINY)
    _run(clone, "dvc", "repro", "-q")
    _commit(clone, "first data")
    assert "Data and pipelines are up to date" in _run(clone, "dvc", "repro")
    first = _digests(clone)

    records = clone / "tests/tiny/pairs/records.jsonl"
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:40]))
    _run(clone, "dvc", "repro", "-q")
    _commit(clone, "fewer pairs")
    assert not set(_digests(clone).items()) & set(first.items())
    changed = json.loads(_run(clone, "dvc", "metrics", "diff", "--json", "HEAD~1"))
    assert changed["data/tiny_align.json"]["num_samples"] == {"old": 48, "new": 40, "diff": -8}
    plots = json.loads(_run(clone, "dvc", "plots", "show", "--json"))["data"]
    assert sorted(plots) == sorted(f"data/{name}.{table}.csv" for name in first for table in TABLES)
    (plot,) = plots["data/tiny_align.samples.csv"]
    bars = {bar["part"]: int(bar["samples"]) for bar in plot["content"]["data"]["values"]}
    assert sorted(bars) == ["pairs test", "pairs train", "pairs validation"]
    assert sum(bars.values()) == 40

    _run(clone, "git", "checkout", "-q", "HEAD~1")
    _run(clone, "dvc", "checkout", "-q")
    shutil.rmtree(clone / "store")  # nothing but the checked-out data is left to train on
    made = json.loads(_run(clone, "vila-ops", "run", "configs/recipes/tiny.yaml", "--json"))
    assert {name: dataset["digest"] for name, dataset in made["datasets"].items()} == first
    for stage in ("align", "pretrain", "sft"):
        assert first[f"tiny_{stage}"] in made["models"][stage]["parents"]
    assert not (clone / "store/shard").exists(), "it is copied into the store, not prepared"
    tasks = json.loads((clone / "store/tiny/summary.json").read_text())["tasks"]
    assert [task["reused"] for task in tasks if task["task"] == "prepare"] == [True] * 4


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
    page = _run(revised.folder, "dvc", "plots", "diff", first, second).strip()
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
    assert _run(revised.folder, "git", "rev-list", "--reverse", "HEAD").split()[1:] == commits
    files = _run(revised.folder, "git", "show", "--name-only", "--format=", commits[2]).split()
    assert set(files) <= {"dvc.lock", "data/own.json", "data/own.md", *(f"data/own.{table}.csv" for table in TABLES)}
    assert _run(revised.folder, "git", "status", "--short").split() == ["??", "raw/"]


@pytest.mark.slow
def test_an_earlier_revision_comes_back_and_a_look_at_nothing_new_makes_none(revised: Revised) -> None:
    assert _run(revised.folder, *WATCH, "--commit") == ""
    assert _run(revised.folder, "git", "rev-parse", "HEAD").strip() == revised.looks[2]["commit"]
    for look in (revised.looks[1], revised.looks[2]):
        _run(revised.folder, "git", "checkout", "-q", look["commit"])
        _run(revised.folder, "dvc", "checkout", "-q")
        assert _digests(revised.folder) == {"own": look["digest"]}
        assert f"{look['num_samples']:,} samples" in (revised.folder / "data/own.md").read_text()


@pytest.mark.slow
def test_the_last_good_revision_stays_until_the_next_one_is_whole(
    revised: Revised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raw data that is refused, a look that is killed; and what a stage reads outlives the revision."""
    folder, raw = revised.folder, revised.folder / "raw"
    before, good = _outputs(folder), _digests(folder)["own"]
    monkeypatch.chdir(folder)
    run = _first_stage(folder)
    stage, data = run.recipe.stages["align"], prepare_named(run, "own")
    assert data.digest == good
    rows = RowLoader(opened(data).file, digest=good, stage=stage, cache=tmp_path / "plans")
    rows.batch(0)

    images = {image: image.read_bytes() for image in sorted((raw / "spoils").glob("*.png"))[:9]}
    for image, whole in images.items():
        image.write_bytes(whole[:100])
    refused = subprocess.run(WATCH, cwd=folder, env={**os.environ, **ENV}, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "more than max_bad_share" in refused.stderr
    assert f"data/own is still the revision before, data {good[:12]}" in refused.stderr
    assert _outputs(folder) == before
    assert _run(folder, "git", "status", "--short").split() == ["??", "raw/"], "also data/.gitignore is as before"
    for image, whole in images.items():
        image.write_bytes(whole)

    _flan(raw / "grows/d.jsonl", 16)
    (tmp_path / "sitecustomize.py").write_text(KILLED_BEFORE_IT_REPLACES)
    env = {**os.environ, **ENV, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    killed = subprocess.run(WATCH, cwd=folder, env=env, capture_output=True, check=False, start_new_session=True)
    assert killed.returncode == -signal.SIGKILL
    assert _outputs(folder) == before

    look = json.loads(_run(folder, *WATCH, "--commit"))
    assert look["digest"] == _digests(folder)["own"] != good
    assert f"{look['num_samples']:,} samples" in (folder / "data/own.md").read_text()
    assert len({key for step in range(40) for row in rows.batch(step)[0] for key in row.keys}) > 40
    init = assemble(run.recipe.model, run.resources)
    assert train_stage(stage, run.recipe.model, data, init, run.resources).parents == (good, init.digest)


@pytest.mark.slow
def test_a_clone_with_pulled_data_alone_shows_plans_and_trains(
    revised: Revised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone, remote = tmp_path / "clone", tmp_path / "remote"
    _run(tmp_path, "git", "clone", "-q", str(revised.folder), str(clone))
    config = f"['remote \"team\"']\n    url = {remote}\n[core]\n    remote = team\n"
    for folder in (revised.folder, clone):
        (folder / ".dvc/config.local").write_text(config)
    _run(revised.folder, "dvc", "push", "-q")
    _run(clone, "dvc", "pull", "-q")
    assert not (clone / "raw").exists()
    digest = _digests(clone)["own"]
    assert digest == _digests(revised.folder)["own"]
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


@pytest.mark.slow
def test_a_dataset_comes_back_from_s3_into_an_empty_cache(s3_store: str, tmp_path: Path) -> None:
    at = address(Dataset, revision=1, recipe={}, parents=())
    attempt = begin(at, store=f"{s3_store}/store")
    for number in range(3):
        (attempt / f"{number}.tar").write_bytes(os.urandom(2**20))
    made = seal(Dataset, at, attempt, facts={"num_samples": 3, "num_tokens": 3}, execution={})
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    _run(one, "git", "init", "-q")
    _run(one, "dvc", "init", "-q")
    _run(one, "dvc", "remote", "add", "-q", "--default", "team", f"{s3_store}/dvc")
    export(made, one / "data/mixture")
    _run(one, "dvc", "add", "-q", "data/mixture")
    _commit(one, "data")
    _run(one, "dvc", "push", "-q")
    _run(tmp_path, "git", "clone", "-q", str(one), str(other))
    assert not (other / "data/mixture").exists()
    _run(other, "dvc", "pull", "-q")
    whole = {path.name: path.read_bytes() for path in (one / "data/mixture").rglob("*") if path.is_file()}
    assert {p.name: p.read_bytes() for p in (other / "data/mixture").rglob("*") if p.is_file()} == whole
    assert len(whole) == 4
    found = find_in(Dataset, at, str(other / "data/mixture"))
    assert found is not None
    verify(found)
    assert found.digest == made.digest


def _clone(folder: Path) -> None:
    for name in CLONED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, folder / name)
        else:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("tmp", "cache", "config.local"))
    _run(folder, "git", "init", "-q")


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


def _look(made: Revised) -> None:
    """One look at the raw data, and what is there after it."""
    made.looks.append(json.loads(_run(made.folder, *WATCH, "--commit")))
    manifests = made.folder.glob("store/shard/*/manifest.json")
    made.shards.append({str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in manifests})


def _changed(repository: Path) -> set[str]:
    """The mixtures whose stages would run again."""
    said: dict[str, Any] = json.loads(_run(repository, "dvc", "status", "--json"))
    return {stage.removeprefix("prepare@") for stage in said}


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


def _digests(repository: Path) -> dict[str, str]:
    manifests = sorted((repository / "data").glob("*/manifest.json"))
    return {path.parent.name: json.loads(path.read_text())["digest"] for path in manifests}


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


def _commit(repository: Path, message: str) -> None:
    _run(repository, "git", "add", "--all")
    _run(repository, "git", "commit", "-qm", message)


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **ENV}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout
