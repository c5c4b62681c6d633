"""Registering is idempotent, also in several processes at once, and only the gate moves the champion."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from typer.testing import CliRunner

from tests.eval.charts import METRIC, PARTS, sealed_report, suite_of, write_charts
from tests.forks import Fork
from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Checkpoint, Dataset, EvalReport, ModelVersion
from vila_ops.cli import app
from vila_ops.config import NO_CONTEXT, Gate, Resources, Run, load
from vila_ops.config.eval import Rule
from vila_ops.errors import CorruptArtifact, PromotionRaceLost, is_final
from vila_ops.pipeline.promotion import register_model
from vila_ops.pipeline.stages import Tasks
from vila_ops.registry import alias_register
from vila_ops.registry.register import champion, register, report_of

ROOT = Path(__file__).parents[2]
RECIPE = load(ROOT / "configs/recipes/tiny.yaml", resources=ROOT / "configs/resources/inline.yaml").recipe
RULE = Rule(metric=METRIC, at_least=0.5, max_regression=0.05)
GATE = Gate(model_name="toy's model", rules=(RULE,))
ITEMS = [f"{part}-{chart}" for part in PARTS for chart in range(10)]
"""Two questions on each of ten charts."""


@pytest.fixture
def resources(tmp_path: Path, empty_database: Path) -> Resources:
    """A registry and a store of this test."""
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    where = {f"storage.{name}": str(tmp_path / name) for name in ("store", "cache", "data")}
    files = {"storage.benchmarks": str(write_charts(tmp_path / "files", 10))}
    return Resources(launch="inline").with_changes({**where, **files, "tracking.uri": uri})


def client(resources: Resources) -> MlflowClient:
    """MLflow's own client."""
    return MlflowClient(resources.tracking.uri, registry_uri=resources.tracking.uri)


def checkpoint(resources: Resources, name: str) -> Checkpoint:
    """A sealed checkpoint whose weights are its name."""
    root = resources.storage.store
    stage = RECIPE.stages["sft"].model_dump(mode="json", exclude={"mixture"})
    at = store.address(Checkpoint, revision=0, recipe={"stage": stage, "seed": name}, parents=("data", "init"))
    attempt = store.begin(at, store=root)
    (attempt / "model.safetensors").write_text(name)
    execution = {"model": RECIPE.model.model_dump(mode="json")}
    return store.seal(Checkpoint, at, attempt, facts={"stage": "sft", "step": 7}, execution=execution)


def report(resources: Resources, model: Checkpoint, share: float, *, suite: str = "probe") -> EvalReport:
    """The sealed report of a model that answers the first items right, such a share of them."""
    quiet = resources.with_changes({"tracking.uri": None})
    return sealed_report(quiet, model, ITEMS[: round(share * len(ITEMS))], suite_of(suite))


def registered(resources: Resources, name: str, share: float, *, against: EvalReport | None = None) -> ModelVersion:
    """A checkpoint through the task."""
    model = checkpoint(resources, name)
    return register(GATE, model, report(resources, model, share), against, resources)


def aliases(resources: Resources) -> dict[str, int]:
    """What MLflow shows."""
    shown = client(resources).get_registered_model(GATE.model_name).aliases
    return {alias: int(version) for alias, version in shown.items()}


def moved(version: ModelVersion, resources: Resources, *, over: int | None) -> None:
    """A version made champion in the store alone."""
    alias_register.move(version.name, {"champion": version}, over=over, reason="", store=resources.storage.store)


def judged(version: ModelVersion, resources: Resources) -> EvalReport:
    """The report by which a version was judged."""
    return report_of(version.name, str(version.version), resources)


@pytest.mark.slow
def test_a_version_names_what_it_is_made_of_and_no_weights_are_uploaded(resources: Resources) -> None:
    model = checkpoint(resources, "one")
    measured = report(resources, model, 0.75)
    version = register(GATE, model, measured, None, resources)
    assert version == ModelVersion(name=GATE.model_name, version=1, checkpoint=model, promoted=True)
    stored = client(resources).get_model_version(GATE.model_name, "1")
    assert stored.source == f"vila-store://{model.uri}"
    expected = {
        "digest": model.digest,
        "stage": "sft",
        "step": "7",
        "parents": '["data", "init"]',
        "report.digest": measured.digest,
        "gate.status": "passed",
        "gate.reason": f"{METRIC} 0.75 is at least 0.5; {METRIC} 0.75 has no champion to be compared with",
        "ready": "true",
    }
    assert expected.items() <= stored.tags.items()
    assert judged(version, resources) == measured
    assert "0.75 is at least 0.5" in stored.description
    assert "| sft | projector, language model | 7 | 2 | 0.0002 | lost |" in stored.description
    assert "- The store does not have the data of sft any more" in stored.description


def test_a_description_that_a_person_wrote_stays_and_a_card_gives_way_to_a_newer_one(resources: Resources) -> None:
    mlflow, milder = client(resources), Gate(model_name=GATE.model_name, rules=(Rule(metric=METRIC, at_least=0.2),))
    model = registered(resources, "one", 0.75).checkpoint
    measured = report(resources, model, 0.75)
    register(milder, model, measured, None, resources)
    card = mlflow.get_model_version(GATE.model_name, "1").description
    assert "0.75 is at least 0.2" in card
    assert card.startswith("# toy's model version 1\n")
    mlflow.update_model_version(GATE.model_name, "1", description="ours")
    register(GATE, model, measured, None, resources)
    assert mlflow.get_model_version(GATE.model_name, "1").description == "ours"
    (whole, _) = (path.read_text() for path in sorted(Path(resources.storage.store).glob("model_card/*/*/README.md")))
    assert whole.startswith("# toy's model version 1\n")


@pytest.mark.slow
def test_the_first_that_passes_is_the_champion_and_a_worse_one_is_refused(resources: Resources) -> None:
    assert champion(GATE, resources) is None
    first = registered(resources, "one", 0.75)
    assert champion(GATE, resources) == first
    against = judged(first, resources)
    worse = registered(resources, "two", 0.6, against=against)
    assert (worse.version, worse.promoted) == (2, False)
    tags = client(resources).get_model_version(GATE.model_name, "2").tags
    assert tags["gate.status"] == "refused"
    assert tags["gate.reason"].startswith(f"{METRIC} 0.6, champion 0.75: gain -0.15 (95 % interval -")
    assert tags["gate.reason"].endswith("20 items, 10 groups) is maybe more than 0.05 worse")
    better = registered(resources, "three", 0.8, against=against)
    assert (better.version, better.promoted) == (3, True)
    assert champion(GATE, resources) == better
    assert aliases(resources) == {"champion": 3, "previous": 1}


def test_registering_again_changes_nothing(resources: Resources) -> None:
    first = registered(resources, "one", 0.75)
    better = registered(resources, "two", 0.75, against=judged(first, resources))
    before = [(one.version, one.tags) for one in client(resources).search_model_versions()]
    again = registered(resources, "one", 0.75, against=judged(better, resources))
    assert again == ModelVersion(**{**first.model_dump(), "promoted": False})  # an old recipe takes nothing back
    assert registered(resources, "two", 0.75) == better
    assert [(one.version, one.tags) for one in client(resources).search_model_versions()] == before


def test_a_registration_that_died_half_way_is_finished(resources: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(alias_register, "move", die)
        with pytest.raises(KeyboardInterrupt):
            registered(resources, "one", 0.75)
    assert client(resources).get_model_version(GATE.model_name, "1").tags["ready"] == "false"
    assert registered(resources, "one", 0.75).promoted
    assert client(resources).get_model_version(GATE.model_name, "1").tags["ready"] == "true"


def test_other_rules_judge_a_version_again(resources: Resources) -> None:
    assert not registered(resources, "one", 0.25).promoted
    milder = Gate(model_name=GATE.model_name, rules=(Rule(metric=METRIC, at_least=0.2),))
    model = checkpoint(resources, "one")
    version = register(milder, model, report(resources, model, 0.25), None, resources)
    assert (version.version, version.promoted) == (1, True)


def test_a_comparison_with_anything_but_the_champion_is_refused(resources: Resources) -> None:
    first = registered(resources, "one", 0.75)
    with pytest.raises(PromotionRaceLost, match="the champion's report is missing"):
        registered(resources, "two", 0.8)
    stranger = report(resources, checkpoint(resources, "four"), 0.5)
    with pytest.raises(PromotionRaceLost, match="the champion's report is of model"):
        registered(resources, "two", 0.8, against=stranger)
    assert champion(GATE, resources) == first
    elsewhere = report(resources, first.checkpoint, 0.75, suite="of another name")
    assert registered(resources, "two", 0.8, against=elsewhere).promoted


def test_a_champion_that_was_measured_on_other_items_is_refused(resources: Resources, tmp_path: Path) -> None:
    first = registered(resources, "one", 0.75)
    fewer = resources.with_changes({"storage.benchmarks": str(write_charts(tmp_path / "fewer", 9))})
    with pytest.raises(ValueError, match="the two differ in 2 items, one is 'augmented-9'"):
        registered(resources, "two", 0.8, against=report(fewer, first.checkpoint, 0.75))
    assert champion(GATE, resources) == first


def test_a_model_that_has_to_win_is_refused_where_it_only_equals(resources: Resources) -> None:
    win = Gate(model_name=GATE.model_name, rules=(Rule(metric=METRIC, min_gain=0),))
    first = registered(resources, "one", 0.5)
    equal, better = checkpoint(resources, "two"), checkpoint(resources, "three")
    against = judged(first, resources)
    assert not register(win, equal, report(resources, equal, 0.5), against, resources).promoted
    assert register(win, better, report(resources, better, 1), against, resources).promoted


def test_a_version_that_was_judged_against_an_earlier_champion_is_not_promoted(resources: Resources) -> None:
    first = registered(resources, "one", 0.75)
    second = registered(resources, "two", 0.6, against=judged(first, resources))
    with pytest.raises(PromotionRaceLost, match=r"became version 1 while version 2 .* against version None") as lost:
        moved(second, resources, over=None)
    assert not is_final(lost.value)
    assert champion(GATE, resources) == first


def test_mlflow_s_aliases_are_set_to_what_the_store_says(resources: Resources) -> None:
    first = registered(resources, "one", 0.75)
    mlflow = client(resources)
    mlflow.set_registered_model_alias(GATE.model_name, "mine", "1")
    second = registered(resources, "two", 0.6, against=judged(first, resources))
    mlflow.set_registered_model_alias(GATE.model_name, "champion", "2")  # a promoter that was stopped and woken
    mlflow.set_registered_model_alias(GATE.model_name, "challenger", "1")
    assert champion(GATE, resources) == first
    assert aliases(resources) == {"champion": 1, "mine": 1}
    moved(second, resources, over=1)  # and killed before MLflow shows it
    assert champion(GATE, resources) == ModelVersion(**{**second.model_dump(), "promoted": True})
    assert aliases(resources) == {"champion": 2, "previous": 1, "mine": 1}


def test_a_store_without_a_register_takes_over_the_champion_that_mlflow_has(resources: Resources) -> None:
    first = registered(resources, "one", 0.75)
    shutil.rmtree(Path(resources.storage.store) / "registry")
    assert champion(GATE, resources) == first
    history = alias_register.read(GATE.model_name, store=resources.storage.store).history
    assert [(one.reason, one.aliases) for one in history] == [("taken over from MLflow", {"champion": 1})]


def test_another_mlflow_than_the_champion_s_is_named(resources: Resources, empty_database: Path) -> None:
    registered(resources, "one", 0.75)
    shutil.copyfile(empty_database, resources.tracking.uri.removeprefix("sqlite:///") + ".other")
    other = resources.with_changes({"tracking.uri": f"{resources.tracking.uri}.other"})
    with pytest.raises(ValueError, match=r"champion of .* is version 1, .*`vila-ops champion .* --remove`"):
        champion(GATE, other)
    alias_register.remove(GATE.model_name, reason="", store=resources.storage.store)
    assert champion(GATE, other) is None


@pytest.mark.slow
def test_a_person_moves_the_champion_by_one_command(resources: Resources, tmp_path: Path) -> None:
    file = tmp_path / "resources.yaml"
    file.write_text(yaml.safe_dump(resources.model_dump(mode="json")))

    def asked(*options: str) -> str:
        done = CliRunner().invoke(app, ["champion", GATE.model_name, "-r", str(file), *options], catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    assert "has no champion" in asked()
    first = registered(resources, "one", 0.75)
    registered(resources, "two", 0.6, against=judged(first, resources))
    assert "champion  2        " in asked("--version", "2", "--reason", "a customer asked")
    assert aliases(resources) == {"champion": 2, "previous": 1}
    back = asked("--back")
    assert re.search(r"\n3  \S+  champion 1, previous 2\n    `vila-ops champion`\n2 .*\n.*: a customer asked\n1 ", back)
    assert aliases(resources) == {"champion": 1, "previous": 2}
    assert json.loads(asked("--json"))["history"][-1]["aliases"] == {"champion": 1, "previous": 2}
    asked("--remove")
    assert aliases(resources) == {}
    with pytest.raises(ValueError, match="each is one move"):
        asked("--back", "--remove")


def test_a_model_that_lost_a_race_is_judged_against_the_new_champion(resources: Resources) -> None:
    """Prefect does not run `register` again with the report of the former champion."""
    first = registered(resources, "one", 0.7)
    charts = {name: one.model_dump() for name, one in suite_of().benchmarks.items()}
    recipe = RECIPE.with_changes({"gate": GATE.model_dump(), "final_suite.benchmarks": charts})
    run = Run(recipe=recipe, resources=resources)
    compared: list[str] = []

    def evaluated(_suite: Any, model: Any, *_: Any) -> EvalReport:
        compared.append(model.digest)
        return report(resources, model, 0.7 if model == first.checkpoint else 0.75)

    def prepared(*_: Any) -> Dataset:
        return Dataset(uri="nowhere", digest="held out", num_samples=0, num_tokens=0)  # which `evaluated` does not read

    def raced(*asked: Any) -> ModelVersion:
        if len(compared) == 1:
            registered(resources, "two", 0.75, against=judged(first, resources))
        return register(*asked)

    model = checkpoint(resources, "three")
    tasks = Tasks(prepare=prepared, evaluate=evaluated, register=raced)
    version = register_model(run, model, report(resources, model, 0.8), tasks=tasks, context=NO_CONTEXT)
    assert compared == [first.checkpoint.digest, checkpoint(resources, "two").digest]
    assert (version.version, version.promoted) == (3, True)
    assert aliases(resources) == {"champion": 3, "previous": 2}


def test_damaged_weights_and_a_strangers_report_are_not_registered(resources: Resources) -> None:
    model, other = checkpoint(resources, "one"), checkpoint(resources, "two")
    measured = report(resources, model, 0.75)
    with pytest.raises(ValueError, match="the report is of model"):
        register(GATE, other, measured, None, resources)
    weights = store.content(model) / "model.safetensors"
    weights.write_text("0ne")
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors"):
        register(GATE, model, measured, None, resources)
    with pytest.raises(MlflowException, match="not found"):
        client(resources).get_registered_model(GATE.model_name)


def test_without_a_tracking_uri_the_error_names_the_setting(resources: Resources) -> None:
    bare = resources.with_changes({"tracking.uri": None})
    with pytest.raises(ValueError, match=r"resources\.tracking\.uri"):
        champion(GATE, bare)


@pytest.mark.slow
def test_four_processes_at_once_make_one_version(resources: Resources, tmp_path: Path) -> None:
    model = checkpoint(resources, "one")
    inputs, folder = tmp_path / "inputs.json", tmp_path / "ready"
    folder.mkdir()
    given = (GATE, model, report(resources, model, 0.75), resources)
    inputs.write_text(json.dumps([one.model_dump(mode="json") for one in given]))
    with contextlib.ExitStack() as living:
        logs = [tmp_path / f"{number}.log" for number in range(4)]
        script = Path(__file__).parent / "racing.py"
        processes = [living.enter_context(Fork(script, inputs, folder, 4, log=log)) for log in logs]
        assert [process.wait() for process in processes] == [0] * 4
    answers = [ModelVersion.model_validate_json(log.read_text().splitlines()[-1]) for log in logs]
    left = client(resources).search_model_versions()
    assert len(left) == 1
    assert left[0].tags["ready"] == "true"
    assert {(answer.version, answer.promoted) for answer in answers} == {(int(left[0].version), True)}
