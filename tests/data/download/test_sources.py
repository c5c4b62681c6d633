"""Which URLs raw files name."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vila_ops.config import Source
from vila_ops.data.download.sources import raw_files, url_module, urls_of
from vila_ops.data.inspect.guess import guess

# The layouts of MMC4 and COYO-700M as published: one document a line, one image a row.
MMC4 = {
    "url": "http://ex.test/p",
    "text_list": ["Intro.", "A red ball."],
    "image_info": [
        {"image_name": "b.jpg", "raw_url": "http://ex.test/b.jpg", "matched_text_index": 1, "matched_sim": 0.31},
        {"image_name": "c.jpg", "raw_url": "http://ex.test/c.jpg", "matched_text_index": 0, "matched_sim": 0.2},
    ],
    "similarity_matrix": [[0.18, 0.31], [0.2, 0.1]],
}


def source(kind: str, path: Path, **settings: Any) -> Source:
    return guess(str(path), kind=kind, images=str(path.parent / "out"), own=settings)


def urls(kind: str, path: Path, **settings: Any) -> list[str]:
    return urls_of(source(kind, path, **settings), path)


def test_mmc4_names_images_in_order_and_each_once(tmp_path):
    path = tmp_path / "docs_shard_1_v2.jsonl"
    path.write_text("\n".join(json.dumps(document) for document in (MMC4, {**MMC4, "image_info": []}, MMC4)))
    assert urls("mmc4", path) == ["http://ex.test/b.jpg", "http://ex.test/c.jpg"]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"image_info": 3}', '{"image_info": [{}]}', "\xff"])
def test_a_line_that_is_no_mmc4_document_is_named_and_costs_no_other(tmp_path, line, caplog):
    path = tmp_path / "docs.jsonl"
    path.write_bytes(json.dumps(MMC4).encode() + b"\n" + line.encode("latin-1") + b"\n")
    assert urls("mmc4", path) == ["http://ex.test/b.jpg", "http://ex.test/c.jpg"]
    assert "docs.jsonl:2 is not an MMC4 document" in caplog.text
    path.write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"docs\.jsonl: none of 1 lines is an MMC4 document"):
        urls("mmc4", path)


def test_what_utf8_cannot_hold_is_replaced_and_what_is_no_text_is_left_out(tmp_path):
    images = [{"raw_url": "http://ex.test/\ud800"}, {"raw_url": None}, {"raw_url": ""}]
    (tmp_path / "docs.jsonl").write_text(json.dumps({"image_info": images}))
    assert urls("mmc4", tmp_path / "docs.jsonl") == ["http://ex.test/?"]


def coyo(path: Path, scores: list[tuple[float, float, float]]) -> list[str]:
    """A COYO file with a row for each (vitb32, vitl14, watermark), and its URLs."""
    named = [f"http://ex.test/{number}" for number in range(len(scores))]
    columns = ("clip_similarity_vitb32", "clip_similarity_vitl14", "watermark_score")
    values = dict(zip(columns, zip(*scores, strict=True), strict=True))
    texts = ["a green tree"] * len(scores)
    pq.write_table(pa.table({"id": range(len(scores)), "url": named, "text": texts, **values}), path)
    return named


def test_coyo_names_the_column_url(tmp_path):
    path = tmp_path / "part-00000.parquet"
    table = {"id": [1, 2, 3], "url": ["http://ex.test/a", None, "http://ex.test/a"], "text": ["a", "b", "c"]}
    pq.write_table(pa.table(table), path)
    assert urls("coyo", path) == ["http://ex.test/a"]
    pq.write_table(pa.table({"id": [1], "link": ["http://ex.test/a"]}), path)
    with pytest.raises(ValueError, match="no column 'url' of text, but id, link"):
        urls("coyo", path)


def test_coyo_is_selected_by_its_scores_as_vilas_downloader_does(tmp_path):
    """Of each file the 20 % with the highest sum of the two similarities, if above a floor (data_prepare/coyo)."""
    path = tmp_path / "part-00000.parquet"
    named = coyo(path, [(n / 64, n / 32, n % 2) for n in range(40)])
    top = {"columns": ["clip_similarity_vitb32", "clip_similarity_vitl14"], "share": 0.2, "above": 0.75}
    assert urls("coyo", path, clean={"top_share": top}) == named[32:]
    assert (
        urls("coyo", path, clean={"top_share": {**top, "share": 0.9}}) == named[17:]
    )  # 16 / 64 + 16 / 32 is not above 0.75
    rules = {"top_share": top, "scores": {"watermark_score": {"at_most": 0.5}}}
    assert urls("coyo", path, clean=rules) == named[32::2]
    assert urls("coyo", path, clean={"min_words": 4}) == []
    assert urls("coyo", path) == named


def test_raw_files_are_those_of_the_format_by_name(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    (raw / "sub").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl.zip", "c.parquet", "sub/a.jsonl", "d.jsonl.part"):
        (raw / name).touch()
    found = raw_files(source("mmc4", raw), out)
    assert found == [
        (raw / "a.jsonl.zip", out / "a"),
        (raw / "b.jsonl", out / "b"),
        (raw / "sub/a.jsonl", out / "sub/a"),
    ]
    assert raw_files(source("mmc4", raw / "b.jsonl"), out) == [(raw / "b.jsonl", out / "b")]
    with pytest.raises(ValueError, match=r"has no file that ends in \.parquet"):
        raw_files(source("coyo", raw / "sub"), out)
    with pytest.raises(ValueError, match="the downloaded images need a folder of their own"):
        raw_files(source("mmc4", raw), raw)


def test_a_kind_without_urls_is_told_which_have_some():
    with pytest.raises(ValueError, match="'llava' have no image URLs to download; coyo, interleaved, mmc4, table have"):
        url_module("llava")
