import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.report.parsed import HOSTILE, Page, check_accessible, check_loads_nothing
from vila_ops.report.drawing import axis
from vila_ops.report.page import (
    loss_chart,
    metric_cards,
    render,
    smoothed,
    thin,
    verdict,
    widths,
)
from vila_ops.report.panels import forest
from vila_ops.report.words import duration, moment, number, same_words, short, where

MLFLOW = "http://127.0.0.1:5000"
PAIRS = Path(__file__).parents[1] / "tiny" / "pairs"


def images() -> list[tuple[str, str]]:
    """The committed images as data URLs, with their captions."""
    pairs = []
    for line in (PAIRS / "records.jsonl").read_text().splitlines():
        image, text = json.loads(line)["turns"][0]["parts"]
        data = base64.b64encode((PAIRS / image["image"]).read_bytes()).decode()
        pairs.append((f"data:image/png;base64,{data}", text["text"]))
    return pairs


def digest(number: int) -> str:
    return f"{number:064x}"[::-1]


def metric(model: str, role: str, value: float | None, **others: Any) -> dict[str, Any]:
    ends = {} if value is None else {"low": value - 0.0111, "high": value + 0.0222}
    return {
        "model": model, "suite": "probe", "split": "test", "name": "caption_loss", "role": role, "value": value,
        "measure": others.get("name", "caption_loss"),
        "low": None, "high": None, "n": 387, "unit": "nats per token", "lower_is_better": role != "gap",
        "published": [], **ends, **others,
    }  # fmt: skip


def worker(rank: int) -> dict[str, Any]:
    return {
        "launch": "ray", "rank": rank, "world_size": 2, "zero_stage": 2, "engine": "deepspeed",
        "node": digest(77)[:56], "actor": digest(80 + rank)[:32], "pid": 4100 + rank,
    }  # fmt: skip


def full_summary() -> dict[str, Any]:
    image, truth = images()[3]
    stages = [
        {
            "name": name, "steps": 1200 + index, "seconds": 71.3 + 60 * index, "digest": digest(10 + index),
            "loss_first": 6.1234 + index, "loss_last": 4.5678 + index, "validation_first": 6.2345 + index,
            "validation_last": 4.6789 + index, "workers": [worker(0), worker(1)],
        }
        for index, name in enumerate(("align", "pretrain", "sft"))
    ]  # fmt: skip
    metrics = [
        metric(model, role, value + index / 10)
        for index, model in enumerate(("base", "align", "pretrain", "sft"))
        for role, value in (("model", 3.2), ("control", 3.7), ("gap", 0.321))
    ]
    metrics += [
        metric("sft", "model", 0.512, name="multiple_choice", unit="share right", lower_is_better=False, suite="demo"),
        metric("sft", "chance", 0.25, name="multiple_choice", unit="share right", lower_is_better=False, suite="demo"),
    ]
    return {
        "recipe": "demo",
        "fingerprint": digest(1),
        "started": "2026-11-28T14:03:21+00:00",
        "seconds": 2261.4,
        "launch": "ray",
        "links": {"mlflow": MLFLOW, "prefect": "http://127.0.0.1:4200", "endpoint": "http://h:8000"},
        "prefect_flow_run": "0197f6c2-8f0e-7c31-9d2a-b7715a0d8f10",
        "mlflow": {"parent_run": digest(2)[:32], "runs": f"{MLFLOW}/#/experiments/1/runs", "model": "vila-demo",
                   "version": 3, "promoted": True},
        "stages": stages,
        "tasks": [
            {"task": "prepare", "name": "align", "digest": digest(20), "seconds": 31.25, "reused": True, "workers": []},
            {"task": "train_stage", "name": "sft", "digest": digest(12), "seconds": 191.3, "reused": False,
             "workers": [worker(0), worker(1)]},
        ],
        "metrics": metrics,
        "layers": layers(),
        "captions": [part()],
        "answer": {"question": "What is this?", "image": image, "truth": truth, "reply": truth.upper(),
                   "model": digest(12), "curl": f"curl -sN http://h:8000/v1 -d '{{\"url\": \"{image}\"}}'"},
        "serving": {"status": "ok", "replica": {"pid": 6120}},
        "versions": {"torch": "2.13.0", "ray": "2.60.0"},
    }  # fmt: skip


def layers() -> list[dict[str, Any]]:
    """Alignment of two models and their controls over five layers."""
    return [
        {"model": model, "role": role, "layer": layer, "value": v, "low": v - 0.02, "high": v + 0.02}
        for model, start in (("base", 0.1), ("align", 0.3))
        for role, less in (("model", 0.0), ("control", 0.05))
        for layer in range(5)
        for v in [start + 0.06 * layer - less]
    ]


def bare_summary() -> dict[str, Any]:
    """An inline run without tracking, deployment or evaluation."""
    summary = full_summary()
    inline = {"launch": "inline", "rank": 0, "world_size": 1, "zero_stage": 0, "engine": "torch"}
    missing = dict.fromkeys(("loss_first", "loss_last", "validation_first", "validation_last", "seconds"))
    return {
        **summary,
        "launch": "inline",
        "links": {"mlflow": None, "prefect": None, "endpoint": None},
        "prefect_flow_run": None,
        "mlflow": {"parent_run": None, "runs": None, "model": "tiny", "version": None, "promoted": False},
        "stages": [{**stage, **missing, "workers": [inline]} for stage in summary["stages"]],
        "tasks": [{**task, "workers": [{"launch": "inline"}]} for task in summary["tasks"]],
        "metrics": [],
        "layers": [],
        "captions": [],
        "answer": None,
        "serving": {},
        "versions": {},
    }


def curves(steps: int = 40) -> dict[str, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = [{"step": 0, "validation_loss": 7.5}]
    rows += [{"step": step, "loss": 7 / step + 1} for step in range(1, steps + 1)]
    rows[-1]["validation_loss"] = 1.875
    return {"align": rows, "pretrain": rows, "sft": rows}


def urls() -> dict[str, str]:
    """The images of captions by their items."""
    return {f"pairs/{number}": image for number, (image, _) in enumerate(images())}


def part(count: int = 3, **others: Any) -> dict[str, Any]:
    """Captions of a benchmark, every second one right."""
    shown = [
        {"item": f"pairs/{number}", "object": "", "truth": truth, "answer": f"a {truth}" if number % 2 else truth,
         "control": "A bus.", "right": number % 2 == 0}
        for number, (_, truth) in enumerate(images()[:count])
    ]  # fmt: skip
    return {
        "model": "sft", "suite": "demo", "split": "test", "benchmark": "cider", "objects": "new", "right": 41,
        "of": 1311, "shown": shown, **others,
    }  # fmt: skip


def gap(value: float, low: float, high: float, **others: Any) -> dict[str, Any]:
    return metric("sft", "gap", value, **{"low": low, "high": high, **others})


def sentence(*metrics: dict[str, Any], **mlflow: Any) -> str:
    summary = full_summary()
    return verdict({**summary, "metrics": list(metrics), "mlflow": {**summary["mlflow"], **mlflow}}).sentence


def test_every_number_of_the_tables_is_on_the_page() -> None:
    summary = full_summary()
    text = Page(render(summary, curves(), urls())).text
    for stage in summary["stages"]:
        assert f"{stage['steps']:,}" in text
        assert duration(stage["seconds"]) in text
        for key in ("loss", "validation"):
            assert f"{stage[f'{key}_first']:.3f}→ to {stage[f'{key}_last']:.3f}" in text
        assert stage["digest"] in text
    for shown in summary["metrics"]:
        assert f"{shown['value']:.3f} [{shown['low']:.3f}, {shown['high']:.3f}]" in text
        assert str(shown["n"]) in text
    for task in summary["tasks"]:
        assert duration(task["seconds"]) in text
        assert task["digest"] in text
    for name, version in summary["versions"].items():
        assert f"{name} {version}" in text
    for expected in ("37 min 41 s", "28 November 2026, 14:03 UTC", "Ray · world size 2 · ZeRO stage 2 · deepspeed",
                     "7.500", "1.875", summary["mlflow"]["parent_run"], summary["prefect_flow_run"],
                     f"actor {digest(81)[:12]} · pid 4101", "Lower is better.", "Higher is better.", "pid 6120",
                     summary["answer"]["curl"], "the digest of stage sft", "same words as the reply"):  # fmt: skip
        assert expected in text


def test_a_metric_of_official_files_has_no_split() -> None:
    official = metric("sft", "model", 0.5, name="pope_f1_official", unit="share", split=None, lower_is_better=False)
    text = Page(render({**full_summary(), "metrics": [official]}, curves(), urls())).text
    assert "On official files, suite probe." in text


def test_published_numbers_stand_in_the_card_of_their_metric() -> None:
    known = [{"model": model, "value": value, "source": "a paper"} for model, value in (("One", 0.855), ("Two", 0.75))]
    of = {"unit": "share", "split": None, "lower_is_better": False}
    shown = metric("sft", "model", 0.5, name="pope_f1_official", published=known, **of)
    other = metric("sft", "model", 0.5, name="gqa_official", **of)
    text = Page(render({**full_summary(), "metrics": [shown, other]}, curves(), urls())).text
    assert text.count("Published:") == 1
    assert "Published: One 0.855, Two 0.750. a paper." in " ".join(text.split())


def test_page_loads_nothing_and_runs_nothing() -> None:
    html = render(full_summary(), curves(), urls())
    check_loads_nothing(html)
    page = Page(html)
    assert {a["href"] for a in page.all("a") if not (a["href"] or "").startswith("#")} == {
        "evaluation.html",
        f"{MLFLOW}/#/experiments/1/runs",
        "http://127.0.0.1:4200",
        "http://h:8000/",
    }


def test_the_chat_page_of_a_deployed_service_is_linked_beside_its_answer() -> None:
    page = render(full_summary(), curves(), urls())
    answer = "<section " + page.partition('<section id="answer"')[2].partition("</section>")[0] + "</section>"
    assert '<a href="http://h:8000/" rel="noreferrer">ask in a browser</a>' in answer
    assert "OpenAI chat API http://h:8000/v1" in Page(answer).text
    assert "http://h:8000" not in render(bare_summary(), curves(), urls())


def test_page_can_be_read_without_seeing_it() -> None:
    html = render(full_summary(), curves(), urls())
    check_accessible(html)
    svgs = Page(html).all("svg")
    assert all(svg.get("aria-label") or svg.get("aria-hidden") or "viewbox" in svg for svg in svgs)


def test_hostile_strings_are_only_text() -> None:
    summary = full_summary()
    summary |= {"recipe": HOSTILE, "fingerprint": HOSTILE, "started": HOSTILE, "prefect_flow_run": HOSTILE}
    summary["answer"] |= {"question": HOSTILE, "truth": HOSTILE, "reply": HOSTILE, "curl": HOSTILE, "model": HOSTILE}
    summary["links"] |= {"mlflow": "javascript:alert(1)", "prefect": HOSTILE}
    summary["mlflow"] |= {"runs": None}
    summary["versions"] = {HOSTILE: HOSTILE}
    summary["serving"] = {HOSTILE: [HOSTILE, None, True, 0.5]}
    summary["stages"][0] |= {"name": HOSTILE, "digest": HOSTILE, "workers": [{"launch": HOSTILE}]}
    summary["tasks"][0] |= {"task": HOSTILE, "name": HOSTILE, "workers": [{"node": HOSTILE}]}
    summary["metrics"] = [metric(HOSTILE, "model", 1.0, name=HOSTILE, unit=HOSTILE, suite=HOSTILE, split=HOSTILE)]
    hostile = {"truth": HOSTILE, "answer": HOSTILE, "control": HOSTILE}
    shown = [{**one, **hostile} for one in part()["shown"]]
    summary["captions"] = [part(shown=shown, **dict.fromkeys(("model", "suite", "split", "benchmark"), HOSTILE))]
    page = Page(render(summary, {HOSTILE: curves()["sft"]}, urls()))
    assert not page.all("script")
    assert len(page.all("img")) == 1 + 2 * len(shown)
    assert not any("onerror" in attrs for _, attrs in page.tags)
    assert not any((a["href"] or "").startswith("javascript") for a in page.all("a"))
    assert page.text.count(HOSTILE) > 20


def test_image_by_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="not in the page"):
        render(bare_summary(), {}, {"a": "https://example.org/a.png"})


def test_inline_run_without_optional_parts_renders() -> None:
    page = Page(render(bare_summary(), {}, {}))
    assert "inline, in this process · world size 1 · ZeRO stage 0 · torch" in page.text
    assert "no model version was registered" in page.text
    assert "was not measured" in page.text
    assert "Served answer" not in page.text
    assert "None" not in page.text
    assert "sft 1,202 – – –" in page.text
    assert not page.all("img")
    empty = {**bare_summary(), "stages": [], "tasks": []}
    assert "This run trained no stage." in Page(render(empty, {}, {})).text


def test_a_reply_of_spaces_shows_as_empty() -> None:
    summary = full_summary()
    summary["answer"]["reply"] = " \n"
    assert "Reply (empty)" in Page(render(summary, {}, urls())).text


def test_missing_values_show_as_a_dash() -> None:
    summary = full_summary()
    summary["metrics"] = [metric("sft", "model", None), metric("sft", "gap", None)]
    summary["stages"][2]["validation_first"] = None
    text = Page(render(summary, {}, urls())).text
    assert "sft – [–, –] 387" in text
    assert f"–→ to {summary['stages'][2]['validation_last']:.3f}" in text
    assert "None" not in text


def test_gallery_keeps_its_order_and_says_what_it_leaves_out() -> None:
    html = render({**full_summary(), "captions": [part(24)]}, curves(4000), urls())
    page = Page(html)
    expected = [f"Held-out image, its true caption: {text}" for _, text in images()[:24]]
    answer = expected[3]
    assert [image["alt"] for image in page.all("img")] == [*expected[:6], answer, *expected]
    assert "Benchmark cider, test split: 41 of 1,311 captions right. The first 24 are shown." in page.text
    assert len(html.encode()) < 3_000_000


def test_the_first_screen_shows_six_captions_of_known_objects_where_there_are_some() -> None:
    known = part(8, benchmark="known_cider", objects="known", right=1, of=2)
    html = render({**full_summary(), "captions": [known, part(7)]}, curves(), urls())
    header = html.partition("<header>")[2].partition("</header>")[0]
    page = Page(header)
    assert [image["alt"] for image in page.all("img")] == [
        f"Held-out image, its true caption: {text}" for _, text in images()[:6]
    ]
    (_, first), (_, second) = images()[:2]
    for expected in (
        "1 of 2 captions of known objects right", f"Model ✓ right {first} True caption {first}",
        f"Model ✗ wrong a {second} True caption {second}",
        "Captions that sft generates for images of the test split: objects that training data names, in a style that "
        "it does not have (benchmark known_cider).",
        "Right: the words of the true caption, whatever their capitals and punctuation.",
        "Shown: the first 6 by the SHA-256 of the item’s name",
    ):  # fmt: skip
        assert expected in page.text
    text = Page(html).text
    assert "Known objects Objects that training data names, in a style that it does not have. Benchmark known_" in text
    assert "New objects Objects that no training data names. Benchmark cider, test split: 41 of 1,311 captions" in text
    new = Page(render(full_summary(), curves(), urls())).text
    assert "41 of 1,311 captions of new objects right" in new
    assert "Shown: the first 3 by" in new


def test_answers_that_are_no_captions_are_in_the_gallery_alone() -> None:
    other = part(benchmark="answer_match", objects=None)
    page = Page(render({**bare_summary(), "captions": [other]}, {}, urls()))
    assert len(page.all("img")) == 3
    assert "answer_match Benchmark answer_match, test split: 41 of 1,311 answers right." in page.text
    assert "True answer" in page.text
    assert "True caption" not in page.text
    assert "SHA-256 of the item’s name" not in page.text


def test_verdict_says_what_the_interval_says() -> None:
    assert "better with the matched image than with a shuffled one" in sentence(gap(0.3, 0.2, 0.4))
    assert "0.200 to 0.400, which excludes zero; version 3 of vila-demo was promoted." in sentence(gap(0.3, 0.2, 0.4))
    assert "worse with the matched image than with a shuffled one" in sentence(gap(-0.3, -0.4, -0.2))
    for low, high in ((-0.1, 0.2), (0.0, 0.4), (-0.4, 0.0)):
        assert "make no significant difference" in sentence(gap(0.1, low, high))
        assert "which includes zero" in sentence(gap(0.1, low, high))
    assert "was registered and not promoted" in sentence(gap(0.3, 0.2, 0.4), promoted=False)
    assert "was not measured with shuffled images" in sentence(metric("align", "gap", 0.5))
    assert "on 9 images of the test split" in sentence(gap(0.3, 0.2, 0.4, split="validation"), gap(0.1, -1, 1, n=9))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (math.nan, "–"), (0.0, "0.000"), (-0.25, "−0.250"), (0.0004, "0.0004"), (1e-7, "1e−07"), (12, "12"),
     (1234, "1,234"), (1234.56, "1,234.6"), (2.0, "2.000")],
)  # fmt: skip
def test_number(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_words_of_time_and_place() -> None:
    assert [duration(s) for s in (None, 0.04, 59.94, 59.96, 3599.4, 3600, 7325)] == [
        "–", "0.0 s", "59.9 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "2 h 02 min",
    ]  # fmt: skip
    assert moment("2026-11-28T14:03:21") == "28 November 2026, 14:03"
    assert moment("yesterday") == "yesterday"
    assert short("10.244.103.112:8265") == "10.244.103.112:8265"
    assert short(digest(5)) == digest(5)[:12]
    assert where({"launch": "inline"}) == "inline"
    assert where({"rank": 0, "node": None, "pid": 7}) == "rank 0 · pid 7"
    assert same_words("A red  Bus.", "a red bus")
    assert not same_words("a bus", "a red bus")


@pytest.mark.parametrize(
    ("values", "labels"),
    [([0.21, 0.49], ["0.3", "0.4"]), ([0.2, 0.5], ["0.2", "0.3", "0.4", "0.5"]),
     ([-0.1, 0.21], ["−0.1", "0.0", "0.1", "0.2"]),
     ([0.0, 0.9], ["0.00", "0.25", "0.50", "0.75"]), ([3388.0, 6412.0], ["4,000", "5,000", "6,000"]),
     ([0, 9], ["0.0", "2.5", "5.0", "7.5"]), ([0, 90], ["0", "25", "50", "75"])],
)  # fmt: skip
def test_axis_has_round_ticks(values: list[float], labels: list[str]) -> None:
    scale = axis(values, ticks=4)
    assert [scale.label(tick) for tick in scale.ticks] == labels
    assert [scale.at(value) for value in values] == [5, 95]


def test_axis_of_one_value_or_none_is_still_an_axis() -> None:
    assert axis([3.0, 3.0], ticks=4).at(3.0) == pytest.approx(50)
    assert len(axis([], ticks=4).ticks) >= 2


def test_models_come_in_order_with_their_controls_and_one_chance() -> None:
    metrics = [
        metric(model, role, value, name="multiple_choice", lower_is_better=False)
        for model in ("sft", "base", "align")
        for role, value in (("model", 0.4), ("control", 0.3), ("chance", 0.25))
    ]
    (card,) = metric_cards(metrics, models=["base", "align", "sft"])
    assert card.values is not None
    assert [row.label for row in card.values.rows] == [
        "base", "base, shuffled", "align", "align, shuffled", "sft", "sft, shuffled", "chance",
    ]  # fmt: skip
    assert card.values.reference == card.values.axis.at(0.25)
    assert card.gaps is None
    assert not card.sizes_differ
    others = metric_cards([*metrics, metric("new", "model", 0.1, name="multiple_choice", n=3)], models=["base"])
    assert others[0].sizes_differ


def test_plot_of_gaps_shows_zero() -> None:
    card = metric_cards([metric("sft", "gap", 5.0)], models=["sft"])[0]
    assert card.gaps is not None
    assert card.gaps.axis.low <= 0
    assert card.gaps.reference == card.gaps.axis.at(0)
    assert card.values is None
    assert forest([]).rows == []


def test_stages_share_the_width_and_none_is_too_narrow() -> None:
    assert widths([1, 1]) == [50, 50]
    shares = widths([1, 10_000, 10])
    assert sum(shares) == pytest.approx(100)
    assert min(shares) > 14


def test_chart_keeps_every_stage_inside_its_part() -> None:
    chart = loss_chart(curves())
    assert chart is not None
    assert [stage.name for stage in chart.stages] == ["align", "pretrain", "sft"]
    for stage in chart.stages:
        for line in (stage.raw, stage.smooth, stage.held_out):
            points = [tuple(map(float, point.split(","))) for point in line.split()]
            assert all(stage.left - 0.01 <= x <= stage.left + stage.width + 0.01 and 12 <= y <= 98 for x, y in points)
        assert stage.validation == [(0, 7.5), (40, 1.875)]
    assert loss_chart({}) is None
    assert loss_chart({"align": []}) is None
    assert loss_chart({"align": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.inf}]}) is not None


def test_thinning_keeps_ends_and_extremes() -> None:
    points = [(step, math.sin(step)) for step in range(10_000)]
    points[5_001] = (5_001, 99.0)
    kept = thin(points, limit=100)
    assert len(kept) <= 104
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert (5_001, 99.0) in kept
    assert kept == sorted(kept)


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert smoothed([(1, 3.0), (2, 3.0), (3, 3.0)]) == [(1, 3.0), (2, 3.0), (3, 3.0)]
    assert smoothed([(1, 8.0), (2, 0.0)])[0] == (1, 8.0)


def test_no_number_of_a_drawing_is_broken() -> None:
    html = render(full_summary(), curves(), urls())
    assert not re.search(r'="(?:nan|inf|-?\d+\.\d{6,})%?"', html)
