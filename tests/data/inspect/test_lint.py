import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow
from typer.testing import CliRunner

from vila_ops.cli import app
from vila_ops.config import Source
from vila_ops.config.sources import JsonLines, Llava, Table
from vila_ops.data.inspect.lint import LintFault, LintSummary, lines, lint
from vila_ops.data.raw.objects import ObjectPath, raw_path
from vila_ops.data.records import CHANGES, FIRST_ANSWER


def png() -> bytes:
    out = io.BytesIO()
    Pillow.new("RGB", (40, 30), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with an image and half of one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "docs/images").mkdir(parents=True)
    (tmp_path / "docs/images/a.png").write_bytes(png())
    (tmp_path / "docs/images/half.png").write_bytes(png()[:60])
    return tmp_path


def record(
    name: str, image: str | list[str] | None = "a.png", question: str = "<image>?", answer: str = "Red."
) -> dict[str, Any]:
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, **({} if image is None else {"image": image}), "conversations": said}


def jsonl(name: str, *records: Any) -> None:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    Path(name).write_text("\n".join(lines) + "\n")


def found(source: Source, folder: Path) -> tuple[list[tuple[str, str]], LintSummary]:
    """(where, reason) of each fault, and the summary, which is the last."""
    *faults, summary = lint(source, cache=folder / "cache")
    assert isinstance(summary, LintSummary)
    assert all(isinstance(fault, LintFault) and fault.detail for fault in faults)
    return [(fault.where, fault.reason) for fault in faults if isinstance(fault, LintFault)], summary


def llava(path: str) -> Llava:
    return Llava(path=path, licence="CC0-1.0", images="docs/images")


def test_every_fault_is_listed_with_its_file_and_line_then_the_counts(folder: Path) -> None:
    jsonl("docs/a.jsonl", record("1"), record("2", question="Which?"), "", "{", record("3", image="gone.png"))
    jsonl("docs/b.jsonl", record("4", answer=" "), record("5"), record("6", question="Which?"))
    assert found(llava("docs"), folder) == (
        [
            ("docs/a.jsonl:2", "too_few_placeholders"),
            ("docs/a.jsonl:4", "bad_json"),
            ("docs/a.jsonl:5", "missing_image"),
            ("docs/b.jsonl:1", "no_text"),
            ("docs/b.jsonl:3", "too_few_placeholders"),
        ],
        LintSummary(
            records=7,
            images=2,
            faults={"too_few_placeholders": 2, "bad_json": 1, "missing_image": 1, "no_text": 1},
        ),
    )


def test_a_good_source_has_no_fault(folder: Path) -> None:
    jsonl("docs/a.jsonl", record("1"), record("2", image=None, question="2 + 2?"))
    assert found(llava("docs/a.jsonl"), folder) == ([], LintSummary(records=2, images=1, faults={}))


@pytest.mark.parametrize("key", ["videos", "audios", "image_path", "photos", "attachment"])
@pytest.mark.parametrize(
    "line",
    [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Red."}]},
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "Red."}]},
        {"inputs": "?", "targets": "Red."},
        {"question": "?", "answer": "Red."},
        {"id": "1", "object": "a", "category": "", "licence": "", "provenance": "",
         "turns": [{"role": "user", "parts": [{"text": "?"}]}, {"role": "assistant", "parts": [{"text": "Red."}]}]},
    ],
    ids=["messages", "llava", "flan", "vflan", "jsonl"],
)  # fmt: skip
def test_media_that_nothing_reads_are_a_fault_of_every_format_of_records(
    line: dict[str, Any], key: str, folder: Path
) -> None:
    jsonl("docs/records.jsonl", line, {**line, key: ["a.mp4" if key == "videos" else "a.png"]})
    done = CliRunner().invoke(app, ["data", "lint", "docs" if "turns" in line else "docs/records.jsonl"])
    assert done.exit_code == 1
    assert "2 records, 0 images, 1 fault" in done.stdout
    assert "docs/records.jsonl:2" in done.stdout
    assert key in done.stdout


def test_a_change_to_a_record_is_counted_and_is_no_fault(folder: Path) -> None:
    greeted = record("1")
    greeted["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
    jsonl("docs/a.jsonl", greeted, record("2"))
    summary = LintSummary(records=2, images=2, faults={}, changed={FIRST_ANSWER: 1})
    assert found(llava("docs/a.jsonl"), folder) == ([], summary)
    assert f"1  {FIRST_ANSWER} (kept): {CHANGES[FIRST_ANSWER]}" in lines(summary)


def test_an_id_that_stands_twice_is_told_with_both_places(folder: Path) -> None:
    jsonl("docs/a.jsonl", record("x"), record("y"))
    jsonl("docs/b.jsonl", record("z"), record("x"))
    fault, summary = lint(llava("docs"), cache=folder / "cache")
    assert isinstance(fault, LintFault)
    assert (fault.where, fault.reason) == ("docs/b.jsonl:2", "duplicate_id")
    assert "'x' is also that of a.jsonl:1" in fault.detail
    assert summary == LintSummary(records=4, images=4, faults={"duplicate_id": 1})


def test_a_image_that_does_not_decode_is_told_with_its_record(folder: Path) -> None:
    records = [record("1"), record("2", image=["a.png", "half.png"], question="<image><image>")]
    Path("docs/a.json").write_text(json.dumps(records, indent=1))
    fault, summary = lint(llava("docs/a.json"), cache=folder / "cache")
    assert isinstance(fault, LintFault)
    assert fault.where == "docs/a.json:16[1]"
    assert fault.reason == "bad_image_truncated"
    assert "image 2" in fault.detail
    assert summary == LintSummary(records=2, images=3, faults={"bad_image_truncated": 1})


@pytest.mark.parametrize("content", ["", "\n \n", "[]"])
def test_a_file_without_a_record_is_a_fault(content: str, folder: Path) -> None:
    Path("docs/a.json").write_text(content)
    jsonl("docs/b.jsonl", record("1"))
    assert found(llava("docs"), folder)[0] == [("docs/a.json", "no_record")]


def test_what_is_not_of_the_format_at_all_is_a_fault_that_ends_the_list(folder: Path) -> None:
    Path("docs/a.json").write_text('[{"id": 1}, {"id"')
    fault, summary = lint(llava("docs"), cache=folder / "cache")
    assert isinstance(fault, LintFault)
    assert (fault.where, fault.reason) == ("docs", "not_readable")
    assert "docs/a.json:1 (byte 12): an element begins that has no end" in fault.detail
    assert summary == LintSummary(records=0, images=0, faults={"not_readable": 1})
    Path("docs/a.csv").write_text("photo,text\n")
    ((where, reason),) = found(Table(path="docs/a.csv", images="docs", licence="CC0-1.0"), folder)[0]
    assert (where, reason) == ("docs", "not_readable")


def test_our_own_layout_is_checked_too(folder: Path) -> None:
    line = {
        "id": "1", "object": "x", "category": "", "licence": "CC0-1.0", "provenance": "my camera",
        "turns": [{"role": "document", "parts": [{"image": "images/half.png"}, {"text": "Red."}]}],
    }  # fmt: skip
    jsonl("docs/records.jsonl", {**line, "turns": []}, line)
    faults, summary = found(JsonLines(path="docs", render="caption"), folder)
    assert faults == [("docs/records.jsonl:1", "bad_line"), ("docs/records.jsonl:2", "bad_image_truncated")]
    assert summary.records == 2


def said(*arguments: str) -> tuple[int, list[str]]:
    done = CliRunner().invoke(app, ["data", "lint", *arguments])
    return done.exit_code, done.stdout.splitlines()


def test_the_command_lists_a_fault_a_line_and_ends_with_1(folder: Path) -> None:
    jsonl("docs/a.jsonl", record("1"), record("2", question="Which?"), record("3", question="Which?"))
    code, lines = said("docs/a.jsonl", "--images", "docs/images")
    assert code == 1
    assert [line.split("  ")[:2] for line in lines[:2]] == [
        ["docs/a.jsonl:2", "too_few_placeholders"],
        ["docs/a.jsonl:3", "too_few_placeholders"],
    ]
    assert lines[2:] == ["3 records, 1 image, 2 faults", "      2  too_few_placeholders"]


def test_the_command_prints_one_json_object_a_line(folder: Path) -> None:
    jsonl("docs/a.jsonl", record("1"), record("2", question="Which?"))
    code, lines = said("docs/a.jsonl", "--images", "docs/images", "--json")
    fault, summary = map(json.loads, lines)
    assert code == 1
    assert fault["where"] == "docs/a.jsonl:2"
    assert summary == {"records": 2, "images": 1, "faults": {"too_few_placeholders": 1}}


def test_the_command_ends_with_0_where_there_is_no_fault(folder: Path) -> None:
    jsonl("docs/a.jsonl", record("1"))
    assert said("docs", "--format", "llava", "--images", "docs/images") == (0, ["1 record, 1 image, 0 faults"])


def test_the_command_reads_a_bucket(folder: Path, s3_store: str) -> None:
    (folder / "docs/captions.csv").write_text("image,text\na.png,Red.\nhalf.png,Half.\n")
    for name in ("captions.csv", "images/a.png", "images/half.png"):
        place = raw_path(f"{s3_store}/{name}")
        assert isinstance(place, ObjectPath)
        place.write(folder / "docs" / name)
    code, lines = said(f"{s3_store}/captions.csv", "--images", f"{s3_store}/images")
    assert code == 1
    assert lines[0].split("  ")[:2] == [f"{s3_store}/captions.csv:3", "bad_image_truncated"]
    assert lines[1:] == ["2 records, 2 images, 1 fault", "      1  bad_image_truncated"]


def test_the_settings_of_a_source_are_given_by_set(folder: Path) -> None:
    Path("docs/own.csv").write_text("file,caption\nnone.jpg,A cat.\n")
    code, lines = said("docs/own.csv")
    assert (code, "name the columns in the source" in lines[0]) == (1, True)
    code, lines = said("docs/own.csv", "-s", "image=file", "--set", "text=caption")
    assert code == 1
    assert lines[0].startswith("docs/own.csv:2  missing_image")
