"""Records left out by name: what else a dataset holds stays as it is, and the config says so in one line."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from vila_ops.artifacts.disk import sha256
from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.store import content, verify
from vila_ops.cli import app
from vila_ops.config import Mixture, Resources, load, quarantine
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.shards import read_index

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/recipes/tiny.yaml"
NAMES = ("pairs", "documents")


@pytest.fixture(scope="module")
def resources(make_resources: Any, tmp_path_factory: pytest.TempPathFactory) -> Resources:
    made: Resources = make_resources(tmp_path_factory.mktemp("quarantine"))
    return made


@pytest.fixture(scope="module")
def whole(make_mixture: Any, make_text: Any, resources: Resources) -> Dataset:
    return prepare(make_mixture(*NAMES, long_documents="split"), make_text(), resources)


def index(dataset: Dataset) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_index(content(dataset)).to_pylist()
    return rows


def test_all_but_the_records_that_are_left_out_stays_byte_for_byte(
    whole: Dataset, make_mixture: Any, make_text: Any, resources: Resources
) -> None:
    """Two records with an image and a document of several pieces; every number is told from the rows that are left."""
    rows = index(whole)
    pieces = Counter(row["id"] for row in rows if row["source"] == "documents")
    document = max(pieces, key=lambda one: pieces[one])
    assert pieces[document] > 1
    pairs = [row["id"] for row in rows if row["source"] == "pairs"][3:5]
    out = {"pairs": pairs, "documents": [document]}
    shards = {path: path.stat().st_mtime_ns for path in Path(resources.storage.store).glob("shard/*/manifest.json")}
    made = prepare(make_mixture(*NAMES, long_documents="split", quarantine=out), make_text(), resources)
    verify(made)
    assert made.parents == whole.parents
    assert made.digest != whole.digest
    left = [row for row in rows if row["id"] not in out[row["source"]]]
    assert index(made) == left
    assert made.num_samples == len(left) == len(rows) - 2 - pieces[document]
    assert made.num_tokens == sum(row["num_tokens"] for row in left)
    tars = [{path.name: sha256(path) for path in content(one).glob("*.tar")} for one in (whole, made)]
    assert tars[0] == tars[1]
    assert shards == {
        path: path.stat().st_mtime_ns for path in Path(resources.storage.store).glob("shard/*/manifest.json")
    }
    summary = json.loads((content(made) / "summary.json").read_text())
    before = json.loads((content(whole) / "summary.json").read_text())
    for name, found in summary["sources"].items():
        own = [row for row in left if row["source"] == name]
        assert found["samples"] == Counter(row["split"] for row in own)
        assert found["licences"] == Counter(row["licence"] for row in own)
        for key in ("tokens", "images"):
            sums: Counter[str] = Counter()
            for row in own:
                sums[row["split"]] += row[f"num_{key}"]
            assert found[key] == dict(sums)
        assert found["records"] == before["sources"][name]["records"]
        assert found["taken_out"] == {**before["sources"][name]["taken_out"], "quarantined": len(out[name])}
        assert found["bad"] == before["sources"][name]["bad"]
    dropped = [
        row for row in pq.read_table(content(made) / "dropped.parquet").to_pylist() if row["reason"] == "quarantined"
    ]
    assert {(row["source"], row["id"]) for row in dropped} == {(name, one) for name in out for one in out[name]}
    gone = {row["key"] for row in rows} - {row["key"] for row in left}
    assert {place.rpartition(":")[2] for row in dropped for place in row["where"].split()} == gone
    assert "`quarantined` | 2 |" in (content(made) / "README.md").read_text()


def test_a_mixture_without_quarantine_is_asked_for_as_before(make_mixture: Any) -> None:
    """Its identity has no word of it: what was prepared before stays found."""
    assert "quarantine" not in make_mixture("pairs").model_dump(mode="json")
    assert make_mixture("pairs").fingerprint() == make_mixture("pairs", quarantine={}).fingerprint()
    assert make_mixture("pairs").fingerprint() != make_mixture("pairs", quarantine={"pairs": ["a"]}).fingerprint()


def test_a_record_that_is_not_there_and_a_source_that_is_not_there_are_refused(
    make_mixture: Any, make_text: Any, resources: Resources
) -> None:
    with pytest.raises(ValueError, match=r"names 'nobody' of source 'pairs', of which there is no sample \(1 such"):
        prepare(make_mixture("pairs", quarantine={"pairs": ["nobody"]}), make_text(), resources)
    for wrong, said in (
        ({"pears": ["a"]}, "no sources"),
        ({"pairs": ["a", "a"]}, "twice"),
        ({"pairs": []}, "at least 1"),
    ):
        with pytest.raises(ValidationError, match=said):
            make_mixture("pairs", quarantine=wrong)


BLOCK = """\
# Mine, and what I think of it.
name: mine   # the name
sources:
  pairs: {kind: jsonl, path: tests/tiny/pairs, render: caption}  # images
"""
RECIPES = {
    "file": ("stages:\n  align: {mixture: {extends: [mine.yaml], name: mine}}\n", 2),
    "block": ("stages:\n  align:\n    mixture:\n      extends: [mine.yaml]\n      name: other # by another\n", 1),
    "flow": ("stages: {align: {mixture: {extends: [mine.yaml], name: other}}}\n", 1),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_mixture_is_given_one_line_and_loses_nothing(kind: str, tmp_path: Path) -> None:
    """Where it is described in a file of its own, in a recipe's lines, or in its braces."""
    text, lines = RECIPES[kind]
    (tmp_path / "mine.yaml").write_text(BLOCK)
    (tmp_path / "split.yaml").write_text("split: {salt: tiny, validation: 0.2, test: 0.3}\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: [{TINY}]\n{text}")
    inline = ROOT / "configs/resources/inline.yaml"
    split = {"salt": "tiny", "validation": 0.2, "test": 0.3}
    overrides = (f"stages.align.mixture.split={json.dumps(split)}",)
    name = "mine" if kind == "file" else "other"
    before = {path: path.read_text() for path in tmp_path.glob("*.yaml")}
    was = load(recipe, resources=inline, overrides=overrides).recipe.stages["align"].mixture
    for records in ({"pairs": ["b", "1e5"]}, {"pairs": ["a", "b", "é: {#"]}):
        quarantine.add(recipe, name, records)
    now = load(recipe, resources=inline, overrides=overrides).recipe.stages["align"].mixture
    assert now.quarantine == {"pairs": ("1e5", "a", "b", "é: {#")}
    assert Mixture.model_validate({**now.model_dump(), "quarantine": {}}) == was
    file = tmp_path / f"quarantine/{name}.yaml"
    assert yaml.safe_load(file.read_text()) == {"pairs": ["1e5", "a", "b", "é: {#"]}
    added = f"quarantine: {{extends: [quarantine/{name}.yaml]}}"
    after = {path: path.read_text() for path in before}
    assert sum(text.count(added) for text in after.values()) == lines
    for path, text in after.items():
        assert text.replace(f"{added}, ", "").replace(f"      {added}\n", "").replace(f"{added}\n", "") == before[path]


def test_the_command_makes_a_revision_and_undoes_its_edit_where_that_fails(
    resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe, asked = tmp_path / "own.yaml", tmp_path / "resources.yaml"
    services = ROOT / "configs/services/default.yaml"
    recipe.write_text(TINY.read_text().replace("../services/default.yaml", str(services)))
    asked.write_text(yaml.safe_dump(resources.model_dump(mode="json", exclude_none=True)))
    command = ["data", "quarantine", str(recipe), "-r", str(asked), "--mixture", "tiny_align"]
    before = recipe.read_text()
    refused = CliRunner().invoke(app, [*command, "--sample", "nothing-000000"])
    assert "has no samples ['nothing-000000']" in str(refused.exception)
    assert recipe.read_text() == before
    run = load(recipe, resources=asked)
    was = prepare(run.recipe.stages["align"].mixture, run.recipe.text("align"), run.resources)
    row, other = index(was)[0], index(was)[-1]
    done = CliRunner().invoke(app, [*command, "--sample", row["key"], "--json"])
    assert done.exit_code == 0, done.output
    made = Dataset.model_validate_json(done.stdout)
    assert index(made) == [one for one in index(was) if one["id"] != row["id"]]
    assert load(recipe, resources=asked).recipe.stages["align"].mixture.quarantine == {"pairs": (row["id"],)}
    again = CliRunner().invoke(app, [*command, "--sample", other["key"], "--json"])
    assert index(Dataset.model_validate_json(again.stdout)) == [
        one for one in index(was) if one["id"] not in (row["id"], other["id"])
    ]
    texts = {path: path.read_text() for path in tmp_path.rglob("*.yaml")}
    stopped = {"stage": "align", "mixture": "tiny_align", "data": was.digest, "step": 1, "what": "loss", "value": "nan"}
    samples = [{"key": "k", "source": "pairs", "id": "nobody"}]
    (tmp_path / "stopped.json").write_text(json.dumps({**stopped, "samples": samples}))
    failed = CliRunner().invoke(app, [*command, "--from", str(tmp_path / "stopped.json")])
    assert "'nobody' of source 'pairs', of which there is no sample" in str(failed.exception)
    assert {path: path.read_text() for path in tmp_path.rglob("*.yaml")} == texts


@pytest.fixture
def own_recipe(resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A recipe of a user's own, and resources."""
    monkeypatch.chdir(ROOT)
    recipe, asked = tmp_path / "own.yaml", tmp_path / "resources.yaml"
    services = ROOT / "configs/services/default.yaml"
    recipe.write_text(TINY.read_text().replace("../services/default.yaml", str(services)))
    asked.write_text(yaml.safe_dump(resources.model_dump(mode="json", exclude_none=True)))
    return recipe, asked


@pytest.mark.parametrize("killed", ["while it writes", "before it is prepared", "after all"])
def test_the_command_that_was_killed_goes_on_where_it_was(killed: str, own_recipe: tuple[Path, Path]) -> None:
    recipe, asked = own_recipe
    run = load(recipe, resources=asked)
    was = prepare(run.recipe.stages["align"].mixture, run.recipe.text("align"), run.resources)
    row, other = index(was)[2], index(was)[3]
    command = ["data", "quarantine", str(recipe), "-r", str(asked), "--mixture", "tiny_align", "--json"]
    before = recipe.read_text()
    quarantine.add(recipe, "tiny_align", {row["source"]: [row["id"]]})
    if killed == "while it writes":  # the ids come first
        recipe.write_text(before)
    if killed == "after all":
        assert CliRunner().invoke(app, [*command, "--sample", row["key"]]).exit_code == 0
    done = CliRunner().invoke(app, [*command, "--sample", row["key"]])
    assert done.exit_code == 0, done.output
    assert index(Dataset.model_validate_json(done.stdout)) == [one for one in index(was) if one["id"] != row["id"]]
    says = f"tiny_align: already quarantined: {row['source']} {row['id']}"
    assert (says in done.stderr) == (killed != "while it writes")
    both = CliRunner().invoke(app, [*command, "--sample", row["key"], "--sample", other["key"]])
    assert says in both.stderr
    gone = {row["id"], other["id"]}
    assert index(Dataset.model_validate_json(both.stdout)) == [one for one in index(was) if one["id"] not in gone]


def test_what_is_edited_while_it_is_prepared_is_not_undone(own_recipe: tuple[Path, Path]) -> None:
    recipe, _ = own_recipe
    edits = quarantine.add(recipe, "tiny_align", {"pairs": ["a"]})
    file = recipe.parent / "quarantine/tiny_align.yaml"
    assert edits.keys() == {recipe, file}
    recipe.write_text(recipe.read_text() + "# mine\n")
    now = recipe.read_text()
    quarantine.restore(edits)
    assert recipe.read_text() == now
    assert not file.exists()


def test_files_of_a_user_keep_comments_line_ends_and_modes(own_recipe: tuple[Path, Path]) -> None:
    recipe, _ = own_recipe
    recipe.write_bytes(recipe.read_bytes().replace(b"\n", b"\r\n"))
    recipe.chmod(0o640)
    text = recipe.read_bytes()
    quarantine.add(recipe, "tiny_align", {"pairs": ["a"]})
    lines = recipe.read_bytes().splitlines(keepends=True)
    assert b"".join(line for line in lines if b"quarantine:" not in line) == text
    assert recipe.stat().st_mode & 0o777 == 0o640
    file = recipe.parent / "quarantine/tiny_align.yaml"
    file.write_text('# Why: blurred.\npairs: [b, "c#1"]  \n')
    quarantine.add(recipe, "tiny_align", {"pairs": ["a"]})
    assert file.read_text() == '# Why: blurred.\n"pairs":\n- "a"\n- "b"\n- "c#1"\n'
    file.write_text("pairs:\n  - b  # blurred\n")
    with pytest.raises(ValueError, match=r"has comments among its ids, which would be lost: .*\{'pairs': \['a'\]\}"):
        quarantine.add(recipe, "tiny_align", {"pairs": ["a"]})
    assert file.read_text() == "pairs:\n  - b  # blurred\n"
