"""Whatever library writes: a full disk is an error with path and bytes. /dev/full is one on which nothing fits."""

import errno
import json
import os
import re
import resource
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from vila_ops.artifacts.disk_faults import faults_named, free_bytes, require, size_of
from vila_ops.data.loading.arrays import new_array
from vila_ops.errors import CorruptArtifact, DiskFault, is_final

TOKENIZER = Path(__file__).parents[1] / "tiny/tokenizer/tokenizer.json"


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(TOKENIZER)


WRITERS: dict[str, Callable[[Path], object]] = {
    "python": lambda path: path.write_text("a"),
    "json": lambda path: path.write_text(json.dumps({"a": 1})),
    "shutil": lambda path: shutil.copyfile(TOKENIZER, path),
    "tarfile": tar,
    "numpy": lambda path: np.save(path.open("wb"), np.zeros(10**6)),
    "pyarrow": lambda path: pq.write_table(pa.table({"a": list(range(10**5))}), path),
    "tokenizers": lambda path: Tokenizer.from_file(str(TOKENIZER)).save(str(path)),
}


@pytest.mark.parametrize("library", WRITERS)
def test_a_full_disk_is_named_whichever_library_wrote(library: str, tmp_path: Path) -> None:
    (tmp_path / "attempt").mkdir()
    (tmp_path / "attempt" / "half").write_bytes(bytes(7))
    full = tmp_path / "attempt" / "file"
    full.symlink_to("/dev/full")
    with pytest.raises(DiskFault) as raised, faults_named(tmp_path / "attempt"):
        WRITERS[library](full)
    assert raised.value.errno == errno.ENOSPC
    path, said = re.escape(f"{tmp_path}/attempt"), str(raised.value)
    told = rf"{path} was not completed \(No space left on device\): (7|16) bytes of it are there, and its disk has \d+ "
    assert re.fullmatch(told + "bytes free; free space on it, repair it or choose another disk, and run again", said)
    assert not is_final(raised.value)


def test_safetensors_beyond_the_limit_of_a_user(tmp_path: Path) -> None:
    """It replaces a link, and so does not write to what it points to."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, before[1]))
    try:
        with pytest.raises(DiskFault, match="File too large") as raised, faults_named(tmp_path):
            save_file({"a": torch.zeros(10**5)}, tmp_path / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a limit of 28"),
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        CorruptArtifact("is damaged (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device", "/elsewhere/raw.tar"),
        ConnectionError("away"),
    ],
)
def test_other_errors_pass_as_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, faults_named(tmp_path):
        raise error
    assert raised.value is error


def test_old_versions_of_safetensors_are_understood_and_a_fault_is_translated_once(tmp_path: Path) -> None:
    text = 'Error while serializing: IoError(Os { code: 5, kind: Uncategorized, message: "Input/output error" })'
    with pytest.raises(DiskFault, match="Input/output error") as raised, faults_named(tmp_path), faults_named(tmp_path):
        raise RuntimeError(text)
    assert str(raised.value).count("was not completed") == 1


def test_what_does_not_fit_is_refused_before_it_is_written(tmp_path: Path) -> None:
    free = free_bytes(tmp_path / "deep" / "down")
    assert free == pytest.approx(os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.1)
    require(tmp_path / "deep", 10)
    with pytest.raises(DiskFault, match=rf"{tmp_path}/deep needs {10**18} bytes, and its disk has \d+ bytes free"):
        require(tmp_path / "deep", 10**18)


def test_space_of_a_mapped_array_is_reserved(tmp_path: Path) -> None:
    """Otherwise the first write to it beyond a full disk would end the process by a signal."""
    array = new_array(tmp_path / "a.npy", np.int64, 10**5)
    array[:] = 1
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 8 * 10**5
    assert size_of(tmp_path) == (tmp_path / "a.npy").stat().st_size
