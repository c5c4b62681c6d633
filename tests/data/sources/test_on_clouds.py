"""Raw files in Google's and Azure's stores are read as those on a disk.

moto stands for Google's store, whose calls for objects are those of S3 but for credentials and quoting, and
tests/azure_server.py for Azure's.
"""

import json
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

import pytest

from tests.azure_server import AzureServer
from tests.data.sources.test_any_file import IMAGE, files_of
from tests.data.sources.test_on_s3 import records, scanned, source_at
from tests.s3_servers import Handler, Proxy
from vila_ops.artifacts.s3_calls import client
from vila_ops.data.raw import objects
from vila_ops.data.raw.objects import filesystem, raw_path
from vila_ops.errors import RawChanged, RawRefused, StoreUnreachable

ACCOUNT = {"private_key": "", "private_key_id": "", "client_email": "", "disable_oauth": True}
"""An account of Google's that asks for no token."""
SIGNED = "AWS4-HMAC-SHA256 Credential=key/20300101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
"""What moto does not check."""
KINDS = ("webdataset", "llava", "hf_parquet", "table", "jsonl")


class GoogleHandler(Handler):
    """Forwards a call of Google's as one of S3, whose slashes and dashes are not quoted."""

    def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return moto's answer."""
        path, mark, query = self.path.partition("?")
        self.path = quote(unquote(path)) + mark + query
        del self.headers["Authorization"]
        self.headers["Authorization"] = SIGNED
        return super().forward(body)


class Cloud(NamedTuple):
    """An empty bucket or container."""

    root: str
    put: Callable[[str, bytes], object]
    remove: Callable[[str], object]
    refuse: Callable[[], object]
    """From now on."""


@pytest.fixture(params=["gs", "az"])
def cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    monkeypatch.setattr(objects, "TRIES", 2)
    name = f"vila-{secrets.token_hex(6)}"
    server: Proxy | AzureServer
    if request.param == "gs":
        request.getfixturevalue("aws")(request.getfixturevalue("moto_endpoint"))
        client().create_bucket(Bucket=name)
        server = proxy = Proxy(request.getfixturevalue("moto_endpoint"))
        server.RequestHandlerClass = GoogleHandler
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        environment = {"GOOGLE_BASE_URL": server.endpoint, "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(ACCOUNT)}
        made = Cloud(
            f"gs://{name}",
            put=lambda key, data: client().put_object(Bucket=name, Key=key, Body=data),
            remove=lambda key: client().delete_object(Bucket=name, Key=key),
            refuse=lambda: setattr(proxy, "choose", lambda *_: "refused"),
        )
    else:
        server = azure = AzureServer()
        environment = {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": server.endpoint}
        made = Cloud(
            f"az://{name}",
            put=lambda key, data: azure.blobs.update({f"devstoreaccount1/{name}/{key}": data}),
            remove=lambda key: azure.blobs.pop(f"devstoreaccount1/{name}/{key}"),
            refuse=lambda: setattr(azure, "refuses", True),
        )
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    filesystem.cache_clear()
    yield made
    filesystem.cache_clear()
    server.shutdown()
    server.server_close()


def test_records_are_those_of_a_disk(cloud: Cloud, tmp_path: Path) -> None:
    for kind in KINDS:
        folder = tmp_path / f"raw/{kind}-0"
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(IMAGE)
        name, content = next(files_of(kind))
        (folder / name).write_bytes(content)
    for path in sorted((tmp_path / "raw").rglob("*.*")):
        cloud.put(str(path.relative_to(tmp_path)), path.read_bytes())
    for kind in KINDS:
        there, here = (source_at(root, f"{kind}-0") for root in (f"{cloud.root}/raw", f"{tmp_path}/raw"))
        raw, on_disk = (scanned(source, tmp_path / "cache") for source in (there, here))
        assert [(one.name, one.digest, one.count) for one in raw] == [(o.name, o.digest, o.count) for o in on_disk]
        made = records(there, raw)
        assert made == records(here, on_disk)
        assert made
        assert scanned(there, tmp_path / "cache") == raw, "it is known by its listing"


@pytest.mark.parametrize("event", ["replaced", "removed"])
def test_an_object_that_changes_while_it_is_read_is_an_error_that_names_it(
    event: str, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FIRST_BYTES": 2**14, "BLOCK_BYTES": 2**16, "BUFFER_BYTES": 2**12}.items():
        monkeypatch.setattr(objects, name, value)
    content = bytes(range(256)) * 2**11
    cloud.put("a.bin", content)
    path = raw_path(f"{cloud.root}/a.bin")
    assert path.read_bytes() == content
    with path.open("rb") as file:
        file.seek(1000)
        assert file.read(10) == content[1000:1010]
        if event == "replaced":
            cloud.put("a.bin", bytes(len(content)))
        else:
            cloud.remove("a.bin")
        with pytest.raises(RawChanged, match=rf"^{cloud.root}/a.bin changed or vanished"):
            file.read()


def test_folders_are_told_from_objects(cloud: Cloud) -> None:
    """The console of a store makes an empty object for a folder, whose key ends with a slash."""
    for key, data in {"raw/": b"", "raw/sub/": b"", "raw/sub/b": b"1", "raw/empty": b"", "rawer": b"2"}.items():
        cloud.put(key, data)
    root = raw_path(f"{cloud.root}/raw")
    assert isinstance(root, objects.ObjectPath)
    assert (root.is_dir(), root.is_file()) == (True, False)
    assert {name: path.stat().st_size for name, path in root.below()} == {"empty": 0, "sub/b": 1}
    assert {name: entry.size for name, entry in root.entries().items()} == {"empty": 0}
    listed, asked = root.entries()["empty"], raw_path(f"{cloud.root}/raw/empty")
    assert isinstance(asked, objects.ObjectPath)
    assert asked.entry() == listed, "a listing and the object itself tell one ETag"
    assert not raw_path(f"{cloud.root}/ra").exists()


def test_a_refusal_is_told_apart_from_a_store_that_is_away(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, free_ports: Callable[[int], list[int]]
) -> None:
    cloud.put("a", b"1")
    cloud.refuse()
    with pytest.raises(RawRefused, match=rf"^{cloud.root}/a: access refused .*403"):
        raw_path(f"{cloud.root}/a").is_file()
    for variable in ("GOOGLE_BASE_URL", "AZURITE_BLOB_STORAGE_URL"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{free_ports(1)[0]}")
    filesystem.cache_clear()
    with pytest.raises(StoreUnreachable, match=rf"^{cloud.root}/a: the store did not answer as it should"):
        raw_path(f"{cloud.root}/a").is_file()


def test_a_file_is_written(cloud: Cloud, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    path = raw_path(f"{cloud.root}/folder/a")
    assert isinstance(path, objects.ObjectPath)
    path.write(tmp_path / "a")
    assert path.read_bytes() == b"content"
