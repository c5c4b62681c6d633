"""A change of resolution between two stages, through the tasks: 28 pixels are 4 tokens, 56 are 16."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vila_ops.artifacts.kinds import Checkpoint, Dataset
from vila_ops.artifacts.store import content, read_manifest
from vila_ops.config import NO_CONTEXT, Run, load
from vila_ops.data.shards import read_index
from vila_ops.eval.compare_reports import compare_reports
from vila_ops.eval.report import read_report
from vila_ops.model.towers import POSITIONS, resize_positions
from vila_ops.pipeline.promotion import champion_report
from vila_ops.pipeline.reports import last_report
from vila_ops.pipeline.run import Outcome, run_pipeline
from vila_ops.pipeline.stages import TASKS, evaluate_stage, mixture_named, prepare_named

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The tiny recipe: align at 28 pixels, pretrain of the projector alone at 56."""
    folder = tmp_path_factory.mktemp("sizes")
    short = [f"stages.{name}.{key}" for name in ("align", "pretrain", "sft") for key in ("num_steps=2", "save_every=2")]
    settings = [
        *short, "stages.pretrain.image_size=56", "stages.pretrain.trainable=[projector]",
        *(f"resources.storage.{name}={folder / name}" for name in ("store", "data", "cache")),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield load(
            ROOT / "configs/recipes/tiny.yaml",
            resources=ROOT / "configs/resources/inline.yaml",
            overrides=tuple(settings),
        )


@pytest.fixture(scope="module")
def outcome(run: Run) -> Outcome:
    return run_pipeline(run)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return load_file(content(model) / "model.safetensors")


def tokens_of(data: Dataset) -> dict[str, int]:
    """Length of every sample of the pairs, by the record's id."""
    rows = read_index(content(data)).to_pylist()
    return {row["id"]: row["num_tokens"] for row in rows if row["source"] == "pairs"}


@pytest.mark.slow
def test_the_second_stage_sees_more_of_a_image_and_keeps_every_weight_it_does_not_train(outcome: Outcome) -> None:
    first, second = outcome.models["align"], outcome.models["pretrain"]
    before, after = weights(first), weights(second)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.endswith(POSITIONS):
            assert torch.equal(after[name], resize_positions(tensor, 4, class_tokens=1))
        else:
            assert torch.equal(after[name], tensor) != ("multi_modal_projector" in name), name
    assert {read_manifest(m.uri)["recipe"]["stage"]["image_size"] for m in (first, second)} == {None, 56}
    curve = json.loads((content(second) / "curve.json").read_text())
    assert all(0 < float.fromhex(row["loss"]) < 20 for row in curve[1:])


@pytest.mark.slow
def test_the_second_checkpoint_is_a_stock_folder_of_sixteen_tokens_a_image(outcome: Outcome) -> None:
    folder = content(outcome.models["pretrain"])
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    image = Pillow.new("RGB", (60, 40), "red")
    inputs = AutoProcessor.from_pretrained(folder)(text="<image> a dog", images=[image], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_every_data_set_is_prepared_at_the_size_of_the_model_that_reads_it(run: Run, outcome: Outcome) -> None:
    sizes = {name: mixture_named(run.recipe, name)[1] for name in outcome.datasets}
    assert {name: (text.image_size, text.image_tokens) for name, text in sizes.items()} == {
        "tiny_align": (28, 4), "tiny_pretrain": (56, 16), "tiny_sft": (56, 16), "tiny_held_out": (56, 16)
    }  # fmt: skip
    assert {name: prepare_named(run, name) for name in sizes} == outcome.datasets
    small, large = (tokens_of(outcome.datasets[name]) for name in ("tiny_align", "tiny_pretrain"))
    assert len(small) > 20
    assert {large[key] - small[key] for key in small} == {12}, "the same captions, with 16 tokens an image for 4"


def test_the_held_out_data_are_prepared_once_for_each_size_and_every_model_is_measured_at_its_own(
    run: Run, outcome: Outcome
) -> None:
    assert len(list(Path(run.resources.storage.store).glob("dataset/*/manifest.json"))) == 3 + 2
    data = {name: report.parents[1] for name, report in outcome.stage_reports.items()}
    assert data["base"] == data["align"] != data["pretrain"] == data["sft"] == outcome.report.parents[1]
    for report in outcome.stage_reports.values():
        scored = {m.name: m.value for m in read_report(report).metrics if m.role == "model"}
        assert 0 < scored["caption_loss"] < 20
    assert evaluate_stage(run, "align", run.recipe.stage_suite) == outcome.stage_reports["align"], (
        "a command asks as the pipeline does"
    )
    assert evaluate_stage(run, "sft", run.recipe.final_suite) == outcome.report


def test_the_report_of_a_recipe_is_that_of_its_last_model_on_the_final_suite(run: Run, outcome: Outcome) -> None:
    assert last_report(run, "tiny.yaml") == outcome.report


def test_a_champion_of_another_image_size_is_compared_on_the_same_items_at_its_own_size(
    run: Run, outcome: Outcome
) -> None:
    small = outcome.models["align"]
    assert isinstance(small, Checkpoint)
    champion = champion_report(run, small, tasks=TASKS, context=NO_CONTEXT)
    assert champion.parents[1] == outcome.stage_reports["align"].parents[1] != outcome.report.parents[1]
    compared = compare_reports({"champion": champion, "model": outcome.report}).comparison
    assert compared.left_out == ()
    values = {(m.name, m.role): m.value for m in read_report(champion).metrics}
    for one in compared.metrics:
        assert one.overall.baseline == pytest.approx(values[one.metric, "model"])
