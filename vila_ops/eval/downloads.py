"""Official files of a benchmark from a data set on the hub, at one commit, into its folder."""

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
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
    """Whether it is in the folder. One that `from_hub` did not bring would be fetched again, and compared."""


def planned(
    folder: Path, files: Sequence[OfficialFile], *, repository: str | None, revision: str | None
) -> list[PlannedFile]:
    """What `from_hub` would bring into a folder, without asking the hub. Raises ValueError as that does."""
    source, commit = _asked(files, repository=repository, revision=revision)
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
    and the commit and the sha256 of each file are recorded for `origins.check`. A file that is there as an earlier call
    recorded it for the same commit is not fetched again, and where all are, a commit's files are not asked for.
    Raises ValueError where the hub does not have the files, where one of another content is in the folder, where
    their authors have no data set, and without a revision; FetchError where the hub did not answer.
    """
    source, revision = _asked(files, repository=repository, revision=revision)
    for file in (one for one in files if repository is None and not one.hub):
        logger.warning("%s is not in %s; fetch it by hand from %s", file.path, source, file.url)
    wanted = [file for file in files if repository or file.hub]
    with faults_named(folder):
        recorded, known = _recorded(folder, source)
        commit = revision if revision == recorded else _commit_of(source, revision)
        known = known if commit == recorded else {}
        here = {file.path: _unchanged(folder, file, known) for file in wanted}
        names = {name for unchanged in here.values() for name in unchanged}
        if missing := [file for file in wanted if not here[file.path]]:
            fetched = _fetch(folder, source, commit, _places(missing, repository=repository))
            names |= fetched.keys()
            listing = {"repository": source, "commit": commit, "sha256": {**known, **fetched}}
            (folder / DOWNLOADED).write_text(json.dumps(listing, indent=1), encoding="utf-8")
    return sorted(names)


def _asked(files: Sequence[OfficialFile], *, repository: str | None, revision: str | None) -> tuple[str, str]:
    """The data set and the revision. Raises ValueError."""
    source = repository or _of_authors(files)
    if revision is None:
        raise ValueError(
            f"no commit of data set {source!r} is known to vila-ops; name one with --revision, so that everyone "
            f"reads the same files (https://huggingface.co/datasets/{source}/commits/main lists them), or main for "
            f"the newest"
        )
    return source, revision


def _of_authors(files: Sequence[OfficialFile]) -> str:
    """The one data set of the authors. Raises ValueError."""
    repositories = {"/".join(file.hub.split("/")[:2]) for file in files if file.hub}
    if len(repositories) != 1:
        by_hand = "; ".join(f"{file.path} from {file.url}" for file in files)
        raise ValueError(
            f"the authors have no data set with these files on the hub; fetch them by hand ({by_hand}), or name a data "
            f"set that has them with --repo"
        )
    return repositories.pop()


def _places(files: Sequence[OfficialFile], *, repository: str | None) -> dict[str, str]:
    """By path of each file in the data set the folder of a zip."""
    if repository:
        return {file.path: "" for file in files}
    paths = ["/".join(place.split("/")[2:]) for place in sorted({file.hub for file in files})]
    return {path: folder for path, _, folder in (one.partition("!") for one in paths)}


def _recorded(folder: Path, source: str) -> tuple[str | None, dict[str, str]]:
    """The commit of a data set that earlier calls fetched from, and the sha256 of each of its files by name."""
    listing = folder / DOWNLOADED
    content = json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else {}
    return (content["commit"], content["sha256"]) if content.get("repository") == source else (None, {})


def _unchanged(folder: Path, file: OfficialFile, known: Mapping[str, str]) -> list[str]:
    """The recorded names of a file, or of many with one pattern; none if one of them is missing or was changed."""
    names = [name for name in known if fnmatchcase(name, file.path)]  # `*` takes slashes too, so `**` is any depth
    same = all((folder / name).is_file() and sha256(folder / name) == known[name] for name in names)
    return names if same else []


def _fetch(folder: Path, source: str, commit: str, places: Mapping[str, str]) -> Mapping[str, str]:
    """Bring files of a commit into a folder; returns the sha256 of each by name."""
    partial = folder.with_name(f".{folder.name}.partial")
    _download(source, commit, list(places), partial)
    for archive in sorted(partial.rglob("*.zip")):
        logger.info("unpacking %s", archive.name)
        _unpack(archive, partial, folder=places.get(archive.relative_to(partial).as_posix(), ""))
        archive.unlink()
    digests = _moved(partial, folder)
    shutil.rmtree(partial)
    return digests


def _unpack(archive: Path, target: Path, *, folder: str) -> None:
    """Extract a zip, or what is below one of its folders."""
    root = f"{folder}/" if folder else ""
    with zipfile.ZipFile(archive) as content:
        for member in content.infolist():
            if member.filename.startswith(root) and not member.is_dir():
                member.filename = member.filename.removeprefix(root)
                content.extract(member, target)  # keeps members inside: it drops leading slashes and ".."


def _commit_of(repository: str, revision: str) -> str:
    """The commit of a revision, as the hub has it."""
    from huggingface_hub import HfApi

    with hub_faults(f"data set {repository!r} at revision {revision!r} is not", "check its name and the network"):
        return str(HfApi().dataset_info(repository, revision=revision).sha)


def _download(repository: str, commit: str, paths: list[str], target: Path) -> None:
    """Bring the files of these paths at a commit into `target`."""
    from huggingface_hub import snapshot_download

    _commit_of(repository, commit)  # without an answer the client would take what is in `target` for all of it
    with hub_faults(f"data set {repository!r} at revision {commit!r} is not", "check its name and the network"):
        snapshot_download(repository, repo_type="dataset", revision=commit, allow_patterns=paths, local_dir=target)
    shutil.rmtree(target / ".cache", ignore_errors=True)  # the hub client's own
    if not any(path.is_file() for path in target.rglob("*")):
        raise ValueError(
            f"data set {repository!r} at {commit} has none of {', '.join(paths)}; name another with --repo"
        )


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
