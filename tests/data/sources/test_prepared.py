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
from vila_ops.data.download.sources import urls_of
from vila_ops.data.inspect.guess import guess
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
    for name in ("mmc4", "coyo", "interleaved", "webdataset", "hf_parquet", "html"):
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
    lines = [json.dumps({"texts": ["A ball.", None], "images": [None, url]}) for url in urls]
    (tmp_path / "interleaved/part.jsonl").write_text("\n".join(lines))
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
        for kind in ("mmc4", "coyo", "interleaved", "webdataset", "hf_parquet", "html")
    }
    for kind in ("mmc4", "coyo", "interleaved"):
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
        "interleaved": (RECORDS // 2, {"not_downloaded": RECORDS // 2}, {}),
        "webdataset": (RECORDS, {}, {}),
        "hf_parquet": (RECORDS, {}, {}),
        "html": (RECORDS, {}, {}),
    }


def summary_of(mixture: dict[str, Any], text: Any, resources: Resources) -> dict[str, Any]:
    made = prepare(Mixture.model_validate({"name": "m", "max_bad_share": 1, **mixture}), text, resources)
    (one,) = json.loads(store.file(made, "summary.json").read_text())["sources"].values()
    return {key: one[key] for key in ("records", "samples", "taken_out", "bad", "changed")}


def test_the_best_share_is_the_same_before_and_after_a_download_of_it_alone(
    make_text: Any, make_resources: Callable[..., Resources], download: Download, tmp_path: Path
):
    """Of 20 rows the 5 with the highest scores are wanted; of these one is gone."""
    urls = [f"http://ex.test/{n}.jpg" for n in range(RECORDS)]
    raw = tmp_path / "raw/part.parquet"
    raw.parent.mkdir()
    rows = {"url": urls, "text": ["a ball"] * RECORDS, "clip_similarity_vitb32": [n / 32 for n in range(RECORDS)]}
    pq.write_table(pa.table(rows), raw)
    clean = {"top_share": {"columns": ["clip_similarity_vitb32"], "share": 0.25}}
    settings = {"kind": "coyo", "path": str(raw), "licence": "CC0-1.0", "clean": clean}
    wanted = urls_of(guess(str(raw), kind="coyo", images="out", own={"clean": clean}), raw)
    assert wanted == urls[15:]
    for name, some in (("all", urls), ("best", wanted)):
        download(tmp_path / name / "part", {url: "not_found" if url == urls[17] else image(7) for url in some})
        source = {**settings, "images": str(tmp_path / name)}
        counts = summary_of({"sources": {"s": source}}, make_text(), make_resources(tmp_path / f"work-{name}"))
        assert sum(counts["samples"].values()) == 4
        assert counts["taken_out"] == {"below_top_share": 15, "not_downloaded": 1}
        assert counts["bad"] == {}


def test_a_truncated_jpeg_is_dropped_or_read_and_counted(
    make_text: Any, make_resources: Callable[..., Resources], tmp_path: Path
):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for n in range(RECORDS):
            sink.write({"__key__": f"{n:04}", "jpg": image(n)[: -40 if n in (3, 4) else None], "txt": "a ball"})
    source = {"kind": "webdataset", "path": str(tmp_path / "a.tar"), "licence": "CC0-1.0"}
    resources = make_resources(tmp_path / "work")
    dropped = summary_of({"sources": {"s": source}}, make_text(), resources)
    assert (sum(dropped["samples"].values()), dropped["bad"], dropped["changed"]) == (
        18,
        {"bad_image_truncated": 2},
        {},
    )
    read = summary_of({"sources": {"s": source}, "images": {"truncated": "read"}}, make_text(), resources)
    assert (sum(read["samples"].values()), read["bad"], read["changed"]) == (20, {}, {"truncated_image": 2})
