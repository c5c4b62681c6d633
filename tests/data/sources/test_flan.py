import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vila_ops.config.sources import Flan
from vila_ops.data.raw.files import RawFile
from vila_ops.data.records import Dropped, Record, Turn

ReadAll = Callable[[Flan], list[list[Record | Dropped]]]
Scan = Callable[[Flan], list[RawFile]]

ROW = {
    "inputs": "Translate to French: cat",
    "targets": "chat",
    "_template_idx": 3,
    "_task_source": "NIv2",
    "_task_name": "task1_translation",
    "_template_type": "zs_opt",
}


def flan(path: Path) -> Flan:
    return Flan(path=str(path), licence="CC-BY-4.0")


def record(place: str, **changed: Any) -> Record:
    facts: dict[str, Any] = {
        "id": place,
        "object": hashlib.sha256(b"Translate to French: cat").hexdigest(),
        "turns": (Turn("user", ("Translate to French: cat",)), Turn("assistant", ("chat",))),
        "category": "task1_translation",
        "licence": "CC-BY-4.0",
        "provenance": place,
    }
    return Record(**{**facts, **changed})


def test_a_row_of_parquet_is_a_question_and_an_answer(tmp_path: Path, read_all: ReadAll, scan: Scan) -> None:
    (tmp_path / "niv2_zsopt_data").mkdir()
    path = tmp_path / "niv2_zsopt_data/part.0.parquet"
    pq.write_table(pa.Table.from_pylist([{**ROW, "targets": f"chat {n}\n"} for n in range(50)]), path, row_group_size=7)
    (file,) = scan(flan(tmp_path))
    assert (file.count, file.images, file.marks) == (50, 0, ())
    found = read_all(flan(tmp_path))
    for number, held in enumerate(found):
        answer = Turn("assistant", (f"chat {number}",))
        turns = (Turn("user", ("Translate to French: cat",)), answer)
        assert held == [record(f"niv2_zsopt_data/part.0.parquet:{number + 1}", turns=turns)]


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_of_jsonl_is_one_too(packed: bool, tmp_path: Path, read_all: ReadAll) -> None:
    own = {"id": "text_flan_00000042", "inputs": "2 + 2?", "targets": "4", "task": "sums", "licence": "CC0-1.0"}
    content = (json.dumps(ROW) + "\n\n" + json.dumps(own)).encode()
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    first, blank, second = read_all(flan(path))
    assert first == [record(f"{path.name}:1")]
    assert blank == []
    assert second == [
        record(
            f"{path.name}:3",
            id="text_flan_00000042",
            object="text_flan_00000042",
            turns=(Turn("user", ("2 + 2?",)), Turn("assistant", ("4",))),
            category="sums",
            licence="CC0-1.0",
        )
    ]


FAULTS = [
    ({"inputs": None}, "malformed_turns", "'inputs' is None"),
    ({"inputs": " "}, "no_text", "turn 1 (user)"),
    ({"targets": "\n"}, "no_text", "turn 2 (assistant)"),
    ({"targets": "a\0"}, "nul_in_text", "turn 2 (assistant)"),
]


@pytest.mark.parametrize(("change", "reason", "told"), [*FAULTS, ({"targets": 4}, "malformed_turns", "'targets' is 4")])
def test_a_faulty_line_is_dropped_with_its_number(
    change: dict[str, Any], reason: str, told: str, tmp_path: Path, read_all: ReadAll
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in (ROW, {**ROW, **change}, ROW)))
    _check_second(read_all(flan(tmp_path)), "a.jsonl:2", reason, told)


@pytest.mark.parametrize(("change", "reason", "told"), FAULTS)
def test_a_faulty_row_is_dropped_with_its_number(
    change: dict[str, Any], reason: str, told: str, tmp_path: Path, read_all: ReadAll
) -> None:
    pq.write_table(pa.Table.from_pylist([ROW, {**ROW, **change}, ROW]), tmp_path / "a.parquet")
    _check_second(read_all(flan(tmp_path)), "a.parquet:2", reason, told)


def test_a_row_that_is_not_utf8_is_dropped_alone(tmp_path: Path, read_all: ReadAll) -> None:
    targets = pa.array([b"chat", b"\xff", b"chat"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, targets.buffers())
    pq.write_table(pa.table({"inputs": ["a"] * 3, "targets": text}), tmp_path / "a.parquet")
    _check_second(read_all(flan(tmp_path)), "a.parquet:2", "invalid_utf8", "not UTF-8")


def _check_second(found: list[list[Record | Dropped]], where: str, reason: str, told: str) -> None:
    (before,), (dropped,), (after,) = found
    assert isinstance(before, Record)
    assert isinstance(after, Record)
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.where) == (reason, where)
    assert told in dropped.detail


def test_a_table_without_the_columns_names_those_that_it_has(tmp_path: Path, scan: Scan) -> None:
    pq.write_table(pa.table({"input": ["a"], "targets": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'inputs'; it has input, targets"):
        scan(flan(tmp_path))


def test_a_file_that_was_cut_off_is_an_error_that_names_it(tmp_path: Path, scan: Scan) -> None:
    pq.write_table(pa.Table.from_pylist([ROW]), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"a\.parquet"):
        scan(flan(tmp_path))


def test_a_new_file_leaves_the_others_digests(tmp_path: Path, scan: Scan) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps(ROW))
    (before,) = scan(flan(tmp_path))
    (tmp_path / "a.jsonl").write_text(json.dumps({**ROW, "targets": "chatte"}))
    (tmp_path / "notes.txt").write_text("unrelated")
    new, same = scan(flan(tmp_path))
    assert (new.name, same) == ("a.jsonl", before)


@pytest.mark.parametrize("parquet", [False, True])
def test_text_only_instructions_with_media_are_dropped(parquet: bool, tmp_path: Path, read_all: ReadAll) -> None:
    rows = [{**ROW, "images": None}, {**ROW, "images": ["a.png"]}]
    path = tmp_path / ("a.parquet" if parquet else "a.jsonl")
    if parquet:
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    (kept,), (fault,) = read_all(flan(tmp_path))
    assert isinstance(kept, Record)
    assert isinstance(fault, Dropped)
    assert (fault.reason, fault.where) == ("unread_media", f"{path.name}:2")
    ignoring = flan(tmp_path).with_changes({"ignore": ["images"]})
    assert all(isinstance(one, Record) for (one,) in read_all(ignoring))
