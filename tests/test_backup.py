"""A machine that is lost comes back from its backup; what is damaged or in the way is told before any work."""

import contextlib
import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.pipeline.sealed import ROOT, seal_all, tiny_run
from vila_ops import local
from vila_ops.artifacts import disk_faults, store
from vila_ops.artifacts.kinds import Artifact, Checkpoint, Dataset, ModelVersion, Shard
from vila_ops.artifacts.listing import sealed
from vila_ops.artifacts.store import backend, root_of, seal, verify
from vila_ops.backup import backup, restore
from vila_ops.cli import app
from vila_ops.config import Resources
from vila_ops.config.base import fingerprint
from vila_ops.config.local import LocalServers
from vila_ops.errors import CorruptArtifact, DiskFault, OtherFormat
from vila_ops.pipeline.explain import explain
from vila_ops.registry import alias_register


@pytest.fixture
def machine(
    tmp_path: Path, make_resources: Callable[..., Resources], free_servers: Callable[[Path], LocalServers]
) -> tuple[Resources, LocalServers]:
    """Where everything lies that a disaster takes: the servers' root is in the store, as by default."""
    resources = make_resources(tmp_path / "machine")
    return resources, free_servers(tmp_path / "machine/store/local")


def in_store(place: str, resources: Resources) -> Resources:
    return resources.with_changes({"storage.store": place})


def make_data(place: str) -> list[Artifact]:
    """A shard, a dataset that holds its file, and a file of its own."""
    at = store.address(Shard, revision=1, recipe={"shard": 1}, parents=())
    attempt = store.begin(at, store=place)
    (attempt / "a.tar").write_bytes(bytes(range(256)) * 40)
    shard = seal(Shard, at, attempt, facts={"num_samples": 3}, execution={"seconds": 1.0})
    at = store.address(Dataset, revision=1, recipe={"mixture": "own"}, parents=(shard.digest,))
    attempt = store.begin(at, store=place)
    (attempt / "index.json").write_text("[3]")
    facts = {"num_samples": 3, "num_tokens": 9}
    known = {"shards/a.tar": (shard, "a.tar")}
    return [shard, seal(Dataset, at, attempt, facts=facts, execution={"seconds": 2.0}, known=known)]


def make_databases(settings: LocalServers) -> None:
    root = Path(settings.root)
    (root / "prefect").mkdir(parents=True)
    for path in (root / "mlflow.db", root / "prefect/prefect.db"):
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA journal_mode = WAL" if path.stem == "prefect" else "PRAGMA user_version = 1")
            database.execute("CREATE TABLE accounts (name TEXT, money INTEGER)")
            database.execute("INSERT INTO accounts VALUES ('a', 100), ('b', 0)")
            database.commit()
    (root / "mlflow-artifacts/0").mkdir(parents=True)
    (root / "mlflow-artifacts/0/items.json").write_text("[1, 2]")


@contextlib.contextmanager
def transfers(settings: LocalServers) -> Iterator[None]:
    """Money moves between two accounts of both databases all the time; their sum stays."""
    done = threading.Event()

    def move(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as database:
            while not done.wait(0.002):  # a reader of a journal gets its turn
                with database:
                    database.execute("UPDATE accounts SET money = money - 1 WHERE name = 'a'")
                    database.execute("UPDATE accounts SET money = money + 1 WHERE name = 'b'")

    paths = (Path(settings.root, "mlflow.db"), Path(settings.root, "prefect/prefect.db"))
    threads = [threading.Thread(target=move, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def money(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return int(database.execute("SELECT SUM(money) FROM accounts").fetchone()[0])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_after_a_disaster_nothing_is_made_again(
    tmp_path: Path, machine: tuple[Resources, LocalServers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is copied, both databases are written to."""
    monkeypatch.chdir(ROOT)
    resources, settings = machine
    run, place = tiny_run(resources), resources.storage.store
    seal_all(run)
    make_databases(settings)
    model = next(one for one in sealed(Checkpoint, store=place) if one.stage == "sft")
    version = ModelVersion(name="own model", version=1, checkpoint=model, promoted=True)
    aliases = alias_register.move("own model", {"champion": version}, over=None, reason="first", store=place)
    claim = f"{root_of(place)}/windows/tiny/2026-01-05T0000Z.json"
    assert backend(claim).create(claim, b'{"flow_run": "1"}')
    with transfers(settings):
        made = backup(resources, settings, tmp_path / "disk")
    assert made.num_artifacts == made.num_copied == len([*Path(place).glob("*/*/manifest.json")])
    assert made.lacking == ()
    shutil.rmtree(tmp_path / "machine")
    restored = restore(tmp_path / "disk", resources, settings)
    assert restored.databases == made.databases == ("mlflow.db", "prefect.db")
    assert {step.status for step in explain(run)} == {"sealed"}
    for one in sealed(Checkpoint, store=place):
        verify(one)
    assert alias_register.read("own model", store=place) == aliases
    assert not backend(claim).create(claim, b""), "the window stays claimed"
    assert money(Path(settings.root, "mlflow.db")) == money(Path(settings.root, "prefect/prefect.db")) == 100
    assert Path(settings.root, "mlflow-artifacts/0/items.json").read_text() == "[1, 2]"
    again = backup(resources, settings, tmp_path / "disk")
    assert (again.num_artifacts, again.num_copied) == (made.num_artifacts, 0)


def test_a_later_backup_adds_what_is_new_and_leaves_the_earlier_one(
    tmp_path: Path, machine: tuple[Resources, LocalServers]
) -> None:
    resources, settings = machine
    place, disk = resources.storage.store, tmp_path / "disk"
    shard, dataset = make_data(place)
    make_databases(settings)
    first = backup(resources, settings, disk)
    before = files_of(disk)
    links = {path.stat().st_ino for path in (disk / "store").rglob("a.tar")}
    assert len(links) == 1, "the file of two artifacts is there once"
    left, other = disk / ".2026-01-05T000000.000001Z-draft", disk / ".my-draft"
    left.mkdir()  # of a backup that was killed
    other.mkdir()
    (Path(settings.root) / "mlflow-artifacts/0/more.json").write_text("[3]")
    backend(place).swap(f"{root_of(place)}/registry/own", b"[]", None)
    second = backup(resources, settings, disk)
    assert (second.num_artifacts, second.num_copied) == (2, 0)
    assert before.items() <= files_of(disk).items()
    assert (left.exists(), other.exists()) == (False, True)
    kept = [disk / one.snapshot / "mlflow-artifacts/0/items.json" for one in (first, second)]
    assert kept[0].samefile(kept[1])
    shutil.rmtree(tmp_path / "machine")
    restore(disk, resources, settings, at=first.snapshot)
    assert not (Path(settings.root) / "mlflow-artifacts/0/more.json").exists()
    shutil.rmtree(tmp_path / "machine")
    restore(disk, resources, settings)
    assert (Path(settings.root) / "mlflow-artifacts/0/more.json").read_text() == "[3]"
    restored = [*sealed(Shard, store=place), *sealed(Dataset, store=place)]
    assert [one.digest for one in restored] == [shard.digest, dataset.digest]
    assert Path(store.file(restored[0], "a.tar")).samefile(store.file(restored[1], "shards/a.tar"))


def test_a_store_moves_from_s3_to_a_disk_and_back(
    tmp_path: Path, machine: tuple[Resources, LocalServers], s3_store: str
) -> None:
    _, settings = machine
    resources = in_store(s3_store, machine[0])
    made = make_data(s3_store)
    assert backend(s3_store).swap(f"{s3_store}/registry/own", b"[]", None)
    backup(resources, settings, tmp_path / "disk")
    for place in ("shard", "dataset", "registry"):
        backend(s3_store).remove(f"{s3_store}/{place}")
    restore(tmp_path / "disk", resources, settings)
    restored = [*sealed(Shard, store=s3_store), *sealed(Dataset, store=s3_store)]
    assert [one.digest for one in restored] == [one.digest for one in made]
    for one in restored:
        verify(one)
    version = backend(s3_store).load(f"{s3_store}/registry/own")
    assert version is not None
    assert version.data == b"[]"


def test_a_changed_bit_of_any_file_is_told_and_nothing_is_restored(
    tmp_path: Path, machine: tuple[Resources, LocalServers]
) -> None:
    resources, settings = machine
    make_data(resources.storage.store)
    make_databases(settings)
    place = root_of(resources.storage.store)
    backend(place).swap(f"{place}/registry/own", b"[]", None)
    backup(resources, settings, tmp_path / "disk")
    shutil.rmtree(tmp_path / "machine")
    marks = ("backup.json", "format.json")  # each manifest says its format too
    files = sorted(path for path in (tmp_path / "disk").rglob("*") if path.is_file() and path.name not in marks)
    assert len(files) >= 9
    for path in files:
        whole = path.read_bytes()
        path.unlink()  # else the other names of the file would change too
        path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 4]) + whole[-1:])
        with pytest.raises(CorruptArtifact) as raised:
            restore(tmp_path / "disk", resources, settings)
        assert str(path.parent) in str(raised.value)
        path.write_bytes(whole)
    assert not (tmp_path / "machine").exists()
    restore(tmp_path / "disk", resources, settings)


def test_an_artifact_that_was_moved_out_of_the_backup_is_left_to_the_next_run(
    tmp_path: Path, machine: tuple[Resources, LocalServers]
) -> None:
    resources, settings = machine
    _, dataset = make_data(resources.storage.store)
    backup(resources, settings, tmp_path / "disk")
    address = Path(dataset.uri).relative_to(root_of(resources.storage.store)).as_posix()
    shutil.rmtree(tmp_path / "disk/store" / address)
    shutil.rmtree(tmp_path / "machine")
    assert restore(tmp_path / "disk", resources, settings).lacking == (address,)
    assert len([*sealed(Shard, store=resources.storage.store)]) == 1


def test_nothing_is_written_over_other_files(tmp_path: Path, machine: tuple[Resources, LocalServers]) -> None:
    resources, settings = machine
    make_data(resources.storage.store)
    make_databases(settings)
    backup(resources, settings, tmp_path / "disk")
    before = files_of(tmp_path / "machine")
    with pytest.raises(ValueError, match="nothing is restored over what is there; `vila-ops down`, move it away"):
        restore(tmp_path / "disk", resources, settings)
    shutil.move(tmp_path / "machine/store", tmp_path / "machine/lost")
    own = settings.with_changes({"root": str(tmp_path / "machine/lost/local")})
    with pytest.raises(ValueError, match=r"lost/local/mlflow.db, .*/prefect.db, .*/mlflow-artifacts: nothing is"):
        restore(tmp_path / "disk", resources, own)
    for database in ("mlflow.db", "prefect/prefect.db"):
        (tmp_path / "machine/lost/local" / database).unlink()
        (tmp_path / "machine/lost/local" / f"{database}-wal").touch()
    shutil.move(tmp_path / "machine/lost/local/mlflow-artifacts", tmp_path / "machine/artifacts")
    with pytest.raises(ValueError, match=r"local/mlflow.db-wal, .*/prefect.db-wal.*: nothing is"):
        restore(tmp_path / "disk", resources, own)
    shutil.rmtree(tmp_path / "machine")
    restore(tmp_path / "disk", resources, settings)
    before = files_of(tmp_path / "machine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/photo.jpg").write_text("mine")
    refused = {
        tmp_path / "other": "holds photo.jpg, which vila-ops did not write there",
        tmp_path / "machine/store/backups": "which is copied; name a folder outside of it",
        tmp_path / "machine": "is or contains .*, which is in use",
    }
    for folder, why in refused.items():
        with pytest.raises(ValueError, match=why):
            backup(resources, settings, folder)
    for folder, at, why in ((tmp_path / "other", None, "holds no backup"), (tmp_path / "disk", "x", "no snapshot 'x'")):
        with pytest.raises(ValueError, match=why):
            restore(folder, resources, settings, at=at)
    assert files_of(tmp_path / "machine") == before


def test_two_backups_into_one_folder_do_not_mix(tmp_path: Path, machine: tuple[Resources, LocalServers]) -> None:
    """Another store may have made another result at an address, which the first store's snapshots name."""
    resources, settings = machine
    make_data(resources.storage.store)
    backup(resources, settings, tmp_path / "disk")
    other = in_store(str(tmp_path / "other"), resources)
    at = store.address(Shard, revision=1, recipe={"shard": 1}, parents=())
    attempt = store.begin(at, store=other.storage.store)
    (attempt / "a.tar").write_bytes(b"other bytes")
    seal(Shard, at, attempt, facts={"num_samples": 3}, execution={})
    with pytest.raises(ValueError, match="two stores made different results at this address; use another folder"):
        backup(other, settings, tmp_path / "disk")
    shutil.rmtree(tmp_path / "machine")
    restore(tmp_path / "disk", resources, settings)


def test_a_database_that_is_none_is_told(tmp_path: Path, machine: tuple[Resources, LocalServers]) -> None:
    resources, settings = machine
    (tmp_path / "mlflow.db").write_text("not a database " * 100)
    own = resources.with_changes({"tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"})
    with pytest.raises(CorruptArtifact, match=r"mlflow.db cannot be copied as a database of sqlite"):
        backup(own, settings, tmp_path / "disk")


def test_a_database_that_is_not_copied_for_want_of_space_or_rights_is_no_damaged_one(
    tmp_path: Path, machine: tuple[Resources, LocalServers], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_databases(machine[1])
    live = Path(machine[1].root, "mlflow.db")
    with pytest.raises(DiskFault, match=r"mlflow.db was not copied to .*copy.db \(unable to open database file\)"):
        local.copy_database(live, tmp_path / "no folder/copy.db")
    monkeypatch.setattr(disk_faults, "free_bytes", lambda _: 7)
    with pytest.raises(DiskFault, match=rf"copy.db needs {live.stat().st_size} bytes, and its disk has 7 bytes free"):
        local.copy_database(live, tmp_path / "copy.db")


def test_what_is_elsewhere_is_told_and_an_old_file_of_it_is_not_copied(
    tmp_path: Path, machine: tuple[Resources, LocalServers]
) -> None:
    """Databases in PostgreSQL, and kept requests outside of the store. A file that resources name is copied."""
    resources, settings = machine
    make_databases(settings)
    own = settings.with_changes({"mlflow_database": "env:VILA_MLFLOW", "prefect_database": "env:VILA_PREFECT"})
    kept = {"share": 1.0, "place": str(tmp_path / "kept")}
    made = backup(resources.with_changes({"serve.samples": kept}), own, tmp_path / "disk")
    assert made.databases == ()
    assert made.lacking == (
        "mlflow.db, which is in PostgreSQL: pg_dump copies it",
        "prefect.db, which is in PostgreSQL: pg_dump copies it",
        f"kept requests at {tmp_path}/kept, which is outside of {root_of(resources.storage.store)}/samples/",
    )
    shutil.copyfile(Path(settings.root, "mlflow.db"), tmp_path / "own.db")
    named = resources.with_changes({"tracking.uri": f"sqlite:///{tmp_path}/own.db"})
    made = backup(named, own, tmp_path / "disk")
    assert made.databases == ("mlflow.db",)
    assert len(made.lacking) == 2


def test_kept_requests_come_back_with_their_times(tmp_path: Path, machine: tuple[Resources, LocalServers]) -> None:
    """By which they are removed after `keep_days`."""
    resources, settings = machine
    kept = Path(root_of(resources.storage.store), "samples/own/records/a.json")
    assert backend(str(kept)).create(str(kept), b"{}")
    os.utime(kept, (1_700_000_000, 1_700_000_000))
    backup(resources, settings, tmp_path / "disk")
    shutil.rmtree(tmp_path / "machine")
    restore(tmp_path / "disk", resources, settings)
    assert kept.stat().st_mtime == 1_700_000_000


def test_a_restore_that_was_interrupted_goes_on_and_up_waits_for_that(
    tmp_path: Path, machine: tuple[Resources, LocalServers], monkeypatch: pytest.MonkeyPatch
) -> None:
    resources, settings = machine
    root = Path(settings.root)
    make_data(resources.storage.store)
    make_databases(settings)
    backup(resources, settings, tmp_path / "disk")
    shutil.rmtree(tmp_path / "machine")
    copied: list[str] = []

    def copy(source: Path, target: Path) -> None:
        copied.append(source.name)
        if source.name == "prefect.db":
            target.write_bytes(source.read_bytes()[:100])
            raise KeyboardInterrupt
        target.write_bytes(source.read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copy)
        with pytest.raises(KeyboardInterrupt):
            restore(tmp_path / "disk", resources, settings)
    assert "mlflow.db" in copied
    assert not (root / "prefect/prefect.db").exists()
    with pytest.raises(ValueError, match=r"a restore did not end, as .*; run `vila-ops restore` again"):
        local.up(settings)
    (root / local.UPGRADED).write_text("of a database that is gone")
    assert restore(tmp_path / "disk", resources, settings).num_artifacts == 2
    assert money(root / "mlflow.db") == money(root / "prefect/prefect.db") == 100
    assert {path.name for path in root.iterdir()} == {"lock", "mlflow-artifacts", "mlflow.db", "pids", "prefect"}
    with pytest.raises(ValueError, match="nothing is restored over what is there"):
        restore(tmp_path / "disk", resources, settings)


def rewrite(manifest: Path, **changes: object) -> None:
    """Change a snapshot's list, with the checksum that it then has."""
    body = {**json.loads(manifest.read_bytes()), **changes}
    del body["checksum"]
    manifest.unlink()
    manifest.write_text(json.dumps({**body, "checksum": fingerprint(body)}))


@pytest.mark.parametrize(
    "name",
    ["mlflow-artifacts//tmp/x", "mlflow-artifacts/../../x", "samples/./x", "/x", "../x", "x", "samples", "mlflow.db/x"],
)
def test_a_snapshot_writes_nowhere_else(name: str, tmp_path: Path, machine: tuple[Resources, LocalServers]) -> None:
    resources, settings = machine
    made = backup(resources, settings, tmp_path / "disk")
    file = {"size": 1, "sha256": "0" * 64, "changed": 0.0}
    rewrite(tmp_path / "disk" / made.snapshot / "snapshot.json", files={name: file})
    with pytest.raises(CorruptArtifact, match=rf"names {name!r}, which is no file of a backup"):
        restore(tmp_path / "disk", resources, settings)


def test_a_damaged_snapshot_costs_links_and_one_of_another_format_is_told(
    tmp_path: Path, machine: tuple[Resources, LocalServers], caplog: pytest.LogCaptureFixture
) -> None:
    resources, settings = machine
    make_databases(settings)
    first, second = (tmp_path / "disk" / backup(resources, settings, tmp_path / "disk").snapshot for _ in range(2))
    (second / "snapshot.json").write_text("{")
    third = backup(resources, settings, tmp_path / "disk").snapshot
    assert "this snapshot copies every file" in caplog.text
    items = "mlflow-artifacts/0/items.json"
    assert not (tmp_path / "disk" / third / items).samefile(first / items)
    rewrite(first / "snapshot.json", format=99, of_later="versions")
    with pytest.raises(OtherFormat, match=r"snapshot.json has format 99, and vila-ops .* reads 1"):
        restore(tmp_path / "disk", resources, settings, at=first.name)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("{}", ValueError, "does not mark a folder of backups"),
        ("[1]", ValueError, "does not mark a folder of backups"),
        ("notes of mine", ValueError, "does not mark a folder of backups"),
        ('{"format": 99}', OtherFormat, "has format 99, and vila-ops .* reads 1"),
    ],
)
def test_a_folder_of_another_program_is_not_taken_for_backups(
    text: str, kind: type[Exception], message: str, tmp_path: Path, machine: tuple[Resources, LocalServers]
) -> None:
    resources, settings = machine
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/backup.json").write_text(text)
    with pytest.raises(kind, match=message):
        backup(resources, settings, tmp_path / "disk")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["backup.json"]


def test_a_folder_of_backups_is_apart_from_the_store_too(
    tmp_path: Path, machine: tuple[Resources, LocalServers]
) -> None:
    resources, settings = machine
    backup(resources, settings, tmp_path / "disk")
    with pytest.raises(ValueError, match=r"lies in or contains .*, which is copied; name a folder outside of it"):
        backup(in_store(str(tmp_path / "disk/store"), resources), settings, tmp_path / "disk")


def test_the_commands_say_what_they_copied_and_what_is_not_there(
    tmp_path: Path, machine: tuple[Resources, LocalServers]
) -> None:
    resources, settings = machine
    make_data(resources.storage.store)
    files = {"resources": resources.model_dump(mode="json"), "servers": settings.model_dump(mode="json")}
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
    where = [word for name in files for word in (f"--{name}", f"{tmp_path}/{name}.yaml")]
    done = CliRunner().invoke(app, ["backup", f"{tmp_path}/disk", *where], catch_exceptions=False)
    assert "2 artifacts (2 copied now) and 0 other files, with no database" in done.stdout
    assert f"not in this backup: mlflow.db, which is not at {settings.root}/mlflow.db" in done.stderr
    shutil.rmtree(tmp_path / "machine")
    done = CliRunner().invoke(app, ["restore", f"{tmp_path}/disk", *where, "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["num_artifacts"] == 2
