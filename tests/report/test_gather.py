"""A measured suite on its page and in MLflow."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.eval.benchmarks.sample import SAMPLES, config_of
from tests.report.parsed import Page, check_accessible, check_loads_nothing
from vila_ops.config import OfficialSuite, load
from vila_ops.config.benchmarks import Pope, TextVqa
from vila_ops.eval.evaluate import evaluate, job_of
from vila_ops.eval.report import read_report, tracked
from vila_ops.model.assemble import assemble
from vila_ops.report import evaluation

ROOT = Path(__file__).parents[2]


def short(kind: type[Pope] | type[TextVqa], **changes: object) -> object:
    prompt = config_of(kind, **changes).prompt.model_dump()
    return config_of(kind, **changes, prompt={**prompt, "answer": {"kind": "generate", "max_new_tokens": 2}})


@pytest.mark.slow
def test_a_suite_is_on_its_page_and_in_mlflow(tmp_path: Path, empty_database: Path) -> None:
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    where = {
        "storage.store": tmp_path / "store", "storage.cache": tmp_path / "cache", "storage.benchmarks": SAMPLES,
        "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db",
    }  # fmt: skip
    overrides = tuple(f"resources.{key}={value}" for key, value in where.items())
    run = load(
        ROOT / "configs/recipes/tiny.yaml", resources=ROOT / "configs/resources/inline.yaml", overrides=overrides
    )
    benchmarks = {"z": short(Pope, version=None), "a": short(TextVqa)}  # neither order is the other
    suite = OfficialSuite.model_validate({"name": "two", "benchmarks": benchmarks, "bootstrap_resamples": 50})
    model = assemble(run.recipe.model, run.resources)
    sealed = evaluate(suite, model, None, run.resources)

    job = job_of(suite, model, None, run.resources)
    content = evaluation.gather(job, sealed)
    assert [part.name for part in content.parts] == ["z", "a"]
    for part in content.parts:
        assert part.metrics
        assert all(metric.name.startswith(f"{part.name}_") for metric in part.metrics)
        assert all(one.name.startswith(f"{part.name}_") for one in part.slices)
    html = evaluation.render(content)
    assert evaluation.render(evaluation.gather(job, sealed)) == html
    assert str(tmp_path) not in html
    check_loads_nothing(html)
    check_accessible(html)
    text = Page(html).text
    for metric in read_report(sealed).metrics:
        assert f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]" in text
    for origin in (sealed, model, *job.files.values()):
        assert origin.digest in text

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "vila"]
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.data.metrics == pytest.approx(tracked(read_report(sealed)))
    inputs = {one.dataset.name: one.dataset.digest for one in logged.inputs.dataset_inputs}
    assert inputs == {name: files.digest[:36] for name, files in job.files.items()}
    paths = [one["path"] for one in json.loads(logged.data.tags["mlflow.loggedArtifacts"])]
    assert paths == ["items/z.json", "images/z.json", "items/a.json", "images/a.json"]
    tables = [json.loads(Path(client.download_artifacts(logged.info.run_id, path)).read_text()) for path in paths]
    assert [len(table["data"]) for table in tables] == [48, 4, 4, 3]  # four and three images
