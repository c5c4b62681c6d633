"""A report is composed of one result for each benchmark: what was measured once is not measured again."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import BenchmarkResult, Dataset, EvalReport, Pretrained
from vila_ops.artifacts.leases import registers
from vila_ops.config import Run, Suite
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.eval import runner
from vila_ops.eval.benchmarks.held_out import held_out_pope
from vila_ops.eval.evaluate import evaluate
from vila_ops.eval.job import EvalJob
from vila_ops.eval.report import Report, read_items, read_report

ROOT = Path(__file__).parents[2]
BENCHMARKS = {
    "caption_loss": {"kind": "caption_loss"},
    "pope": {"kind": "held_out_pope"},
    "text_loss": {"kind": "text_loss"},
}


@pytest.fixture(scope="module")
def data(run: Run) -> Dataset:
    suite = run.recipe.final_suite
    return prepare(suite.mixture, run.recipe.text(max_tokens=suite.max_tokens), run.resources)


@pytest.fixture(scope="module")
def suite(run: Run) -> Suite:
    """Three benchmarks."""
    return suite_with(run, BENCHMARKS)


@pytest.fixture(scope="module")
def measure(run: Run, model: Pretrained, data: Dataset) -> Callable[[Suite], tuple[EvalReport, set[str]]]:
    """The report of a suite, and the kinds of the benchmarks that were measured for it."""

    def make(suite: Suite) -> tuple[EvalReport, set[str]]:
        before = sealed(run)
        report = evaluate(suite, model, data, run.resources)
        return report, {benchmark for address, benchmark in sealed(run).items() if address not in before}

    return make


Measure = Callable[[Suite], tuple[EvalReport, set[str]]]


def suite_with(run: Run, benchmarks: dict[str, Any], **changes: Any) -> Suite:
    return Suite.model_validate({**run.recipe.stage_suite.model_dump(), "benchmarks": benchmarks, **changes})


def sealed(run: Run) -> dict[str, str]:
    """The sealed results in the store: the kind of the benchmark by address."""
    manifests = Path(run.resources.storage.store).glob("score/*/manifest.json")
    return {path.parent.name: json.loads(path.read_text())["facts"]["benchmark"] for path in manifests}


@pytest.mark.slow
def test_a_suite_is_measured_once_and_renamed_it_measures_nothing(run: Run, suite: Suite, measure: Measure) -> None:
    first, measured = measure(suite)
    assert measured == {"caption_loss", "held_out_pope", "text_loss"}
    assert measure(suite) == (first, set())
    renamed, measured = measure(suite_with(run, BENCHMARKS, name="renamed"))
    assert measured == set()
    assert renamed.suite == "renamed"
    assert read_report(renamed) == Report(**{**dict(read_report(first)), "suite": "renamed"})


def test_one_more_benchmark_is_one_more_measurement(run: Run, suite: Suite, measure: Measure) -> None:
    measure(suite)
    larger, measured = measure(suite_with(run, {"words": {"kind": "text_multiple_choice"}, **BENCHMARKS}))
    assert measured == {"text_multiple_choice"}
    assert [metric.name for metric in read_report(larger).metrics][:3] == ["words", "words", "caption_loss"]


def test_a_benchmark_whose_revision_is_raised_is_measured_again_alone(
    suite: Suite, measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, _ = measure(suite)
    monkeypatch.setattr(held_out_pope, "REVISION", held_out_pope.REVISION + 1)
    again, measured = measure(suite)
    assert measured == {"held_out_pope"}
    assert again == report  # of equal results


def test_a_setting_of_one_benchmark_measures_that_one_and_one_of_the_suite_all(
    run: Run, suite: Suite, measure: Measure
) -> None:
    measure(suite)
    assert measure(suite_with(run, {**BENCHMARKS, "pope": {"kind": "held_out_pope", "control": "none"}}))[1] == {
        "held_out_pope"
    }
    assert measure(suite_with(run, BENCHMARKS, seed=1))[1] == {"caption_loss", "held_out_pope", "text_loss"}


def test_metrics_have_the_suites_names_and_equal_benchmarks_are_measured_once(run: Run, measure: Measure) -> None:
    named = {name: {"kind": "held_out_pope", "control": "none"} for name in ("objects", "again")}
    content = read_report(measure(suite_with(run, named, seed=2))[0])
    assert {(metric.name, metric.measure) for metric in content.metrics} == {
        (f"{name}_{measure}", f"held_out_pope_{measure}")
        for name in ("objects", "again")
        for measure in ("accuracy", "f1", "yes_ratio")
    }
    assert content.benchmarks["objects"] == content.benchmarks["again"]


def test_a_report_leads_to_the_scores_of_each_item(
    run: Run, model: Pretrained, data: Dataset, suite: Suite, measure: Measure
) -> None:
    report = measure(suite)[0]
    content = read_report(report)
    job = EvalJob(suite=suite, model=model, data=data, resources=run.resources)
    result = job.result("caption_loss")
    assert isinstance(result, BenchmarkResult)
    reference = content.benchmarks["caption_loss"]
    assert result.uri == f"{store.root_of(run.resources.storage.store)}/{reference.address}"
    assert result.digest == reference.digest
    assert report.parents == (
        model.digest,
        data.digest,
        *(content.benchmarks[name].digest for name in suite.benchmarks),
    )
    rows = [row for row in read_items(result) if row.condition == "matched"]
    assert len(rows) == reference.num_items == 10
    nats, tokens = (sum(row.scores[column] for row in rows) for column in ("nats", "tokens"))
    (metric,) = [one for one in content.metrics if (one.name, one.role) == ("caption_loss", "model")]
    assert metric.value == pytest.approx(nats / tokens)


def test_the_lease_of_one_benchmark_is_held_at_a_time(
    run: Run, measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So another process that needs an earlier one of this suite does not wait for the later ones."""
    held: list[tuple[str, list[str]]] = []
    own = runner.Runner.conclude

    def noted(of: runner.Runner, name: str) -> Any:
        leases = registers(run.resources.storage.store)
        held.append((of.job.address(name).key, [at.partition("/")[2] for at, is_held in leases.items() if is_held]))
        return own(of, name)

    monkeypatch.setattr(runner.Runner, "conclude", noted)
    assert measure(suite_with(run, BENCHMARKS, seed=3))[1] == {"caption_loss", "held_out_pope", "text_loss"}
    assert len(held) == 3
    assert all(leases == [key] for key, leases in held)


@pytest.mark.slow
def test_a_report_that_is_found_or_only_composed_loads_no_model(
    run: Run, model: Pretrained, data: Dataset, suite: Suite, measure: Measure
) -> None:
    report = measure(suite)[0]
    job = EvalJob(suite=suite, model=model, data=data, resources=run.resources)
    found, composed = (EvalReport.model_validate_json(line) for line in run_python(WITHOUT_A_MODEL, job))
    assert found == report
    assert composed.suite == "composed"


@pytest.mark.slow
def test_a_benchmark_of_a_third_party_package_gives_its_metric_and_its_version_is_in_the_address(
    run: Run, model: Pretrained, data: Dataset, tmp_path: Path
) -> None:
    suite = {**run.recipe.stage_suite.model_dump(mode="json"), "benchmarks": {"words": {"kind": "words_seen"}}}
    job = json.dumps(
        {
            "suite": suite,
            "model": model.model_dump(),
            "data": data.model_dump(),
            "resources": run.resources.model_dump(),
        }
    )
    sites = [
        install(tmp_path, version=version, revision=raised) for version, raised in (("1.0", 1), ("1.1", 1), ("1.1", 2))
    ]
    measured = json.loads(run_python(EVALUATE, job, site=sites[0])[-1])
    assert [(one["name"], one["measure"], one["value"], one["n"]) for one in measured["metrics"]] == [
        ("words_first", "words_seen_first", 1.0, 10)
    ]
    addresses = [run_python(ADDRESS, job, site=site)[-1] for site in sites]
    assert addresses[0] == measured["benchmarks"]["words"]["address"]
    assert len(set(addresses)) == 3
    manifest = store.read_manifest(f"{run.resources.storage.store}/{addresses[0]}")
    assert manifest["recipe"]["plugin"] == {"package": "seen-words", "version": "1.0", "revision": 1}
    with pytest.raises(ValueError, match="words_seen"):
        Suite.model_validate(suite)  # this process has no such package


@pytest.mark.ray
def test_an_actor_of_a_cluster_seals_the_same_results(
    run: Run,
    model: Pretrained,
    data: Dataset,
    suite: Suite,
    measure: Measure,
    ray_cluster: str,
    tmp_path: Path,
) -> None:
    report = measure(suite)[0]
    changes = {
        "launch": "ray", "ray_address": ray_cluster, "storage.store": str(tmp_path / "store"),
        "evaluate.num_workers": 2,
    }  # fmt: skip
    job = EvalJob(suite=suite, model=model, data=data, resources=run.resources.with_changes(changes))
    on_ray = json.loads(run_python(EVALUATE, job)[-1])
    assert on_ray == json.loads(read_report(report).model_dump_json())
    elsewhere = job.with_changes({"resources.storage.store": str(tmp_path / "dead")})
    assert run_python(DEAD_ACTOR, elsewhere)[-1] == read_report(report).benchmarks["caption_loss"].digest
    refused, finding = run_python(ON_GPU, job)[-2:]
    assert f"device is cuda, but the cluster at {ray_cluster} has no GPU; add a node with one" in refused
    assert finding == f"device: {refused}"


DEAD_ACTOR = """
import os
import sys
from pathlib import Path
import ray
import torch
from vila_ops.eval.job import EvalJob
from vila_ops.eval.ray_workers import Evaluator, RayWorkers

job = EvalJob.model_validate_json(Path(sys.argv[1]).read_text())
workers = RayWorkers(job)
shards = range(len(workers.plan("caption_loss")))


@ray.remote(num_cpus=0)
class Dies:
    def start(self):
        pass

    def answer(self, name, shard):
        os._exit(1)


workers._actors.append(Dies.remote())
ray.get(workers._actors[1].start.remote())
assert sorted(workers.answer_all("caption_loss", shards)) == list(shards)


class Lost:
    def conclude(self, name):
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")


class LosesItsDevice(Evaluator.__ray_metadata__.modified_class):
    def __init__(self, job):
        super().__init__(job)
        self._runner = Lost()


lost = workers._actors[0] = ray.remote(num_cpus=0)(LosesItsDevice).remote(job.model_dump_json())
workers.conclude("caption_loss")
assert workers._actors[0] is not lost
print(job.result("caption_loss").digest)
workers.close()
"""
ON_GPU = """
import sys
from pathlib import Path
from vila_ops.cluster import device_on
from vila_ops.doctor import device_findings
from vila_ops.errors import ClusterFull
from vila_ops.eval.job import EvalJob

resources = EvalJob.model_validate_json(Path(sys.argv[1]).read_text()).resources
resources = resources.with_changes({"device": "cuda"})
try:
    device_on(resources, resources.device)
except ClusterFull as error:
    print(error)
print(*(one.text for one in device_findings(resources) if not one.ok))
"""
WITHOUT_A_MODEL = """
import sys
from pathlib import Path
from vila_ops.eval.evaluate import evaluate
from vila_ops.eval.job import EvalJob

job = EvalJob.model_validate_json(Path(sys.argv[1]).read_text())
for suite in (job.suite, job.suite.with_changes({"name": "composed"})):
    print(evaluate(suite, job.model, job.data, job.resources).model_dump_json())
assert not {"torch", "ray", "transformers", "mlflow", "boto3"} & set(sys.modules), sorted(sys.modules)
"""
EVALUATE = """
import sys
from pathlib import Path
from vila_ops.eval.evaluate import evaluate
from vila_ops.eval.job import EvalJob
from vila_ops.eval.report import read_report

job = EvalJob.model_validate_json(Path(sys.argv[1]).read_text())
print(read_report(evaluate(job.suite, job.model, job.data, job.resources)).model_dump_json())
"""
ADDRESS = """
import sys
from pathlib import Path
from vila_ops.eval.job import EvalJob

address = EvalJob.model_validate_json(Path(sys.argv[1]).read_text()).address("words")
print(f"{address.kind}/{address.key}")
"""
PLUGIN = """
from typing import Literal

import numpy as np

from vila_ops.config import Config as Base
from vila_ops.eval.benchmark import MetricValues, ScoreRequest, Units
from vila_ops.eval.benchmarks.held_out.items import word_items
from vila_ops.generate.request import Prompt

REVISION = {revision}


class Config(Base):
    kind: Literal["words_seen"] = "words_seen"


def read(source, config):
    return word_items(source.inputs)


def requests(items, config, tokenizer):
    context, text_ids = tokenizer().context, tokenizer().text_ids
    return [ScoreRequest(item=i.id, prompt=Prompt(context), continuations=(text_ids(i.word),)) for i in items]


def score(items, rows, config):
    return [{{"first": float(row.response.nats[0] > 0)}} for row in rows]


def metrics(items, rows, config):
    return [MetricValues("words_seen_first", Units.of(rows), np.array([row.scores["first"] for row in rows]))]
"""


def install(root: Path, *, version: str, revision: int) -> Path:
    """A folder with a package that has one benchmark, as pip lays it out."""
    site = root / f"{version}-{revision}"
    facts = site / f"seen_words-{version}.dist-info"
    facts.mkdir(parents=True)
    (site / "seen_words.py").write_text(PLUGIN.format(revision=revision))
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: seen-words\nVersion: {version}\n")
    (facts / "entry_points.txt").write_text("[vila_ops.benchmarks]\nwords_seen = seen_words\n")
    return site


def run_python(program: str, job: EvalJob | str, *, site: Path | None = None) -> list[str]:
    """The lines that a program prints in a fresh process, given a file with the job."""
    text = job if isinstance(job, str) else job.model_dump_json()
    paths = [str(path) for path in (site, ROOT) if path is not None]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(text)
        file.flush()
        done = subprocess.run(
            [sys.executable, "-c", program, file.name],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True,
            timeout=1200, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
