"""Prepared data in `data/<mixture>` alone, as after `dvc pull` without raw files: it is used and kept."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vila_ops.artifacts.exports import export
from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.store import Address, begin, content, opened, read_manifest, seal, verify
from vila_ops.config import Mixture, Resources, TextFormat
from vila_ops.data.inspect.show import show
from vila_ops.data.loading.loader import RowLoader
from vila_ops.data.preprocess.identity import raw_digests
from vila_ops.data.preprocess.prepare import prepare, prepared
from vila_ops.data.preprocess.shard_writer import tokenizer_of
from vila_ops.data.shards import index_of, samples_of

SPLIT = {"salt": "tiny", "validation": 0.2, "test": 0.2}


class Clone(NamedTuple):
    """A colleague's clone."""

    raw: Path
    resources: Resources

    def mixture(self, **more: Any) -> Mixture:
        """The mixture, whose raw files may not be there."""
        sources = {
            "pairs": {"kind": "jsonl", "path": str(self.raw / "pairs"), "render": "caption"},
            "words": {"kind": "jsonl", "path": str(self.raw / "words"), "render": "document"},
        }
        return Mixture.model_validate(
            {"name": "mine", "sources": sources, "split": SPLIT, "shard_bytes": 40_000, **more}
        )

    def folder(self) -> Path:
        """DVC's output."""
        return Path(self.resources.storage.data) / "mine"


@pytest.fixture(scope="module")
def text(make_text: Any) -> TextFormat:
    made: TextFormat = make_text()
    return made


@pytest.fixture(scope="module")
def origin(make_resources: Any, tiny: Path, text: TextFormat, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """Where the data was prepared, with its raw files."""
    root = tmp_path_factory.mktemp("origin")
    shutil.copytree(tiny / "pairs", root / "raw/pairs")
    shutil.copytree(tiny / "definitions", root / "raw/words")
    made = Clone(root / "raw", make_resources(root))
    export(prepare(made.mixture(), text, made.resources), made.folder())
    return made


@pytest.fixture
def clone(origin: Clone, make_resources: Any, tmp_path: Path) -> Clone:
    """A clone with the prepared data alone, and an empty store."""
    made = Clone(tmp_path / "raw", make_resources(tmp_path))
    shutil.copytree(origin.folder(), made.folder())
    return made


def prepared_here(clone: Clone, text: TextFormat, **more: Any) -> Dataset | None:
    return prepared(clone.mixture(**more), text, clone.resources)


def test_pulled_data_is_shown_and_trained_on_without_raw_files(
    origin: Clone, clone: Clone, text: TextFormat, make_stage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    was = prepare(origin.mixture(), text, origin.resources)
    with caplog.at_level(logging.WARNING):
        pulled = prepared_here(clone, text)
    assert pulled is not None
    assert (pulled.uri, pulled.digest) == (str(clone.folder()), was.digest)
    assert f"raw files of source 'pairs' are not here (no records.jsonl in '{clone.raw}/pairs'" in caplog.text
    assert f"{clone.folder()} is used as it was prepared" in caplog.text
    assert not Path(clone.resources.storage.store).exists(), "a look writes nothing"
    page = show(pulled, tokenizer_of(text, cache=tmp_path), tmp_path / "page.html", per_source=2)
    assert page.read_text().count("<figure") >= 2
    kept = prepare(clone.mixture(), text, clone.resources)
    verify(kept)
    assert kept == prepare(clone.mixture(), text, clone.resources)
    assert (kept.digest, kept.parents) == (was.digest, was.parents)
    assert Path(kept.uri).is_relative_to(clone.resources.storage.store)
    assert not list(Path(clone.resources.storage.store).glob("shard/*")), "nothing was prepared"
    stage = make_stage(clone.mixture(), global_batch_size=4)
    rows = RowLoader(opened(kept).file, digest=kept.digest, stage=stage, cache=tmp_path / "plans")
    rows.batch(0)
    shutil.rmtree(clone.folder())  # as `dvc repro` and `dvc checkout` do while a stage trains
    assert len({key for step in range(8) for row in rows.batch(step)[0] for key in row.keys}) > 8
    assert list(samples_of(kept, index_of(kept).to_pylist()))


def test_raw_files_that_are_here_in_part_have_to_be_those_that_it_was_made_of(
    origin: Clone, clone: Clone, text: TextFormat
) -> None:
    shutil.copytree(origin.raw / "words", clone.raw / "words")
    assert prepared_here(clone, text) is not None
    records = clone.raw / "words/records.jsonl"
    records.write_text("".join(records.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=rf"'pairs' are not here .*{clone.folder()} was prepared of other raw data; "):
        prepared_here(clone, text)


def test_records_without_any_of_their_images_count_as_not_here(origin: Clone, clone: Clone, text: TextFormat) -> None:
    """As where records are in git and images in DVC. Without prepared data, `prepare` says how many are missing."""
    shutil.copytree(origin.raw, clone.raw)
    for image in (clone.raw / "pairs").glob("*.png"):
        image.unlink()
    made = prepare(clone.mixture(), text, clone.resources)
    assert made.digest == read_manifest(str(origin.folder()))["digest"]
    shutil.rmtree(clone.folder())
    shutil.rmtree(clone.resources.storage.store)
    with pytest.raises(ValueError, match=r"48 of 48 records of source 'pairs' are bad"):
        prepare(clone.mixture(), text, clone.resources)


def test_pulled_data_of_another_question_is_refused_with_the_difference(
    clone: Clone, text: TextFormat, make_text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = rf"'pairs' are not here .*'words' are not here .*{clone.folder()} "
    with pytest.raises(ValueError, match=told + "was prepared with other settings of the mixture; correct the path"):
        prepared_here(clone, text, max_bad_share=0.5)
    other = make_text(max_tokens=64)
    with pytest.raises(ValueError, match=told + "was prepared for another text format or tokenizer;"):
        prepare(clone.mixture(), other, clone.resources)
    with monkeypatch.context() as patched:
        patched.setattr("vila_ops.data.preprocess.prepare.REVISION", 10**6)
        with pytest.raises(ValueError, match=told + "was prepared by another version of vila-ops;"):
            prepared_here(clone, text)
    shutil.rmtree(clone.folder())
    with pytest.raises(ValueError, match=told + r"holds no dataset; correct the path, or bring .*`dvc pull`"):
        prepared_here(clone, text)
    assert not Path(clone.resources.storage.store).exists()


def test_two_datasets_of_one_question_that_differ_are_refused(
    origin: Clone, clone: Clone, text: TextFormat, tmp_path: Path
) -> None:
    """As where a colleague's libraries encode images otherwise: one of the two has to go."""
    other = prepare(origin.mixture(), text, origin.resources)
    manifest = read_manifest(other.uri)
    at = Address(*manifest["address"].split("/"), manifest["recipe"], tuple(manifest["parents"]))
    attempt = begin(at, store=clone.resources.storage.store)
    shutil.copytree(content(other), attempt, dirs_exist_ok=True)
    (attempt / "summary.json").write_text("{}")
    facts = {"num_samples": other.num_samples, "num_tokens": other.num_tokens}
    sealed = seal(Dataset, at, attempt, facts=facts, execution={})
    with pytest.raises(ValueError, match=rf"{clone.folder()} and {sealed.uri} .* differ .* move the one away"):
        prepare(clone.mixture(), text, clone.resources)
    shutil.move(sealed.uri, tmp_path / "away")
    assert prepare(clone.mixture(), text, clone.resources).digest == other.digest


def test_a_folder_of_images_that_is_not_here_is_told_where_other_files_are(tmp_path: Path) -> None:
    """LLaVA's captions come with a table of URLs; that table is no image."""
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "1", "image": "a.jpg", "conversations": []}]))
    (tmp_path / "metadata.json").write_text("[]")
    source = {"kind": "llava_cc3m", "path": str(tmp_path), "images": str(tmp_path / "images"), "licence": "MIT"}
    chosen = Mixture.model_validate({"name": "own", "sources": {"llava": source}})
    raw = raw_digests(chosen, cache=tmp_path / "cache")
    assert raw.missing == {"llava": f"no folder {tmp_path / 'images'}"}
    assert raw.here.keys() == {"llava"}
    (tmp_path / "images").mkdir()
    assert raw_digests(chosen, cache=tmp_path / "cache").missing == {}
