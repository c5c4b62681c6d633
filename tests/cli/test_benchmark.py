"""`vila-ops benchmark`: list, check, and get from a hub of this process."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote, urlsplit

import pytest
from typer.testing import CliRunner, Result

from tests.eval.benchmarks.sample import ROOT, SAMPLES, copy_of
from vila_ops.cli import app
from vila_ops.config.benchmarks import Official
from vila_ops.errors import FetchError
from vila_ops.eval import downloads
from vila_ops.eval.downloads import from_hub
from vila_ops.eval.origins import DOWNLOADED, OfficialFile, check, default_config, official_kinds, origins_of

COMMIT = "c" * 40
MIRROR = "someone/mirror"
PINNED = ("chartqa", "llava_bench", "mmmu", "seed_bench")
"""Benchmarks whose authors' data set has a commit that we state."""


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["benchmark", *words])


def lines_of(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_official_file_is_listed_with_source_size_licence_and_server() -> None:
    listed = lines_of(run("list", "--json"))
    kinds = {config.model_fields["kind"].default for config in get_args(Official)}
    assert {one["benchmark"] for one in listed} == kinds == {path.name for path in SAMPLES.iterdir() if path.is_dir()}
    for one in listed:
        assert one["url"].startswith("http")
        assert one["size"]
        assert one["licence"]
        assert one["server"]
    text = run("list").stdout
    assert "server: closed on 2026-03-31" in text
    assert "  mmbench_dev_20230712.tsv\n    138 MB, " in text
    assert (
        "  AI2D_TEST.tsv\n    size not stated, licence not stated (diagrams of AllenAI's AI2D), labels=masked\n" in text
    )
    assert "  commit on the hub: 98e6ac0cb9b7b2cd2c991b85a50762edc4aedc68\n  */validation-*.parquet\n" in text
    assert "  commit on the hub: not known; `benchmark get` needs --revision\n  MME_Bench" in text


@pytest.mark.parametrize("kind", official_kinds())
def test_the_listed_paths_are_those_that_are_read(kind: str) -> None:
    """Each file of a sample is one of the listed ones, and each of a default config's is in the sample."""
    patterns = origins_of(kind).files
    listed = {path for file in patterns for path in (SAMPLES / kind).glob(file.path)}
    assert {path for path in (SAMPLES / kind).rglob("*") if path.is_file()} <= listed
    config = default_config(kind, {})
    for file in patterns:
        assert not file.is_read(config) or any((SAMPLES / kind).glob(file.path))


def problems(kind: str, folder: Path, **settings: Any) -> list[tuple[str, str]]:
    return [(one.file, one.problem) for one in check(folder, default_config(kind, settings))]


def test_a_sample_is_another_version_and_otherwise_without_fault(tmp_path: Path) -> None:
    expected = "another version: 8 items, and the official one has 12,578"
    assert problems("gqa", SAMPLES / "gqa") == [("testdev_balanced_questions.json", expected)]
    assert problems("pope", SAMPLES / "pope", version=None) == []
    result = run("check", str(SAMPLES), "--only", "pope", "-s", "version=null")
    assert (result.exit_code, result.stdout) == (0, "pope: no fault\n")


def test_missing_and_damaged_files_are_found(tmp_path: Path) -> None:
    folder = copy_of("pope", tmp_path)
    (folder / "val2014/COCO_val2014_000000000001.jpg").unlink()
    (folder / "val2014/COCO_val2014_000000000002.jpg").write_bytes(b"no image")
    ((file, problem),) = problems("pope", folder, version=None)
    assert file == "pope"
    assert problem.startswith("24 of 48 items have no image that can be read: COCO_val2014_000000000001.jpg is missing")
    (folder / "coco_pope_popular.json").write_text("{")
    ((file, problem),) = problems("pope", folder, version=None)
    assert "line 1 is not JSON" in problem
    (folder / "coco_pope_popular.json").unlink()
    ((file, problem),) = problems("pope", folder, version=None)
    assert file == "coco_pope_popular.json"
    assert problem.startswith("missing; it is in https://github.com/RUCAIBox/POPE")
    result = run("check", str(tmp_path), "--json")
    assert result.exit_code == 1
    assert [(one["benchmark"], one["file"]) for one in lines_of(result)] == [("pope", "coco_pope_popular.json")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "nothing"], "no benchmark 'nothing' reads official files"),
        (["-s", "split=test"], "name it with --only"),
        ([], "has no folder of a benchmark"),
    ],
)
def test_a_wrong_check_is_told(words: list[str], message: str, tmp_path: Path) -> None:
    result = run("check", str(tmp_path), *words)
    assert result.exit_code == 1
    assert message in str(result.exception)


class Hub(BaseHTTPRequestHandler):
    """The calls of the hub that its client makes, on one commit of some data sets."""

    files: dict[str, Mapping[str, bytes]]
    commits: dict[str, str]
    """The only commit of each data set."""

    def do_HEAD(self) -> None:
        """A file's size and digest."""
        self.do_GET()

    def do_GET(self) -> None:
        """Facts of a data set, the list of its files, or a file."""
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            name = "/".join(parts[2:4])
            files, commit = self.files.get(name), self.commits.get(name)
            if files is None or parts[5] not in ("main", commit):
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound" if files is None else "RevisionNotFound"})
            elif parts[4] == "revision":
                self._send(200, json.dumps({"id": name, "sha": commit}).encode())
            else:
                tree = [{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in files.items()]
                self._send(200, json.dumps(tree).encode())
            return
        name = "/".join(parts[1:3])
        data = self.files[name]["/".join(parts[5:])]
        self._send(200, data, {"X-Repo-Commit": self.commits[name], "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})  # noqa: S324

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def zipped(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def data_set_of(kind: str) -> str:
    """OWNER/NAME of the authors' data set."""
    return "/".join(next(file.hub for file in origins_of(kind).files if file.hub).split("/")[:2])


def data_sets_of_authors() -> dict[str, dict[str, bytes]]:
    """The samples of PINNED as the authors' data sets have them."""
    samples = {kind: files_below(SAMPLES / kind) for kind in PINNED}
    del samples["llava_bench"]["rule.json"]  # in LLaVA's repository
    chart, seed = samples["chartqa"], samples["seed_bench"]
    images = {name: data for name, data in seed.items() if name.startswith("SEED-Bench-image/")}
    charts = {f"ChartQA Dataset/{name}": data for name, data in chart.items()}
    samples["chartqa"] = {"ChartQA Dataset.zip": zipped({**charts, "__MACOSX/ChartQA Dataset/._test": b"no"})}
    samples["seed_bench"] = {
        "SEED-Bench.json": seed["SEED-Bench.json"],
        "SEED-Bench-image.zip": zipped(images),
    }
    return {data_set_of(kind): files for kind, files in samples.items()}


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    mirror = {**files_below(SAMPLES / "vizwiz"), "README.md": b"not asked for", "code.py": b"print()"}
    mme = {"MME_Benchmark_release_version.zip": zipped({**files_below(SAMPLES / "mme"), "../outside.txt": b"no"})}
    files = {MIRROR: mirror, "darkyarding/MME": mme, **data_sets_of_authors()}
    revisions = {data_set_of(kind): origins_of(kind).revision for kind in PINNED}
    handler = type("Files", (Hub,), {"files": files, "commits": {**dict.fromkeys(files, COMMIT), **revisions}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def _hub_here(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub)  # both are made of HF_ENDPOINT when it is imported
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_get_asks_the_hub_of_the_environment_and_unpacks_the_authors_zip(hub: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "vila_ops", "benchmark", "get", "mme", "--revision", "main"]
    command += ["--out", str(tmp_path / "files")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    own = files_below(tmp_path / "files/mme")
    listing = json.loads(own.pop(DOWNLOADED))
    assert own.pop("outside.txt") == b"no"  # a member never leaves the folder
    assert own == files_below(SAMPLES / "mme")
    assert (listing["repository"], listing["commit"]) == ("darkyarding/MME", COMMIT)
    assert len(done.stdout.splitlines()) == len(own) + 1
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["mme"]


@pytest.mark.usefixtures("_hub_here")
@pytest.mark.parametrize("kind", PINNED)
def test_get_takes_the_stated_commit_by_default(kind: str, tmp_path: Path) -> None:
    done = run("get", kind, "--out", str(tmp_path))
    assert done.exception is None, done.exception
    listing = json.loads((tmp_path / kind / DOWNLOADED).read_text())
    assert (listing["repository"], listing["commit"]) == (data_set_of(kind), origins_of(kind).revision)
    assert re.fullmatch("[0-9a-f]{40}", listing["commit"])
    taken = files_below(tmp_path / kind)
    del taken[DOWNLOADED]
    expected = files_below(SAMPLES / kind)
    elsewhere = {"rule.json", *(name for name in expected if name.startswith("SEED-Bench-video-image/"))}
    assert taken == {name: data for name, data in expected.items() if name not in elsewhere}


def test_every_stated_commit_is_tried() -> None:
    assert {kind for kind in official_kinds() if origins_of(kind).revision} == set(PINNED)


@pytest.mark.usefixtures("_hub_here")
def test_get_takes_the_official_paths_of_a_mirror_and_check_knows_what_it_took(tmp_path: Path) -> None:
    files = [file for file in origins_of("vizwiz").files if file.is_read(default_config("vizwiz", {}))]
    folder = tmp_path / "vizwiz"
    names = from_hub(folder, files, repository=MIRROR, revision="main")
    assert names == ["val.json", *(f"val/VizWiz_val_{number:08d}.jpg" for number in range(4))]
    version = ("val.json", "another version: 4 items, and the official one has 4,319")
    assert problems("vizwiz", folder) == [version]
    assert from_hub(folder, files, repository=MIRROR, revision=COMMIT) == names
    (folder / "val/VizWiz_val_00000003.jpg").write_bytes((folder / "val/VizWiz_val_00000000.jpg").read_bytes())
    changed, *rest = problems("vizwiz", folder)
    assert changed == (
        "val/VizWiz_val_00000003.jpg",
        f"changed since it was downloaded from {MIRROR} at {COMMIT}; move it away and get it again",
    )
    assert rest == [version]
    with pytest.raises(ValueError, match=r"VizWiz_val_00000003\.jpg has another content than the one on the hub"):
        from_hub(folder, files, repository=MIRROR, revision="main")


@pytest.mark.usefixtures("_hub_here")
def test_what_is_here_as_it_was_fetched_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    fetched: list[list[str]] = []
    download = downloads._download

    def counted(repository: str, commit: str, paths: list[str], target: Path) -> None:
        fetched.append(paths)
        download(repository, commit, paths, target)

    monkeypatch.setattr(downloads, "_download", counted)
    folder = tmp_path / "llava_bench"
    first = run("get", "llava_bench", "--out", str(tmp_path))
    before = files_below(folder)
    (folder / "questions.jsonl").unlink()
    assert run("get", "llava_bench", "--out", str(tmp_path)).stdout == first.stdout
    assert files_below(folder) == before
    assert fetched[1:] == [["questions.jsonl"]]
    (folder / "images/001.jpg").write_bytes(b"mine")
    changed = run("get", "llava_bench", "--out", str(tmp_path))
    assert "001.jpg has another content than the one on the hub; move it away" in str(changed.exception)
    (folder / "images/001.jpg").write_bytes(before["images/001.jpg"])
    splits = {
        split: [file for file in origins_of("vizwiz").files if file.is_read(default_config("vizwiz", {"split": split}))]
        for split in ("val", "test")
    }
    for files in splits.values():
        from_hub(tmp_path / "vizwiz", files, repository=MIRROR, revision="main")
    del fetched[:]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port that discards, where nobody listens
    assert run("get", "llava_bench", "--out", str(tmp_path)).stdout == first.stdout
    for split, files in splits.items():
        names = from_hub(tmp_path / "vizwiz", files, repository=MIRROR, revision=COMMIT)
        assert f"{split}.json" in names
    assert fetched == []


@pytest.mark.usefixtures("_hub_here")
@pytest.mark.parametrize("nested", ["", "MME_Benchmark/"])
def test_a_file_of_a_deep_folder_is_known_and_fetched_again_when_it_is_lost(
    nested: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zips: list[str] = []
    root = "MME_Benchmark_release_version"
    files = {
        f"{root}/{nested}{name}": name.encode()
        for name in ("OCR/1.txt", "OCR/1.png", "artwork/questions_answers_YN/1.txt", "artwork/images/1.jpg")
    }

    def download(repository: str, commit: str, paths: list[str], target: Path) -> None:
        zips.extend(paths)
        target.mkdir()
        (target / f"{root}.zip").write_bytes(zipped(files))

    monkeypatch.setattr(downloads, "_download", download)

    def got() -> list[str]:
        return from_hub(tmp_path / "mme", origins_of("mme").files, repository=None, revision=COMMIT)

    monkeypatch.setattr(downloads, "_commit_of", lambda _repository, revision: revision)
    assert got() == got() == sorted(files)
    assert zips == [f"{root}.zip"]
    lost = tmp_path / "mme" / root / nested / "artwork/questions_answers_YN/1.txt"
    lost.unlink()
    assert got() == sorted(files)
    assert lost.is_file()
    assert zips == 2 * [f"{root}.zip"]


@pytest.mark.parametrize("name", ["x/test.json", "test.json"])
def test_a_file_of_the_same_name_in_a_folder_is_another_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"{}")
    known = {name: hashlib.sha256(b"{}").hexdigest()}
    file = OfficialFile("test.json", "https://example.org", "?", "?")
    assert downloads._unchanged(tmp_path, file, known) == (["test.json"] if name == "test.json" else [])


@pytest.mark.usefixtures("_hub_here")
def test_what_the_hub_does_not_have_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = origins_of("gqa").files
    with pytest.raises(ValueError, match=r"fetch them by hand \(testdev_balanced_questions.json from https://cs.stanf"):
        from_hub(tmp_path / "gqa", files, repository=None, revision="main")
    with pytest.raises(ValueError, match=f"data set '{MIRROR}' at {COMMIT} has none of testdev"):
        from_hub(tmp_path / "gqa", files, repository=MIRROR, revision="main")
    with pytest.raises(ValueError, match="'someone/else' at revision 'main' is not available from the hub"):
        from_hub(tmp_path / "gqa", files, repository="someone/else", revision="main")
    with pytest.raises(
        ValueError, match=rf"no commit of data set '{MIRROR}' is known.*with --revision.*{MIRROR}/commits"
    ):
        from_hub(tmp_path / "gqa", files, repository=MIRROR, revision=None)
    without = run("get", "mme", "--out", str(tmp_path))
    assert "no commit of data set 'darkyarding/MME' is known" in str(without.exception)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port that discards, where nobody listens
    with pytest.raises(FetchError, match="not available from the hub"):
        from_hub(tmp_path / "gqa", files, repository=MIRROR, revision="main")


def test_a_dry_run_lists_sizes_and_what_is_here_and_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    shown = run("get", "llava_bench", "--out", str(tmp_path), "--dry-run")
    assert shown.exception is None, shown.exception
    assert shown.stdout.splitlines() == [
        "llava_bench, from data set liuhaotian/llava-bench-in-the-wild at 9773b6fd2be88d4ced480dcd9bfd4ce76e47f79b",
        *("  questions.jsonl", "    8 kB, to fetch", "  context.jsonl", "    8 kB, to fetch"),
        *("  answers_gpt4.jsonl", "    47 kB, to fetch", "  images/*.jpg", "    10 MB, to fetch"),
        *("  rule.json", "    size not stated, by hand"),
        "    https://github.com/haotian-liu/LLaVA/blob/main/llava/eval/table/rule.json",
    ]
    assert list(tmp_path.iterdir()) == []
    copy_of("llava_bench", tmp_path)
    there = lines_of(run("get", "llava_bench", "--out", str(tmp_path), "--dry-run", "--json"))
    assert {one["here"] for one in there} == {True}
    zips = lines_of(run("get", "chartqa", "--out", str(tmp_path), "--dry-run", "--json"))
    assert {one["download"] for one in zips} == {"ChartQA Dataset.zip"}
    unknown = run("get", "mme", "--out", str(tmp_path), "--dry-run")
    assert "no commit of data set 'darkyarding/MME' is known" in str(unknown.exception)
    mirror = run("get", "vizwiz", "--out", str(tmp_path), "--repo", MIRROR, "--revision", "main", "--dry-run")
    assert mirror.stdout.startswith(f"vizwiz, from data set {MIRROR} at main\n  val.json\n")
