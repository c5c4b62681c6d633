"""A bit of every kind of file of a small store is flipped, and what is said is followed: the same artifacts come back.

VILA_FLIPS sets how many bits of each sealed file are flipped (1; `make faults`: more), VILA_SEED which.
"""

import os
import random
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests import made_elsewhere
from tests.eval.benchmarks.sample import SAMPLES, config_of
from tests.seed import SEED
from tests.test_exactness import write_data
from vila_ops.artifacts.kinds import Artifact, ModelVersion
from vila_ops.artifacts.store import KINDS, MANIFEST, verify_folder
from vila_ops.config import Mixture, OfficialSuite, Resources
from vila_ops.config.benchmarks import Pope
from vila_ops.config.load import load_suite
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.errors import CorruptArtifact
from vila_ops.eval.evaluate import evaluate
from vila_ops.local.process import ProcessRecord, read_record, record_path
from vila_ops.model.assemble import assemble
from vila_ops.registry.card import write_card
from vila_ops.registry.gate import GateVerdict
from vila_ops.retrain import decisions
from vila_ops.retrain.decide import Decided
from vila_ops.serve.backends.local_process import ProcessManager, ServiceRecord
from vila_ops.train.job import BadSampleReport
from vila_ops.train.stage import train_stage

FEW_SHOT = Path(__file__).parents[2] / "configs/suites/sample_few_shot.yaml"
DECISION = decisions.DecisionRecord(
    name="own", subject="retrain", when=datetime(2026, 1, 5, tzinfo=UTC), window=datetime(2026, 1, 5, tzinfo=UTC),
    trigger="schedule", policy={},
    decided=Decided(verdict="not now", rule="no reason", reason="nothing is new", change="new data", checks=()),
)  # fmt: skip
FLIPS = max(1, int(os.environ.get("VILA_FLIPS", "0")) // 100)
pytestmark = pytest.mark.slow
Pipeline = Callable[[], list[Artifact]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("every-file")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(root: Path) -> Pipeline:
    """All sealing tasks in order, each of which finds what is sealed already."""
    places = {f"storage.{name}": f"{root}/{name}" for name in ("store", "cache", "data")}
    resources = Resources(launch="inline").with_changes(
        {**places, "storage.benchmarks": str(SAMPLES), "storage.features_leave_free": 0.0}
    )
    pope = config_of(Pope, version=None, first=12)
    nearest = load_suite(FEW_SHOT).benchmarks["okvqa_nearest"]  # its demonstrations are sealed
    official = OfficialSuite(name="official", benchmarks={"pope": pope, "nearest": nearest}, bootstrap_resamples=50)
    model, own = made_elsewhere.model(root), made_elsewhere.mixture(root)
    near = {"near_duplicates": {"text_similarity": 1.0}}  # they need surveys
    mixture = Mixture.model_validate({**own.model_dump(), **near})

    def run() -> list[Artifact]:
        base = assemble(model, resources)
        data = prepare(mixture, model.text(max_tokens=128), resources)
        trained = train_stage(made_elsewhere.stage(mixture), model, data, base, resources)
        report = evaluate(made_elsewhere.suite(mixture), trained, data, resources)
        decision = decisions.seal(DECISION, root=str(root / "store"))
        version = ModelVersion(name="own", version=1, checkpoint=trained, promoted=False)
        card = write_card(version, report, GateVerdict(()))
        return [base, data, trained, report, evaluate(official, trained, None, resources), decision, card]

    return run


@pytest.fixture(scope="module")
def whole(pipeline: Pipeline) -> list[Artifact]:
    return pipeline()


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def follow(message: str, away: Path) -> None:
    """Do what a message says."""
    if found := re.search(r"move (?:all of )?(.+) away and run again", message):
        places = found[1].split(", ")
    else:
        found = re.search(r"^(\S+) is not a lease; remove it", message)
        assert found, message
        places = [found[1]]
    for place in places:
        away.mkdir(exist_ok=True)
        if Path(place).exists():  # an earlier message may have named it too
            shutil.move(place, away / "-".join(Path(place).parts[-2:]))


def sealed(root: Path) -> dict[str, list[Path]]:
    """The files of all sealed artifacts by kind, manifests included."""
    store = root / "store"
    return {
        kind: sorted(path for path in (store / kind).rglob("*") if path.is_file() and path.stat().st_size)
        for kind in KINDS.values()
    }


def folder_of(path: Path, root: Path) -> Path:
    return (root / "store").joinpath(*path.relative_to(root / "store").parts[:2])


def test_each_sealed_file_is_compared_and_the_message_names_its_folder(root: Path, whole: list[Artifact]) -> None:
    draw = random.Random(SEED)
    files = sealed(root)
    assert all(files.values()), "there is one of each kind"
    names = {re.sub(r"^.*-[0-9a-f]{12}\.tar$", "SHARD.tar", path.name) for kind in files.values() for path in kind}
    assert {
        MANIFEST,
        "SHARD.tar",
        "shard.tar",
        "index.parquet",
        "counts.json",
        "model.safetensors",
        "curve.json",
    } <= names
    for path in (path for kind in files.values() for path in kind):
        before = path.read_bytes()
        for _ in range(FLIPS):
            flip(path, draw)
            with pytest.raises(CorruptArtifact) as told:
                verify_folder(str(folder_of(path, root)))
            message, folder = str(told.value), re.escape(str(folder_of(path, root)))
            assert path.name in message
            assert re.search(rf"move (all of )?(.*, )?{folder}(,.*)? away and run again", message), message
            path.write_bytes(before)


def test_what_is_said_of_a_damaged_file_of_each_kind_brings_the_same_artifacts_back(
    root: Path, whole: list[Artifact], pipeline: Pipeline, tmp_path: Path
) -> None:
    draw = random.Random(SEED)
    for kind, files in sealed(root).items():
        path = draw.choice([path for path in files if path.exists()])  # a linked one may have been moved away
        flip(path, draw)
        with pytest.raises(CorruptArtifact) as told:
            verify_folder(str(folder_of(path, root)))
        follow(str(told.value), tmp_path / kind)
    assert pipeline() == whole
    for kind in sealed(root).values():
        for folder in {folder_of(path, root) for path in kind}:
            verify_folder(str(folder))


def test_all_that_is_not_sealed_heals_or_says_what_to_do(
    root: Path, whole: list[Artifact], pipeline: Pipeline, tmp_path: Path
) -> None:
    """One bit of every file of caches and leases, before data, checkpoint and report are made again."""
    draw = random.Random(SEED)
    store = root / "store"
    others = [
        path for path in store.rglob("*") if path.is_file() and path.relative_to(store).parts[0] not in KINDS.values()
    ]
    assert {"plans", "features", "leases"} <= {path.relative_to(store).parts[0] for path in others}
    for path in others:
        if path.stat().st_size:
            flip(path, draw)
    for artifact in whole[1:]:
        shutil.move(artifact.uri, tmp_path / artifact.digest)
    for scored in (store / "score").iterdir():
        shutil.move(scored, tmp_path / scored.name)
    for number in range(len(others)):
        try:
            made = pipeline()
        except CorruptArtifact as error:
            follow(str(error), tmp_path / f"away-{number}")
        else:
            break
    assert made == whole


def test_a_damaged_record_names_its_file_and_is_not_needed(root: Path) -> None:
    """Of a service, of a server and of a stage that stopped: cut off, or with a byte that JSON does not have."""
    manager = ProcessManager(root / "service", "vila")
    manager.folder.mkdir(parents=True)
    manager.write(ServiceRecord(pid=1, started=1.0, host="127.0.0.1", port=1, identity="i"))
    server = record_path(root / "servers", "mlflow")
    server.parent.mkdir(parents=True)
    server.write_text(
        ProcessRecord(name="mlflow", pid=1, started=1.0, command=(), env={}, directory="/").model_dump_json()
    )
    stopped = root / "bad-samples-step-000001.json"
    report = {"stage": "s", "mixture": "m", "data": "d", "step": 1, "what": "loss", "value": "nan", "samples": ()}
    stopped.write_text(BadSampleReport.model_validate(report).model_dump_json())
    readers: dict[Path, Callable[[], object]] = {
        manager.record_path: manager.read,
        server: lambda: read_record(root / "servers", "mlflow"),
        stopped: lambda: BadSampleReport.read(stopped),
    }
    for path, read in readers.items():
        assert read() is not None
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole.replace(b"{", b"\xff", 1), b""):
            path.write_bytes(damaged)
            with pytest.raises(CorruptArtifact, match=re.escape(str(path))):
                read()
    manager.record_path.unlink()
    server.unlink()
    assert manager.read() is read_record(root / "servers", "mlflow") is None
