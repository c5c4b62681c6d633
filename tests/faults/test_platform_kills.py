"""SIGKILL to each part of the platform at random moments of a deployed pipeline, on servers that `up` starts.

A flow run also gets SIGTERM, by which clouds and Kubernetes say that its machine will be taken away.

What died is started again as a person would do it. The flow run or the next one of its deployment then ends with the
digests of an undisturbed run. No stage is trained twice to its end, MLflow has one run for each stage and evaluation
with each step once, the registry has one version and one promotion, and no run stays open. Nothing is served here.

VILA_PLATFORM_KILLS sets the number of kills of each part (`make faults`: 20), and VILA_SEED the moments. Without it
each part of a pipeline without Ray is killed once, in an order that the seed draws; test_nodes.py kills nodes.
"""

import contextlib
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.faults.test_nodes import OPTIONS, RAY
from tests.flows.flow_runs import ROOT, STAGES, Json, kill_server, processes_of, start_flow_run, written
from tests.seed import SEED
from vila_ops import local, tracking
from vila_ops.artifacts import store
from vila_ops.config.local import LocalServers
from vila_ops.registry import alias_register

KILLS = int(os.environ.get("VILA_PLATFORM_KILLS", "0"))
KILLS_A_PIPELINE = 3
ENDING = {"flow run": signal.SIGKILL, "preempted flow run": signal.SIGTERM}
"""What ends a flow run's own process, and how."""
INLINE = (*ENDING, "worker", "prefect", "mlflow")
"""Parts that are killed while the flow run's own process trains."""
ON_RAY = ("head", "raylet", "training worker")
"""Parts that are killed while two nodes train, with a worker on each."""
QUICK = {
    "RAY_health_check_period_ms": "1000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_raylet_start_wait_time_s": "120",
}
"""Environment of both nodes, with which a lost one is noticed sooner than by default."""
log = logging.getLogger(__name__)
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
BENCHMARKS = ("caption_loss", "text_loss")
"""What the models are measured on; the gate reads the latter."""
TRAINED, OUTRUN = "trained {}: ", "was sealed by another attempt first"
"""How lines of the log begin when a stage has been sealed, and what they say where another attempt was first."""
START_SECONDS = 600.0
"""The longest time until a server, a node or a flow run is there."""
BACKOFF_SECONDS = 1.5 * (5 + 30 + 120 + 300 + 300)
"""What the five pauses before a task is tried again take together at most (docs/operations.md)."""
Digests = dict[str, str]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600 + 600 * KILLS)]


class Whole(NamedTuple):
    """An undisturbed run."""

    digests: Digests
    seconds: float


def until(true: Callable[[], bool], seconds: float = START_SECONDS) -> None:
    """Wait for something; what it was is in the traceback."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"seed {SEED}: not within {seconds:.0f} s"
        time.sleep(0.2)


class SecondNode:
    """A raylet with its processes, beside the head of the servers."""

    def __init__(self, servers: Json, free_ports: Callable[[int], list[int]]) -> None:
        self._servers, self._free_ports = servers, free_ports
        self._env = {**os.environ, **local.env(servers["settings"]), "PYTHONPATH": str(ROOT)}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until the cluster has two nodes."""
        agent, metrics = self._free_ports(2)
        ports = ["--dashboard-agent-listen-port", str(agent), "--metrics-export-port", str(metrics)]
        command = [*RAY, *OPTIONS, "--address", self._servers["at"].ray, *ports]
        self._process = subprocess.Popen(
            command, env=self._env, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
        )
        until(lambda: self._alive() == 2)

    def kill(self) -> None:
        """Send SIGKILL to the raylet. The other processes of a node end by themselves, or with `end`."""
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                if process.name() == "raylet":
                    process.kill()
        self.end()

    def end(self) -> None:
        """End what is left of it."""
        tree = self._tree()
        for process in tree:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        for process in psutil.wait_procs(tree, timeout=5)[1]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self._process is not None:
            self._process.wait()
        self._process = None

    def _tree(self) -> list[psutil.Process]:
        if self._process is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            whole = psutil.Process(self._process.pid)
            return [whole, *whole.children(recursive=True)]
        return []

    def _alive(self) -> int:
        token = Path(self._env["RAY_AUTH_TOKEN_PATH"]).read_text()
        with contextlib.suppress(httpx.HTTPError):
            url = f"{self._servers['at'].ray_dashboard}/api/v0/nodes"
            answer = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=30)
            if answer.is_success:
                return sum(node["state"] == "ALIVE" for node in answer.json()["data"]["result"]["result"])
        return 0


class Platform:
    """The servers, which parts of them are killed and started again."""

    def __init__(self, servers: Json, free_ports: Callable[[int], list[int]], *, on_ray: bool) -> None:
        self.servers, self.on_ray = servers, on_ray
        self._names = ("mlflow", "prefect", "worker", "sweeper", *(("ray",) if on_ray else ()))
        self._node = SecondNode(servers, free_ports) if on_ray else None

    def start(self) -> None:
        """Start the servers and the second node."""
        self.up()
        if self._node:
            self._node.start()

    def up(self) -> None:
        """Start what does not run."""
        with contextlib.chdir(ROOT):
            local.up(self.servers["settings"], only=self._names)

    def down(self) -> None:
        """End all of it."""
        if self._node:
            self._node.end()
        local.down(self.servers["settings"])

    def kill(self, what: str, flow_run: str, seconds: float) -> None:
        """A signal to a part. A worker that trains is waited for so long, unless the flow run ends before."""
        match what:
            case "flow run" | "preempted flow run":
                own = processes_of(flow_run)
                for process in own:
                    with contextlib.suppress(psutil.Error):
                        if process.ppid() not in {one.pid for one in own}:
                            process.send_signal(ENDING[what])
            case "raylet":
                assert self._node is not None
                self._node.kill()
            case "training worker":
                until(lambda: bool(self._training()) or self.state_of(flow_run) in ENDED, seconds)
                for process in self._training()[:1]:
                    process.kill()
            case _:
                kill_server(self.servers, {"head": "ray"}.get(what, what))

    def restart(self, what: str) -> None:
        """Start again what was killed, as far as a person has to."""
        if what == "head" and self._node:
            self._node.end()
        if what not in (*ENDING, "training worker", "raylet"):
            self.up()
        if what in ("head", "raylet") and self._node:
            self._node.start()

    def state_of(self, flow_run: str) -> str:
        """The state in Prefect, which is asked until it answers: its sqlite may be locked."""
        return str(self.ask("GET", f"/flow_runs/{flow_run}")["state"]["type"])

    def ask(self, method: str, path: str, body: Json | None = None) -> Any:
        """What Prefect's API answers."""
        url = f"{self.servers['at'].prefect}/api{path}"
        answers: list[httpx.Response] = []

        def answered() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                answers.append(httpx.request(method, url, json=body, trust_env=False, timeout=30).raise_for_status())
            return bool(answers)

        until(answered)
        return answers[0].json()

    def _training(self) -> list[psutil.Process]:
        """The workers of Ray Train of this cluster."""
        token = local.env(self.servers["settings"])["RAY_AUTH_TOKEN_PATH"]
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in "".join(process.cmdline()) and (
                    process.environ().get("RAY_AUTH_TOKEN_PATH") == token
                ):
                    found.append(process)
        return found


class Pipeline:
    """The tiny pipeline in a store of its own, by as many flow runs of the deployment as it takes."""

    numbers = itertools.count()

    def __init__(self, platform: Platform, *, seconds: float = START_SECONDS) -> None:
        """An undisturbed flow run takes so many seconds at most."""
        self._longest = START_SECONDS + BACKOFF_SECONDS + 3 * seconds  # what was killed is done again
        servers, name = platform.servers, f"tiny-{next(self.numbers)}"
        self._platform, self.model = platform, name
        self.store = servers["folder"] / name
        kept = servers["resources"]
        resources = {
            "launch": "inline",
            "storage": {**kept["storage"], "store": str(self.store)},
            "tracking": kept["tracking"],
            "serve": {"started_by": "operator"},
        }
        if platform.on_ray:
            apart = {"placement": "STRICT_SPREAD", "network": {"interface": "lo"}, "max_failures": 5}
            resources |= {"launch": "ray", "ray_address": kept["ray_address"], "train": {**kept["train"], **apart}}
        file = servers["folder"] / f"{name}.yaml"
        file.write_text(yaml.safe_dump(resources))
        overrides = (f"gate.model_name={name}",)
        self._parameters = {
            "recipe": f"{servers['folder']}/recipe.yaml",
            "resources": str(file),
            "overrides": overrides,
        }
        self._mlflow = MlflowClient(servers["at"].mlflow, registry_uri=servers["at"].mlflow)
        for run in self._tracked():  # a run of MLflow is found again by its address, which is that of other pipelines
            self._mlflow.delete_run(run.info.run_id)
        self.flow_runs: list[str] = []

    def start(self) -> None:
        """Start a flow run, and wait until it works."""
        self.flow_runs.append(start_flow_run(self._platform.servers, "vila/full-pipeline", self._parameters))
        until(lambda: self.state() in ("RUNNING", *ENDED))

    def state(self) -> str:
        """Of the latest flow run."""
        return self._platform.state_of(self.flow_runs[-1])

    def killed(self, whats: Iterable[str], draw: random.Random, *, within: float) -> int:
        """Kill parts one after the other while it runs; returns how many, since it may end before. It ends then.

        Between two kills there are at most `within` seconds.
        """
        kills = 0
        self.start()
        for what in whats:
            moment = time.monotonic() + draw.uniform(0, within)
            until(
                lambda: time.monotonic() > moment or self.state() in ENDED,  # noqa: B023 it is called at once
                within + START_SECONDS,
            )
            if self.state() == "COMPLETED":
                break
            if self.state() in ENDED:
                self.start()
            self._platform.kill(what, self.flow_runs[-1], self._longest)
            self._platform.restart(what)
            kills += 1
            if what in ENDING:
                self._wait()
        self.finish()
        assert len(self.flow_runs) <= kills + 1, f"seed {SEED}: more than one flow run for a kill"
        return kills

    def finish(self) -> None:
        """Wait for the end; where the flow run fails, the next one of the deployment goes on."""
        self._wait()
        while self.state() != "COMPLETED" and len(self.flow_runs) < 2 * KILLS_A_PIPELINE:
            self.start()
            self._wait()
        assert self.state() == "COMPLETED", f"seed {SEED}"

    def _wait(self) -> None:
        until(lambda: self.state() in ENDED, self._longest)

    def digests(self) -> Digests:
        """Of all that was sealed."""
        return digests_of(self.store / "tiny/summary.json")

    def check(self, whole: Digests) -> None:
        """What was made is what an undisturbed run makes, once."""
        told = f"seed {SEED}, flow runs {self.flow_runs}"
        assert self.digests() == whole, told
        until(lambda: not any(processes_of(one) for one in self.flow_runs))
        until(lambda: all(self._platform.state_of(one) in ENDED for one in self.flow_runs))
        assert len(list(self.store.glob("checkpoint/*/manifest.json"))) == len(STAGES), told
        lines = self._log()
        assert not [line for line in lines if OUTRUN in line], told
        assert max(self.trained(lines).values()) <= 1, told
        evaluated = ["sft on tiny", *(f"{model} on tiny_probe" for model in ("base", *STAGES))]
        names = sorted(["tiny", *STAGES, *(f"evaluate {one}" for one in evaluated)])
        assert sorted(run.info.run_name for run in self._tracked()) == names, told
        until(lambda: {run.info.status for run in self._tracked()} == {"FINISHED"})
        for run in self._tracked():
            if run.info.run_name in STAGES:
                steps = [one.step for one in self._mlflow.get_metric_history(run.info.run_id, "loss")]
                assert sorted(steps) == sorted(set(steps)), told
                assert len(steps) == 6, told
        (version,) = self._mlflow.search_model_versions(f"name='{self.model}'")
        assert version.tags["digest"] == whole["train_stage sft"], told
        moves = alias_register.read(self.model, store=str(self.store)).history
        champions = [move.aliases.get("champion") for move in moves]
        assert [one for one, _ in itertools.groupby(champions) if one is not None] == [1], told

    def trained(self, lines: Iterable[str] | None = None) -> dict[str, int]:
        """How many lines of the log say of each stage that it was trained."""
        lines = self._log() if lines is None else list(lines)
        return {stage: sum(line.startswith(TRAINED.format(stage)) for line in lines) for stage in STAGES}

    def _tracked(self) -> list[Run]:
        experiment = self._mlflow.get_experiment_by_name(tracking.EXPERIMENT)
        return [] if experiment is None else list(self._mlflow.search_runs([experiment.experiment_id]))

    def _log(self) -> list[str]:
        """The lines of all flow runs that reached Prefect; those of a process's last second may not have."""
        wanted = {"logs": {"flow_run_id": {"any_": self.flow_runs}}}
        lines: list[str] = []
        while page := self._platform.ask("POST", "/logs/filter", {**wanted, "offset": len(lines)}):
            lines += [one["message"] for one in page]
        return lines


def _written(folder: Path, settings: LocalServers) -> Json:
    """What `written` makes, with fewer benchmarks."""
    servers, file = written(folder, settings), folder / "recipe.yaml"
    recipe = yaml.safe_load(file.read_text())
    for name in ("stage_suite", "final_suite"):
        recipe[name]["benchmarks"] = {one: recipe[name]["benchmarks"][one] for one in BENCHMARKS}
    file.write_text(yaml.safe_dump(recipe))
    return servers


def digests_of(file: Path) -> Digests:
    """The digests of a summary, of what tasks seal."""
    tasks = json.loads(file.read_text())["tasks"]
    return {f"{task['task']} {task['name']}": task["digest"] for task in tasks if task["reused"] is not None}


@pytest.fixture(scope="module")
def make_platform(
    tmp_path_factory: pytest.TempPathFactory,
    free_servers: Callable[[Path], LocalServers],
    free_ports: Callable[[int], list[int]],
) -> Iterator[Callable[[bool], Platform]]:
    """Servers of this module's own, with Ray or without; those that are up are taken again."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for name, value in QUICK.items():
            patch.setenv(name, value)
        made: dict[bool, Platform] = {}

        def make(on_ray: bool) -> Platform:
            if on_ray not in made:
                folder = tmp_path_factory.mktemp("ray" if on_ray else "box")
                platform = Platform(_written(folder, free_servers(folder / "local")), free_ports, on_ray=on_ray)
                stack.callback(platform.down)
                platform.start()
                made[on_ray] = platform
            return made[on_ray]

        yield make


@pytest.fixture(scope="module")
def undisturbed(make_platform: Callable[[bool], Platform]) -> Callable[[bool], Whole]:
    """A run of the deployment on servers that nobody disturbs, with Ray or without; its seconds begin when it works."""

    @cache
    def run(on_ray: bool) -> Whole:
        pipeline = Pipeline(make_platform(on_ray))
        pipeline.start()
        started = time.monotonic()
        pipeline.finish()
        seconds = time.monotonic() - started
        pipeline.check(pipeline.digests())
        until(lambda: pipeline.trained() == dict.fromkeys(STAGES, 1))  # or `check` would look for another text in vain
        assert OUTRUN in Path(store.__file__).read_text()
        assert len(pipeline.flow_runs) == 1
        return Whole(pipeline.digests(), seconds)

    return run


@pytest.mark.skipif(bool(KILLS), reason="VILA_PLATFORM_KILLS asks for more")
def test_each_part_is_killed_and_a_run_ends_as_an_undisturbed_one(
    make_platform: Callable[[bool], Platform], undisturbed: Callable[[bool], Whole]
) -> None:
    draw, whole = random.Random(SEED), undisturbed(False)
    pipeline = Pipeline(make_platform(False), seconds=whole.seconds)
    kills = pipeline.killed(draw.sample(INLINE, len(INLINE)), draw, within=whole.seconds / (2 * len(INLINE)))
    assert kills == len(INLINE), "a run that is disturbed takes no less time"
    pipeline.check(whole.digests)


@pytest.mark.skipif(not KILLS, reason="VILA_PLATFORM_KILLS says how many kills")
@pytest.mark.parametrize("what", [*INLINE, *(pytest.param(one, marks=pytest.mark.ray) for one in ON_RAY)])
def test_a_part_is_killed_again_and_again(
    what: str, make_platform: Callable[[bool], Platform], undisturbed: Callable[[bool], Whole]
) -> None:
    """A few kills in each pipeline, until there were enough."""
    on_ray = what in ON_RAY
    whole = undisturbed(on_ray)
    draw, started = random.Random(f"{SEED} {what}"), time.monotonic()
    kills, pipelines, flow_runs, within = 0, 0, 0, whole.seconds
    while kills < KILLS:
        pipeline, began = Pipeline(make_platform(on_ray), seconds=whole.seconds), time.monotonic()
        wanted = min(KILLS_A_PIPELINE, KILLS - kills)
        done = pipeline.killed([what] * wanted, draw, within=within)
        if not done:  # later ones are quicker than the first, and a kill is to fall into one
            within = min(within, time.monotonic() - began)
        pipeline.check(whole.digests)
        kills, pipelines, flow_runs = kills + done, pipelines + 1, flow_runs + len(pipeline.flow_runs)
        log.info(
            "%s: %d kills in %d pipelines, %d flow runs, %.0f s (an undisturbed run: %.0f s), seed %d",
            what, kills, pipelines, flow_runs, time.monotonic() - started, whole.seconds, SEED,
        )  # fmt: skip
