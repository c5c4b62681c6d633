"""Every command on the tiny recipe, inline: what `run` made is what each task's own command then finds."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from vila_ops.artifacts.kinds import EvalReport
from vila_ops.artifacts.store import read_manifest
from vila_ops.cli import app, main
from vila_ops.config import load
from vila_ops.eval.report import read_report
from vila_ops.pipeline.reports import report_named
from vila_ops.registry.gate import metrics_of

ROOT = Path(__file__).parents[1]
TINY = "configs/recipes/tiny.yaml"
PROGRAM = str(Path(sys.executable).parent / "vila-ops")
Json = dict[str, Any]
PLACES = (
    *("store", "store/dataset", "store/shard", "store/checkpoint", "store/pretrained", "store/score", "store/report"),
    *("store/leases", "store/resume", "store/plans", "store/features", "store/diagnostics", "store/sample_log"),
    *("store/serve", "store/tiny", "store/verify-resume", "cache", "cache/packages", "cache/archives", "data"),
)
"""Folders of a run, in each of which a file of the user's lies before it."""


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Path]:
    """Inline, with a registry in a file, in a folder of this test's own; what is served ends with it."""
    folder = tmp_path_factory.mktemp("inline")
    file = folder / "resources.yaml"
    places = {name: str(folder / name) for name in ("store", "cache", "data")}
    for place in PLACES:
        (folder / place).mkdir(parents=True)
        (folder / place / "photo.jpg").write_text("mine")
    shutil.copyfile(empty_database, folder / "mlflow.db")
    file.write_text(
        yaml.safe_dump(
            {
                "launch": "inline",
                "storage": places,
                "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
                "serve": {"port": 0},
            }
        )
    )
    yield file
    with contextlib.chdir(ROOT):
        assert CliRunner().invoke(app, ["undeploy", TINY, "-r", str(file)]).exit_code == 0


@pytest.fixture(scope="module")
def ran(resources: Path) -> Json:
    """Every task, by one command that prints one JSON object and nothing else."""
    done = subprocess.run(
        [PROGRAM, "run", TINY, "-r", str(resources), "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    handle: Json = json.loads(done.stdout)
    assert f"served at {handle['deployment']['url']} until `vila-ops undeploy {TINY} -r {resources}`" in done.stderr
    return handle


def said(*arguments: str) -> Json:
    """The one JSON object that a command prints."""
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    handle: Json = json.loads(done.stdout)
    return handle


@pytest.mark.slow
def test_every_task_runs_inline_and_each_command_finds_what_it_made(ran: Json, resources: Path) -> None:
    where = ("-r", str(resources))
    assert said("fetch", TINY, *where) == ran["models"]["base"]
    for name, dataset in ran["datasets"].items():
        assert said("prepare", TINY, "--mixture", name, *where) == dataset
    for name in ("align", "pretrain", "sft"):
        assert said("train", TINY, "--stage", name, *where) == ran["models"][name]
    for name, report in ran["stage_reports"].items():
        assert said("evaluate", TINY, "--stage", name, *where) == report
    assert said("evaluate", TINY, "--stage", "sft", "--final", *where) == ran["report"]
    plot = resources.parent / "alignment.svg"
    for _ in range(2):  # one of our own is replaced
        points = said("alignment", TINY, "--out", str(plot), *where)["layers"]
    assert [point["model"] for point in points if point["role"] == "model" and point["layer"] == 2] == [
        "base", "align", "pretrain", "sft",
    ]  # fmt: skip
    assert ElementTree.parse(plot).getroot().attrib["role"] == "img"
    explained = json.loads(CliRunner().invoke(app, ["explain", TINY, *where, "--json"]).stdout)
    assert {step["status"] for step in explained if step["task"] not in ("register", "deploy")} == {"sealed"}
    changed = CliRunner().invoke(app, ["explain", TINY, *where, "-s", "stages.sft.learning_rate=1e-4"])
    assert "    stages.sft.learning_rate: 0.0002 -> 0.0001" in changed.stdout.splitlines()
    reported = CliRunner().invoke(app, ["report", TINY, *where, "--json"])
    costs, gains = json.loads(reported.stdout).values()
    assert [one["uri"] for one in costs] == [step["uri"] for step in explained if step["uri"]]
    for one in costs:  # 6 steps of 2 sequences of 128 tokens, without a GPU
        assert one["seconds"] == json.loads(Path(one["uri"], "manifest.json").read_text())["execution"]["seconds"]
        assert (one["gpu_hours"], one["money"]) == (0.0, None)
        assert one["positions"] == (1536 if one["task"] == "train" else None)
    stages = ("base", "align", "pretrain", "sft")
    assert [(one["metric"], one["model"], one["over"]) for one in gains] == [
        ("text_loss", f"{now} on tiny_probe", f"{before} on tiny_probe") for before, now in pairwise(stages)
    ]
    made = [*ran["models"].values(), *ran["datasets"].values(), *ran["stage_reports"].values(), ran["report"]]
    assert {step["uri"] for step in explained} - {None} == {one["uri"] for one in made}
    assert said("register", TINY, *where) == ran["version"]
    assert said("deploy", TINY, *where) == ran["deployment"]
    assert ran["version"]["promoted"]
    assert ran["answer"]["model"] == ran["deployment"]["model"] == ran["models"]["sft"]["digest"]


@pytest.mark.slow
def test_a_run_touches_no_file_of_the_user_s_and_its_own_have_the_umask_s_mode(ran: Json, resources: Path) -> None:
    folder = resources.parent
    photos = [path for path in folder.rglob("photo.jpg") if path.read_text() == "mine"]
    assert {path.parent.relative_to(folder).as_posix() for path in photos} == set(PLACES)
    mode = resources.stat().st_mode
    other = {path for name in ("store", "cache") for path in (folder / name).rglob("*") if path.is_file()}
    assert len(other) > 100
    logs = {"vila.log", "vila-version-1.log"}
    assert {path.name for path in other if path.stat().st_mode != mode} == logs, "a server's log is private"


@pytest.mark.slow
def test_a_report_is_named_by_its_folder_its_recipe_its_version_and_its_run(ran: Json, resources: Path) -> None:
    report = EvalReport(**ran["report"])
    run = read_manifest(report.uri)["execution"]["mlflow_run"]
    for reference in (report.uri, TINY, "models:/tiny/1", run):
        assert report_named(reference, resources) == report
    with pytest.raises(ValueError, match=rf"is not of one evaluation; .*{run} \(evaluate sft on tiny\)"):
        report_named(ran["context"]["parent_run"], resources)
    where = ("-r", str(resources))
    base = EvalReport(**said("evaluate", TINY, "--stage", "base", "--final", *where))
    compared = said("compare", base.uri, TINY, *where)["comparison"]
    assert compared["left_out"] == []
    for one, values in (("baseline", metrics_of(read_report(base))), ("candidate", metrics_of(read_report(report)))):
        assert {metric["metric"]: metric["overall"][one] for metric in compared["metrics"]} == pytest.approx(values)


@pytest.mark.slow
def test_the_summary_of_a_run_has_the_final_captions_in_the_order_of_a_hash(ran: Json, resources: Path) -> None:
    answers = read_report(EvalReport(**ran["report"])).answers
    (part,) = json.loads((resources.parent / "store/tiny/summary.json").read_text())["captions"]
    shown = part.pop("shown")
    assert [one["item"] for one in shown] == sorted(
        (one.item for one in answers), key=lambda item: sha256(item.encode()).hexdigest()
    )
    assert part == {
        "benchmark": "cider", "objects": "new", "model": "sft", "suite": "tiny", "split": "test", "of": 12,
        "right": sum(one["right"] for one in shown),
    }  # fmt: skip
    page = (resources.parent / "store/tiny/report.html").read_text()
    assert page.count('class="image"') == 6 + 12 + 1, "the first screen, the gallery and the served answer"


@pytest.mark.slow
def test_two_runs_that_differ_in_one_setting_make_what_depends_on_it_and_compare_in_mlflow(
    ran: Json, resources: Path
) -> None:
    changed = "stages.sft.mixture.sources.instructions.weight"
    other = said("run", TINY, "-r", str(resources), "-s", f"{changed}=0.25")
    tasks = json.loads((resources.parent / "store/tiny/summary.json").read_text())["tasks"]
    assert {(task["task"], task["name"]) for task in tasks if task["reused"] is False} == {
        ("prepare", "tiny_sft"), ("train_stage", "sft"), ("evaluate", "sft on tiny_probe"), ("evaluate", "sft on tiny"),
    }  # fmt: skip
    client = MlflowClient(f"sqlite:///{resources.parent}/mlflow.db")
    first, second = (client.get_run(run["context"]["parent_run"]) for run in (ran, other))
    differing = {key for key in first.data.params if first.data.params[key] != second.data.params[key]}
    assert first.data.params.keys() == second.data.params.keys()
    assert differing == {changed}
    assert first.data.metrics.keys() == second.data.metrics.keys() >= {"caption_loss", "caption_loss.gap", "cider"}
    assert {first.info.status, second.info.status} == {"FINISHED"}
    assert other["version"]["promoted"]
    rules = "[{metric: caption_loss, max_regression: 5}, {metric: text_multiple_choice, min_gain: 0.9}]"
    judged = said("register", TINY, "-r", str(resources), "-s", f"gate.rules={rules}")
    assert (judged["version"], judged["promoted"]) == (1, False)
    reason = client.get_model_version("tiny", "1").tags["gate.reason"]
    assert reason.startswith("text_multiple_choice 0.")
    assert reason.endswith("12 items, 12 groups) is not surely more than 0.9 better")


@pytest.mark.slow
def test_a_run_tells_a_person_its_metrics_and_what_it_left_out(tmp_path: Path, ran: Json, resources: Path) -> None:
    untracked = {**yaml.safe_load(resources.read_text()), "tracking": {"uri": None}}
    (tmp_path / "untracked.yaml").write_text(yaml.safe_dump(untracked))
    done = CliRunner().invoke(app, ["run", TINY, "-r", str(tmp_path / "untracked.yaml")])
    reports = [json.loads(path.read_text()) for path in resources.parent.glob("store/report/*/attempt-*/report.json")]
    final = ran["models"]["sft"]["digest"]
    report = next(one for one in reports if one["model"] == final and one["split"] == "test")
    about, _, header, *rows = done.stdout.splitlines()
    assert about == f"suite tiny, test split, model {final[:12]}"
    assert header.split()[:3] == ["score", "of", "value"]
    assert [row.split()[0] for row in takewhile(str.strip, rows)] == [metric["name"] for metric in report["metrics"]]
    assert "nothing was registered or deployed" in done.stderr


@pytest.mark.slow
def test_verify_resume_tells_its_kill_and_leaves_the_store_as_it_was(ran: Json, resources: Path) -> None:
    store = resources.parent / "store"
    before = sorted(store.glob("*/*/manifest.json"))
    asked = ["train", "verify-resume", TINY, "--kills", "1", "--steps", "8", "-r", str(resources)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    told = done.stderr.splitlines()
    assert told[0].startswith("stage align of tiny, with num_steps 8 instead of 6, save_every 1 instead of 2")
    assert [line[:11] for line in told if line.startswith("kill ")] == ["kill 1 of 1"]
    assert done.stdout.startswith("equal: 1 kills, 8 steps of align trained ")
    assert "the samples of 8 steps" in done.stdout
    assert sorted(store.glob("*/*/manifest.json")) == before
    assert [path.name for path in (store / "verify-resume").iterdir()] == ["photo.jpg"], "a file of the user's"


def test_train_is_a_recipe_up_to_a_stage_or_a_command() -> None:
    told = CliRunner().invoke(app, ["train", "--help"]).stdout
    assert "vila-ops train RECIPE --stage NAME" in told
    assert "verify-resume" in told
    for arguments in (["train", "--stage", "sftt", TINY], ["train", "stage", TINY, "--stage", "sftt"]):
        failed = CliRunner().invoke(app, arguments)
        assert "no stage 'sftt'" in str(failed.exception)


def test_show_prints_the_run_with_its_overrides() -> None:
    shown = said("show", TINY, "-s", "stages.sft.learning_rate=4e-4")
    assert shown["recipe"]["stages"]["sft"]["learning_rate"] == 4e-4
    assert shown["resources"]["launch"] == "inline"


HEAVY = {"torch", "transformers", "ray", "mlflow", "boto3", "deepspeed", "prefect"}
LOOKS = (
    ("--help",),
    ("train", "--help"),
    ("data", "--help"),
    ("show", TINY),
    ("status", "--servers", "configs/local.yaml"),
)


@pytest.mark.parametrize("arguments", LOOKS, ids=" ".join)
def test_a_look_imports_no_heavy_library(arguments: tuple[str, ...]) -> None:
    """In a fresh process that runs `python -m vila_ops`."""
    program = (
        "import atexit, json, runpy, sys\n"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))\n"
        f"sys.argv = ['vila-ops', *{list(arguments)!r}]\n"
        "runpy.run_module('vila_ops', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=1200, check=True)
    modules = set(json.loads(done.stderr.splitlines()[-1]))
    assert "vila_ops" in modules
    assert not modules & HEAVY


def test_show_tells_a_person_what_each_stage_trains() -> None:
    """First of all; with --full every setting follows, as YAML that reads back."""
    where = ("configs/recipes/vila-7b.yaml", "-r", "configs/resources/vila_128.yaml")
    recipe = load(Path(where[0]), resources=Path(where[2])).recipe
    done = CliRunner().invoke(app, ["show", *where])
    first, _, *table = done.stdout.splitlines()
    assert first == f"recipe vila-7b, fingerprint {recipe.fingerprint()}"
    lines = [line.split() for line in table if line]
    assert [line[0] for line in lines] == 2 * ["stage", "align", "pretrain", "sft"]
    assert " ".join(lines[1][1:]) == "projector 336 px, 576 tokens 256 x 4096 0.001"
    assert " ".join(lines[5][1:]) == "1 epoch 2 8 x 32"
    full = CliRunner().invoke(app, ["show", *where, "--full"]).stdout
    assert full.startswith(done.stdout)
    assert yaml.safe_load(full.removeprefix(done.stdout)) == said("show", *where)


def test_plan_tells_a_person_how_large_the_parts_are_before_lengths_are_known() -> None:
    """Counts of Llama-2 and CLIP as published; mlp2x_gelu by hand: 1,024 x 4,096 + 4,096 + 4,096 x 4,096 + 4,096."""
    where = ("configs/recipes/vila-7b.yaml", "-r", "configs/resources/vila_128.yaml")
    done = CliRunner().invoke(app, ["plan", *where])
    lines = [line.split() for line in done.stdout.splitlines() if line]
    assert [line[:2] for line in lines[1:4]] == [
        ["language_model", "6,738,415,616"],
        ["vision_tower", "303,507,456"],
        ["projector", "20,979,712"],
    ]
    assert lines[4] == ["all", "parts", "7,062,902,784"]
    assert lines[6] == ["align", "20,979,712", "7,062,902,784", "0.3%"]
    assert "the lengths of mixture" in str(done.exception)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stages.sft.learning_rate=-1", "stages.sft.learning_rate: Input should be greater than 0; it is -1"),
        ("stages.sft.lr=3", "stages.sft.lr: there is no such setting; docs/settings.md lists them"),
        ("stages.sft.tuning=lora", "tuning: a mapping is wanted here, such as {kind: ...}, not 'lora'"),
        ("stages.sft.pack=maybe", "unable to interpret input; it is 'maybe'"),
        ("model.image_size=448", "raise max_tokens, or lower image_size, or merge patches"),
    ],
)
def test_a_wrong_setting_is_told_with_its_value_and_the_way_out(
    override: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["vila-ops", "show", TINY, "-s", override])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_data_show_writes_a_page_of_the_mixture_that_was_prepared(tmp_path: Path, ran: Json, resources: Path) -> None:
    page = tmp_path / "samples.html"
    asked = ("--mixture", "tiny_align", "-r", str(resources), "--out", str(page), "--per-source", "1")
    assert said("data", "show", TINY, *asked) == ran["datasets"]["tiny_align"]
    assert "<h1>tiny_align</h1>" in page.read_text()
    assert page.read_text().count("<article>") == 3  # one of each split


def test_doctor_and_status_print_one_json_list(tmp_path: Path) -> None:
    servers = tmp_path / "local.yaml"
    servers.write_text(yaml.safe_dump({"root": str(tmp_path / "local")}))
    done = CliRunner().invoke(app, ["status", "--servers", str(servers), "--json"])
    assert [server["state"] for server in json.loads(done.stdout)] == ["stopped"] * 5
    done = CliRunner().invoke(app, ["doctor", "--servers", str(servers), "--json"])
    findings = json.loads(done.stdout)
    assert {finding["ok"] for finding in findings} <= {True, False}
    assert any("Python 3.11" in finding["text"] for finding in findings)
    assert any("links are create-only" in finding["text"] for finding in findings)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", TINY, "--stage", "sftt"], "no stage 'sftt'; it has"),
        (["train", "verify-resume", TINY, "--stage", "base"], "no stage 'base'; it has"),
        (["prepare", TINY, "--mixture", "algin"], "no mixture 'algin'; it has"),
        (["data", "show", TINY, "--mixture", "algin", "--out", "page.html"], "no mixture 'algin'; it has"),
        (["data", "watch", "configs/recipes/demo.yaml", "--mixture", "align"], "made of pinned packages alone"),
        (["show", "configs/recipes/none.yaml"], "configs/recipes/none.yaml"),
        (["show", TINY, "-s", "stages.sft.learning_rat=1"], "learning_rat"),
        (["register", TINY, "-r", "configs/resources/inline.yaml"], "set resources.tracking.uri"),
    ],
)
def test_a_wrong_argument_is_one_message_and_no_traceback(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["vila-ops", *arguments])
    with pytest.raises(SystemExit, match="1"):
        main()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert told in printed.err
    assert "Traceback" not in printed.err


def test_the_program_tells_a_wrong_argument_and_ends_with_one() -> None:
    command = [PROGRAM, "show", "configs/recipes/none.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
