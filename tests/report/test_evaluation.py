"""The page of an evaluation, of the committed samples and given answers."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.eval.benchmarks.sample import SAMPLES, SETTINGS, config_of, rows_of, sample_items
from tests.eval.test_item_tables import no_image, no_tokenizer
from tests.report.parsed import HOSTILE, Page, check_accessible, check_loads_nothing
from vila_ops.config.benchmarks import Mmmu, Pope
from vila_ops.eval.benchmark import Item, Unreadable, benchmark_of
from vila_ops.eval.report import Report, ReportMetric, ResultReference
from vila_ops.eval.scoring import metric_values, score
from vila_ops.eval.shown import item_scores, shown_rows
from vila_ops.report import gallery as galleries
from vila_ops.report.baselines import published
from vila_ops.report.evaluation import BenchmarkPart, Cost, Evaluation, Origin, render
from vila_ops.report.gallery import IMAGE_BYTES, WORST, gallery
from vila_ops.report.scores import score_rows

POPE = config_of(Pope, version=None)
ITEMS = sample_items(POPE)


def part_of(config: Any, items: list[Item], answer: Callable[[Item, int], str | None]) -> BenchmarkPart:
    scored = score(items, rows_of(items, config, answer), config, SETTINGS)
    requests = list(benchmark_of(config.kind).requests(items, config, no_tokenizer))
    scores = item_scores(metric_values(items, scored.rows, config))
    return BenchmarkPart(
        name=config.kind,
        settings=config.model_dump(mode="json"),
        num_items=scored.measurement.num_items,
        num_groups=scored.measurement.num_clusters,
        failed=scored.measurement.failed,
        metrics=[ReportMetric(**dict(one), measure=one.name) for one in scored.measurement.metrics],
        slices=scored.measurement.slices,
        gallery=gallery(shown_rows(requests, items, scored.rows, scores, no_tokenizer), no_image, IMAGE_BYTES),
        cost=Cost(requests=len(items), prompt_tokens=12_345, answer_tokens=96, seconds=75.0),
    )


def evaluation_of(*parts: BenchmarkPart, **changes: Any) -> Evaluation:
    references = {
        part.name: ResultReference(
            address=f"score/{part.name}", digest="d" * 64, num_items=part.num_items, num_clusters=part.num_groups
        )
        for part in parts
    }
    metrics = tuple(metric for part in parts for metric in part.metrics)
    report = Report(suite="sample", model="a" * 64, benchmarks=references, metrics=metrics, layers=(), answers=())
    return replace(
        Evaluation(
            report=report,
            model="sft",
            sealed="2026-11-28T14:03:21+00:00",
            engine="torch on cpu",
            parts=parts,
            origins=(Origin("report", "b" * 64, "report/0123", "suite sample"),),
        ),
        **changes,
    )


def yes_unless_failed(item: Item, _: int) -> str | None:
    """Yes to all, but the first two questions time out."""
    return None if item in ITEMS[:2] else "Yes"


def test_every_number_of_the_report_is_on_the_page() -> None:
    part = part_of(POPE, ITEMS, yes_unless_failed)
    text = Page(render(evaluation_of(part))).text
    for metric in part.metrics:
        assert f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]" in text
        assert metric.name.removesuffix("_official").removesuffix("_corrected") in text
    for expected in ("48 items in 4 groups", "2 timeout", "12,345", "1 min 15 s", "b" * 64, "report/0123",
                     "torch on cpu", "28 November 2026, 14:03 UTC"):  # fmt: skip
        assert expected in text


def test_the_accuracy_of_yes_is_the_share_of_yes_in_the_official_file() -> None:
    lines = (SAMPLES / "pope/coco_pope_random.json").read_text().splitlines()
    labels = [json.loads(line)["label"] for line in lines]
    share = labels.count("yes") / len(labels)
    (row,) = [
        row
        for row in Page(render(evaluation_of(part_of(POPE, ITEMS, lambda *_: "Yes")))).rows
        if row[0] == "pope_random_accuracy"
    ]
    assert row[2].startswith(f"{share:.3f} [")
    assert row[3:5] == ["the same", str(len(labels))]


def test_columns_that_differ_are_side_by_side() -> None:
    part = part_of(POPE, ITEMS, lambda *_: "")  # the official script reads an empty answer as yes
    rows = {row[0]: row for row in Page(render(evaluation_of(part))).rows}
    numbers = {metric.name: f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]" for metric in part.metrics}
    official, corrected = (numbers[f"pope_random_recall_{column}"] for column in ("official", "corrected"))
    assert official != corrected
    assert rows["pope_random_recall"][2:4] == [official, corrected]


def test_published_numbers_are_those_of_the_papers() -> None:
    """Table 5 of arXiv:2312.07533v4 for 7B, 13B, 13B with ShareGPT4V, and LLaVA-1.5 7B and 13B; typed from there."""
    table = {
        ("gqa_official", "split", "testdev_balanced", 12_578): (0.623, 0.633, 0.632, 0.620, 0.633),
        ("scienceqa_image_official", "subset", "image", 2_017): (0.682, 0.737, 0.731, 0.668, 0.716),
        ("textvqa_ocr_official", "split", "val", 5_000): (0.644, 0.666, 0.653, 0.582, 0.613),
        ("pope_f1_official", "version", "e3e3926", 5_043): (0.855, 0.842, 0.848, 0.859, 0.859),
        ("mme_perception_official", "kind", "mme", 2_374): (1533.0, 1570.1, 1556.5, 1510.7, 1531.3),
        ("mmbench_dev_20230712_official", "kind", "mmbench", 4_329): (0.689, 0.703, 0.708, 0.643, 0.677),
        ("mmbench_cn_dev_20231003_official", "kind", "mmbench_cn", 4_329): (0.617, 0.643, 0.654, 0.583, 0.636),
        ("seed_bench_total_official", "subset", "total", 19_242): (0.611, 0.628, 0.614, 0.586, 0.616),
    }
    for (measure, key, value, items), numbers in table.items():
        given = published(measure, {key: value}, items)
        assert [one.value for one in given] == pytest.approx(numbers)
        assert [one.model for one in given][::3] == ["VILA-7B", "LLaVA-1.5-7B"]
        assert "arXiv:2312.07533" in given[0].source
        assert "arXiv:2310.03744" in given[3].source


@pytest.mark.parametrize(
    ("measure", "settings", "items"),
    [
        ("textvqa_without_ocr_official", {"split": "val"}, 5_000),
        ("textvqa_ocr_official", {"split": "val"}, 4),
        ("seed_bench_image_official", {"subset": "image"}, 14_233),
        ("pope_f1_corrected", {"version": "e3e3926"}, 5_043),
        ("pope_f1_official", {"version": "109985c"}, 5_133),
        ("pope_f1_official", {"version": "e3e3926", "first": 5_043}, 5_043),
        ("pope_f1_official_answered", {"version": "e3e3926"}, 5_043),
        ("gqa_official", {"split": "val_balanced"}, 132_062),
        ("vqav2_official", {"split": "val2014"}, 214_354),
        ("scienceqa_official", {"subset": "all"}, 4_241),
        ("mmbench_dev_v11_official", {"version": "dev_v11"}, 4_876),
    ],
)
def test_a_published_number_stands_beside_no_other_variant(measure: str, settings: dict[str, Any], items: int) -> None:
    assert published(measure, settings, items) == ()


def test_published_numbers_are_beside_their_metric_with_their_source() -> None:
    part = part_of(POPE, ITEMS, yes_unless_failed)
    assert "VILA-7B" not in Page(render(evaluation_of(part))).text  # the sample is of no published version
    page = Page(render(evaluation_of(replace(part, settings={**part.settings, "version": "e3e3926"}))))
    (row,) = [row for row in page.rows if row[0] == "pope_f1"]
    for expected in ("VILA-7B 0.855 1", "VILA-13B 0.842 1", "LLaVA-1.5-7B 0.859 2"):
        assert expected in row[-1]
    assert [row[-1] for row in page.rows if row[0] == "pope_random_f1"] == ["–"]
    assert "arXiv:2312.07533v4" in page.text


def test_a_metric_without_columns_has_one_value() -> None:
    metric = ReportMetric(
        name="caption_loss", measure="caption_loss", role="model", value=3.25, low=3.0, high=3.5, n=9,
        lower_is_better=True, unit="nats per token",
    )  # fmt: skip
    gap = metric.model_validate({**metric.model_dump(), "role": "gap", "value": 0.125, "low": 0.0, "high": 0.25})
    first, second = score_rows([metric, gap], {}, 9)
    assert (first.metric, first.corrected, first.differs) == (metric, None, False)
    assert (second.kind, second.metric) == ("gap", gap)


@pytest.mark.parametrize("ending", ["", "_answered", "_4shot_nearest", "_2shot_text_only_answered"])
def test_the_columns_of_any_variant_share_a_row(ending: str) -> None:
    columns = [
        ReportMetric(
            name=f"vqa_{column}{ending}", measure=f"vqa_{column}{ending}", role="model", value=value, low=0.0, high=1.0,
            n=9, lower_is_better=False, unit="share",
        )
        for column, value in (("official", 0.25), ("corrected", 0.5))
    ]  # fmt: skip
    (row,) = score_rows(columns, {}, 9)
    assert (row.label, row.metric, row.corrected, row.differs) == (f"vqa{ending}", *columns, True)


def test_the_answers_begin_with_what_failed_and_what_was_wrong() -> None:
    part = part_of(POPE, ITEMS, yes_unless_failed)
    cards = part.gallery.cards
    assert [card.status for card in cards[:2]] == ["timeout", "timeout"]
    assert [card.answer for card in cards[:3]] == [None, None, "Yes"]
    assert [card.score for card in cards] == [0.0] * WORST + [1.0] * 3
    assert {card.reference for card in cards[:WORST][2:]} == {"No"}
    assert all(card.turns[-1][1][0].image.startswith("data:image/jpeg;base64,") for card in cards)
    text = Page(render(evaluation_of(part))).text
    assert "12 of 48" in text
    assert "none" in text


def test_all_images_and_demonstrations_of_a_question_are_shown_in_their_order() -> None:
    config = config_of(Mmmu)
    items = sample_items(config)
    rows = rows_of(items, config, lambda *_: "A")
    requests = list(benchmark_of(config.kind).requests(items, config, no_tokenizer))
    shown = shown_rows(requests, items, rows, {}, no_tokenizer)
    several = next(one for one in shown if sum(not isinstance(part, str) for part in one.question) > 1)
    demonstration = shown[0]
    few = replace(
        several,
        row=replace(several.row, shots=("train-7",)),
        turns=(("user", demonstration.question), ("assistant", ("B",)), *several.turns),
    )
    (card,) = gallery([few], no_image, IMAGE_BYTES).cards
    kinds = ["image" if piece.image else "text" for piece in card.turns[-1][1]]
    assert kinds == ["text" if isinstance(part, str) else "image" for part in several.question if part != "\n"]
    assert [role for role, _ in card.turns] == ["user", "assistant", "user"]
    part = replace(part_of(POPE, ITEMS, yes_unless_failed), gallery=galleries.Gallery([card], 1))
    text = Page(render(evaluation_of(part))).text
    assert "1 shots: train-7" in text


def test_an_image_that_is_missing_is_told() -> None:
    first = Item(**{**vars(ITEMS[0]), "parts": {**ITEMS[0].parts, "image": (Unreadable("a.jpg is missing"),)}})
    part = part_of(POPE, [first, *ITEMS[1:]], lambda item, _: None if item is first else "Yes")
    assert "Image: a.jpg is missing" in Page(render(evaluation_of(part))).text


def test_images_and_texts_are_bounded() -> None:
    requests = list(benchmark_of("pope").requests(ITEMS, POPE, no_tokenizer))
    rows = rows_of(ITEMS, POPE, lambda *_: "x" * 100_000)
    shown = shown_rows(requests, ITEMS, rows, {}, no_tokenizer)
    one = len(gallery(shown, no_image, IMAGE_BYTES).cards[0].turns[-1][1][0].image)
    cards = gallery(shown, no_image, one + 10).cards
    assert sum(len(piece.image) for card in cards for _, pieces in card.turns for piece in pieces) <= one + 10
    assert "the images that it may have" in cards[1].turns[-1][1][0].missing
    assert all(len(card.answer or "") <= galleries.MAX_TEXT + 2 for card in cards)


def test_the_page_loads_nothing_and_can_be_read_without_seeing_it() -> None:
    html = render(evaluation_of(part_of(POPE, ITEMS, yes_unless_failed)))
    check_loads_nothing(html)
    check_accessible(html)
    assert not [a for a in Page(html).all("a") if not (a["href"] or "").startswith("#")]


def test_what_a_model_or_a_file_says_is_only_text() -> None:
    part = part_of(POPE, ITEMS, lambda *_: HOSTILE)
    texts = [galleries.ShownPiece(text=HOSTILE), galleries.ShownPiece(missing=HOSTILE)]
    card = galleries.AnswerCard(
        item=HOSTILE, group=HOSTILE, status=HOSTILE, detail=HOSTILE, turns=[(HOSTILE, texts)], shots=(HOSTILE,),
        reference=HOSTILE, answer=None, score=None,
    )  # fmt: skip
    part = replace(
        part, name=HOSTILE, failed={HOSTILE: 1}, gallery=galleries.Gallery([card, *part.gallery.cards[1:]], 2)
    )
    html = render(evaluation_of(part, model=HOSTILE, engine=HOSTILE, origins=(Origin(*[HOSTILE] * 4),)))
    check_loads_nothing(html)
    page = Page(html)
    assert HOSTILE in page.text
    assert len(page.all("img")) == len(part.gallery.cards) - 1


def test_the_same_report_gives_the_same_bytes() -> None:
    first, second = (render(evaluation_of(part_of(POPE, ITEMS, yes_unless_failed))) for _ in range(2))
    assert first == second
