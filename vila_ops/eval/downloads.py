"""Official files of a benchmark from a data set on the hub, at one commit, into its folder."""

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vila_ops.artifacts.disk import sha256
from vila_ops.artifacts.disk_faults import faults_named
from vila_ops.eval.origins import DOWNLOADED, OfficialFile
from vila_ops.packages.resolve import hub_faults

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedFile:
    """A file that `from_hub` would bring, or that a person has to."""

    file: str
    """Its path in the benchmark's folder."""
    size: str
    """Of the download, as `OfficialFile` states it."""
    download: str
    """PATH of the download in the data set, such as a zip that has the file; by hand: where it is published."""
    repository: str
    """The data set."""
    revision: str
    by_hand: bool
    here: bool
    """Whether it is in the folder. It would be fetched again, and compared."""


def planned(
    folder: Path, files: Sequence[OfficialFile], *, repository: str | None, revision: str | None
) -> list[PlannedFile]:
    """What `from_hub` would bring into a folder, without asking the hub. Raises ValueError as that does."""
    source, commit, _ = _asked(files, repository=repository, revision=revision)
    plans = []
    for file in files:
        by_hand = repository is None and not file.hub
        own = file.path if repository else file.hub.removeprefix(f"{source}/").partition("!")[0]
        plans.append(
            PlannedFile(
                file=file.path,
                size=file.size,
                download=file.url if by_hand else own,
                repository=source,
                revision=commit,
                by_hand=by_hand,
                here=next(folder.glob(file.path), None) is not None,
            )
        )
    return plans


def from_hub(folder: Path, files: Sequence[OfficialFile], *, repository: str | None, revision: str | None) -> list[str]:
    """Fetch files into a benchmark's folder; returns their names. An interrupted download goes on with the next call.

    `repository` has them under their paths; None: each file comes from the data set of its authors. Zips are unpacked,
    and the commit and the sha256 of each file are recorded for `origins.check`.
    Raises ValueError where the hub does not have the files, where one of another content is in the folder, where
    their authors have no data set, and without a revision; FetchError where the hub did not answer.
    """
    source, revision, folders = _asked(files, repository=repository, revision=revision)
    for file in (one for one in files if repository is None and not one.hub):
        logger.warning("%s is not in %s; fetch it by hand from %s", file.path, source, file.url)
    partial = folder.with_name(f".{folder.name}.partial")
    with faults_named(folder):
        commit = _download(source, revision, list(folders), partial)
        for archive in sorted(partial.rglob("*.zip")):
            logger.info("unpacking %s", archive.name)
            _unpack(archive, partial, folder=folders.get(archive.relative_to(partial).as_posix(), ""))
            archive.unlink()
        digests = _moved(partial, folder)
        listing = {"repository": source, "commit": commit, "sha256": digests}
        (folder / DOWNLOADED).write_text(json.dumps(listing, indent=1), encoding="utf-8")
        shutil.rmtree(partial)
    return sorted(digests)


def _asked(
    files: Sequence[OfficialFile], *, repository: str | None, revision: str | None
) -> tuple[str, str, dict[str, str]]:
    """The data set, the revision, and by path of each file in it the folder of a zip. Raises ValueError."""
    source, folders = (repository, {file.path: "" for file in files}) if repository else _by_authors(files)
    if revision is None:
        raise ValueError(
            f"no commit of data set {source!r} is known to vila-ops; name one with --revision, so that everyone "
            f"reads the same files (https://huggingface.co/datasets/{source}/commits/main lists them), or main for "
            f"the newest"
        )
    return source, revision, folders


def _by_authors(files: Sequence[OfficialFile]) -> tuple[str, dict[str, str]]:
    """The one data set of the authors, and by path of each file in it the folder of a zip. Raises ValueError."""
    places = sorted({file.hub for file in files if file.hub})
    repositories = {"/".join(place.split("/")[:2]) for place in places}
    if len(repositories) != 1:
        by_hand = "; ".join(f"{file.path} from {file.url}" for file in files)
        raise ValueError(
            f"the authors have no data set with these files on the hub; fetch them by hand ({by_hand}), or name a data "
            f"set that has them with --repo"
        )
    paths = ["/".join(place.split("/")[2:]) for place in places]
    return repositories.pop(), {path: folder for path, _, folder in (one.partition("!") for one in paths)}


def _unpack(archive: Path, target: Path, *, folder: str) -> None:
    """Extract a zip, or what is below one of its folders."""
    root = f"{folder}/" if folder else ""
    with zipfile.ZipFile(archive) as content:
        for member in content.infolist():
            if member.filename.startswith(root) and not member.is_dir():
                member.filename = member.filename.removeprefix(root)
                content.extract(member, target)  # keeps members inside: it drops leading slashes and ".."


def _download(repository: str, revision: str, paths: list[str], target: Path) -> str:
    """The commit of a revision, whose files of these paths are then in `target`."""
    from huggingface_hub import HfApi, snapshot_download

    with hub_faults(f"data set {repository!r} at revision {revision!r} is not", "check its name and the network"):
        commit = HfApi().dataset_info(repository, revision=revision).sha
        snapshot_download(repository, repo_type="dataset", revision=commit, allow_patterns=paths, local_dir=target)
    shutil.rmtree(target / ".cache", ignore_errors=True)  # the hub client's own
    if not any(path.is_file() for path in target.rglob("*")):
        raise ValueError(
            f"data set {repository!r} at {commit} has none of {', '.join(paths)}; name another with --repo"
        )
    return str(commit)


def _moved(source: Path, folder: Path) -> Mapping[str, str]:
    """Move files into a folder; returns the sha256 of each by name. Raises ValueError for one of another content."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    digests = {path.relative_to(source).as_posix(): sha256(path) for path in files}
    for name, digest in digests.items():
        if (folder / name).exists() and sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} has another content than the one on the hub; move it away")
    for name in digests:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / name, folder / name)
    return digests
