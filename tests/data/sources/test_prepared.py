"""Formats all the way through `prepare`."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from vila_ops.artifacts import store
from vila_ops.config import Mixture, Resources
from vila_ops.data.preprocess.prepare import prepare

Download = Callable[[Path, Mapping[str, Any]], None]
RECORDS = 20


def image(number: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (80, 70), (number, 0, 0)).save(buffer, "jpeg")
    return buffer.getvalue()


@pytest.fixture
def raw(tmp_path: Path, download: Download) -> Path:
    """A folder a format, an image a record; half of COYO's addresses are dead, and one of MMC4's."""
    urls = [f"http://ex.test/{n}.jpg" for n in range(RECORDS)]
    for name in ("mmc4", "coyo", "webdataset", "hf_parquet", "html"):
        (tmp_path / name).mkdir()
    documents = [
        {"url": url, "text_list": ["Intro.", "A ball."], "similarity_matrix": [[0.1, 0.2]],
         "image_info": [{"raw_url": url, "matched_text_index": 1, "matched_sim": 0.2}]}
        for url in urls
    ]  # fmt: skip
    (tmp_path / "mmc4/shard.jsonl").write_text("\n".join(map(json.dumps, documents)))
    download(tmp_path / "images/shard", {url: image(n) if n else "timeout" for n, url in enumerate(urls)})
    pq.write_table(pa.table({"url": urls, "text": ["a ball"] * RECORDS}), tmp_path / "coyo/part.parquet")
    download(tmp_path / "images/part", {url: image(n) if n % 2 else "not_found" for n, url in enumerate(urls)})
    with webdataset.TarWriter(str(tmp_path / "webdataset/a.tar")) as sink:
        for n in range(RECORDS):
            sink.write({"__key__": f"{n:04}", "jpg": image(n), "txt": "a ball"})
    images = [{"bytes": image(n), "path": f"{n}.jpg"} for n in range(RECORDS)]
    pq.write_table(pa.table({"image": images, "text": ["a ball"] * RECORDS}), tmp_path / "hf_parquet/a.parquet")
    for n in range(RECORDS):
        (tmp_path / f"html/{n}.jpg").write_bytes(image(n))
        (tmp_path / f"html/{n}.html").write_text(f"<h1>Page {n}</h1><img src={n}.jpg><p>A ball.")
    return tmp_path


def test_every_record_is_a_sample_or_counted_and_dead_addresses_do_not_count_as_bad(
    raw: Path, make_text: Any, make_resources: Callable[..., Resources], tmp_path: Path
):
    sources: dict[str, Any] = {
        kind: {"kind": kind, "path": str(raw / kind), "licence": "CC0-1.0"}
        for kind in ("mmc4", "coyo", "webdataset", "hf_parquet", "html")
    }
    for kind in ("mmc4", "coyo"):
        sources[kind]["images"] = str(raw / "images")
    mixture = Mixture.model_validate({"name": "all", "sources": sources, "shard_bytes": 10_000})
    resources = make_resources(tmp_path / "work")
    made = prepare(mixture, make_text(), resources)
    with open(store.file(made, "summary.json")) as file:
        summary = json.load(file)["sources"]
    counts = {kind: (sum(one["samples"].values()), one["taken_out"], one["bad"]) for kind, one in summary.items()}
    assert counts == {
        "mmc4": (RECORDS - 1, {"not_downloaded": 1}, {}),
        "coyo": (RECORDS // 2, {"not_downloaded": RECORDS // 2}, {}),
        "webdataset": (RECORDS, {}, {}),
        "hf_parquet": (RECORDS, {}, {}),
        "html": (RECORDS, {}, {}),
    }
