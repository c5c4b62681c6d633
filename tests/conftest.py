"""Real small objects that many tests share: the tiny fixtures as configs, models and prepared data."""

import contextlib
import fcntl
import gc
import importlib.util
import itertools
import os
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import LlavaProcessor
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from tests import forks
from tests.ray_head import ray_head
from tests.s3_servers import moto
from tests.seed import SEED
from vila_ops.artifacts import s3_calls
from vila_ops.artifacts.s3_calls import client, client_of
from vila_ops.config import Mixture, Model, Resources, Stage, TextFormat
from vila_ops.config.local import LocalServers
from vila_ops.data.raw.objects import filesystem
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.model import features
from vila_ops.model.build import build_model
from vila_ops.model.processing import build_processor
from vila_ops.model.vila import VilaForConditionalGeneration
from vila_ops.packages.normalisation import mean_std
from vila_ops.packages.tokenizer import IMAGE_TOKEN, build_tokenizer

TINY = Path(__file__).parent / "tiny"
RENDERS = {"pairs": "caption", "documents": "document", "instructions": "instructions", "definitions": "document"}
SIDE, PATCH = 56, 14
THREADS = int(os.environ.get("VILA_TEST_THREADS", "1"))
"""torch's threads in every test, and in the workers of the stages that it trains."""

QUICK_RAY = {
    # ray.train.report() waits for the next health check
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # a process for each group of workers, which asks whether a cloud takes their nodes away
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # by default the first driver starts a worker for each CPU, most of which are never used: 1.5 s of CPU each
    "RAY_prestart_worker_first_driver": "0",
    # by default workers have what CPU the tests beside them leave, while the servers around them go on asking
    "RAY_worker_niceness": "0",
}
"""Environment of every process that uses Ray."""

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of every process: threads sleep while they wait. By default they wait in loops: a stage with two threads
took 14 to 25 s of CPU on two busy cores, and 1.9 s so (1.5 s with one thread)."""

LONGEST = (
    "tests/flows/full_pipeline",
    "tests/faults/test_nodes.py",
    "tests/test_cli.py",
    "tests/serve/test_deploy_ray.py",
    "tests/train/test_zero.py",
    "tests/eval/test_evaluate.py",
    "tests/data/test_prepare_on_ray.py",
    "tests/fake_device/test_inline_paths.py",
    "tests/train/test_watchdog.py",
    "tests/faults/test_failing_disk.py",
    "tests/test_exactness.py",
    "tests/train/test_lora_stage.py",
    "tests/test_dvc_revisions.py",
    "tests/faults/test_resume.py",
    "tests/faults/test_elastic.py",
    "tests/train/test_verify_resume.py",
    "tests/faults/test_failpoints.py",
    "tests/model/test_hostile_folders.py",
    "tests/tracking/test_outbox.py",
    "tests/test_passwords.py",
    "tests/test_image_size.py",
    "tests/test_your_data.py",
)
"""The units that take the longest, in order (measured)."""

MakeModel = Callable[..., Model]
Whole = tuple[VilaForConditionalGeneration, LlavaProcessor]


def pytest_configure(config: pytest.Config) -> None:
    """Clusters of these tests ask for a token of these tests, whatever Ray keeps in the home folder.

    Set before a test module imports Ray, which reads it only once. Properties are tried with the same 100 examples
    always; `make faults` (VILA_FUZZ) draws 1,000 others.
    """
    busy: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    importlib.import_module("setuptools")  # before anything imports distutils, or torch's compiler finds the wrong one
    settings.register_profile("repeatable", derandomize=True, max_examples=100, **busy)
    settings.register_profile("drawn", max_examples=1000, **busy)
    settings.load_profile("drawn" if "VILA_FUZZ" in os.environ else "repeatable")
    stack = contextlib.ExitStack()
    config.add_cleanup(stack.close)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vila-tests-")))
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers share it
        stack.enter_context(forks.serving(folder / "forks"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), **QUICK_RAY, **PASSIVE}
    torch.set_num_threads(THREADS)  # for fixtures of a module or a session, which come before `_few_threads`


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long units come first."""
    weights: dict[Path, int] = {}
    for item in items:
        own = 10 * (item.get_closest_marker("ray") is not None) + (item.get_closest_marker("slow") is not None)
        weights[unit_of(item.path)] = weights.get(unit_of(item.path), 0) + own
    for number, name in enumerate(reversed(LONGEST)):
        weights[config.rootpath / name] = 1000 + number
    items.sort(key=lambda item: -weights[unit_of(item.path)])


def unit_of(file: Path) -> Path:
    """What one worker of pytest-xdist runs as a whole, since its tests share what they set up: a file, or a package."""
    return file.parent if (file.parent / "__init__.py").exists() else file


class UnitScheduling(LoadFileScheduling):
    """Gives whole units to the workers."""

    def _split_scope(self, nodeid: str) -> str:
        return str(unit_of(self.config.rootpath / super()._split_scope(nodeid)))


@pytest.hookimpl(optionalhook=True)  # some runs are without xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> UnitScheduling:
    return UnitScheduling(config, log)


def pytest_collection_finish() -> None:
    """Keep what all tests have imported out of each search for garbage, which takes 0.3 s with it."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell with each failure which draws it was made of."""
    report = yield
    if report.failed:
        report.sections.append(("seed", f"VILA_SEED={SEED}"))
    return report


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    """Two cores are shared. For each test, because whatever loads a model in this process sets the number too."""
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session", autouse=True)
def _nearly_full_disk() -> Iterator[None]:
    """A disk on which no feature is kept by default, however free the machine's is: a test that needs them says so."""
    usage = SimpleNamespace(total=10**14, used=10**14 - 10**12, free=10**12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "shutil", SimpleNamespace(disk_usage=lambda _: usage))
        yield


@pytest.fixture(scope="session")
def docs_script() -> Callable[[str], ModuleType]:
    """A script of docs/ by its name, as a module that is imported nowhere else."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"docs_{name}", TINY.parents[1] / "docs" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The folder of the committed fixtures."""
    return TINY


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """The config of a random model: a tower, a projector, a Llama of two layers."""

    def make(tower: str = "clip", projector: str = "mlp_gelu", factor: int = 2, **more: Any) -> Model:
        shape = {"factor": factor} if projector == "mlp_downsample" else {}
        return Model.model_validate(
            {
                "vision_tower": {"kind": "random", "architecture": tower},
                "projector": {"kind": projector, **shape},
                "language_model": {"kind": "random", "tokenizer": str(TINY / "tokenizer")},
                "image_size": SIDE,
                "patch_size": PATCH,
                **more,
            }
        )

    return make


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Model], Whole]:
    """A config to the model itself and its processor."""
    cache = tmp_path_factory.mktemp("cache")

    def make(model: Model) -> Whole:
        fast = build_tokenizer(model.language_model, chat_template=model.chat_template, cache=cache)
        whole = build_model(
            model,
            vocabulary=len(fast),
            image_id=fast.convert_tokens_to_ids(IMAGE_TOKEN),
            eos_id=fast.eos_token_id,
            cache=cache,
        )
        return whole, build_processor(whole.config, fast, mean_std=mean_std(model.vision_tower))

    return make


@pytest.fixture(scope="session")
def make_text(make_model: MakeModel) -> Callable[..., TextFormat]:
    """How the tiny model reads records."""

    def make(max_tokens: int = 128, **more: Any) -> TextFormat:
        return make_model(**more).text(max_tokens=max_tokens)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tiny tokenizer, with images of four tokens."""
    fast = build_tokenizer(make_model().language_model, chat_template="chatml", cache=tmp_path_factory.mktemp("cache"))
    return Tokenizer(fast, image_tokens=4, after_image="")


@pytest.fixture(scope="session")
def make_mixture() -> Callable[..., Mixture]:
    """A mixture of the tiny folders."""

    def make(*names: str, weights: dict[str, float] | None = None, **more: Any) -> Mixture:
        sources = {
            name: {
                "kind": "jsonl",
                "path": str(TINY / name),
                "render": RENDERS[name],
                "weight": (weights or {}).get(name, 1.0),
            }
            for name in names
        }
        return Mixture.model_validate({"name": "-".join(names), "sources": sources, "shard_bytes": 40_000, **more})

    return make


@pytest.fixture(scope="session")
def make_stage() -> Callable[..., Stage]:
    """A short stage on a mixture."""

    def make(mixture: Mixture, **more: Any) -> Stage:
        return Stage.model_validate(
            {
                "name": "align",
                "mixture": mixture.model_dump(),
                "trainable": ["projector"],
                "num_steps": 8,
                "global_batch_size": 2,
                "sequence_length": 128,
                "learning_rate": 1e-3,
                "precision": "fp32",
                "save_every": 2,
                "validate_every": 4,
                "validation_rows": 2,
                **more,
            }
        )

    return make


@pytest.fixture(scope="session")
def make_resources() -> Callable[..., Resources]:
    """Everything under one folder, inline; more settings by their dotted paths."""

    def make(root: Path, **more: Any) -> Resources:
        places = {f"storage.{name}": str(root / name) for name in ("store", "data", "cache")}
        own = {**places, "storage.features_leave_free": 0.0, "train.threads_per_worker": THREADS}
        return Resources(launch="inline").with_changes({**own, **more})

    return make


@pytest.fixture(scope="session")
def free_ports() -> Iterator[Callable[[int], list[int]]]:
    """Ports that nobody holds now, and that no other test nor another run of these tests is given.

    They lie below those that the kernel gives to outgoing connections, any of which may take one before it is used; a
    port that the kernel chooses (by asking for port 0) is one of those. A run marks its ports by names in the abstract
    namespace of Unix sockets, which the kernel forgets when the run ends, however it ends.
    """
    ports = iter(range(20_000, 32_000))
    with contextlib.ExitStack() as marks:

        def is_free(port: int) -> bool:
            mark = marks.enter_context(socket.socket(socket.AF_UNIX))
            with socket.socket() as listener:
                try:
                    mark.bind(f"\0vila-ops-tests-{port}")
                    listener.bind(("127.0.0.1", port))
                except OSError:
                    return False
            return True

        yield lambda count: list(itertools.islice(filter(is_free, ports), count))


@pytest.fixture(scope="session")
def free_servers(free_ports: Callable[[int], list[int]]) -> Callable[[Path], LocalServers]:
    """Settings of servers on free ports, in a folder of the test's own."""

    def settings(root: Path) -> LocalServers:
        names = [name for name in LocalServers.model_fields if name.endswith("_port")]
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        return LocalServers.model_validate(
            {"root": str(root), "ray_object_store_bytes": 100 * 2**20, "start_timeout_seconds": 1500, **ports}
        )

    return settings


@pytest.fixture(scope="session")
def empty_database() -> Path:
    """MLflow's tables; the first worker that needs them makes them for all, because that takes seconds."""
    from mlflow import MlflowClient

    folder = Path(os.environ[forks.SOCKET]).parent  # of this run, whichever its worker
    path = folder / "mlflow.db"
    with (folder / "mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            MlflowClient(f"sqlite:///{path}", registry_uri=f"sqlite:///{path}").search_registered_models()
    return path


@pytest.fixture(scope="module")
def ray_cluster(free_ports: Callable[[int], list[int]]) -> Iterator[str]:
    """The address of a Ray head of a module's own."""
    with ray_head(free_ports) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium. Of a module's own, as Playwright keeps the event loop of its thread."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium or google-chrome on the PATH")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """moto's S3."""
    server = moto("127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Sets what boto3 reads, in this process and those that it starts, and nothing of the user's own."""

    nobody = tmp_path / "aws-config"
    nobody.touch()

    def point(endpoint: str, *, key: str = "key", secret: str = "canary-secret") -> None:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": str(nobody),
            "AWS_SHARED_CREDENTIALS_FILE": str(nobody),
            "AWS_EC2_METADATA_DISABLED": "true",
            "VILA_CACHE": str(tmp_path / "copies"),
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(s3_calls, "WAIT_SECONDS", 0.01)
        client_of.cache_clear()
        filesystem.cache_clear()

    yield point
    client_of.cache_clear()
    filesystem.cache_clear()


@pytest.fixture
def s3_store(moto_endpoint: str, aws: Callable[..., None]) -> str:
    """An empty store in a bucket of its own."""
    aws(moto_endpoint)
    bucket = f"vila-{secrets.token_hex(6)}"
    client().create_bucket(Bucket=bucket)
    return f"s3://{bucket}/a/store"


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    made: str = str(tmp_path / "store") if request.param == "disk" else request.getfixturevalue("s3_store")
    return made
