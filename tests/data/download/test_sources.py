"""Which URLs raw files name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vila_ops.data.download.sources import raw_files, urls_of

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


def test_mmc4_names_images_in_order_and_each_once(tmp_path):
    path = tmp_path / "docs_shard_1_v2.jsonl"
    path.write_text("\n".join(json.dumps(document) for document in (MMC4, {**MMC4, "image_info": []}, MMC4)))
    assert urls_of("mmc4", path) == ["http://ex.test/b.jpg", "http://ex.test/c.jpg"]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"image_info": 3}', '{"image_info": [{}]}', "\xff"])
def test_a_line_that_is_no_mmc4_document_is_named_and_costs_no_other(tmp_path, line, caplog):
    path = tmp_path / "docs.jsonl"
    path.write_bytes(json.dumps(MMC4).encode() + b"\n" + line.encode("latin-1") + b"\n")
    assert urls_of("mmc4", path) == ["http://ex.test/b.jpg", "http://ex.test/c.jpg"]
    assert "docs.jsonl:2 is not an MMC4 document" in caplog.text
    path.write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"docs\.jsonl: none of 1 lines is an MMC4 document"):
        urls_of("mmc4", path)


def test_what_utf8_cannot_hold_is_replaced_and_what_is_no_text_is_left_out(tmp_path):
    images = [{"raw_url": "http://ex.test/\ud800"}, {"raw_url": None}, {"raw_url": ""}]
    (tmp_path / "docs.jsonl").write_text(json.dumps({"image_info": images}))
    assert urls_of("mmc4", tmp_path / "docs.jsonl") == ["http://ex.test/?"]


def test_coyo_names_the_column_url(tmp_path):
    path = tmp_path / "part-00000.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3], "url": ["http://ex.test/a", None, "http://ex.test/a"]}), path)
    assert urls_of("coyo", path) == ["http://ex.test/a"]
    pq.write_table(pa.table({"id": [1], "link": ["http://ex.test/a"]}), path)
    with pytest.raises(ValueError, match="no column 'url' but id, link"):
        urls_of("coyo", path)


def test_raw_files_are_those_of_the_format_by_name(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.parquet"):
        (tmp_path / name).touch()
    assert [path.name for path in raw_files("mmc4", tmp_path)] == ["a.jsonl", "b.jsonl"]
    assert raw_files("mmc4", tmp_path / "b.jsonl") == [tmp_path / "b.jsonl"]
    with pytest.raises(ValueError, match=r"no folder with \*\.parquet"):
        raw_files("coyo", tmp_path / "nowhere")
