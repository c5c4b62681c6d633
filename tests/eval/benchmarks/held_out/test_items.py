"""What a suite asks about is held out, shuffled and drawn from other held-out objects only."""

from pathlib import Path

import pytest

from vila_ops.artifacts.kinds import Dataset
from vila_ops.config import Run, Suite, load
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.shards import index_of
from vila_ops.eval.benchmarks.held_out.items import Items, read_items

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("items")
    where = (f"resources.storage.store={folder}/store", f"resources.storage.cache={folder}/cache")
    return load(ROOT / "configs/recipes/tiny.yaml", resources=ROOT / "configs/resources/inline.yaml", overrides=where)


@pytest.fixture(scope="module")
def dataset(run: Run) -> Dataset:
    suite = run.recipe.final_suite
    return prepare(suite.mixture, run.recipe.text(max_tokens=suite.max_tokens), run.resources)


@pytest.fixture(scope="module")
def items(run: Run, dataset: Dataset) -> Items:
    return read_items(dataset, run.recipe.final_suite)


def test_objects_and_distractors_are_of_the_suites_side_only(run: Run, dataset: Dataset, items: Items) -> None:
    index = index_of(dataset).to_pylist()
    held_out = {row["object"] for row in index if row["split"] == "test"}
    trained = {row["object"] for row in index if row["split"] == "train"}
    objects = [image.object for image in items.images]
    assert len(set(objects)) == len(objects) == 12
    assert set(objects) <= held_out
    assert not held_out & trained
    captions = {image.caption for image in items.images}
    shown = {image.image: image.object for image in items.images}
    for image in items.images:
        assert set(image.distractors) <= captions - {image.caption}
        assert len(set(image.distractors)) == 3
        assert image.absent in set(objects) - {image.object, shown[image.other_image]}


def test_the_control_shows_every_image_once_and_never_the_own_one(items: Items) -> None:
    own = [image.image for image in items.images]
    other = [image.other_image for image in items.images]
    assert sorted(own) == sorted(other)
    assert all(one != two for one, two in zip(own, other, strict=True))


def test_items_depend_on_data_and_seed_alone(run: Run, dataset: Dataset, items: Items) -> None:
    assert read_items(dataset, run.recipe.final_suite) == items
    reseeded = Suite.model_validate({**run.recipe.final_suite.model_dump(), "seed": 1})
    assert [p.other_image for p in read_items(dataset, reseeded).images] != [p.other_image for p in items.images]


def test_words_have_three_other_meanings(items: Items) -> None:
    assert len(items.words) == 12
    for word in items.words:
        assert len({word.meaning, *word.distractors}) == 4
