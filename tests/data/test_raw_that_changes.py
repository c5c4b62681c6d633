"""Raw files that change between the scan and the work of `prepare`: an error that names them, and nothing sealed."""

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vila_ops.artifacts.kinds import Dataset, Shard
from vila_ops.artifacts.listing import sealed
from vila_ops.artifacts.s3_calls import client
from vila_ops.config import Mixture, Resources
from vila_ops.data.preprocess import build
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.errors import RawChanged


class Raw:
    """The raw folder of the tiny pairs, on disk or in S3."""

    def __init__(self, folder: Path, bucket: str | None) -> None:
        self.folder, self.bucket = folder, bucket
        self.root = str(folder) if bucket is None else f"s3://{bucket}/pairs"
        if bucket is not None:
            for path in sorted(folder.iterdir()):
                self.write(path.name, path.read_bytes())

    def write(self, name: str, data: bytes | None) -> None:
        """Replace a file, or remove it."""
        if self.bucket is not None and data is None:
            client().delete_object(Bucket=self.bucket, Key=f"pairs/{name}")
        elif self.bucket is not None:
            client().put_object(Bucket=self.bucket, Key=f"pairs/{name}", Body=data)
        elif data is None:
            (self.folder / name).unlink()
        else:
            (self.folder / name).write_bytes(data)


@pytest.fixture(params=["disk", "s3"])
def raw(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Raw:
    shutil.copytree(tiny / "pairs", tmp_path / "pairs")
    if request.param == "disk":
        return Raw(tmp_path / "pairs", None)
    request.getfixturevalue("s3_store")
    bucket = f"vila-{secrets.token_hex(6)}"
    client().create_bucket(Bucket=bucket)
    return Raw(tmp_path / "pairs", bucket)


def mixture_of(root: str) -> Mixture:
    source = {"kind": "jsonl", "path": root, "render": "caption"}
    return Mixture.model_validate({"name": "pairs", "sources": {"pairs": source}, "shard_bytes": 40_000})


def test_a_change_after_the_scan_is_named_and_seals_nothing(
    raw: Raw,
    make_text: Callable[..., Any],
    make_resources: Callable[..., Resources],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resources, text, survey = make_resources(tmp_path / "work"), make_text(), build.survey
    records = (raw.folder / "records.jsonl").read_bytes()
    image = (raw.folder / "dog.png").read_bytes()
    for name, data in (("dog.png", None), ("dog.png", image + b"x"), ("records.jsonl", records[:-200])):

        def late(*arguments: Any, name: str = name, data: bytes | None = data) -> Any:
            raw.write(name, data)
            return survey(*arguments)

        monkeypatch.setattr(build, "survey", late)
        with pytest.raises(RawChanged, match=f"^{raw.root}/{name} changed or vanished"):
            prepare(mixture_of(raw.root), text, resources)
        assert not list(sealed(Dataset, store=resources.storage.store))
        raw.write(name, image if name == "dog.png" else records)
    monkeypatch.setattr(build, "survey", survey)
    made = prepare(mixture_of(raw.root), text, resources)
    assert list(sealed(Shard, store=resources.storage.store))
    here = prepare(mixture_of(str(raw.folder)), text, make_resources(tmp_path / "other"))
    assert (made.digest, made.parents) == (here.digest, here.parents), "the place of raw data is no part of it"
