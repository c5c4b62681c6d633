"""Clusters of several nodes on this machine: parts of them are killed, and the curve equals that of one process.

A node is a raylet with its processes and resources. VILA_KILLS_NODES sets the number of kills of each kind (`make
faults`: 20). Without it, one run loses its flow and a node, with the worker on it.
"""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from tests.seed import SEED
from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.artifacts.store import content, read_manifest
from vila_ops.config import Resources, Run, Stage, load
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.doctor.cluster import examine_cluster
from vila_ops.errors import CorruptArtifact
from vila_ops.model.assemble import assemble
from vila_ops.train.job import JobPayload
from vila_ops.train.stage import train_stage

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("VILA_KILLS_NODES", "0"))
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--num-cpus", "2"]
OPTIONS = ["--node-ip-address", "127.0.0.1", "--object-store-memory", "80000000"]
OPTIONS += ["--min-worker-port", "0", "--max-worker-port", "0"]
ENV = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_health_check_period_ms": "1000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_raylet_start_wait_time_s": "120",
}
"""Environment of nodes and flows. With the last three, a lost node or head is noticed sooner than by default, and a
node may take longer to start, as four nodes do on a busy machine."""
STEPS_A_KILL = 6
PATIENCE_SECONDS = 1000


class Nodes:
    """A cluster of one test: a head and further nodes. All of its processes are ended by their ids."""

    def __init__(self, free_ports: Callable[[int], list[int]], *, count: int) -> None:
        self.free_ports, self.count = free_ports, count
        self.gcs, self.dashboard, self.client = free_ports(3)
        self.address, self.jobs = f"127.0.0.1:{self.gcs}", f"http://127.0.0.1:{self.dashboard}"
        self.started: list[subprocess.Popen[bytes]] = []
        self.folder = ""

    def up(self) -> None:
        """Start the head, which is node 0, and then the other nodes one by one, as starting them together is slow."""
        head = ["--head", "--port", str(self.gcs), "--temp-dir", self.folder, "--dashboard-port", str(self.dashboard)]
        self._start(*head, "--ray-client-server-port", str(self.client))
        _wait(lambda: _listens(self.gcs) and _listens(self.dashboard), "a head")
        _wait(lambda: self._alive() == 1, "a node on the head")
        for number in range(1, self.count):
            self.add()
            _wait(lambda wanted=number + 1: self._alive() == wanted, f"{number + 1} nodes")

    def add(self) -> None:
        """Start one more node, which joins within seconds."""
        self._start("--address", self.address)

    def kill(self, number: int) -> None:
        """Send SIGKILL to the raylet of a node, or to all processes of the head."""
        tree = _tree(self.started.pop(number))
        for process in tree:
            if number == 0 or process.name() == "raylet":
                process.kill()
        _end(tree)

    def workers(self) -> list[psutil.Process]:
        """Return the processes that train."""
        processes = [process for one in self.started for process in _tree(one)]
        return [process for process in processes if "RayTrainWorker" in "".join(_words(process))]

    def end(self) -> None:
        """End all processes, those of the head last."""
        for one in reversed(self.started):
            _end(_tree(one))
        self.started.clear()

    def _alive(self) -> int:
        try:
            return len(list_nodes(self.jobs, filters=[("state", "=", "ALIVE")]))
        except RayStateApiException:
            return 0

    def _start(self, *arguments: str) -> None:
        agent, metrics = self.free_ports(2)
        ports = ["--dashboard-agent-listen-port", str(agent), "--metrics-export-port", str(metrics)]
        command = [*RAY, *OPTIONS, *arguments, *ports]
        self.started.append(subprocess.Popen(command, env=ENV, cwd=self.folder, stdout=subprocess.DEVNULL))


def _words(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def _tree(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        whole = psutil.Process(process.pid)
        return [whole, *whole.children(recursive=True)]
    return []


def _end(tree: list[psutil.Process]) -> None:
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(tree, timeout=5)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, f"no {what} within {PATIENCE_SECONDS} s, seed {SEED}"
        time.sleep(0.2)  # each look at the nodes costs the dashboard's processes CPU


@pytest.fixture
def cluster_of(free_ports: Callable[[int], list[int]]) -> Iterator[Callable[[int], Nodes]]:
    """Starts a cluster with some number of nodes."""
    with ExitStack() as stack:

        def start(count: int) -> Nodes:
            nodes = Nodes(free_ports, count=count)
            nodes.folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-t", ignore_cleanup_errors=True))
            stack.callback(nodes.end)
            nodes.up()
            return nodes

        yield start


@pytest.fixture(scope="module")
def make_payload(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], JobPayload]:
    """Makes the payload of a stage with some number of steps, launched inline, that saves after each step."""
    root = tmp_path_factory.mktemp("nodes")
    inline = ROOT / "configs/resources/inline.yaml"
    where = (
        f"resources.storage.store={root}/store",
        f"resources.storage.cache={root}/cache",
        "resources.train.threads_per_worker=1",
    )
    run: Run = load(ROOT / "configs/recipes/tiny.yaml", resources=inline, overrides=where)
    whole = run.recipe.stages["pretrain"]

    def make(num_steps: int) -> JobPayload:
        changes = {"num_steps": num_steps, "save_every": 1, "validate_every": num_steps, "global_batch_size": 32}
        return JobPayload(
            stage=Stage.model_validate({**whole.model_dump(), **changes}),
            model=run.recipe.model_of("pretrain"),
            data=prepare(whole.mixture, run.recipe.text(), run.resources),
            init=assemble(run.recipe.model, run.resources),
            resources=run.resources,
            working_directory=str(ROOT),
        )

    return make


class Flow:
    """A process that runs a stage, and is restarted after its death."""

    def __init__(self, payload: JobPayload, folder: Path, launch: Mapping[str, str], **train: object) -> None:
        own = {"storage.store": str(folder / "store"), **{f"train.{key}": value for key, value in train.items()}}
        self.payload = payload.with_changes({"resources": payload.resources.with_changes({**launch, **own})})
        self.folder, self.lives = folder, 0
        (folder / "payload.json").write_text(self.payload.model_dump_json())

    def start(self) -> None:
        """Start the process."""
        self.lives += 1
        self.log = self.folder / f"flow-{self.lives}.log"
        files = [str(self.folder / "payload.json"), str(self.folder / "checkpoint.json")]
        command = [sys.executable, str(Path(__file__).parent / "stage_process.py"), *files]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=ENV, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def steps(self) -> int:
        """Return the step of the newest resume checkpoint."""
        steps = [int(path.parent.name[5:]) for path in self.folder.glob("store/resume/*/step-*/manifest.json")]
        return max(steps, default=0)

    def await_steps(self, least: int) -> None:
        """Wait until the checkpoint of a step exists."""

        def is_so() -> bool:
            assert self.process.poll() is None, f"ended too early, seed {SEED}: {self.log.read_text()[-4000:]}"
            return self.steps() >= least

        _wait(is_so, f"step {least}")

    def result(self) -> Checkpoint:
        """Wait for the end of the process and return its checkpoint."""
        assert self.process.wait(PATIENCE_SECONDS) == 0, self.log.read_text()[-4000:]
        return Checkpoint.model_validate_json((self.folder / "checkpoint.json").read_text())

    @contextmanager
    def running(self) -> Iterator["Flow"]:
        """Start the process, and end it with the context."""
        self.start()
        try:
            yield self
        finally:
            self.process.kill()
            self.process.wait()


def _losses(checkpoint: Checkpoint) -> list[float]:
    curve = json.loads((content(checkpoint) / "curve.json").read_text())
    return [float.fromhex(row["loss"]) for row in curve if "loss" in row]


def _is_that_of_one_process(made: Checkpoint, payload: JobPayload, *, num_nodes: int) -> None:
    """Check the curve, that nothing was sealed twice, that every node had one worker, and that no draft is left."""
    alone = train_stage(payload.stage, payload.model, payload.data, payload.init, payload.resources)
    assert _losses(made) == pytest.approx(_losses(alone), rel=1e-6, abs=1e-6), f"seed {SEED}"
    store = Path(made.uri).parents[1]
    assert len(list(store.glob("checkpoint/*/manifest.json"))) == 1
    assert not list(store.glob("resume/*"))
    assert not list(store.glob("ray_train/*"))
    workers = read_manifest(made.uri)["execution"]["workers"]
    assert len({worker["node"] for worker in workers}) == len(workers) == num_nodes
    assert {worker["backend"] for worker in workers} == {"gloo"}


def test_a_job_outlives_its_flow_and_a_node(
    cluster_of: Callable[[int], Nodes], make_payload: Callable[[int], JobPayload], tmp_path: Path
) -> None:
    """The job stays the same: a second flow re-attaches to it, and Ray Train waits for a node."""
    nodes, stage = cluster_of(2), make_payload(16)
    launch = {"launch": "ray_job", "ray_address": nodes.address, "job_address": nodes.jobs}
    flow = Flow(
        stage, tmp_path, launch, num_workers=2, zero_stage=1, placement="STRICT_SPREAD",
        network={"interface": "lo", "env": {"TP_SOCKET_IFNAME": "lo"}}, max_failures=5,
    )  # fmt: skip
    with flow.running():
        flow.await_steps(2)
        flow.process.kill()
        flow.process.wait()
        flow.start()
        workers = nodes.workers()
        assert len(workers) == 2
        for worker in workers:
            environment = worker.environ()  # the environment at the start of the process
            assert [environment[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")] == [
                "lo"
            ] * 3
        nodes.kill(1)
        nodes.add()
        made = flow.result()
    _is_that_of_one_process(made, stage, num_nodes=2)
    # The error comes from the task, not from Ray, and is not retried.
    damaged = JobPayload.model_validate(
        {**flow.payload.model_dump(), "data": {**stage.data.model_dump(), "digest": "0" * 64}}
    )
    with pytest.raises(CorruptArtifact, match=f"{'0' * 64}"):
        train_stage(damaged.stage, damaged.model, damaged.data, damaged.init, damaged.resources)
    (job,) = [
        job
        for job in JobSubmissionClient(nodes.jobs).list_jobs()
        if job.status == JobStatus.SUCCEEDED and job.submission_id
    ]
    assert job.submission_id == f"{Path(made.uri).name}-1"
    for life in (1, 2):
        assert f"is job {job.submission_id};" in (tmp_path / f"flow-{life}.log").read_text()
    _doctor_measures_both_nodes(flow.payload.resources)


def _doctor_measures_both_nodes(resources: Resources) -> None:
    try:
        told = [finding.text for finding in examine_cluster(resources)]
    finally:
        ray.shutdown()
    nodes = [text for text in told if text.startswith("node ") and "; store: writes " in text]
    assert len(nodes) == 2, told
    assert all(f"{socket.gethostname()}, cpu; " in text for text in nodes)
    assert len([text for text in told if text.startswith("all-reduce of 64 MiB between 2 nodes: bus ")]) == 1
    assert not any("clock is" in text or "several versions" in text for text in told), told


@pytest.mark.skipif(not KILLS, reason="VILA_KILLS_NODES says how many kills")
@pytest.mark.timeout(PATIENCE_SECONDS * (KILLS + 2))
@pytest.mark.parametrize(
    ("what", "num_nodes"),
    [("worker", 2), ("worker", 4), ("node", 2), ("node", 4), ("head", 2), ("flow", 2)],
)
def test_killed_again_and_again_it_goes_on(
    what: str,
    num_nodes: int,
    cluster_of: Callable[[int], Nodes],
    make_payload: Callable[[int], JobPayload],
    tmp_path: Path,
) -> None:
    """One stage with all kills of one kind. After the head's death, cluster and flow are started again."""
    draw = random.Random(SEED)
    nodes, stage = cluster_of(num_nodes), make_payload(STEPS_A_KILL * (KILLS + 1))
    launch = {"launch": "ray_job", "job_address": nodes.jobs} if what == "flow" else {"launch": "ray"}
    flow = Flow(
        stage, tmp_path, {**launch, "ray_address": nodes.address}, num_workers=num_nodes, zero_stage=2,
        placement="STRICT_SPREAD", network={"interface": "lo"}, max_failures=3 * KILLS,
    )  # fmt: skip
    with flow.running():
        for _ in range(KILLS):
            flow.await_steps(flow.steps() + 1)
            time.sleep(draw.uniform(0, 0.5))
            match what:
                case "worker":
                    draw.choice(nodes.workers()).kill()
                case "node":
                    nodes.kill(draw.randrange(1, num_nodes))
                    nodes.add()
                case "head":
                    nodes.kill(0)
                    assert flow.process.wait(PATIENCE_SECONDS) != 0
                    nodes.end()
                    nodes.up()
                    flow.start()
                case "flow":
                    flow.process.kill()
                    flow.process.wait()
                    flow.start()
        made = flow.result()
    _is_that_of_one_process(made, stage, num_nodes=num_nodes)
    if launch["launch"] == "ray_job":
        ended = [job.status for job in JobSubmissionClient(nodes.jobs).list_jobs() if job.submission_id]
        assert ended == [JobStatus.SUCCEEDED]


@pytest.mark.skipif(not KILLS, reason="long: VILA_KILLS_NODES asks for it")
def test_a_cluster_without_room_is_an_error_that_says_so(
    cluster_of: Callable[[int], Nodes], make_payload: Callable[[int], JobPayload], tmp_path: Path
) -> None:
    nodes = cluster_of(1)
    launch = {"launch": "ray", "ray_address": nodes.address}
    flow = Flow(make_payload(2), tmp_path, launch, num_workers=2, placement="STRICT_SPREAD", start_timeout_seconds=60)
    with flow.running():
        assert flow.process.wait(PATIENCE_SECONDS) == 1
    assert (
        "ClusterFull: 2 workers of {'CPU': 1.0, 'GPU': 0} with placement STRICT_SPREAD and node label any did not "
        "start within 60 s; the live nodes have [{'CPU': 2.0, 'GPU': 0}]" in flow.log.read_text()
    )
