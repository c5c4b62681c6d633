"""File systems that do not do what a store on disk rests on."""

import os
from pathlib import Path
from typing import Any

import pytest

from vila_ops.artifacts import disk
from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.store import address, begin
from vila_ops.errors import UnsafeStore

AT = address(Dataset, revision=1, recipe={}, parents=())
link = os.link


def no_links(*_: Any) -> None:
    raise PermissionError(1, "Operation not permitted")


def overwriting(source: Path, target: Path) -> None:
    Path(target).unlink(missing_ok=True)
    link(source, target)


@pytest.mark.parametrize(
    ("broken", "told"),
    [(no_links, r"are needed and failed \(Operation not permitted\); use a"), (overwriting, "overwrote")],
)
def test_a_file_system_without_create_only_links_is_refused_before_any_work(
    broken: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", broken)
    with pytest.raises(UnsafeStore, match=told):
        begin(AT, store=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_was_made_although_its_answer_was_lost_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", asked_twice)  # as an NFS client does
    assert disk.create(str(tmp_path / "a"), b"mine")
    assert not disk.create(str(tmp_path / "a"), b"later")
    assert (tmp_path / "a").read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_where_a_link_would_cross_file_systems_it_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crossing(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    (tmp_path / "a").write_bytes(b"1")
    monkeypatch.setattr(os, "link", crossing)
    disk.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"1"
