"""Download a pinned package from its registry to the cache: checked by sha256, extracted, published by one rename."""

import fcntl
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, assert_never

from vila_ops.artifacts import output
from vila_ops.artifacts.disk import CACHE, make_folder, remove
from vila_ops.artifacts.disk_faults import faults_named
from vila_ops.artifacts.folders import is_as_listed, write_listing
from vila_ops.config.package import Package
from vila_ops.errors import FetchError, FetchRefused

logger = logging.getLogger(__name__)

CLIENT_TIMEOUT_SECONDS = 3600
MAX_PARALLEL = 2
_NOT_FOUND = re.compile(
    r"E404|ETARGET|No matching version|No matching distribution|Unable to locate package"
    r"|Version '.*' for '.*' was not found|Can't find a source to download|No packages found"
)
_NO_NETWORK = re.compile(
    r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|ERR_SOCKET_TIMEOUT|ENOTCACHED"
    r"|Could not connect|Could not resolve|Temporary failure resolving|Cannot initiate the connection|Unable to connect"
    r"|NewConnectionError|ConnectTimeout|ProxyError|Connection refused|Failed to establish|Network is unreachable"
    r"|Failed to fetch"
)


def fetch_all(packages: Sequence[Package], *, cache: Path) -> dict[Package, Path]:
    """The extracted folder of each package. The first FetchError is raised after downloads in progress have ended."""
    unique = list(dict.fromkeys(packages))
    with ThreadPoolExecutor(max_workers=MAX_PARALLEL) as pool:
        return dict(zip(unique, pool.map(lambda package: fetch(package, cache=cache), unique), strict=True))


def fetch(package: Package, *, cache: Path) -> Path:
    """The folder with the package's content, downloaded unless it is in the cache. Raises FetchError and DiskFault.

    The content of a deb is its tree under /, that of a wheel its zipped files, that of an npm package its `package/`.
    The folder appears by one rename. Each process compares its files with their sha256 once, and extracts a damaged one
    again. Several processes may call this at once.
    """
    folder = folder_of(package, cache=cache)
    if is_as_listed(folder, cache=cache):
        return folder
    for parent in (folder.parent, cache / "archives", cache / "locks"):
        make_folder(parent, setting=CACHE)
    with _locked(cache / "locks" / folder.name):
        if not is_as_listed(folder, cache=cache):
            _remove_leftovers(folder.parent, folder.name)
            _remove_leftovers(cache / "archives", package.sha256)
            archive = _archive(package, cache=cache)
            _publish_content(package, archive, folder, cache=cache)
    return folder


def folder_of(package: Package, *, cache: Path) -> Path:
    """Where the content of a package lies once it was fetched."""
    name = f"{package.registry}-{_plain(package.name)}-{_plain(package.version)}-{package.sha256[:12]}"
    return cache / "packages" / name


def _publish_content(package: Package, archive: Path, folder: Path, *, cache: Path) -> None:
    work_folder = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        content = work_folder / "content"
        with faults_named(content):
            content.mkdir()
            _extract(package, archive, content)
            output.use_umask(content)
            write_listing(content, cache=cache, name=folder.name)
        if folder.exists():
            logger.warning("%s is not as it was extracted; it is replaced", folder)
            remove(str(folder))
        os.rename(content, folder)
    finally:
        shutil.rmtree(work_folder, ignore_errors=True)
    logger.info("%s %s %s is in %s", package.registry, package.name, package.version, folder)


def _remove_leftovers(folder: Path, name: str) -> None:
    """Delete the temporary folders of killed attempts. Callers hold the package's lock, so no attempt is alive."""
    for leftover in folder.glob(f".{name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of this path, which the kernel releases when the process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _archive(package: Package, *, cache: Path) -> Path:
    """The package's file with the right sha256: from the cache, or downloaded."""
    for kept in sorted((cache / "archives").glob(f"{package.sha256}-*")):
        if _sha256(kept) == package.sha256:
            return kept
        logger.warning("%s does not have the sha256 of its name; it is fetched again", kept)
        kept.unlink()
    work_folder = Path(tempfile.mkdtemp(prefix=f".{package.sha256}.", dir=cache / "archives"))
    try:
        with faults_named(work_folder):
            file = _download(package, work_folder, cache=cache)
        got = _sha256(file)
        if got != package.sha256:
            raise _refusal(
                package,
                f"wrong sha256: expected {package.sha256}, got {got}",
                "if the registry's file was replaced on purpose, review it and change the pin; otherwise do not use it",
            )
        kept = cache / "archives" / f"{package.sha256}-{file.name}"
        output.use_umask(work_folder)
        os.replace(file, kept)
        return kept
    finally:
        shutil.rmtree(work_folder, ignore_errors=True)


def _download(package: Package, work_folder: Path, *, cache: Path) -> Path:
    logger.info("fetching %s %s %s", package.registry, package.name, package.version)
    match package.registry:
        case "pypi":
            _pip_download(package, work_folder)
        case "npm":
            _npm_pack(package, work_folder)
        case "debian":
            _apt_download(package, work_folder, cache=cache)
        case _:
            assert_never(package.registry)
    files = [path for path in work_folder.iterdir() if path.is_file()]
    if len(files) != 1:
        names = sorted(path.name for path in files)
        raise _refusal(package, f"the client left {names} where one file was expected", "run the client yourself")
    return files[0]


def _pip_download(package: Package, work_folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise _refusal(package, f"client missing: {sys.executable} has no pip", "python -m ensurepip")
    requirement = f"{package.name}=={package.version}"
    # Without retries pip reports a missing network as "no matching distribution".
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--retries=3",
        "--dest",
        str(work_folder),
    ]
    _run(package, [sys.executable, "-m", "pip", "download", *options, "--", requirement], work_folder)


def _npm_pack(package: Package, work_folder: Path) -> None:
    npm = _client(package, "npm", "install Node.js with npm")
    options = ["--loglevel=error", "--ignore-scripts", "--pack-destination", str(work_folder)]
    _run(package, [npm, "pack", *options, "--", f"{package.name}@{package.version}"], work_folder)


def _apt_download(package: Package, work_folder: Path, *, cache: Path) -> None:
    """apt-get download; if apt's lists lack the package, again after apt-get update."""
    apt = _client(package, "apt-get", "run on Debian, or copy the extracted .deb to the cache from such a machine")
    command = [apt, "download", f"{package.name}={package.version}"]
    result = _call(package, command, work_folder)
    if result.returncode and _NOT_FOUND.search(result.stderr):
        if os.geteuid() != 0:
            raise _refusal(package, f"not found in apt's lists: {_last_lines(result)}", "run: sudo apt-get update")
        with _locked(cache / "locks" / "apt-get-update"):
            _run(package, [apt, "update", "-o", "APT::Update::Error-Mode=any"], work_folder)
        result = _call(package, command, work_folder)
    _check(package, command, result)


def _client(package: Package, name: str, remedy: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise _refusal(package, f"client missing: no {name} on PATH", remedy)
    return path


def _run(package: Package, command: list[str], work_folder: Path) -> None:
    _check(package, command, _call(package, command, work_folder))


def _call(package: Package, command: list[str], work_folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a client and capture its output for an error message."""
    try:
        return subprocess.run(
            command,
            cwd=work_folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CLIENT_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        what = f"{Path(command[0]).name} took more than {CLIENT_TIMEOUT_SECONDS} s"
        raise _failure(package, what, "check the network, then run again") from error


def _check(package: Package, command: list[str], result: subprocess.CompletedProcess[str]) -> None:
    if result.returncode == 0:
        return
    output = _last_lines(result)
    # Network first: a client without network also reports that it found nothing.
    if _NO_NETWORK.search(result.stderr + result.stdout):
        raise _failure(package, f"no network: {output}", "check the network or the registry's mirror, then run again")
    if _NOT_FOUND.search(result.stderr + result.stdout):
        raise _refusal(
            package, f"not found: {output}", "check name and version; pin a version that the registry still has"
        )
    line = " ".join(command)
    raise _failure(
        package, f"`{line}` ended with status {result.returncode}: {output}", "run it yourself to see all of its output"
    )


def _last_lines(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (result.stderr or result.stdout).splitlines() if line.strip()]
    return " | ".join(lines[-4:])


def _extract(package: Package, archive: Path, target: Path) -> None:
    try:
        match package.registry:
            case "pypi":
                _unzip(archive, target)
            case "npm":
                with archive.open("rb") as stream:
                    _untar(stream, target, mode="r|gz", strip=1)
            case "debian":
                _undeb(package, archive, target)
            case _:
                assert_never(package.registry)
    except (tarfile.TarError, zipfile.BadZipFile, ValueError) as error:
        raise _refusal(package, f"{archive.name} cannot be extracted: {error}", "do not use this package") from error


def _undeb(package: Package, archive: Path, target: Path) -> None:
    dpkg = _client(package, "dpkg-deb", "install dpkg (on any Linux)")
    command = [dpkg, "--fsys-tarfile", str(archive)]
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages) as process,
    ):
        assert process.stdout is not None
        _untar(process.stdout, target, mode="r|", strip=0)
        if process.wait():
            messages.seek(0)
            raise ValueError(f"dpkg-deb: {messages.read().decode(errors='replace').strip()}")


def _untar(stream: IO[bytes], target: Path, *, mode: str, strip: int) -> None:
    """Extract without the first `strip` path components; skip links that leave the folder. Raises for such paths."""

    def inside(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        parts = PurePosixPath(member.name).parts[strip:]
        if not parts:
            return None
        try:
            return tarfile.data_filter(member.replace(name="/".join(parts), deep=False), path)
        except (tarfile.AbsoluteLinkError, tarfile.LinkOutsideDestinationError):
            logger.debug("link %s -> %s leaves its package", member.name, member.linkname)
            return None

    with tarfile.open(fileobj=stream, mode=mode) as tar:  # type: ignore[call-overload]
        tar.extractall(target, filter=inside)


def _unzip(archive: Path, target: Path) -> None:
    """Extract; a path that leaves the folder is an error (zip files of wheels hold no links)."""
    with zipfile.ZipFile(archive) as wheel:
        for name in wheel.namelist():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name:
                raise ValueError(f"path {name!r} leaves the folder")
        wheel.extractall(target)


def _failure(package: Package, what: str, remedy: str) -> FetchError:
    """The error of a download that may succeed at another try."""
    return FetchError(_message(package, what, remedy))


def _refusal(package: Package, what: str, remedy: str) -> FetchRefused:
    """The error of a download that fails again at another try."""
    return FetchRefused(_message(package, what, remedy))


def _message(package: Package, what: str, remedy: str) -> str:
    return f"{package.registry} package {package.name} {package.version}: {what}; to do: {remedy}"


def _plain(text: str) -> str:
    """The text as part of a file name: no slash, colon or at sign."""
    return re.sub(r"[^A-Za-z0-9._+~-]+", "_", text).strip("_")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
