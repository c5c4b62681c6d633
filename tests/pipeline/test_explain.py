"""`explain` says what depends on an edit of a recipe, and names the setting or the raw file; it makes nothing."""

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipeline.sealed import ROOT, seal_all, tiny_run
from tests.seed import SEED
from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.artifacts.listing import sealed
from vila_ops.config import Recipe, Resources, Run
from vila_ops.data.preprocess import prepare
from vila_ops.pipeline.explain import Step, explain, explain_promotion
from vila_ops.pipeline.explain_deploy import explain_deploy
from vila_ops.processes import this_process
from vila_ops.registry import alias_register
from vila_ops.serve.backends.local_process import LocalProcess, ServiceRecord
from vila_ops.serve.router.state import ServiceState, Track
from vila_ops.serve.spec import Spec

EDITS = int(os.environ.get("VILA_EDITS", "12"))
STAGES = ("align", "pretrain", "sft")
SHAPES = (STAGES, STAGES, STAGES, ("align", "sft"), ("align", "middle", "pretrain", "sft"))
"""Stages of an edited recipe: mostly its own, one fewer, and one more."""
HELD_OUT = "prepare tiny_held_out"
FINAL = "evaluate sft on tiny"
PROBE = "evaluate {} on tiny_probe"
QUESTIONS = {"kind": "jsonl", "path": "tests/tiny/pairs", "render": "questions"}
INSTRUCTIONS = {"kind": "jsonl", "path": "tests/tiny/instructions", "render": "instructions"}
Graph = dict[str, set[str]]
Change = tuple[str, Any, set[str]]
"""A setting, its new value, and the tasks whose own part of the recipe it is."""


def graph(stages: Sequence[str]) -> Graph:
    """Which tasks each task of the tiny recipe with these stages reads the results of."""
    reads: Graph = {"assemble base": set(), HELD_OUT: set(), PROBE.format("base"): {"assemble base", HELD_OUT}}
    model = "assemble base"
    for name in stages:
        reads[f"prepare tiny_{name}"] = set()
        reads[f"train {name}"] = {model, f"prepare tiny_{name}"}
        model = f"train {name}"
        reads[PROBE.format(name)] = {model, HELD_OUT}
    return {**reads, FINAL: {model, HELD_OUT}}


def changes(stages: Sequence[str]) -> tuple[Change, ...]:
    """Edits of settings. A stage that the recipe did not have is not among those that are edited."""
    known = [name for name in stages if name in STAGES]
    trains, data = {f"train {name}" for name in stages}, {f"prepare tiny_{name}" for name in stages}
    of_pretrain: tuple[Change, ...] = (
        ("stages.pretrain.mixture.sources.instructions", INSTRUCTIONS, {"prepare tiny_pretrain"}),
        ("stages.pretrain.mixture.sources.documents.weight", 3.0, {"prepare tiny_pretrain"}),
    )
    return (
        ("model.language_model.hidden_size", 32, {"assemble base"}),
        ("model.projector", {"kind": "linear"}, {"assemble base", *trains}),
        ("model.image_size", 42, {"assemble base", *data, HELD_OUT}),
        ("max_tokens", 90, data),
        *((f"stages.{name}.learning_rate", 3e-3, {f"train {name}"}) for name in known),
        *((f"stages.{name}.num_steps", 8, {f"train {name}"}) for name in known),
        *((f"stages.{name}.mixture.shard_bytes", 50000, {f"prepare tiny_{name}"}) for name in known),
        *((f"stages.{name}.save_every", 3, set()) for name in known),
        *(of_pretrain if "pretrain" in known else ()),
        ("stages.sft.mixture.sources", {"pairs": QUESTIONS}, {"prepare tiny_sft"}),
        ("stages.align.mixture.sources.pairs.clean.min_words", 2, {"prepare tiny_align"}),
        ("stages.align.mixture.sources.words.package.version", "1:3.0-38", {"prepare tiny_align"}),
        ("stages.align.mixture.near_duplicates", {"text_similarity": 0.9}, {"prepare tiny_align"}),
        ("final_suite.max_objects", 11, {FINAL}),
        ("final_suite.benchmarks.cider.max_new_tokens", 9, {FINAL}),
        ("stage_suite.seed", 5, {PROBE.format(name) for name in ("base", *stages)}),
        ("gate.model_name", "other", set()),
        ("service.max_new_tokens", 64, set()),
        ("name", "other", set()),
    )


@pytest.fixture
def tiny(make_resources: Callable[..., Resources], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(ROOT)
    return tiny_run(make_resources(tmp_path))


def by_name(steps: list[Step]) -> dict[str, Step]:
    return {f"{step.task} {step.name}": step for step in steps}


def below(changed: set[str], reads: Graph) -> set[str]:
    """Every task that reads the result of a changed one, directly or through others."""
    reached: set[str] = set()
    while more := {task for task, inputs in reads.items() if inputs & (changed | reached)} - reached:
        reached |= more
    return reached - changed


def shaped(recipe: Recipe, stages: Sequence[str]) -> Recipe:
    """The recipe with these stages; one that it does not have is as `pretrain`, on a mixture of its own."""
    own = recipe.model_dump()["stages"]
    base = own["pretrain"]
    new = {name: {**base, "name": name, "mixture": {**base["mixture"], "name": f"tiny_{name}"}} for name in stages}
    return recipe.with_changes({"stages": {name: own.get(name, new[name]) for name in stages}})


def test_an_empty_store_has_everything_to_do_and_a_full_one_nothing(tiny: Run) -> None:
    new_base = ("no base model with its tower or its language model is sealed",)
    first = by_name(explain(tiny))
    assert set(first) == set(graph(STAGES))
    assert {step.status for step in first.values()} == {"runs"}
    assert first["train sft"].why == ("its data and its model are made first", "nothing of this name is sealed")
    assert first["assemble base"].why == new_base
    before = sorted(Path(tiny.resources.storage.store).rglob("*"))
    assert before == [], "it makes nothing"
    seal_all(tiny)
    steps = explain(tiny)
    assert {step.status for step in steps} == {"sealed"}
    assert all(step.uri is not None and not step.why for step in steps)
    other = tiny.recipe.with_changes({"model.vision_tower.num_layers": 3, "model.language_model.num_layers": 3})
    unlike = by_name(explain(Run(recipe=other, resources=tiny.resources)))
    assert unlike["assemble base"].why == new_base, "a base model of other parts is not what it was made of"


@pytest.mark.slow
def test_an_edit_runs_what_it_changes_and_what_reads_that_and_nothing_else(tiny: Run) -> None:
    packaged = yaml.safe_load((ROOT / "configs/sources/wordnet.yaml").read_text())["sources"]["wordnet"]
    recipe = tiny.recipe.with_changes({"stages.align.mixture.sources.words": packaged})
    seal_all(Run(recipe=recipe, resources=tiny.resources))
    draw = random.Random(SEED)
    for number in range(EDITS):
        stages = draw.choice(SHAPES)
        edits = draw.sample(changes(stages), draw.choice((0, 1, 1, 2, 3)))
        edited = shaped(recipe, stages).with_changes({path: value for path, value, _ in edits})
        steps = by_name(explain(Run(recipe=edited, resources=tiny.resources)))
        reads = graph(stages)
        assert set(steps) == set(reads)
        changed = {task for _, _, tasks in edits for task in tasks}
        changed |= {"prepare tiny_middle", "train middle"} & set(reads)
        if "pretrain" not in stages and "train align" not in changed | below(changed, reads):
            changed.add("train sft")  # goes on from a model that is there, and is another one
        runs = {task for task, step in steps.items() if step.status == "runs"}
        follows = {task for task, step in steps.items() if step.status == "follows"}
        assert (runs, follows) == (changed, below(changed, reads)), (number, stages, edits)
        told = [line for task in runs for line in steps[task].why]
        for path, _, tasks in edits:
            named = path if path.startswith(("stages", "model.p", "model.l", "final", "stage")) else path.split(".")[-1]
            assert bool(tasks) == any(f"{named}{end}" in line for line in told for end in ":."), (number, path, told)


def test_the_setting_is_named_with_both_values(tiny: Run) -> None:
    seal_all(tiny)
    recipe = tiny.recipe.with_changes(
        {"stages.sft.learning_rate": 1e-5, "final_suite.benchmarks.cider.control": "none"}
    )
    steps = by_name(explain(Run(recipe=recipe, resources=tiny.resources)))
    assert steps["train sft"].why == ("stages.sft.learning_rate: 0.0002 -> 1e-05",)
    assert steps["evaluate sft on tiny_probe"].why == ("its model is made first",)
    assert steps[FINAL].why == (
        "its model is made first",
        'cider: final_suite.benchmarks.cider.control: "shuffled" -> "none"',
    )
    renamed = tiny.recipe.with_changes({"final_suite.name": "other"})
    (step,) = (one for one in explain(Run(recipe=renamed, resources=tiny.resources)) if one.status != "sealed")
    assert step.why == ("every benchmark is measured; the report is composed again",)


@pytest.mark.slow
def test_raw_files_that_changed_are_named(tiny: Run, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    images = sorted((ROOT / "tests/tiny/pairs").glob("*.png"))

    def write(name: str, chosen: list[Path]) -> None:
        rows = [f"{image.name},A photo of a {image.stem}." for image in chosen]
        (raw / name).write_text("\n".join(["image,text", *rows, ""]))

    write("a.csv", images[:8])
    write("b.csv", images[8:16])
    write("c.csv", images[16:24])
    table = {"kind": "table", "path": str(raw), "images": "tests/tiny/pairs", "licence": "MIT", "render": "caption"}
    recipe = tiny.recipe.with_changes({"stages.align.mixture.sources": {"mine": table}})
    run = Run(recipe=recipe, resources=tiny.resources)
    prepare.prepare(recipe.stages["align"].mixture, recipe.text("align"), run.resources)
    assert by_name(explain(run))["prepare tiny_align"].status == "sealed"
    write("b.csv", images[9:16])
    write("d.csv", images[24:30])
    (raw / "a.csv").unlink()
    step = by_name(explain(run))["prepare tiny_align"]
    assert step.status == "runs"
    assert step.why == (
        "source 'mine': b.csv changed, or a file that it names",
        "source 'mine': d.csv is new",
        "source 'mine': a.csv is gone",
    )


def served_as_champion(run: Run, version: ModelVersion) -> None:
    """Note a version as the champion and as what this very process serves."""
    place = run.resources.storage.store
    alias_register.move(version.name, {"champion": version}, over=None, reason="a test", store=place)
    spec = Spec.of(run.recipe.service, version, run.resources)
    service = LocalProcess(run.recipe.service.name, run.resources)
    track = Track(spec=spec, url="http://127.0.0.1:9", process=this_process())
    service.manager.folder.mkdir(parents=True)
    service.manager.write(
        ServiceRecord(**this_process()._asdict(), host="127.0.0.1", port=run.resources.serve.port, identity="")
    )
    service.register.change(lambda _: ServiceState(stable=track))


def test_a_deployment_is_told_with_what_is_live_and_changes_nothing(tiny: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set resources\.tracking\.uri"):
        explain_deploy(Run(recipe=tiny.recipe, resources=tiny.resources.with_changes({"tracking.uri": None})))
    database = tmp_path / "mlflow.db"
    resources = tiny.resources.with_changes({"tracking.uri": f"sqlite:///{database}", "serve.port": 8123})
    run = Run(recipe=tiny.recipe, resources=resources)
    first = by_name(explain_deploy(run))
    name = f"deploy {run.recipe.service.name}"
    assert [*first] == [
        *("assemble base", *(task for one in STAGES for task in (f"prepare tiny_{one}", f"train {one}"))),
        *(HELD_OUT, FINAL, f"register {run.recipe.gate.model_name}", name),
    ]
    assert first[name].why == ("nothing serves; it will listen at http://127.0.0.1:8123",)
    assert not list(Path(resources.storage.store).rglob("*"))

    seal_all(run)
    steps = by_name(explain_deploy(run))
    uri = steps["train sft"].uri
    assert uri is not None
    sealed = Checkpoint(uri=uri, digest=store.read_manifest(uri)["digest"], stage="sft", step=6)
    assert steps[f"register {run.recipe.gate.model_name}"].why[0].startswith("there is no champion")
    assert steps[name].why[1].startswith("a replica would load 0 MB of files")
    served_as_champion(run, ModelVersion(name=run.recipe.gate.model_name, version=3, checkpoint=sealed, promoted=True))
    steps = by_name(explain_deploy(run))
    assert steps[f"register {run.recipe.gate.model_name}"].why == ("the model is version 3, the champion",)
    assert steps[name].why[0] == "version 3 serves at http://127.0.0.1:8123, and stays as it is unless the gate changed"
    slower = run.recipe.with_changes({"service.max_new_tokens": 3})
    steps = by_name(explain_deploy(Run(recipe=slower, resources=resources)))
    assert steps[name].why[0].endswith(", and is started again, with the changed settings unless the gate changed")
    back = ModelVersion(name=run.recipe.gate.model_name, version=2, checkpoint=sealed, promoted=True)
    alias_register.move(back.name, {"champion": back}, over=3, reason="back", store=resources.storage.store)
    steps = by_name(explain_deploy(run))
    assert steps[name].why[0] == (
        "version 3 serves at http://127.0.0.1:8123 until version 2, the champion, takes over unless the gate changed"
    )
    other = run.recipe.with_changes({"stages.sft.learning_rate": 1e-5})
    steps = by_name(explain_deploy(Run(recipe=other, resources=resources)))
    assert steps["train sft"].status == "runs"
    assert steps["evaluate champion 2 on tiny"].status == "sealed"
    assert "the champion is version 2" in steps[f"register {run.recipe.gate.model_name}"].why[0]
    assert steps[name].why == ("version 3 serves at http://127.0.0.1:8123 until one that passed the gate answers",)
    assert not database.exists()


def test_a_champion_that_the_gate_compares_with_is_measured_too(tiny: Run) -> None:
    """It is the model after another stage, which has no report on the final suite, as after a change of the suite."""
    resources = tiny.resources.with_changes({"tracking.uri": "http://127.0.0.1:9"})
    run = Run(recipe=tiny.recipe, resources=resources)
    seal_all(run)
    assert not [task for task in by_name(explain(run)) if "champion" in task]
    name, place = run.recipe.gate.model_name, run.resources.storage.store
    rivals = {
        one.stage: ModelVersion(name=name, version=number, checkpoint=one, promoted=True)
        for number, one in enumerate(sealed(Checkpoint, store=place), start=1)
    }
    first = rivals["pretrain"]
    alias_register.move(name, {"champion": first}, over=None, reason="a test", store=place)
    for told in (explain(run), explain_promotion(run)):
        runs = {task for task, one in by_name(told).items() if one.status == "runs"}
        assert runs == {f"evaluate champion {first.version} on tiny"}
    alias_register.move(name, {"champion": rivals["sft"]}, over=first.version, reason="a test", store=place)
    assert {one.status for one in explain_promotion(run)} == {"sealed"}
