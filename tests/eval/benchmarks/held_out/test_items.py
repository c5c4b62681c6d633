"""Items are of held-out objects, and are shuffled among and compared with other held-out objects only."""

from typing import Any

import pytest

from vila_ops.artifacts.kinds import Dataset
from vila_ops.config import Run, Suite
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.shards import index_of, named
from vila_ops.eval.benchmarks.held_out.items import EvalInputs, ImageItem, image_items, sample_items, word_items


@pytest.fixture(scope="module")
def dataset(run: Run) -> Dataset:
    suite = run.recipe.final_suite
    return prepare(suite.mixture, run.recipe.text(max_tokens=suite.max_tokens), run.resources)


@pytest.fixture(scope="module")
def inputs(run: Run, dataset: Dataset) -> EvalInputs:
    return EvalInputs.of(run.recipe.final_suite, dataset)


@pytest.fixture(scope="module")
def images(inputs: EvalInputs) -> tuple[ImageItem, ...]:
    return image_items(inputs, "new")


def test_objects_and_distractors_are_of_the_suites_split_only(dataset: Dataset, images: tuple[ImageItem, ...]) -> None:
    index = index_of(dataset).to_pylist()
    held_out = {row["object"] for row in index if row["split"] == "test"}
    trained = {row["object"] for row in index if row["split"] == "train"}
    objects = [item.group for item in images]
    assert len(set(objects)) == len(objects) == 12
    assert set(objects) <= held_out
    assert not held_out & trained
    captions = {item.caption for item in images}
    shown = {item.image: item.group for item in images}
    for item in images:
        assert set(item.distractors) <= captions - {item.caption}
        assert len(set(item.distractors)) == 3
        assert item.absent in set(objects) - {item.group, shown[item.shuffled_image]}


def test_the_control_shows_every_image_once_and_never_the_matched_one(images: tuple[ImageItem, ...]) -> None:
    matched = [item.image for item in images]
    shuffled = [item.shuffled_image for item in images]
    assert sorted(matched) == sorted(shuffled)
    assert all(one != two for one, two in zip(matched, shuffled, strict=True))


def test_items_depend_on_data_and_seed_alone(run: Run, dataset: Dataset, images: tuple[ImageItem, ...]) -> None:
    image_items.cache_clear()
    assert image_items(EvalInputs.of(run.recipe.final_suite, dataset), "new") == images
    reseeded = EvalInputs.of(run.recipe.final_suite.with_changes({"seed": 1}), dataset)
    assert [item.shuffled_image for item in image_items(reseeded, "new")] != [item.shuffled_image for item in images]


def test_words_have_three_other_meanings(inputs: EvalInputs) -> None:
    words = word_items(inputs)
    assert len(words) == 12
    for word in words:
        assert len({word.meaning, *word.distractors}) == 4


def test_models_of_other_image_sizes_and_templates_have_the_same_items(run: Run, inputs: EvalInputs) -> None:
    suite = run.recipe.final_suite
    model = run.recipe.model.with_changes({"image_size": 56, "chat_template": "plain"})
    other = EvalInputs.of(suite, prepare(suite.mixture, model.text(max_tokens=suite.max_tokens), run.resources))
    assert other.data.digest != inputs.data.digest
    for one, two in zip(image_items(inputs, "new"), image_items(other, "new"), strict=True):
        assert (one.id, one.group, one.references, one.absent) == (two.id, two.group, two.references, two.absent)
        assert one.image != two.image
    assert word_items(inputs) == word_items(other)
    samples = [
        [(item.id, item.references) for item in sample_items(of, None, with_images=False)] for of in (inputs, other)
    ]
    assert samples[0] == samples[1]


def with_kept_out(suite: Suite, **changes: Any) -> Suite:
    """A suite with a second source of the same objects, as if it were of another style."""
    tree = suite.model_dump(mode="json")
    tree["mixture"]["name"] = "two_styles"
    tree["mixture"]["sources"]["drawn"] = tree["mixture"]["sources"]["pairs"]
    tree["benchmarks"]["known_choice"] = {"kind": "multiple_choice", "objects": "known"}
    return Suite.model_validate({**tree, "kept_out": ["drawn"], **changes})


def test_known_objects_are_named_in_training_and_shown_in_the_style_that_is_kept_out(
    run: Run, images: tuple[ImageItem, ...]
) -> None:
    suite = with_kept_out(run.recipe.final_suite)
    data = prepare(suite.mixture, run.recipe.text(max_tokens=suite.max_tokens), run.resources)
    inputs = EvalInputs.of(suite, data)
    known = image_items(inputs, "known")
    trained = {row["object"] for row in index_of(data).to_pylist() if row["split"] == "train"}
    drawn = {row["object"] for row in index_of(data).to_pylist() if row["source"] == "drawn"}
    objects = {item.group for item in known}
    assert len(objects) == len(known) >= 4
    assert objects <= trained & drawn
    assert {caption for item in known for caption in item.distractors} <= {item.caption for item in known}
    on_validation = EvalInputs.of(with_kept_out(run.recipe.final_suite, split="validation"), data)
    assert not objects & {item.group for item in image_items(on_validation, "known")}
    assert [(one.group, one.image) for one in image_items(inputs, "new")] == [(one.group, one.image) for one in images]
    samples = {item.id for item in sample_items(inputs, None, with_images=True)}
    kept_out = {row["name"] for row in named(index_of(data).to_pylist()) if row["source"] == "drawn"}
    assert samples
    assert kept_out
    assert not samples & kept_out


def test_kept_out_sources_and_benchmarks_of_known_objects_need_each_other(run: Run) -> None:
    suite = run.recipe.final_suite
    with pytest.raises(ValueError, match=r"benchmarks of known objects \(\['known_choice'\]\) and kept_out sources"):
        with_kept_out(suite, kept_out=[])
    with pytest.raises(ValueError, match=r"kept_out names \['definitions'\], which are no sources"):
        with_kept_out(suite, kept_out=["definitions"])
    tree = run.recipe.model_dump(mode="json")
    for name in ("final_suite", "stage_suite"):
        tree[name] = with_kept_out(run.recipe.final_suite, name=name).model_dump(mode="json")
    with pytest.raises(ValueError, match=r"trains on \['pairs'\], whose drawing style suite 'final_suite' keeps out"):
        type(run.recipe).model_validate(tree)
