"""A store of each released format is read by this version, and a store of another format is left alone."""

import json
import tarfile
from pathlib import Path

import pytest

from tests.artifacts.known_store import known
from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.store import address, backend, begin, find_manifest, probe
from vila_ops.artifacts.store_format import FORMAT, KNOWN, NAME, mark
from vila_ops.errors import CorruptArtifact, OtherFormat

STORES = Path(__file__).parents[1] / "golden/stores"


@pytest.fixture(autouse=True)
def _nothing_known() -> None:
    KNOWN.clear()


def test_every_format_until_now_has_a_store() -> None:
    assert sorted(path.name for path in STORES.glob("*.tar.xz")) == [f"format-{n}.tar.xz" for n in range(1, FORMAT + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(STORES.glob("*.tar.xz")), ids=lambda path: path.name)
def test_a_store_that_an_earlier_version_wrote_is_read_whole(path: Path, tmp_path: Path) -> None:
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path, filter="data")
    written, read = json.loads((tmp_path / "known.json").read_text()), known(tmp_path / "store")
    for name in ("losses", "metrics"):  # of another processor
        assert read.pop(name) == pytest.approx(written.pop(name), rel=1e-4)
    assert read == written


def test_a_store_is_marked_by_the_first_that_writes_and_one_without_a_mark_is_of_format_1(tmp_path: Path) -> None:
    probe(str(tmp_path))
    assert json.loads((tmp_path / NAME).read_text())["format"] == FORMAT
    KNOWN.clear()
    probe(str(tmp_path))
    assert FORMAT == 1


@pytest.mark.parametrize("written", [0, FORMAT + 1])
def test_a_store_of_another_format_is_refused_before_anything_is_written(store: str, written: int) -> None:
    backend(store).create(f"{store}/{NAME}", mark(written))
    before = backend(store).entries(store)
    with pytest.raises(OtherFormat, match=f"has format {written}, and vila-ops .* reads {FORMAT}; nothing was changed"):
        begin(address(Dataset, revision=1, recipe={}, parents=()), store=store)
    assert [entry.name for entry in backend(store).entries(store)] == [entry.name for entry in before]


@pytest.mark.parametrize("manifest", [b"another layout", b'{"format": 2, "data": "d", "files": {}}'])
def test_a_manifest_of_another_layout_is_damage_only_in_a_store_of_this_format(store: str, manifest: bytes) -> None:
    sealed = f"{store}/dataset/{32 * '0'}"
    backend(store).create(f"{sealed}/manifest.json", manifest)
    for there in (None, FORMAT):
        if there is not None:
            backend(store).create(f"{store}/{NAME}", mark(there))
        with pytest.raises(CorruptArtifact, match=r"manifest\.json (is not a manifest|was changed after sealing)"):
            find_manifest(sealed)
    backend(store).remove(f"{store}/{NAME}")
    backend(store).create(f"{store}/{NAME}", mark(FORMAT + 1))
    with pytest.raises(OtherFormat, match=f"{store} has format {FORMAT + 1}"):
        find_manifest(sealed)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[1]", mark(FORMAT)[:-3], mark(2).replace(b"2", b"3", 1), b'{"format": null}']
)
def test_a_damaged_mark_names_its_file_and_the_way_out(data: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(data)
    with pytest.raises(
        CorruptArtifact, match=rf"{NAME} does not say the format .* move {tmp_path}/{NAME} away and run"
    ):
        probe(str(tmp_path))
    (tmp_path / NAME).unlink()
    probe(str(tmp_path))
