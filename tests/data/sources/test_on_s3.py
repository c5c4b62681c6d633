"""Raw files in S3: every kind reads them where they lie as it reads them on disk, whole, whatever fails on the way.

moto honours If-Match, and nanio checks signatures; both stand behind a proxy that makes faults.
"""

import random
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from botocore.retries.standard import ExponentialBackoff
from pydantic import TypeAdapter

from tests import s3_servers
from tests.data.sources.test_any_file import IMAGE, KINDS, URL, files_of
from tests.s3_servers import KEY, READ_SECONDS, SECRET, Choose, Fault, Proxy
from vila_ops.artifacts.s3_calls import client
from vila_ops.config.sources import Source
from vila_ops.data import sources
from vila_ops.data.raw import objects
from vila_ops.data.raw.files import RawFile, Span
from vila_ops.data.raw.objects import raw_path
from vila_ops.errors import RawChanged, StoreRefused, StoreUnreachable

Download = Callable[[Path, Mapping[str, Any]], None]
IN_A_ROW = 3
FAULTS: tuple[Fault, ...] = ("error", "slow_down", "hang", "reset", "partial")


class Bucket(NamedTuple):
    """A bucket behind a proxy."""

    proxy: Proxy
    name: str

    def put(self, files: Mapping[str, bytes]) -> None:
        """Put objects."""
        for key, data in files.items():
            client().put_object(Bucket=self.name, Key=key, Body=data)

    def uri(self, key: str) -> str:
        """The URI of an object."""
        return f"s3://{self.name}/{key}"


@pytest.fixture(scope="module")
def nanio(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], list[int]]) -> Iterator[str]:
    with s3_servers.nanio(tmp_path_factory.mktemp("nanio"), free_ports(1)[0]) as endpoint:
        yield endpoint


@pytest.fixture
def make_bucket(aws: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bucket]]:
    """Makes an empty bucket on a server."""
    monkeypatch.setattr(objects, "READ_SECONDS", READ_SECONDS)
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.01)
    servers: list[Proxy] = []

    def make(endpoint: str, **keys: str) -> Bucket:
        server = Proxy(endpoint)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        aws(server.endpoint, **keys)
        made = Bucket(server, f"vila-{secrets.token_hex(6)}")
        client().create_bucket(Bucket=made.name)
        return made

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def bucket(make_bucket: Callable[..., Bucket], moto_endpoint: str) -> Bucket:
    return make_bucket(moto_endpoint)


@pytest.fixture
def files(tmp_path: Path, download: Download) -> Path:
    """A folder with a folder KIND-NUMBER of each kind and container, and the images that were downloaded."""
    for kind in KINDS:
        for number, (name, content) in enumerate(files_of(kind)):
            folder = tmp_path / f"raw/{kind}-{number}"
            folder.mkdir(parents=True)
            (folder / "a.png").write_bytes(IMAGE)
            (folder / name).write_bytes(content)
            if kind == "llava_cc3m":
                (folder / "metadata.json").write_text('[{"image": "a.png", "url": "http://ex.test/"}]')
    download(tmp_path / "raw/out/a", {URL: IMAGE})
    return tmp_path / "raw"


def source_at(root: str, folder: str) -> Source:
    kind = folder.rpartition("-")[0]
    place = f"{root}/{folder}"
    chosen: dict[str, Any] = {"kind": kind, "path": place, "licence": "CC0-1.0", "images": place}
    if kind in ("mmc4", "coyo", "interleaved"):
        chosen["images"] = f"{root}/out"
    if kind == "jsonl":
        chosen = {"kind": kind, "path": place, "render": "conversation"}
    if kind in ("flan", "webdataset", "hf_parquet", "html"):
        del chosen["images"]
    made: Source = TypeAdapter(Source).validate_python(chosen)
    return made


def scanned(source: Source, cache: Path) -> list[RawFile]:
    return sources.raw_files(source, {}, cache=cache)


def records(source: Source, raw: list[RawFile]) -> list[Any]:
    """All records of the files of a scan."""
    spans = [
        Span(name=file.name, path=file.path, digest=file.digest, start=0, stop=file.count, mark=(file.marks or (0,))[0])
        for file in raw
    ]
    known = sources.Known.of(file.known for file in raw)
    return [record for span in spans for made in sources.read(source, {}, span, known=known) for record in made]


def upload(folder: Path, bucket: Bucket) -> str:
    """The folder of a bucket with the files of a folder."""
    bucket.put({f"raw/{p.relative_to(folder)}": p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()})
    return bucket.uri("raw")


def with_faults(draw: random.Random, injected: Counter[Fault]) -> Choose:
    """Every second call fails at random, at most IN_A_ROW times in a row."""
    in_a_row: Counter[tuple[str, str]] = Counter()
    lock = threading.Lock()

    def choose(method: str, target: str) -> Fault | None:
        with lock:
            call = (method, target)
            if draw.random() < 0.5 or in_a_row[call] == IN_A_ROW:
                in_a_row[call] = 0
                return None
            in_a_row[call] += 1
            fault = draw.choices(FAULTS, weights=(4, 4, 1, 4, 4))[0]
            injected[fault] += 1
            return fault

    return choose


def test_every_kind_reads_s3_as_it_reads_a_disk(files: Path, bucket: Bucket, tmp_path: Path) -> None:
    root = upload(files, bucket)
    for folder in sorted(path.name for path in files.iterdir() if path.name != "out"):
        there, here = source_at(root, folder), source_at(str(files), folder)
        raw = scanned(there, tmp_path / "cache")
        on_disk = scanned(here, tmp_path / "cache")
        facts = [(one.name, one.digest, one.count, one.images, one.beside, one.beside_missing) for one in raw]
        assert facts == [(o.name, o.digest, o.count, o.images, o.beside, o.beside_missing) for o in on_disk], folder
        made = records(there, raw)
        assert made == records(here, on_disk), folder
        assert made, folder


@pytest.mark.parametrize("server", ["moto", "nanio"])
def test_faults_of_the_store_change_no_record(
    server: str,
    files: Path,
    tmp_path: Path,
    make_bucket: Callable[..., Bucket],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {"key": KEY, "secret": SECRET} if server == "nanio" else {}
    made = make_bucket(request.getfixturevalue("nanio" if server == "nanio" else "moto_endpoint"), **keys)
    root = upload(files, made)
    injected: Counter[Fault] = Counter()
    made.proxy.choose = with_faults(random.Random(5), injected)
    for folder in ("webdataset-0", "llava-0", "mmc4-0", "hf_parquet-0", "table-0"):
        there, here = source_at(root, folder), source_at(str(files), folder)
        raw = scanned(there, tmp_path / "cache")
        assert records(there, raw) == records(here, scanned(here, tmp_path / "cache")), folder
    assert set(injected) == set(FAULTS)


def test_a_store_that_stays_away_or_refuses_is_told_apart(
    make_bucket: Callable[..., Bucket], nanio: str, aws: Callable[..., None]
) -> None:
    made = make_bucket(nanio, key=KEY, secret=SECRET)
    made.put({"a.jsonl": b"{}\n"})
    path = raw_path(made.uri("a.jsonl"))
    assert path.read_bytes() == b"{}\n"
    made.proxy.choose = lambda *_: "slow_down"
    with pytest.raises(StoreUnreachable, match=rf"^{made.uri('a.jsonl')}: the store did not answer"):
        raw_path(made.uri("a.jsonl")).is_file()
    made.proxy.choose = lambda *_: None
    aws(made.proxy.endpoint, key=KEY, secret="wrong")
    with pytest.raises(StoreRefused, match=rf"^{made.uri('a.jsonl')}: access refused"):
        raw_path(made.uri("a.jsonl")).is_file()


@pytest.mark.parametrize("event", ["replaced", "removed"])
def test_an_object_that_changes_while_it_is_read_is_an_error_that_names_it(
    event: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "FIRST_BYTES", 2**14)
    monkeypatch.setattr(objects, "BLOCK_BYTES", 2**16)
    monkeypatch.setattr(objects, "BUFFER_BYTES", 2**12)
    bucket.put({"a.bin": bytes(2**19)})
    with raw_path(bucket.uri("a.bin")).open("rb") as file:
        assert file.read(10) == bytes(10)
        if event == "replaced":
            bucket.put({"a.bin": b"1" * 2**19})
        else:
            client().delete_object(Bucket=bucket.name, Key="a.bin")
        with pytest.raises(RawChanged, match=rf"^{bucket.uri('a.bin')} changed or vanished"):
            file.read()


def test_a_range_is_read_and_not_the_whole(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "FIRST_BYTES", 2**14)
    monkeypatch.setattr(objects, "BLOCK_BYTES", 2**16)
    monkeypatch.setattr(objects, "BUFFER_BYTES", 2**12)
    content = random.Random(1).randbytes(2**21)
    bucket.put({"a.bin": content})
    bucket.proxy.calls.clear()
    with raw_path(bucket.uri("a.bin")).open("rb") as file:
        file.seek(2**20)
        assert file.read(100) == content[2**20 : 2**20 + 100]
    assert [method for method, _ in bucket.proxy.calls].count("GET") == 1


def test_an_unchanged_object_is_known_by_its_listing_and_one_put_again_by_its_content(
    files: Path, bucket: Bucket, tmp_path: Path
) -> None:
    source = source_at(upload(files, bucket), "llava-0")
    first = scanned(source, tmp_path / "cache")
    bucket.proxy.calls.clear()
    assert scanned(source, tmp_path / "cache") == first
    assert "GET" not in {method for method, target in bucket.proxy.calls if "list-type" not in target}
    parts = client().create_multipart_upload(Bucket=bucket.name, Key="raw/llava-0/a.png")
    where = {"Bucket": bucket.name, "Key": "raw/llava-0/a.png", "UploadId": parts["UploadId"]}
    tag = client().upload_part(**where, PartNumber=1, Body=IMAGE)["ETag"]
    client().complete_multipart_upload(**where, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": tag}]})
    assert "-1" in client().head_object(Bucket=bucket.name, Key="raw/llava-0/a.png")["ETag"]
    again = scanned(source, tmp_path / "cache")
    assert [one.digest for one in again] == [one.digest for one in first]
    bucket.put({"raw/llava-0/a.png": IMAGE[:-1] + b"x"})
    assert [one.digest for one in scanned(source, tmp_path / "cache")] != [one.digest for one in first]


@pytest.mark.parametrize("where", ["disk", "s3"])
@pytest.mark.parametrize("kind", ["llava-0", "jsonl-0", "mmc4-0", "html-0", "llava_cc3m-0"])
def test_a_file_that_changed_or_vanished_since_the_scan_is_an_error_that_names_it(
    where: str, kind: str, files: Path, bucket: Bucket, tmp_path: Path
) -> None:
    root = upload(files, bucket) if where == "s3" else str(files)
    source = source_at(root, kind)
    raw = scanned(source, tmp_path / "cache")
    whole = records(source, raw)
    beside = {"mmc4-0": ["out/a.tar", "out/a.parquet"], "llava_cc3m-0": ["llava_cc3m-0/metadata.json"]}
    for name in (*beside.get(kind, [f"{kind}/a.png"]), f"{kind}/{raw[0].name}"):
        content = (files / name).read_bytes()
        for other in (content + b" ", None):
            _put(files / name, f"raw/{name}", bucket, other)
            with pytest.raises(RawChanged, match=f"{root}/{name}"):
                records(source, raw)
        _put(files / name, f"raw/{name}", bucket, content)
        assert records(source, raw) == whole, "equal bytes are no change"


def _put(path: Path, key: str, bucket: Bucket, data: bytes | None) -> None:
    if data is None:
        path.unlink()
        client().delete_object(Bucket=bucket.name, Key=key)
    else:
        path.write_bytes(data)
        bucket.put({key: data})
