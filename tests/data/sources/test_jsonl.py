import json
from pathlib import Path

import pytest

from vila_ops.config.sources import JsonLines
from vila_ops.data import sources
from vila_ops.data.records import Dropped, Image, Record, Turn

DOG = {
    "id": "1",
    "object": "Dog",
    "category": "animals",
    "licence": "CC0-1.0",
    "provenance": "my camera",
    "turns": [
        {"role": "user", "parts": [{"image": "photos/dog.png"}, {"text": "What is <image> this?"}]},
        {"role": "assistant", "parts": [{"text": "A dog."}]},
    ],
}


def source(folder: Path, *lines: object) -> JsonLines:
    (folder / "photos").mkdir(exist_ok=True)
    (folder / "photos/dog.png").write_bytes(b"dog")
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    (folder / "records.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return JsonLines(render="questions", path=str(folder))


def test_a_line_is_a_record(tmp_path: Path):
    ours = source(tmp_path, {**DOG, "id": "0", "object": "Bär"}, "", DOG)
    first, second = sources.keys(ours, {})
    assert first == "000000001:0"
    assert second.startswith("000000003:")
    assert list(sources.read(ours, {}, second)) == [
        Record(
            id="1",
            object="dog",
            turns=(
                Turn("user", (Image(b"dog"), "What is <image> this?")),
                Turn("assistant", ("A dog.",)),
            ),
            category="animals",
            licence="CC0-1.0",
            provenance="my camera",
        )
    ]
    (bear,) = sources.read(ours, {}, first)
    assert isinstance(bear, Record)
    assert bear.object == "bär"


def test_a_record_whose_picture_is_missing_is_dropped(tmp_path: Path):
    ours = source(tmp_path, {**DOG, "turns": [{"role": "document", "parts": [{"image": "gone.png"}]}]})
    assert list(sources.read(ours, {}, sources.keys(ours, {})[0])) == [Dropped("1", "missing_image")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "Invalid JSON"),
        ({**DOG, "turns": []}, "turns"),
        ({**DOG, "colour": "brown"}, "colour"),
        ({key: value for key, value in DOG.items() if key != "licence"}, "licence"),
        ({**DOG, "turns": [{"role": "narrator", "parts": [{"text": "x"}]}]}, "role"),
        ({**DOG, "turns": [{"role": "user", "parts": [{"image": "../secret.png"}]}]}, "not a path inside the folder"),
        ({**DOG, "turns": [{"role": "user", "parts": [{"image": "/etc/passwd"}]}]}, "not a path inside the folder"),
    ],
)
def test_a_bad_line_is_an_error_that_names_it(line: object, message: str, tmp_path: Path):
    ours = source(tmp_path, DOG, line)
    with pytest.raises(ValueError, match=rf"(?s)records\.jsonl line 2: .*{message}"):
        list(sources.read(ours, {}, sources.keys(ours, {})[1]))


def test_a_folder_without_records_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no records\.jsonl in"):
        sources.keys(JsonLines(render="questions", path=str(tmp_path)), {})


def test_it_needs_no_package(tmp_path: Path):
    assert sources.packages(source(tmp_path, DOG)) == ()
