"""Raw files in Google's and Azure's stores are read as those on a disk.

moto stands for Google's store, whose calls for objects are those of S3 but for credentials and quoting, and
tests/azure_server.py for Azure's.
"""

import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

import pytest
from obstore.exceptions import GenericError

from tests.azure_server import AzureServer
from tests.data.sources.test_any_file import IMAGE, files_of
from tests.data.sources.test_on_s3 import records, scanned, source_at
from tests.s3_servers import Choose, Fault, Handler, Proxy
from vila_ops.artifacts.s3_calls import client
from vila_ops.data.raw import clouds, objects
from vila_ops.data.raw.objects import filesystem, raw_path
from vila_ops.errors import RawChanged, RawRefused, StoreUnreachable

ACCOUNT = {"private_key": "", "private_key_id": "", "client_email": "", "disable_oauth": True}
"""An account of Google's that asks for no token."""
AZURE = {"AZURE_STORAGE_ACCOUNT_NAME": "account"}
APPLICATION = {"AZURE_CLIENT_ID": "a", "AZURE_CLIENT_SECRET": "b", "AZURE_TENANT_ID": "c"}
"""An application of Azure's, which asks for a token."""
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


def cut_once(proxy: Proxy) -> Choose:
    """Cut the next body off."""

    def choose(method: str, _target: str) -> Fault | None:
        if method != "GET":
            return None
        proxy.choose = lambda *_: None
        return "partial"

    return choose


class Cloud(NamedTuple):
    """An empty bucket or container."""

    root: str
    put: Callable[[str, bytes], object]
    remove: Callable[[str], object]
    refuse: Callable[[], object]
    """From now on."""
    cut: Callable[[], object]
    """The next body breaks off."""


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Nothing of the user's own: no credentials, no endpoint, no proxy."""
    for variable in [one for one in os.environ if re.match("AZURE_|GOOGLE_|.*_PROXY$", one, re.IGNORECASE)]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))  # gcloud's credentials are below it
    monkeypatch.setattr(objects, "TRIES", 2)
    filesystem.cache_clear()
    yield monkeypatch
    filesystem.cache_clear()


@pytest.fixture(params=["gs", "az"])
def cloud(request: pytest.FixtureRequest, own_environment: pytest.MonkeyPatch) -> Iterator[Cloud]:
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
            cut=lambda: setattr(proxy, "choose", cut_once(proxy)),
        )
    else:
        server = azure = AzureServer()
        environment = {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": server.endpoint}
        made = Cloud(
            f"az://{name}",
            put=lambda key, data: azure.blobs.update({f"devstoreaccount1/{name}/{key}": data}),
            remove=lambda key: azure.blobs.pop(f"devstoreaccount1/{name}/{key}"),
            refuse=lambda: setattr(azure, "status", 403),
            cut=lambda: setattr(azure, "cuts", 1),
        )
    for variable, value in environment.items():
        own_environment.setenv(variable, value)
    yield made
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


def test_an_object_beside_a_folder_of_its_name_is_told_once_and_with_its_content(cloud: Cloud) -> None:
    for key, data in {"raw/sub": b"four", "raw/sub/": b"", "raw/sub/b": b"1"}.items():
        cloud.put(key, data)
    root = raw_path(f"{cloud.root}/raw")
    assert isinstance(root, objects.ObjectPath)
    below = dict(root.below())
    assert {name: path.stat().st_size for name, path in below.items()} == {"sub": 4, "sub/b": 1}
    assert below["sub"].read_bytes() == b"four"


def test_a_body_that_breaks_off_is_read_on(cloud: Cloud) -> None:
    content = bytes(range(256)) * 64
    cloud.put("a", content)
    path = raw_path(f"{cloud.root}/a")
    assert path.is_file()
    cloud.cut()
    assert path.read_bytes() == content


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


@pytest.mark.parametrize(
    ("scheme", "environment", "message"),
    [
        ("az", {}, "no usable credentials or endpoint .*Account must be specified.*AZURE_STORAGE_ACCOUNT_NAME"),
        ("az", {**AZURE, "AZURE_STORAGE_ACCOUNT_KEY": "%%%"}, "no usable credentials or endpoint .*Invalid Access Key"),
        ("az", {**AZURE, "AZURE_STORAGE_ENDPOINT": "nonsense"}, "no usable credentials or endpoint .*nonsense"),
        ("gs", {"GOOGLE_APPLICATION_CREDENTIALS": "/no/such/file"}, "no usable .*/no/such/file.*GOOGLE_APPLICATION_CR"),
        ("gs", {"GOOGLE_SERVICE_ACCOUNT_KEY": '{"a'}, "no usable credentials or endpoint .*decode service account"),
        ("gs", {"GOOGLE_APPLICATION_CREDENTIALS": "FEDERATED"}, "no usable .*unknown variant `external_account`"),
    ],
)
def test_credentials_that_cannot_be_used_are_refused(
    scheme: str, environment: dict[str, str], message: str, tmp_path: Path, own_environment: pytest.MonkeyPatch
) -> None:
    federated = tmp_path / "federated.json"
    federated.write_text(json.dumps({"type": "external_account", "audience": "any"}))
    for variable, value in environment.items():
        own_environment.setenv(variable, value.replace("FEDERATED", str(federated)))
    with pytest.raises(RawRefused, match=f"^{scheme}://bucket/a: {message}"):
        raw_path(f"{scheme}://bucket/a").is_file()


@pytest.mark.parametrize(
    ("environment", "status", "fault"),
    [
        ({"AZURE_SKIP_SIGNATURE": "true"}, 409, "access refused"),  # PublicAccessNotPermitted
        (APPLICATION, 401, "no usable credentials"),
        (APPLICATION, 404, "no usable credentials"),
        (APPLICATION, 503, None),
    ],
)
def test_an_account_or_a_token_that_is_refused_will_be_again(
    environment: dict[str, str], status: int, fault: str | None, own_environment: pytest.MonkeyPatch
) -> None:
    server = AzureServer()
    server.status = status
    endpoints = {"AZURE_STORAGE_ENDPOINT": server.endpoint, "AZURE_AUTHORITY_HOST": server.endpoint}
    for variable, value in {"AZURE_STORAGE_ACCOUNT_NAME": "account", **endpoints, **environment}.items():
        own_environment.setenv(variable, value)
    try:
        with pytest.raises(RawRefused if fault else StoreUnreachable) as raised:
            raw_path("az://container/a").is_file()
    finally:
        server.shutdown()
        server.server_close()
    assert f"az://container/a: {fault or 'the store did not answer as it should'} (" in str(raised.value)
    assert f" {status} " in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "token request: Error performing GET http://169.254.169.254/metadata/identity/oauth2/token?a=b - HTTP error",
        "token request: Error performing GET http://metadata.google.internal/computeMetadata/v1/a - HTTP error",
    ],
)
def test_a_machine_without_an_identity_of_the_cloud_has_no_credentials(text: str) -> None:
    with pytest.raises(RawRefused, match="no usable credentials"), clouds._translated("gs://bucket/a"):
        raise GenericError(f"Generic error: Error performing {text}: error sending request")


@pytest.mark.parametrize(
    ("scheme", "variable"),
    [("gs", "GOOGLE_BASE_URL"), ("az", "AZURE_STORAGE_ENDPOINT"), ("az", "AZURITE_BLOB_STORAGE_URL")],
)
def test_a_password_in_an_endpoint_is_refused_and_not_shown(
    scheme: str, variable: str, own_environment: pytest.MonkeyPatch
) -> None:
    own_environment.setenv(variable, "http://user:canary@127.0.0.1:9")
    with pytest.raises(RawRefused, match=f"^{variable} holds a password") as raised:
        raw_path(f"{scheme}://bucket/a").is_file()
    assert "canary" not in str(raised.value)
    with pytest.raises(StoreUnreachable) as unreachable, clouds._translated("gs://bucket/a"):
        raise GenericError("Error performing HEAD http://user:canary@127.0.0.1:9/a")
    assert "canary" not in str(unreachable.value)


@pytest.mark.parametrize("size", [7, 11 * 2**20])
def test_a_file_is_written_also_in_parts(size: int, cloud: Cloud, tmp_path: Path) -> None:
    content = (bytes(range(251)) * (size // 251 + 1))[:size]
    (tmp_path / "a").write_bytes(content)
    path = raw_path(f"{cloud.root}/folder/a")
    assert isinstance(path, objects.ObjectPath)
    path.write(tmp_path / "a")
    assert path.read_bytes() == content
