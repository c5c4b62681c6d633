"""Which errors another try can fix, decided by one function for Prefect, for Ray and for what crosses processes."""

import ast
import errno
import os
from collections import Counter
from pathlib import Path

import httpx
import httpx2
import huggingface_hub
import pytest
from botocore.exceptions import ClientError
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    TEMPORARILY_UNAVAILABLE,
)
from prefect import Task
from prefect.client.schemas.objects import State, StateType
from pydantic import ValidationError

from flows import tasks
from vila_ops import errors, tracking
from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.leases import hold
from vila_ops.artifacts.s3_calls import translated
from vila_ops.artifacts.store import address, begin
from vila_ops.config import Package, Resources, load
from vila_ops.data.preprocess.identity import raw_digests
from vila_ops.data.shards import CorruptShard
from vila_ops.errors import FINAL, DamagedFile, FetchError, RemoteError, StoreRefused, VilaError, is_final
from vila_ops.packages.fetch import fetch
from vila_ops.packages.resolve import hub_folder
from vila_ops.pipeline.stages import TASKS

ROOT = Path(__file__).parents[1]
TINY, INLINE = ROOT / "configs/recipes/tiny.yaml", ROOT / "configs/resources/inline.yaml"
ERRORS = {
    errors.CorruptArtifact("x"): True,
    errors.OtherFormat("x"): True,
    DamagedFile("x", "is missing"): True,
    CorruptShard("x"): True,
    errors.UnsafeStore("x"): True,
    StoreRefused("x"): True,
    errors.RawRefused("x"): True,
    errors.StoreUnreachable("x"): False,
    errors.RawChanged("x"): True,
    errors.DiskFault("x"): False,
    errors.DamagedAnswer("x"): False,
    errors.OtherBytes("x"): False,
    errors.FetchError("x"): False,
    errors.FetchRefused("x"): True,
    errors.TrackerRefused("x"): True,
    errors.TrackerUnreachable("x"): False,
    errors.ClusterUnreachable("x"): False,
    errors.ClusterFull("x"): False,
    errors.EndpointUnreachable("x"): False,
    errors.EndpointRefused("x"): True,
    errors.WorkerLost("x"): False,
    errors.JobFailed("x"): False,
    errors.JobStopped("x"): True,
    errors.NonFiniteLoss("x"): True,
    errors.OutOfMemory("x"): True,
    errors.DeviceLost("x"): True,
    errors.HungStep("x"): False,
    errors.Preempted("x"): False,
    errors.UnsupportedSetting("n", "x"): True,
    errors.LeaseLost("x"): False,
    errors.PromotionRaceLost("x"): False,
    errors.NotReady("x"): False,
    errors.TokenizerMissing("x"): True,
    errors.ServerFailed("x"): False,
    ValueError("x"): True,
    UnicodeDecodeError("utf-8", b"", 0, 1, "x"): True,
    TypeError("x"): True,
    KeyError("x"): True,
    AttributeError("x"): True,
    NameError("x"): True,
    ModuleNotFoundError("x"): True,
    NotImplementedError("x"): True,
    AssertionError("x"): True,
    RuntimeError("x"): False,
    OSError(errno.EIO, "x"): False,
    FileNotFoundError("x"): False,
    ConnectionError("x"): False,
    TimeoutError("x"): False,
    MemoryError("x"): False,
    httpx.ConnectError("x"): False,
}


@pytest.mark.parametrize(("error", "final"), ERRORS.items(), ids=[type(error).__name__ for error in ERRORS])
def test_an_error_is_final_or_retryable_for_prefect_for_ray_and_after_crossing_a_process(
    error: Exception, final: bool
) -> None:
    assert is_final(error) is final
    assert is_final(RemoteError.from_json(RemoteError.of(error).to_json()).rebuilt()) is final
    failed = State(type=StateType.FAILED, data=error)
    # the pipeline brings another report; another process goes on
    again = not final and not isinstance(error, errors.PromotionRaceLost | errors.Preempted)
    assert tasks.TASKS.register.retry_condition_fn(tasks.TASKS.register, None, failed) is again


def test_the_table_has_every_class() -> None:
    ours = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VilaError)}
    assert ours - {VilaError, errors.Unreachable} <= {type(error) for error in ERRORS}
    assert all(any(isinstance(error, kind) for error in ERRORS) for kind in FINAL)


def test_every_task_asks_the_same_function() -> None:
    made = [one for one in [*vars(tasks.TASKS).values(), *vars(tasks).values()] if isinstance(one, Task)]
    assert {task.name for task in made} == {function.__name__ for function in vars(TASKS).values()}
    assert len({task.retry_condition_fn for task in made}) == 1
    users = {
        str(path.relative_to(ROOT))
        for folder in ("vila_ops", "flows")
        for path in (ROOT / folder).rglob("*.py")
        if any(isinstance(node, ast.Name) and node.id in ("is_final", "FINAL") for node in ast.walk(tree(path)))
    }
    assert {"flows/tasks.py", "vila_ops/train/ray_workers.py", "vila_ops/train/ray_job_main.py"} <= users
    text = {user: (ROOT / user).read_text() for user in users - {"vila_ops/errors.py"}}
    assert not [user for user, code in text.items() if "FINAL" in code]


def test_a_class_of_error_is_defined_once() -> None:
    paths = [path for folder in ("vila_ops", "flows") for path in (ROOT / folder).rglob("*.py")]
    defined = Counter(node.name for path in paths for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef))
    names = {kind.__name__ for kind in vars(errors).values() if isinstance(kind, type)}
    assert {name: defined[name] for name in names if defined[name] > 1} == {}


def test_an_error_keeps_its_class_and_message_across_processes_where_both_know_it() -> None:
    rebuilt = RemoteError.from_json(RemoteError.of(DamagedFile("a/b", "is missing")).to_json()).rebuilt()
    assert (type(rebuilt), str(rebuilt)) == (errors.CorruptArtifact, "a/b is missing")
    try:
        Resources(launch="ray")
    except ValidationError as error:
        rebuilt = RemoteError.of(error).rebuilt()
    assert (type(rebuilt), "set ray_address" in str(rebuilt)) == (ValueError, True)


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("/proc/nope", "store /proc/nope cannot be written (No such file or directory); set resources.storage.store"),
        ("/dev/null", "store /dev/null cannot be written (File exists); set resources.storage.store"),
        ("/dev/null/a", "store /dev/null/a cannot be written (Not a directory); set resources.storage.store"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_sentence_at_once(store: str, message: str) -> None:
    at = address(Dataset, revision=1, recipe={}, parents=())
    for use in (lambda: begin(at, store=store), lambda: hold(at, store=store).__enter__()):
        with pytest.raises(StoreRefused) as raised:
            use()
        assert str(raised.value).startswith(message)
        assert is_final(raised.value)


@pytest.mark.parametrize("cache", ["/proc/nope", "/dev/null"])
def test_a_cache_that_cannot_be_used_is_one_sentence_at_once(cache: str) -> None:
    mixture = load(TINY, resources=INLINE).recipe.stages["align"].mixture
    package = Package(registry="npm", name="x", version="1", sha256="0" * 64, licence="MIT")
    for use in (lambda: raw_digests(mixture, cache=Path(cache)), lambda: fetch(package, cache=Path(cache))):
        with pytest.raises(StoreRefused) as raised:
            use()
        assert str(raised.value).startswith("resources.storage.cache /")
        assert str(raised.value).endswith("; set it to a folder of yours")
        assert is_final(raised.value)


def test_a_full_disk_is_no_reason_to_give_up_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space left") as raised:
        begin(address(Dataset, revision=1, recipe={}, parents=()), store=str(tmp_path))
    assert not is_final(raised.value)


@pytest.mark.parametrize(
    ("code", "status", "final"),
    [("AccessDenied", 403, True), ("NoSuchBucket", 404, True), ("SlowDown", 503, False), ("BadDigest", 400, False)],
)
def test_answers_of_s3_are_translated(code: str, status: int, final: bool) -> None:
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(VilaError) as raised, translated("s3://bucket/key"):
        raise ClientError(answer, "PutObject")
    assert is_final(raised.value) is final


@pytest.mark.parametrize(
    ("code", "final"),
    [
        (PERMISSION_DENIED, True),
        (INVALID_PARAMETER_VALUE, True),
        (INTERNAL_ERROR, False),
        (TEMPORARILY_UNAVAILABLE, False),
    ],
)
def test_answers_of_mlflow_are_translated(code: int, final: bool) -> None:
    with pytest.raises(VilaError) as raised, tracking.translated("http://user:secret@127.0.0.1:9", "the run 'a'"):
        raise MlflowException("no", error_code=code)
    assert is_final(raised.value) is final
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("cause", "kind"), [(httpx2.ConnectError("x"), FetchError), (OfflineModeIsEnabled(), ValueError)]
)
def test_answers_of_the_hub_are_translated(
    cause: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:  # what snapshot_download raises, without its retries of 20 s
        raise LocalEntryNotFoundError("no snapshot") from cause

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(kind, match="neither a local folder nor available from the hub"):
        hub_folder(f"vila-ops/{kind.__name__}", "main")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())
