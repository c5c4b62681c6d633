"""Suites on mixtures of any kind: what they measure is what stock transformers computes, and what they lack is told."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vila_ops.artifacts.kinds import Dataset, Pretrained
from vila_ops.artifacts.store import content
from vila_ops.config import Run, Suite
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.shards import Sample, index_of, named, samples_of
from vila_ops.eval.evaluate import evaluate
from vila_ops.eval.needs import check_held_out
from vila_ops.eval.opened import opened
from vila_ops.eval.report import Report, read_report
from vila_ops.pipeline.stages import evaluate_stage

ROOT = Path(__file__).parents[2]
BENCHMARKS = {"loss": {"kind": "held_out_loss"}, "answers": {"kind": "answer_match", "max_new_tokens": 4}}


@pytest.fixture(scope="module")
def data(run: Run) -> Dataset:
    """Questions about images and text-only instructions: what the last stage trains on."""
    return prepare(run.recipe.stages["sft"].mixture, run.recipe.text("sft"), run.resources)


def suite_of(run: Run, benchmarks: dict[str, Any], stage: str = "sft", **changes: Any) -> Suite:
    mixture = run.recipe.stages[stage].mixture.model_dump()
    settings = {"name": "own", "split": "test", "max_objects": 6, "bootstrap_resamples": 200}
    return Suite.model_validate({**settings, "mixture": mixture, "benchmarks": benchmarks, **changes})


@pytest.fixture(scope="module")
def report(run: Run, model: Pretrained, data: Dataset) -> Report:
    return read_report(evaluate(suite_of(run, BENCHMARKS), model, data, run.resources))


@pytest.fixture(scope="module")
def measured(report: Report, data: Dataset) -> list[Sample]:
    """The samples that were measured."""
    items = {answer.item for answer in report.answers}
    return list(samples_of(data, [row for row in named(index_of(data).to_pylist()) if row["name"] in items]))


def values(report: Report) -> dict[tuple[str, str], float]:
    return {(metric.name, metric.role): metric.value for metric in report.metrics}


def stock_nats(model: Pretrained, samples: list[Sample]) -> tuple[float, int]:
    """Negative log-likelihood of all target tokens and their number, by stock transformers, sample by sample."""
    stock = LlavaForConditionalGeneration.from_pretrained(content(model)).eval()
    processor = AutoProcessor.from_pretrained(content(model), backend="pil").image_processor
    nats, tokens = 0.0, 0
    for sample in samples:
        images = [Image.open(io.BytesIO(data)) for data in sample.images]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"] if images else None
        ids = torch.tensor([sample.input_ids])
        with torch.no_grad():
            logits = stock(input_ids=ids, pixel_values=pixels).logits[0, :-1].double()
        each = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        target = torch.tensor(sample.is_target[1:])
        nats, tokens = nats + float(each[target].sum()), tokens + int(target.sum())
    return nats, tokens


@pytest.mark.slow
def test_the_loss_of_conversations_is_that_of_stock_transformers(
    report: Report, measured: list[Sample], model: Pretrained
) -> None:
    assert len({sample.object for sample in measured}) == 6
    assert all(sample.images for sample in measured)
    nats, tokens = stock_nats(model, measured)
    assert values(report)["loss", "model"] == pytest.approx(nats / tokens, abs=1e-4)


def test_the_control_shows_each_question_with_the_image_of_another_object(
    report: Report, measured: list[Sample], model: Pretrained
) -> None:
    """By hand: objects in the order of the items, each with the image of the next one."""
    order = list(dict.fromkeys(answer.object for answer in report.answers))
    image = {sample.object: sample.images for sample in measured}
    after = dict(zip(order, [*order[1:], order[0]], strict=True))
    shuffled = [Sample(**{**vars(sample), "images": image[after[sample.object]]}) for sample in measured]
    nats, tokens = stock_nats(model, shuffled)
    assert values(report)["loss", "control"] == pytest.approx(nats / tokens, abs=1e-4)
    gap = values(report)["loss", "control"] - values(report)["loss", "model"]
    assert values(report)["loss", "gap"] == pytest.approx(gap, abs=1e-9)


def test_answers_are_compared_with_those_of_the_raw_records(report: Report) -> None:
    raw = (ROOT / "tests/tiny/pairs/records.jsonl").read_text().splitlines()
    parts = [part for line in raw for turn in json.loads(line)["turns"] for part in turn["parts"]]
    captions = {part["text"] for part in parts if "text" in part}
    truths = [answer.truth for answer in report.answers]
    assert set(truths) <= captions | {"Yes.", "No."}
    assert len(truths) == 12  # a description and a yes-or-no question for each of 6 objects
    share = max(truths.count(one) for one in truths) / len(truths)
    assert values(report)["answers", "chance"] == pytest.approx(share)
    equal = [answer.answer.casefold().strip(" .") == answer.truth.casefold().strip(" .") for answer in report.answers]
    assert values(report)["answers", "model"] == pytest.approx(sum(equal) / len(equal))


@pytest.mark.slow
def test_a_sealed_report_is_opened_with_the_scores_of_its_numbers(run: Run, model: Pretrained, data: Dataset) -> None:
    report = evaluate(suite_of(run, BENCHMARKS), model, data, run.resources)
    told = values(read_report(report))
    scores = {name: one.scores()[name].values for name, one in opened(report).items()}
    nats, tokens = scores["loss"].sum(axis=0)
    assert nats / tokens == pytest.approx(told["loss", "model"])
    assert scores["answers"].mean() == pytest.approx(told["answers", "model"])


def test_without_a_control_text_counts_too(run: Run, model: Pretrained, data: Dataset) -> None:
    suite = suite_of(run, {"loss": {"kind": "held_out_loss", "control": "none"}}, max_objects=400)
    report = read_report(evaluate(suite, model, data, run.resources))
    rows = [row for row in index_of(data).to_pylist() if row["split"] == "test"]
    assert {row["num_images"] for row in rows} == {0, 1}
    nats, tokens = stock_nats(model, list(samples_of(data, rows)))
    (metric,) = report.metrics
    assert (metric.role, metric.n) == ("model", len(rows))
    assert metric.value == pytest.approx(nats / tokens, abs=1e-4)


@pytest.mark.slow
def test_documents_are_measured_text_after_text_with_the_images_between(run: Run, model: Pretrained) -> None:
    data = prepare(run.recipe.stages["pretrain"].mixture, run.recipe.text("pretrain"), run.resources)
    suite = suite_of(run, {"loss": {"kind": "held_out_loss"}}, stage="pretrain", max_objects=400)
    report = read_report(evaluate(suite, model, data, run.resources))
    rows = [row for row in index_of(data).to_pylist() if row["split"] == "test" and row["num_images"]]
    assert max(row["num_images"] for row in rows) > 1
    nats, tokens = stock_nats(model, list(samples_of(data, rows)))
    assert values(report)["loss", "model"] == pytest.approx(nats / tokens, abs=1e-4)


def test_samples_of_another_tokenizer_are_refused(run: Run, model: Pretrained, data: Dataset, tmp_path: Path) -> None:
    """One with as many tokens and the same image token, as Mistral's and Llama's are: its ids mean other texts."""
    from vila_ops.data.preprocess.shard_writer import tokenizer_of
    from vila_ops.eval.benchmarks.held_out import held_out_loss
    from vila_ops.eval.benchmarks.held_out.items import EvalInputs, HeldOut

    suite = suite_of(run, BENCHMARKS)
    tokenizer = tokenizer_of(run.recipe.text("sft"), cache=tmp_path)

    class Shifted:
        image_id, image_tokens = tokenizer.image_id, tokenizer.image_tokens

        def decode(self, ids: list[int]) -> str:
            return tokenizer.decode([(id + 7) % 250 for id in ids])

    inputs, config = EvalInputs.of(suite, data), suite.benchmarks["loss"]
    assert held_out_loss.read(HeldOut(inputs, lambda: tokenizer), config)
    with pytest.raises(ValueError, match="tokenised for another model"):
        held_out_loss.read(HeldOut(inputs, Shifted), config)  # type: ignore[arg-type]


KINDS = {
    "words": (
        {"words": {"kind": "text_loss"}},
        "words reads sources with render definition; mixture 'tiny_align' has pairs",
    ),
    "answers": ({"a": {"kind": "answer_match"}}, "a reads sources with render conversation or questions"),
}


@pytest.mark.parametrize("of", KINDS)
def test_a_mixture_without_what_a_benchmark_reads_is_refused_at_load(of: str, run: Run) -> None:
    benchmarks, message = KINDS[of]
    with pytest.raises(ValueError, match="cannot measure") as raised:
        suite_of(run, benchmarks, stage="align")
    assert message in str(raised.value)


def test_questions_about_objects_need_names_of_objects(run: Run) -> None:
    table = {"kind": "table", "path": "a.csv", "images": "images", "licence": "CC0-1.0"}
    with pytest.raises(ValueError, match="pope asks for objects by name"):
        suite_of(run, {"pope": {"kind": "held_out_pope"}}, mixture={"name": "mine", "sources": {"mine": table}})


def test_too_few_held_out_objects_are_told_before_anything_is_trained(run: Run, tmp_path: Path) -> None:
    """The tiny pairs are 48 objects; a split of 1 % leaves none or one of them."""
    few = {"salt": "tiny", "validation": 0.001, "test": 0.001}
    recipe = run.recipe.model_dump(mode="json")
    for holder in (recipe["final_suite"], recipe["stage_suite"], *recipe["stages"].values()):
        holder["mixture"]["split"] = few
    resources = run.resources.with_changes({"storage.store": str(tmp_path / "store")})
    smaller = Run.model_validate({"recipe": recipe, "resources": resources})
    with pytest.raises(ValueError, match="caption_loss needs 2 objects with images and has 0") as raised:
        evaluate_stage(smaller, "sft", smaller.recipe.stage_suite)
    assert "raise split.validation of the mixtures of all stages and suites alike" in str(raised.value)
    assert not (tmp_path / "store/checkpoint").exists()


def test_text_alone_is_told_how_it_can_be_measured(run: Run, data: Dataset) -> None:
    mixture = run.recipe.stages["sft"].mixture.model_dump()
    del mixture["sources"]["pairs"]
    mixture["sources"]["instructions"]["render"] = "conversation"  # as chat messages without images are
    suite = suite_of(run, {"loss": {"kind": "held_out_loss"}}, mixture=mixture)
    with pytest.raises(ValueError, match="control: none reads records without images"):
        check_held_out(suite, data)
