"""Official benchmarks from their files to a report: sealed, answered shard by shard, scored again without a model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.eval.benchmarks.sample import SAMPLES, config_of
from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import EvalReport, Pretrained
from vila_ops.cli import app
from vila_ops.cli.scores import scores
from vila_ops.config import OfficialSuite, Resources, Run
from vila_ops.config.benchmarks import Pope
from vila_ops.eval import runner, shards
from vila_ops.eval.benchmarks import pope
from vila_ops.eval.evaluate import evaluate, rescore
from vila_ops.eval.job import EvalJob
from vila_ops.eval.report import read_items, read_report
from vila_ops.eval.sealed import SealedImages, items_of, seal_files

PROMPT = {**config_of(Pope).prompt.model_dump(), "answer": {"kind": "generate", "max_new_tokens": 2}}


def suite_of(**changes: Any) -> OfficialSuite:
    config = config_of(Pope, **{"version": None, "prompt": PROMPT, **changes})
    return OfficialSuite(name="official", benchmarks={"pope": config}, bootstrap_resamples=50)


@pytest.fixture(scope="module")
def resources(run: Run) -> Resources:
    return run.resources.with_changes({"storage.benchmarks": str(SAMPLES)})


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images, 24 questions, fill a shard."""
    monkeypatch.setattr(shards, "SHARD", 20)


@pytest.fixture(scope="module")
def report(model: Pretrained, resources: Resources) -> EvalReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 20)
        return evaluate(suite_of(), model, None, resources)


def job_of(model: Pretrained, resources: Resources, suite: OfficialSuite) -> EvalJob:
    files = {name: seal_files(config, resources) for name, config in suite.benchmarks.items()}
    return EvalJob(suite=suite, model=model, files=files, resources=resources)


def test_sealed_files_are_the_official_items_and_images(resources: Resources) -> None:
    config = config_of(Pope, version=None)
    files = seal_files(config, resources)
    assert (files.num_items, files.num_unreadable) == (48, 0)
    items, images = items_of(files), SealedImages(files)
    for item, own in zip(items, pope.read(SAMPLES / "pope", config), strict=True):
        assert (item.id, item.group, item.references, item.slices) == (own.id, own.group, own.references, own.slices)
        (image,) = item.parts["image"]
        assert images(image) == (SAMPLES / "pope/val2014" / item.group).read_bytes()  # type: ignore[arg-type]
    assert len(items_of(files, first=5)) == 5


def test_other_prompts_read_the_same_sealed_files_and_other_files_other_ones(
    resources: Resources, tmp_path: Path
) -> None:
    files = seal_files(config_of(Pope, version=None), resources)
    assert seal_files(config_of(Pope, version=None, failed_items="left_out"), resources) == files
    shutil.copytree(SAMPLES / "pope", tmp_path / "pope")
    moved = resources.with_changes({"storage.benchmarks": str(tmp_path)})
    assert seal_files(config_of(Pope, version=None), moved) == files
    (tmp_path / "pope/val2014/COCO_val2014_000000000001.jpg").unlink()
    assert seal_files(config_of(Pope, version=None), moved).num_unreadable == 12


def test_a_missing_folder_is_told_with_the_way_out(resources: Resources, tmp_path: Path) -> None:
    elsewhere = resources.with_changes({"storage.benchmarks": str(tmp_path)})
    with pytest.raises(ValueError, match=f"from {tmp_path}/pope, which does not exist; put them there"):
        seal_files(config_of(Pope, version=None), elsewhere)


@pytest.mark.slow
def test_every_item_has_a_row_with_what_was_asked_and_answered(
    report: EvalReport, model: Pretrained, resources: Resources
) -> None:
    content = read_report(report)
    assert content.split is content.data is None
    assert content.benchmarks["pope"].num_items == 48
    assert content.benchmarks["pope"].num_clusters == 4
    result = job_of(model, resources, suite_of()).result("pope")
    assert result is not None
    rows = read_items(result)
    assert len(rows) == 48
    for row in rows:
        assert (row.response.status, row.condition, row.rotation, row.shots) == ("ok", "matched", 0, ())
        assert isinstance(row.answer, str)
        assert row.response.prompt_tokens
        assert sum(row.scores.values()) == 2  # one outcome in each column
    assert len({row.response.prompt_hash for row in rows}) == 48
    execution = store.read_manifest(result.uri)["execution"]
    assert len(execution["seconds_of"]) == 48
    answers = store.file(result, "official/coco_pope_random_answers.json").read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in answers] == list(range(1, 25))


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_with_the_shard_it_was_in(
    report: EvalReport, model: Pretrained, resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = resources.with_changes({"storage.store": str(tmp_path / "store")})
    own, answered = runner.Runner.answer, list[int]()

    def dies(of: runner.Runner, name: str, shard: int) -> Any:
        if len(answered) == 1:
            raise KeyboardInterrupt
        answered.append(shard)
        return own(of, name, shard)

    monkeypatch.setattr(runner.Runner, "answer", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(suite_of(), model, None, fresh)
    monkeypatch.setattr(runner.Runner, "answer", own)
    asked = noted(monkeypatch)
    assert evaluate(suite_of(), model, None, fresh).digest == report.digest
    assert (answered, asked) == ([0], [24])


def noted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of requests of each call of a target, filled as they come."""
    own, asked = runner.EngineTarget.answer, list[int]()

    def counted(of: Any, requests: Any, image_of: Any) -> Any:
        asked.append(len(requests))
        return own(of, requests, image_of)

    monkeypatch.setattr(runner.EngineTarget, "answer", counted)
    return asked


def test_other_settings_of_scoring_ask_nothing(
    report: EvalReport, model: Pretrained, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = noted(monkeypatch)
    evaluate(suite_of(failed_items="left_out"), model, None, resources)
    assert asked == []


def test_scoring_again_needs_no_model_and_gives_the_same_digest_twice(
    report: EvalReport, model: Pretrained, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.EngineTarget, "engine", property(lambda of: pytest.fail("a model was loaded")))
    assert rescore(suite_of(), model, None, resources) == report
    assert rescore(suite_of(), model, None, resources).digest == report.digest
    monkeypatch.setattr(pope, "REVISION", pope.REVISION + 1)  # the result is made of the sealed shards
    assert rescore(suite_of(), model, None, resources).digest == report.digest


def test_other_scores_of_one_revision_are_refused(
    report: EvalReport, model: Pretrained, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pope.PARSERS, "official", lambda text: "no")
    with pytest.raises(
        ValueError, match=r"gives the answers of .* other scores than are sealed there; raise the REVISION"
    ):
        rescore(suite_of(), model, None, resources)


def test_what_was_not_answered_cannot_be_scored_again(model: Pretrained, resources: Resources) -> None:
    prompt = {**PROMPT, "hint": "Say yes or no."}
    with pytest.raises(ValueError, match="2 shards of 'pope' were not answered; evaluate it without --rescore"):
        rescore(suite_of(prompt=prompt), model, None, resources)


@pytest.mark.slow
def test_an_image_that_is_missing_is_a_status_and_an_image_passes_the_tower_once(
    model: Pretrained, resources: Resources, tmp_path: Path
) -> None:
    shutil.copytree(SAMPLES / "pope", tmp_path / "files/pope")
    (tmp_path / "files/pope/val2014/COCO_val2014_000000000001.jpg").unlink()
    places = {"storage.benchmarks": str(tmp_path / "files"), "storage.store": str(tmp_path / "store")}
    fresh = resources.with_changes({**places, "storage.features_leave_free": 0.0})
    content = read_report(evaluate(suite_of(), model, None, fresh))
    assert content.benchmarks["pope"].failed == {"unreadable": 12}
    features = list((tmp_path / "store/features").rglob("*.features"))
    assert len(features) == 3, "one file for each image that could be read, for twelve questions each"


def test_questions_of_one_image_are_sealed_with_the_reason_why_they_have_no_number(
    model: Pretrained, resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    suite = suite_of(first=3)
    with caplog.at_level("INFO"):
        report = read_report(evaluate(suite, model, None, resources))
    told = [record.message for record in caplog.records if record.name == "vila_ops.progress"]
    assert told[-1].startswith("pope request 3/3  ")
    assert told[-1].endswith(" requests/s  0:00 left")
    assert report.metrics == ()
    result = job_of(model, resources, suite).result("pope")
    assert result is not None
    assert len(read_items(result)) == 3
    reason = "3 items in 1 clusters; an interval needs at least two clusters"
    assert f"pope: no pope_f1_official: {reason}" in scores(report)


def test_a_shard_is_one_file_of_responses(report: EvalReport, resources: Resources) -> None:
    manifests = list(Path(resources.storage.store).glob("answers/*/manifest.json"))
    names = [sorted(json.loads(path.read_text())["files"]) for path in manifests]
    assert names
    assert {tuple(one) for one in names} == {(runner.RESPONSES,)}


@pytest.mark.slow
def test_the_command_of_the_page_prints_the_numbers_and_scores_again(
    run: Run, model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(SAMPLES.parents[1])
    storage, page = run.resources.storage, tmp_path / "evaluation.html"
    command = [
        *("evaluate", "configs/recipes/tiny.yaml", "--stage", "base", "--suite", "configs/suites/sample.yaml"),
        *("-s", "resources.storage.benchmarks=docs/samples", "-s", f"resources.storage.store={storage.store}"),
        *("-s", f"resources.storage.cache={storage.cache}"),
    ]
    first, again = (CliRunner().invoke(app, [*command, *more]) for more in (["--out", str(page)], ["--rescore"]))
    assert first.exit_code == 0, first.output
    assert "pope_random_f1" in page.read_text()
    assert again.stdout == first.stdout
    line, *_ = [line for line in first.stdout.splitlines() if line.startswith("pope_f1_official ")]
    assert line.split()[1] == "model"
