import hashlib
import io
import multiprocessing
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from vila_ops.config.package import Package
from vila_ops.errors import FetchError
from vila_ops.packages.fetch import fetch, fetch_all

CLOSED_PORT = "https://127.0.0.1:9"
NEEDS_DPKG = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb on this machine")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wheel(folder: Path, name: str = "tiny_words", content: str = "WORDS = 3\n") -> Package:
    """A wheel that pip accepts."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", content)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return Package(registry="pypi", name=name, version="1.0", sha256=sha256(path), licence="MIT")


def npm_archive(cache: Path, members: list[tarfile.TarInfo]) -> Package:
    """An npm package whose archive already lies in the cache."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    archive = cache / "archives" / f"{digest}-some.tgz"
    archive.parent.mkdir(parents=True, exist_ok=True)
    archive.write_bytes(buffer.getvalue())
    return Package(registry="npm", name="some", version="1.0.0", sha256=digest, licence="MIT")


def member(name: str, *, size: int = 1, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = 0 if link else size
    if link:
        info.type, info.linkname = tarfile.SYMTYPE, link
    return info


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, pip's only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_wheel_is_fetched_once_and_kept(index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    package = wheel(index)
    folder = fetch(package, cache=tmp_path / "cache")
    assert (folder / "tiny_words/__init__.py").read_text() == "WORDS = 3\n"
    assert folder.parent == tmp_path / "cache/packages"
    assert folder.name == f"pypi-tiny_words-1.0-{package.sha256[:12]}"
    shutil.rmtree(index)
    assert fetch(package, cache=tmp_path / "cache") == folder
    assert capfd.readouterr() == ("", "")


def test_the_kept_archive_is_enough_when_the_folder_is_gone(index: Path, tmp_path: Path):
    package = wheel(index)
    folder = fetch(package, cache=tmp_path)
    shutil.rmtree(folder)
    shutil.rmtree(index)
    assert (fetch(package, cache=tmp_path) / "tiny_words/__init__.py").is_file()


@pytest.mark.slow
def test_a_corrupted_archive_is_fetched_again(index: Path, tmp_path: Path):
    package = wheel(index)
    shutil.rmtree(fetch(package, cache=tmp_path))
    (archive,) = (tmp_path / "archives").glob(f"{package.sha256}-*")
    archive.write_bytes(archive.read_bytes()[:-7])
    assert (fetch(package, cache=tmp_path) / "tiny_words/__init__.py").is_file()
    assert sha256(archive) == package.sha256


def test_what_a_killed_attempt_left_is_not_used(index: Path, tmp_path: Path):
    package = wheel(index)
    leftover = tmp_path / "packages" / f".pypi-tiny_words-1.0-{package.sha256[:12]}.k1ll3d" / "content/tiny_words"
    leftover.mkdir(parents=True)
    (leftover / "__init__.py").write_text("WOR")
    download = tmp_path / "archives" / f".{package.sha256}.k1ll3d"
    download.mkdir(parents=True)
    (download / "tiny_words-1.0-py3-none-any.whl").write_bytes(b"PK")
    folder = fetch(package, cache=tmp_path)
    assert (folder / "tiny_words/__init__.py").read_text() == "WORDS = 3\n"
    assert [path.name for path in (tmp_path / "packages").iterdir()] == [folder.name]
    assert [sha256(path) for path in (tmp_path / "archives").iterdir()] == [package.sha256]


def test_a_wrong_sha256_is_refused_and_nothing_is_left(index: Path, tmp_path: Path):
    package = wheel(index)
    wrong = Package.model_validate({**package.model_dump(), "sha256": "0" * 64})
    with pytest.raises(
        FetchError, match=rf"pypi package tiny_words 1\.0: wrong sha256: expected 0{{64}}, got {package.sha256}"
    ):
        fetch(wrong, cache=tmp_path)
    assert list((tmp_path / "packages").iterdir()) == []
    assert list((tmp_path / "archives").iterdir()) == []


def test_an_unknown_package_is_named(index: Path, tmp_path: Path):
    unknown = Package(registry="pypi", name="no-such-words", version="1.0", sha256="0" * 64, licence="MIT")
    with pytest.raises(
        FetchError, match=r"pypi package no-such-words 1\.0: not found: .*; to do: check name and version"
    ):
        fetch(unknown, cache=tmp_path)


@pytest.mark.parametrize("registry", ["npm", "debian"])
def test_a_missing_client_is_named(registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    package = Package.model_validate(
        {"registry": registry, "name": "some", "version": "1", "sha256": "0" * 64, "licence": "MIT"}
    )
    with pytest.raises(
        FetchError, match=rf"{registry} package some 1: client missing: no (npm|apt-get) on PATH; to do: "
    ):
        fetch(package, cache=tmp_path)


@pytest.mark.parametrize("registry", ["pypi", "npm"])
def test_no_network_differs_from_not_found(registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if registry == "npm" and shutil.which("npm") is None:
        pytest.skip("no npm on this machine")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", CLOSED_PORT)
    monkeypatch.setenv("npm_config_registry", CLOSED_PORT)
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    package = Package.model_validate(
        {"registry": registry, "name": "six", "version": "1.16.0", "sha256": "0" * 64, "licence": "MIT"}
    )
    with pytest.raises(FetchError, match=rf"{registry} package six 1\.16\.0: no network: .*; to do: check the network"):
        fetch(package, cache=tmp_path / "cache")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("apt-get") is None, reason="needs apt-get, and root to update it")
def test_no_network_and_no_lists_of_apt_is_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] {CLOSED_PORT} stable main\n")
    for folder in ("lists/partial", "cache/archives/partial"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "apt.conf").write_text(
        f'Dir::State::lists "{tmp_path}/lists"; Dir::Cache "{tmp_path}/cache"; '
        f'Dir::Etc::sourcelist "{tmp_path}/sources.list"; Dir::Etc::sourceparts "{tmp_path}/none";'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    package = Package(registry="debian", name="wordnet-base", version="1:3.0-37", sha256="0" * 64, licence="WordNet")
    with pytest.raises(
        FetchError, match=r"debian package wordnet-base 1:3\.0-37: no network: .*; to do: check the net"
    ):
        fetch(package, cache=tmp_path / "fetched")


def _fetch_in_a_process(package: Package, cache: Path) -> str:
    return (fetch(package, cache=cache) / "tiny_words/__init__.py").read_text()


@pytest.mark.slow
def test_four_processes_at_once_all_end_well(index: Path, tmp_path: Path):
    package = wheel(index)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        texts = pool.starmap(_fetch_in_a_process, [(package, tmp_path)] * 4)
    assert texts == ["WORDS = 3\n"] * 4
    assert len(list((tmp_path / "packages").iterdir())) == 1
    assert len(list((tmp_path / "archives").iterdir())) == 1


@pytest.mark.slow
def test_fetch_all_gives_each_package_its_folder(index: Path, tmp_path: Path):
    packages = [wheel(index, f"words_{letter}", f"WORDS = {letter!r}\n") for letter in "abc"]
    folders = fetch_all([*packages, packages[0]], cache=tmp_path)
    assert list(folders) == packages
    assert (folders[packages[2]] / "words_c/__init__.py").read_text() == "WORDS = 'c'\n"


@pytest.mark.slow
def test_fetch_all_raises_what_failed(index: Path, tmp_path: Path):
    good = wheel(index)
    bad = Package(registry="pypi", name="no-such-words", version="1.0", sha256="0" * 64, licence="MIT")
    with pytest.raises(FetchError, match="no-such-words"):
        fetch_all([good, bad], cache=tmp_path)


def test_the_first_folder_of_an_npm_archive_is_left_out(tmp_path: Path):
    package = npm_archive(tmp_path, [member("package/a.txt"), member("package/b/c.txt")])
    folder = fetch(package, cache=tmp_path)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == ["a.txt", "b", "b/c.txt"]


@pytest.mark.parametrize("name", ["package/../../evil.txt", "package/b/../../../evil.txt"])
def test_a_path_out_of_the_folder_is_refused(name: str, tmp_path: Path):
    package = npm_archive(tmp_path, [member("package/a.txt"), member(name)])
    with pytest.raises(FetchError, match=r"npm package some 1\.0\.0: .* cannot be extracted"):
        fetch(package, cache=tmp_path)
    assert not list(tmp_path.rglob("evil.txt"))
    assert list((tmp_path / "packages").iterdir()) == []


def test_a_zip_path_out_of_the_folder_is_refused(tmp_path: Path):
    archive = tmp_path / "archives" / "evil.whl"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as evil:
        evil.writestr("../evil.txt", "x")
    digest = sha256(archive)
    archive.rename(archive.with_name(f"{digest}-evil.whl"))
    package = Package(registry="pypi", name="evil", version="1.0", sha256=digest, licence="MIT")
    with pytest.raises(FetchError, match=r"path '\.\./evil\.txt' leaves the folder"):
        fetch(package, cache=tmp_path)


def test_links_out_of_the_folder_are_left_out(tmp_path: Path):
    members = [member("package/a.txt"), member("package/in", link="a.txt"), member("package/out", link="/etc/passwd")]
    folder = fetch(npm_archive(tmp_path, members), cache=tmp_path)
    assert (folder / "in").read_bytes() == b"x"
    assert not (folder / "out").is_symlink()


@NEEDS_DPKG
def test_a_deb_gives_its_tree_as_under_the_root(tmp_path: Path):
    tree = tmp_path / "tree"
    (tree / "usr/share/words").mkdir(parents=True)
    (tree / "usr/share/words/list").write_text("one\n")
    (tree / "usr/share/words/passwd").symlink_to("/etc/passwd")
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        "Package: words\nVersion: 1:2-3\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: w\n"
    )
    built = tmp_path / "words.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", str(tree), str(built)], check=True, capture_output=True)
    package = Package(registry="debian", name="words", version="1:2-3", sha256=sha256(built), licence="MIT")
    (tmp_path / "archives").mkdir()
    built.rename(tmp_path / "archives" / f"{package.sha256}-words.deb")
    folder = fetch(package, cache=tmp_path)
    assert (folder / "usr/share/words/list").read_text() == "one\n"
    assert not (folder / "usr/share/words/passwd").is_symlink()
    assert ":" not in folder.name


@NEEDS_DPKG
def test_a_deb_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "archives").mkdir()
    archive = tmp_path / "archives/no.deb"
    archive.write_text("not a deb")
    package = Package(registry="debian", name="no", version="1", sha256=sha256(archive), licence="MIT")
    archive.rename(archive.with_name(f"{package.sha256}-no.deb"))
    with pytest.raises(FetchError, match=r"debian package no 1: .*no\.deb cannot be extracted"):
        fetch(package, cache=tmp_path)


REAL = {
    "wordnet-base": ("debian", "1:3.0-37", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"),
    "is-number": ("npm", "7.0.0", "7b75c1057198cf97696909a9bee176c9c5e9bcb5b03bf3ecef2f484defadd51e"),
    "six": ("pypi", "1.16.0", "8abb2f1d86890a2dfb989f9a77cfcfd3e47c2a354b01111771326f8aa26e0254"),
}
INSIDE = {"wordnet-base": "usr/share/wordnet/data.noun", "is-number": "index.js", "six": "six.py"}


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_each_registrys_client_brings_the_real_package(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    registry, version, digest = REAL[name]
    package = Package.model_validate(
        {"registry": registry, "name": name, "version": version, "sha256": digest, "licence": "see package"}
    )
    assert (fetch(package, cache=tmp_path) / INSIDE[name]).stat().st_size > 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.real
@pytest.mark.parametrize("registry", ["debian", "npm", "pypi"])
def test_each_registrys_client_reports_an_unknown_package(registry: str, tmp_path: Path):
    package = Package.model_validate(
        {
            "registry": registry,
            "name": "vila-ops-no-such-package",
            "version": "9.9.9",
            "sha256": "0" * 64,
            "licence": "?",
        }
    )
    with pytest.raises(FetchError, match=rf"{registry} package vila-ops-no-such-package 9\.9\.9: not found"):
        fetch(package, cache=tmp_path)


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_each_registrys_client_reports_an_unknown_version(name: str, tmp_path: Path):
    package = Package.model_validate(
        {"registry": REAL[name][0], "name": name, "version": "99.9.9", "sha256": "0" * 64, "licence": "?"}
    )
    with pytest.raises(FetchError, match=rf"package {name} 99\.9\.9: not found"):
        fetch(package, cache=tmp_path)


@pytest.mark.real
def test_apt_reports_a_missing_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, CLOSED_PORT)
    registry, version, digest = REAL["wordnet-base"]
    package = Package.model_validate(
        {"registry": registry, "name": "wordnet-base", "version": version, "sha256": digest, "licence": "?"}
    )
    with pytest.raises(FetchError, match=r"debian package wordnet-base 1:3\.0-37: no network"):
        fetch(package, cache=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a bit", "a file too many", "a file too few", "the listing", "no listing"])
def test_a_damaged_folder_is_extracted_again(
    damage: str, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package = wheel(index)
    folder = fetch(package, cache=tmp_path)
    path, (listing,) = folder / "tiny_words/__init__.py", (tmp_path / "listings").iterdir()
    match damage:
        case "a bit":
            path.write_text("WORDS = 2\n")
        case "a file too many":
            (folder / "tiny_words/other.py").write_text("")
        case "a file too few":
            path.unlink()
        case "the listing":
            listing.write_bytes(listing.read_bytes()[:-1] + b"?")
        case "no listing":
            listing.unlink()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))  # the kept archive is enough
    assert fetch(package, cache=tmp_path) == folder
    assert path.read_text() == "WORDS = 3\n"
    assert not (folder / "tiny_words/other.py").exists()
    assert "is not as it was extracted; it is replaced" in caplog.text
    assert [one.name for one in (tmp_path / "packages").iterdir()] == [folder.name]
    caplog.clear()
    assert fetch(package, cache=tmp_path) == folder
    assert not caplog.records
