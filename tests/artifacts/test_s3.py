"""What is of S3 alone: credentials (nanio checks them), the probe (nanio ignores conditions), and local copies."""

import logging
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests import s3_servers
from tests.s3_servers import KEY, SECRET
from vila_ops.artifacts import s3, s3_calls
from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.s3_calls import client, place, put
from vila_ops.artifacts.store import Address, address, begin, content, file, find, probe, seal
from vila_ops.cli import app
from vila_ops.errors import StoreRefused, UnsafeStore

AT = address(Dataset, revision=1, recipe={}, parents=())


@pytest.fixture(scope="module")
def nanio(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], list[int]]) -> Iterator[str]:
    """A server that honours keys and ignores conditions."""
    with s3_servers.nanio(tmp_path_factory.mktemp("nanio"), free_ports(1)[0]) as endpoint:
        yield endpoint


@pytest.fixture
def bucket(nanio: str, aws: Callable[..., None]) -> str:
    """A bucket of nanio's, with the right keys set."""
    aws(nanio, key=KEY, secret=SECRET)
    name = f"vila-{secrets.token_hex(6)}"
    client().create_bucket(Bucket=name)
    return name


def write(store: str, data: dict[str, bytes], *, at: Address = AT) -> Dataset:
    attempt = begin(at, store=store)
    for name, value in data.items():
        (attempt / name).write_bytes(value)
    return seal(Dataset, at, attempt, facts={"num_samples": 1, "num_tokens": 1}, execution={})


def test_a_store_that_ignores_conditions_is_refused_before_any_work(bucket: str, tmp_path: Path) -> None:
    for ask in (probe, lambda store: begin(AT, store=store)):
        with pytest.raises(UnsafeStore, match=r"ignores If-None-Match: a second put overwrote the first.*use a store"):
            ask(f"s3://{bucket}/store")
    assert client().list_objects_v2(Bucket=bucket).get("Contents", []) == [], "the probe is removed"
    attempt = tmp_path / "copies/s3" / bucket / "store/dataset" / AT.key / "attempt-1"
    attempt.mkdir(parents=True)
    with pytest.raises(UnsafeStore, match="ignores If-None-Match"):
        seal(Dataset, AT, attempt, facts={"num_samples": 1, "num_tokens": 1}, execution={})


@pytest.mark.slow
def test_doctor_says_what_a_store_lacks(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "servers.yaml").write_text(f"root: {tmp_path / 'local'}\n")
    (tmp_path / "resources.yaml").write_text(f"launch: inline\nstorage:\n  store: s3://{bucket}/store\n")
    files = ["--servers", str(tmp_path / "servers.yaml"), "-r", str(tmp_path / "resources.yaml")]
    told = CliRunner().invoke(app, ["doctor", *files])
    assert told.exit_code == 1
    assert f"BAD  store s3://{bucket}/store ignores If-None-Match" in told.stdout


def test_a_store_that_ignores_if_match_alone_is_refused(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(uri: str, data: bytes, condition: s3_calls.Condition) -> str | None:
        if "IfMatch" in condition:
            return str(client().put_object(**place(uri), Body=data)["ETag"])
        return put(uri, data, condition)

    monkeypatch.setattr(s3, "put", forgetful)
    with pytest.raises(UnsafeStore, match="ignores If-Match: two processes could hold one lease"):
        probe(s3_store)


def test_the_right_keys_read_write_list_and_upload_in_parts(bucket: str, tmp_path: Path) -> None:
    large = secrets.token_bytes(20 * 2**20)
    (tmp_path / "large").write_bytes(large)
    client().upload_file(str(tmp_path / "large"), bucket, "large", Config=s3_calls.TRANSFER)
    client().put_object(Bucket=bucket, Key="small", Body=b"1")
    assert s3.read(f"s3://{bucket}/small") == b"1"
    assert s3.sizes([f"s3://{bucket}/{name}" for name in ("large", "none", "small")]) == [len(large), None, 1]
    client().download_file(bucket, "large", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == large
    assert [o["Key"] for o in client().list_objects_v2(Bucket=bucket)["Contents"]] == ["large", "small"]


WRONG_KEYS = [(KEY, "wrong-" + secrets.token_hex(8)), ("nobody", SECRET)]


@pytest.mark.parametrize(("key", "secret"), WRONG_KEYS, ids=["another secret", "another key"])
def test_wrong_keys_are_refused_and_told_without_the_secret(
    key: str, secret: str, bucket: str, nanio: str, aws: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    aws(nanio, key=key, secret=secret)
    caplog.set_level(logging.INFO)
    with pytest.raises(StoreRefused, match=rf"s3://{bucket}/.*access refused by {nanio} .*AWS_ACCESS_KEY_ID") as raised:
        begin(AT, store=f"s3://{bucket}/store")
    assert secret not in f"{raised.value}{raised.value.__cause__}{caplog.text}"
    s3_calls.client_of.cache_clear()  # nanio leaves the body of the refused put on its connection
    with pytest.raises(StoreRefused, match="access refused"):
        s3.sizes([f"s3://{bucket}/small"])


@pytest.mark.slow
def test_no_keys_at_all_are_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3_calls.client_of.cache_clear()
    with pytest.raises(StoreRefused, match=r"no usable credentials \(NoCredentialsError\); set AWS_ACCESS_KEY_ID"):
        find(Dataset, AT, store=f"s3://{bucket}/store")


def test_an_endpoint_with_a_password_is_refused_and_not_shown(aws: Callable[..., None]) -> None:
    aws("http://vila:canary@127.0.0.1:9")
    with pytest.raises(StoreRefused, match="AWS_ENDPOINT_URL holds a password") as raised:
        find(Dataset, AT, store="s3://bucket/store")
    assert "canary" not in f"{raised.value}{raised.value.__cause__}"


def test_no_secret_is_written_anywhere(s3_store: str, tmp_path: Path) -> None:
    write(s3_store, {"a": b"1"})
    name = place(s3_store)["Bucket"]
    keys = [found["Key"] for found in client().list_objects_v2(Bucket=name)["Contents"]]
    objects = [client().get_object(Bucket=name, Key=key)["Body"].read() for key in keys]
    files = [path.read_bytes() for path in (tmp_path / "copies").rglob("*") if path.is_file()]
    assert len(objects) == 3
    assert not any(b"canary-secret" in data for data in [*objects, *files])


def test_one_file_is_fetched_without_the_others(s3_store: str, tmp_path: Path) -> None:
    made = write(s3_store, {"a": b"1", "b": b"2"})
    copies = content(made)
    for name in ("a", "b"):
        (copies / name).unlink()
    assert file(made, "b") == copies / "b"
    assert [path.name for path in copies.iterdir()] == ["b"]


def test_a_copy_that_rotted_is_fetched_anew(s3_store: str) -> None:
    made = write(s3_store, {"a": b"right"})
    path = file(made, "a")
    path.write_bytes(b"wrong")
    assert file(made, "a").read_bytes() == b"right"
    path.write_bytes(b"short"[:2])
    assert (content(made) / "a").read_bytes() == b"right"


def test_threads_that_want_the_same_file_download_it_once(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write(s3_store, {"a": b"right"})
    file(made, "a").unlink()
    downloads: list[str] = []
    download = s3._download

    def counted(uri: str, *rest: object) -> None:
        downloads.append(uri)
        download(uri, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(s3, "_download", counted)
    with ThreadPoolExecutor(8) as pool:
        assert {path.read_bytes() for path in pool.map(lambda _: file(made, "a"), range(8))} == {b"right"}
    assert len(downloads) == 1


@pytest.mark.parametrize("store", ["gs://bucket/store", "s3://B", "s3://bucket//x", "s3://bucket/../x"])
def test_what_is_no_store_is_refused_by_the_config(store: str, make_resources: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="neither a folder nor s3://BUCKET/PREFIX"):
        make_resources(Path("x"), **{"storage.store": store})
