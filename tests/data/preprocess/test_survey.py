"""Rules over all records, through the whole of prepare: planted copies and leaks are what goes, and nothing else."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from vila_ops.artifacts.store import content
from vila_ops.config import Mixture, Resources
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.shards import read_index

QUESTION = "which of the seven lamps in the old harbour office was lit when the last ferry left"


@pytest.fixture
def resources(tmp_path: Path, make_resources: Callable[..., Resources]) -> Resources:
    return make_resources(tmp_path / "work")


def folder(root: Path, lines: list[dict[str, Any]], images: dict[str, bytes]) -> Path:
    root.mkdir(parents=True)
    for name, data in images.items():
        (root / name).write_bytes(data)
    (root / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def line(name: str, *parts: dict[str, str]) -> dict[str, Any]:
    own = {"category": "", "licence": "CC0-1.0", "provenance": f"of {name}"}
    return {"id": name, "object": name, **own, "turns": [{"role": "document", "parts": list(parts)}]}


def smaller(path: Path) -> bytes:
    """A copy at half the size, as JPEG."""
    with Image.open(path) as image:
        flat = Image.new("RGB", image.size, (255, 255, 255))
        flat.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
    out = io.BytesIO()
    flat.resize((flat.width // 2, flat.height // 2)).save(out, "JPEG", quality=80)
    return out.getvalue()


def dropped(dataset: Any) -> dict[str, tuple[str, str]]:
    rows = pq.read_table(content(dataset) / "dropped.parquet").to_pylist()
    return {row["id"]: (row["reason"], row["detail"]) for row in rows}


def test_a_second_copy_of_a_image_and_of_a_text_go(
    resources: Resources, make_text: Any, tiny: Path, tmp_path: Path
) -> None:
    names = ["dog", "cat", "bus", "crown"]
    images = {f"{name}.png": (tiny / f"pairs/{name}.png").read_bytes() for name in names}
    images["other.jpg"] = smaller(tiny / "pairs/cat.png")
    lines = [line(name, {"image": f"{name}.png"}, {"text": f"A {name}."}) for name in names]
    lines.append(line("again", {"image": "other.jpg"}, {"text": "Another word for it."}))
    lines += [
        line(name, {"text": f"{start} {QUESTION}, and nobody knew."}) for name, start in (("t1", "So"), ("t2", "So"))
    ]
    raw = folder(tmp_path / "raw", lines, images)
    asked = {"kind": "jsonl", "path": str(raw), "render": "caption"}
    mixture = {"name": "m", "sources": {"p": asked}, "near_duplicates": {"image_bits": 4, "text_similarity": 0.8}}
    made = prepare(Mixture.model_validate(mixture), make_text(), resources)
    gone = dropped(made)
    assert {name: reason for name, (reason, _) in gone.items()} == {"again": "duplicate_image", "t2": "duplicate_text"}
    assert "'cat' (of cat)" in gone["again"][1]
    assert set(read_index(content(made))["id"].to_pylist()) == {*names, "t1"}
    summary = json.loads((content(made) / "summary.json").read_text())["sources"]["p"]
    assert summary["taken_out"] == {"duplicate_image": 1, "duplicate_text": 1}
    assert summary["bad"] == {}


def test_what_an_evaluation_set_asks_is_not_trained_on(
    resources: Resources, make_text: Any, tiny: Path, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(tiny / "pairs", raw)
    leaked = json.loads((raw / "records.jsonl").read_text().splitlines()[0])
    with (raw / "records.jsonl").open("a") as records:
        records.write(json.dumps(line("leak", {"text": f"We read: {QUESTION.upper()}? The third."})) + "\n")
    image = leaked["turns"][0]["parts"][0]["image"]
    evaluation = folder(
        tmp_path / "evaluation",
        [line("asked", {"image": "e.jpg"}, {"text": "What is it?"}), line("read", {"text": QUESTION})],
        {"e.jpg": smaller(raw / image)},
    )
    source = {"kind": "jsonl", "render": "caption"}
    mixture = {
        "name": "m",
        "sources": {"p": {**source, "path": str(raw)}},
        "contamination": {"sources": {"e": {**source, "path": str(evaluation)}}},
    }
    made = prepare(Mixture.model_validate(mixture), make_text(), resources)
    gone = dropped(made)
    assert {name: reason for name, (reason, _) in gone.items()} == {
        leaked["id"]: "contaminated_image", "leak": "contaminated_text"
    }  # fmt: skip
    assert "'asked'" in gone[leaked["id"]][1]
    assert "'read'" in gone["leak"][1]
    assert made.num_samples == 47


def test_an_evaluation_set_without_records_is_an_error(
    resources: Resources, make_mixture: Any, make_text: Any, tmp_path: Path
) -> None:
    hollow = {"kind": "jsonl", "render": "caption", "path": str(folder(tmp_path / "hollow", [], {}))}
    asked = make_mixture("definitions", contamination={"sources": {"e": hollow}})
    with pytest.raises(ValueError, match="evaluation set 'e' has no records to compare with"):
        prepare(asked, make_text(), resources)


def test_only_what_a_rule_needs_is_looked_at_again(resources: Resources, make_mixture: Any, make_text: Any) -> None:
    prepare(make_mixture("pairs"), make_text(), resources)
    assert not (Path(resources.storage.store) / "survey").exists()
    near = {"near_duplicates": {"image_bits": 2}}
    first = prepare(make_mixture("pairs", **near), make_text(), resources)
    surveys = sorted((Path(resources.storage.store) / "survey").iterdir())
    assert len(surveys) == 3
    second = prepare(make_mixture("pairs", **near, seed=1), make_text(), resources)
    assert sorted((Path(resources.storage.store) / "survey").iterdir()) == surveys
    assert first.num_samples == second.num_samples
