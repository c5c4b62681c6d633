"""A store on disk. A file appears whole or not at all, by link(2), which is atomic on NFS too."""

import errno
import glob
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from stat import S_ISDIR

from vila_ops.artifacts.backend import AT_ONCE, Entry, FileFacts, Versioned
from vila_ops.artifacts.disk_faults import faults_named, require
from vila_ops.errors import DamagedFile, StoreRefused, UnsafeStore

CACHE = "resources.storage.cache"
"""The setting of the cache, for messages."""
REMOVED = "-removed-"
"""In the hidden name of a folder while it is removed."""
KEPT_VERSIONS = 8
"""Versions of a register that are kept, so that a reader that lists its folder during a swap finds one that stays."""

MAY_PASS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EINTR, errno.EAGAIN, errno.ETIMEDOUT)
"""Error numbers that the next try may not meet."""
SETTLED_SECONDS = 2.0
"""A file that changed less than this ago could change again within one tick of its file system's clock."""
MOST_KNOWN = 2**17
"""Number of digests at which a process forgets all of them."""
_known: dict[tuple[int, ...], str] = {}
"""sha256 by device, inode, size, mtime and ctime, so that hard links to one file are read once."""


def read(uri: str) -> bytes | None:
    """The bytes of a file; None if it does not exist. Raises StoreRefused where it may not be read."""
    try:
        return Path(uri).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise StoreRefused(f"{uri} may not be read ({error.strerror}); change its mode or owner") from error


def create(uri: str, data: bytes) -> bool:
    """Write a file whole or not at all, and only if none exists: link(2) fails for an existing name."""
    path = Path(uri)
    draft = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    with faults_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, path)
        except FileExistsError:
            return os.stat(draft).st_nlink == 2  # NFS had linked it, lost its answer and was asked again
        finally:
            draft.unlink(missing_ok=True)
        sync(path.parent)
    return True


def load(uri: str) -> Versioned | None:
    """The newest version of a register, which is a folder of numbered files."""
    while number := _newest(Path(uri)):
        data = read(_version(uri, number))
        if data is not None:  # else a newer version has just replaced it
            return Versioned(data, str(number))
    return None


def swap(uri: str, data: bytes, tag: str | None) -> str | None:
    """Replace version `tag` (None: create the first); the new tag, or None if another version is the newest."""
    own = int(tag or 0) + 1
    if not create(_version(uri, own), data):
        return None
    newest = _newest(Path(uri))
    if newest != own:  # `tag` was replaced so long ago that its successor is removed
        Path(_version(uri, own)).unlink(missing_ok=True)
        return None
    for path in Path(uri).iterdir():
        if path.name.isdecimal() and int(path.name) <= own - KEPT_VERSIONS:
            path.unlink(missing_ok=True)
    return str(own)


def begin(uri: str) -> Path:
    """The folder of a new attempt, at its final place."""
    folder = Path(uri)
    folder.mkdir(parents=True)
    return folder


def publish(attempt: Path, uri: str) -> None:
    """Force every file of an attempt to the disk."""
    for path in [*(p for p in sorted(attempt.rglob("*")) if p.is_file() or p.is_dir()), attempt]:
        sync(path)


def discard(attempt: Path, uri: str) -> None:
    """Remove an attempt whose address was sealed by another one."""
    shutil.rmtree(attempt)


def entries(uri: str) -> list[Entry]:
    """All files and folders below a folder, without those that are removed meanwhile."""
    listed: list[Entry] = []
    for folder, folders, files in os.walk(uri):
        for path in (os.path.join(folder, name) for name in (*folders, *files)):
            with suppress(FileNotFoundError):
                stat = os.lstat(path)
                size = 0 if S_ISDIR(stat.st_mode) else stat.st_size
                arrived = max(stat.st_mtime, stat.st_ctime)
                listed.append(Entry(os.path.relpath(path, uri), size, stat.st_mtime, arrived))
    return listed


def changed(path: Path) -> float:
    """Time of the last change of a file, or of anything in a folder, in seconds since 1970."""
    return max([path.lstat().st_mtime, *(entry.changed for entry in entries(str(path)))])


def remove(uri: str) -> None:
    """Remove a file or a folder. It gets a hidden name first, so that nobody takes half of it for the whole.

    What a removal that was killed left of it is removed too.
    """
    path = Path(uri)
    hidden = f".{path.name.lstrip('.')}{REMOVED}"
    with suppress(FileNotFoundError):
        path.rename(path.with_name(f"{hidden}{secrets.token_hex(6)}"))
    for left in sorted(path.parent.glob(f"{glob.escape(hidden)}*")):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, onerror=_unless_gone)
        else:
            left.unlink(missing_ok=True)


def sizes(uris: Sequence[str]) -> list[int | None]:
    """Size of each file in bytes; None for a missing one."""
    return [path.stat().st_size if path.is_file() else None for path in map(Path, uris)]


def digest(uri: str, expected: FileFacts) -> str:
    """sha256 of a file, whose bytes are read again."""
    return _remembered(Path(uri), os.stat(uri))


def check(uri: str, facts: FileFacts) -> None:
    """Compare a file with its sha256, once per process and content. Raises DamagedFile."""
    try:
        actual = known_sha256(Path(uri))
    except FileNotFoundError as error:
        raise DamagedFile(uri, "is missing") from error
    if actual != facts["sha256"]:
        raise DamagedFile(uri, f"has sha256 {actual[:12]}..., sealed as {facts['sha256'][:12]}...")


def fetch(uri: str, facts: FileFacts) -> None:
    """Nothing: the file is on this machine."""


def local(uri: str, facts: FileFacts) -> Path:
    """The file itself, compared with its sha256."""
    check(uri, facts)
    return Path(uri)


def folder(uri: str, files: Mapping[str, tuple[str, FileFacts]]) -> Path:
    """The folder itself, every file compared with its sha256."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda one: check(*one), files.values()))
    return Path(uri)


def copy(uri: str, facts: FileFacts, target: Path) -> None:
    """Copy a file; an edit of the copy does not reach the store."""
    try:
        shutil.copyfile(local(uri, facts), target)
    except FileNotFoundError as error:
        raise DamagedFile(uri, "is missing") from error


def sharing(uri: str, root: str, kinds: Iterable[str]) -> list[str]:
    """The folders ROOT/KIND/KEY that hold a hard link to this file."""
    try:
        own = os.stat(uri)
    except FileNotFoundError:
        return []
    if own.st_nlink == 1:
        return []
    folders = [folder for kind in kinds for folder in sorted(Path(root, kind).glob("*"))]
    return [str(folder) for folder in folders if any(os.path.samestat(own, p.lstat()) for p in folder.rglob("*"))]


def link(source: Path, target: Path) -> None:
    """Hard-link a file; copy it if the target is on another file system. A known sha256 stays known."""
    before = source.stat()
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copyfile(source, target)
    after, digest = source.stat(), _known.get(_identity(before))
    if digest is not None and _identity(before)[:-1] == _identity(after)[:-1]:  # a link changes the ctime alone
        _known[_identity(after)] = digest


@lru_cache(maxsize=64)
def probe(root: str) -> str:
    """Try what sealing rests on; a line that says what works.

    Raises StoreRefused for a folder that cannot be written, UnsafeStore for a file system whose link(2) is missing or
    overwrites, and OSError for a fault that may pass, such as a full disk.
    """
    way_out = "use a folder of a local disk or of NFS, or a store on S3"
    with _scratch(root) as scratch:
        taken = f"{scratch}/taken"
        with _refused(UnsafeStore, f"store {root}: link(2) and fsync(2) are needed and failed", way_out):
            first, second = create(taken, b"first"), create(taken, b"second")
        if (first, second, read(taken)) != (True, False, b"first"):
            raise UnsafeStore(f"store {root}: link(2) overwrote a file that was there; {way_out}")
    return f"store {root}: links are create-only and fsync works"


def timed(root: str, data: bytes) -> tuple[float, float]:
    """Seconds of writing a file of its own and of reading it back.

    Raises StoreRefused, DiskFault where the disk lacks the space, and OSError of the disk.
    """
    with _scratch(root) as scratch, open(f"{scratch}/file", "w+b", buffering=0) as file:
        require(Path(root), len(data))
        started, rest = time.perf_counter(), memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]  # write(2) may write less than it was given
        os.fsync(file.fileno())
        wrote = time.perf_counter() - started
        if hasattr(os, "posix_fadvise"):  # not on macOS, whose reads come from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        whole = file.read()
        took = time.perf_counter() - started
    if whole != data:
        raise OSError(errno.EIO, f"store {root} does not read back what was just written")
    return wrote, took


def _scratch(root: str) -> "tempfile.TemporaryDirectory[str]":
    """A folder of its own in a store, which is made where it is absent. Raises StoreRefused."""
    folder = Path(root)
    with _refused(StoreRefused, f"store {root} cannot be written", "set resources.storage.store to a folder of yours"):
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".probe-", dir=folder)


def make_folder(folder: Path, *, setting: str) -> None:
    """Make the folder that a setting names.

    Raises StoreRefused where it cannot be made, and OSError for a fault that may pass.
    """
    with _refused(StoreRefused, f"{setting} {folder} cannot be made", "set it to a folder of yours"):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _refused(kind: type[StoreRefused | UnsafeStore], fault: str, way_out: str) -> Iterator[None]:
    """Translate an OSError that the next try would meet again."""
    try:
        yield
    except OSError as error:
        if error.errno in MAY_PASS:
            raise
        raise kind(f"{fault} ({error.strerror}); {way_out}") from error


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read once per process and again when the file has changed."""
    stat = path.stat()
    return _known.get(_identity(stat)) or _remembered(path, stat)


def sync(path: Path) -> None:
    """Force a file or folder to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unless_gone(_call: object, _path: str, error: tuple[type[BaseException], BaseException, object]) -> None:
    """Pass over what another process removes meanwhile, in `shutil.rmtree`."""
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _remembered(path: Path, before: os.stat_result) -> str:
    """sha256 of a file whose stat was `before`; remembered unless a later change could leave the stat the same."""
    settled = abs(time.time() - before.st_ctime) > SETTLED_SECONDS
    digest = sha256(path)
    if settled:
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[_identity(before)] = digest
    return digest


def _newest(folder: Path) -> int:
    """Number of the newest version in a register's folder; 0 for none."""
    try:
        return max((int(name) for name in os.listdir(folder) if name.isdecimal()), default=0)
    except FileNotFoundError:
        return 0


def _version(uri: str, number: int) -> str:
    return f"{uri}/{number:012d}"
