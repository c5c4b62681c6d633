"""`vila-ops init`: a project that loads as it stands, on any data, and that overwrites nothing."""

import json
import os
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from vila_ops.cli import app
from vila_ops.config import Run, load
from vila_ops.config.load import read
from vila_ops.config.sources import Table

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests/tiny"


def run(*words: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def project(folder: Path, name: str | None = None) -> Run:
    """The run of a project's own recipe on its own resources."""
    recipe = folder / f"configs/recipes/{name or folder.name}.yaml"
    return load(recipe, resources=folder / "configs/resources/inline.yaml")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A folder `mine` with a table and a folder of images."""
    (tmp_path / "mine/images").mkdir(parents=True)
    (tmp_path / "mine/captions.csv").write_text("image,text\n1.png,A red square.\n")
    return tmp_path / "mine"


def test_a_project_names_the_data_from_its_own_folder(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(table.parent)
    said = run("init", "mine", "--data", "mine/captions.csv", "--images", "mine/images")
    made = project(table)
    (source,) = made.recipe.final_suite.mixture.sources.values()
    assert isinstance(source, Table)
    assert (source.path, source.images, source.render) == ("captions.csv", "images", "caption")
    assert list(made.recipe.stages) == ["align", "sft"]
    for line in said.splitlines():
        if line.startswith("wrote "):
            assert Path(line.removeprefix("wrote ")).is_file()
    assert "vila-ops show configs/recipes/mine.yaml" in said


def test_stages_and_suites_read_one_prepared_dataset(table: Path) -> None:
    run("init", table, "--data", table / "captions.csv", "--images", table / "images")
    recipe = project(table).recipe
    assert {stage.mixture for stage in recipe.stages.values()} == {recipe.final_suite.mixture}
    assert recipe.text("sft") == recipe.text("sft", max_tokens=recipe.final_suite.max_tokens)
    assert (recipe.stage_suite.split, recipe.final_suite.split) == ("validation", "test")


def test_data_elsewhere_is_named_by_its_absolute_path(table: Path, tmp_path: Path) -> None:
    run("init", tmp_path / "project", "--data", table / "captions.csv", "--images", table / "images")
    (source,) = project(tmp_path / "project").recipe.final_suite.mixture.sources.values()
    assert isinstance(source, Table)
    assert (source.path, source.images) == (str(table / "captions.csv"), str(table / "images"))


def test_without_data_a_project_says_where_to_put_it(tmp_path: Path) -> None:
    said = run("init", tmp_path / "later")
    (source,) = project(tmp_path / "later").recipe.final_suite.mixture.sources.values()
    assert isinstance(source, Table)
    assert (source.path, source.images) == ("raw/captions.csv", "raw/images")
    assert f"put your table into {tmp_path / 'later/raw/captions.csv'}" in said


TURNS = [{"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "A."}]
CHAT = {"id": "1", "image": "a.png", "conversations": TURNS}
MESSAGES = {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]}


@pytest.mark.parametrize(
    ("name", "text", "kind", "benchmarks"),
    [
        ("c.csv", "image,text\na.png,A red square.\n", "table", {"held_out_loss", "cider"}),
        ("q.tsv", "image\tquestion\ttext\na.png\tQ?\tA.\n", "table", {"held_out_loss", "answer_match"}),
        ("l.json", json.dumps([CHAT]), "llava", {"held_out_loss", "answer_match"}),
        ("m.jsonl", json.dumps(MESSAGES), "messages", {"held_out_loss", "answer_match"}),
        ("f.jsonl", json.dumps({"inputs": "Q?", "targets": "A."}), "flan", {"held_out_loss", "answer_match"}),
    ],
)
def test_the_suites_measure_what_the_data_can_be_measured_by(
    name: str, text: str, kind: str, benchmarks: set[str], tmp_path: Path
) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).write_text(text)
    run("init", tmp_path / "mine", "--data", tmp_path / "raw" / name)
    recipe = project(tmp_path / "mine").recipe
    (source,) = recipe.final_suite.mixture.sources.values()
    assert source.kind == kind
    for suite in (recipe.stage_suite, recipe.final_suite):
        assert set(suite.benchmarks) == benchmarks


@pytest.mark.parametrize(
    ("folder", "name"),
    [("2024", "data-2024"), ("on", "data-on"), ("1e5", "data-1e5"), ("My cats & dogs", "My-cats-dogs"), ("_x", "x")],
)
def test_a_project_has_a_name_that_yaml_and_files_can_hold(folder: str, name: str, tmp_path: Path) -> None:
    run("init", tmp_path / folder)
    assert project(tmp_path / folder, name).recipe.name == name


def test_no_file_is_overwritten_and_none_is_written_beside_one(table: Path, tmp_path: Path) -> None:
    strangers = {
        table / "dvc.yaml": "stages: {}\n",
        tmp_path / "other/configs/models/other.yaml": "mine: true\n",
    }
    for path, text in strangers.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=f"{path} exists, and init overwrites nothing"):
            run("init", table if path.is_relative_to(table) else tmp_path / "other")
        assert path.read_text() == text
        assert sorted(tmp_path.rglob("*")) == before


def test_a_gitignore_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*.log\n")
    run("init", tmp_path)
    assert (tmp_path / ".gitignore").read_text() == "*.log\n"


@pytest.mark.parametrize("data", [".", "captions.csv"])
def test_raw_data_that_contains_the_project_is_refused(data: str, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder, or the images' folder, which would be read again with everything that is prepared into it."""
    monkeypatch.chdir(table)
    with pytest.raises(ValueError, match="contains the project"):
        run("init", ".", "--data", data)
    assert sorted(os.listdir(table)) == ["captions.csv", "images"]


def test_the_default_model_is_the_demo_s_pretrained_parts(tmp_path: Path) -> None:
    run("init", tmp_path / "mine")
    model = read(tmp_path / "mine/configs/models/mine.yaml")
    parts = read(ROOT / "configs/models/smollm2_dinov2.yaml")
    for name in ("vision_tower", "language_model"):
        assert model[name] == parts[name]


def test_dvc_keeps_of_a_project_what_it_keeps_of_this_repository(tmp_path: Path) -> None:
    run("init", tmp_path / "mine")
    ours, theirs = (
        yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]["prepare"] for folder in (ROOT, tmp_path / "mine")
    )
    text = json.dumps({key: ours["do"][key] for key in ("outs", "metrics", "plots")}).replace("${key}", "${item}")
    assert json.loads(text) == {key: theirs["do"][key] for key in ("outs", "metrics", "plots")}
    assert theirs["do"]["deps"] == ["configs", "raw/captions.csv", "raw/images"]


@pytest.mark.parametrize("options", [["--images", "x"], ["--format", "table"], ["-s", "image=file"]])
def test_options_about_data_need_data(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give --data too"):
        run("init", tmp_path / "mine", *options)
    assert not (tmp_path / "mine").exists()
