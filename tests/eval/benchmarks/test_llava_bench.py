"""LLaVA-Bench from its official files to answers, and with a judge to numbers; the judge is a real HTTP server."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.sample import SAMPLES, SETTINGS, config_of, numbers, rows_of, sample_items
from tests.eval.stub_endpoint import Answer, Server, completion
from vila_ops.artifacts.kinds import Endpoint
from vila_ops.config import OfficialSuite, Resources, Run
from vila_ops.config.benchmarks import LlavaBench
from vila_ops.eval.benchmark import Item
from vila_ops.eval.benchmarks import llava_bench
from vila_ops.eval.evaluate import evaluate, rescore
from vila_ops.eval.judge import judged
from vila_ops.eval.metrics.judged import score_pair
from vila_ops.eval.report import read_report
from vila_ops.eval.rows import ItemRow
from vila_ops.eval.scoring import score

JUDGE = {"model": "org/judge", "temperature": 0.2, "max_new_tokens": 50, "system": "Be precise."}
PLAIN = config_of(LlavaBench)
REPLIES = {"colour": "8 6", "detail": "Both are fine.", "third": "10, 5\nThe second is short."}


@pytest.fixture
def resources(run: Run, tmp_path: Path) -> Resources:
    changes = {"storage.store": str(tmp_path / "store"), "evaluate.endpoint.max_retries": 1}
    return run.resources.with_changes(changes)


def with_judge(server: Server, **changes: Any) -> LlavaBench:
    server.answer = lambda text, tries: completion(next(reply for word, reply in REPLIES.items() if word in text))
    return LlavaBench.model_validate({**PLAIN.model_dump(), "judge": {**JUDGE, "url": server.url, **changes}})


def answered(config: LlavaBench) -> tuple[list[Item], list[ItemRow]]:
    items = sample_items(config)
    return items, rows_of(items, config, lambda item, _: f"An answer to {item.id}.")


def test_without_a_judge_the_result_is_the_answers_file_of_llavas_script() -> None:
    items, rows = answered(PLAIN)
    assert numbers(rows, items, PLAIN) == {}
    (content,) = llava_bench.official_files(items, rows, PLAIN).values()
    first, *others = map(json.loads, content.decode().splitlines())
    assert len(others) == 2
    assert first == {
        "question_id": 0,
        "prompt": "What is the colour of the circle?",
        "text": "An answer to 0.",
        "answer_id": "0",
        "model_id": "vila-ops",
        "metadata": {},
    }


def test_the_relative_score_by_hand_leaves_out_what_the_judge_did_not_score(
    server: Server, resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_judge(server)
    items, rows = answered(config)
    rows = judged(items, rows, config, resources)
    assert [row.judge_reply for row in rows] == list(REPLIES.values())
    measurement = score(items, rows, config, SETTINGS).measurement
    (metric,) = measurement.metrics
    assert metric.value == pytest.approx((6 + 5) / (8 + 10))
    assert (metric.n, measurement.failed) == (2, {"not_judged": 1})
    reviews = llava_bench.official_files(items, rows, config)["reviews.jsonl"].decode().splitlines()
    assert [json.loads(one)["tuple"] for one in reviews] == [[8, 6], [-1, -1], [10, 5]]


def test_the_judge_is_told_what_llavas_script_tells_it(server: Server, resources: Resources) -> None:
    config = with_judge(server)
    items, rows = answered(config)
    judged(items, rows, config, resources)
    body = next(one for one in server.bodies if "third" in one["messages"][-1]["content"][0]["text"])
    rule = json.loads((SAMPLES / "llava_bench/rule.json").read_text())["llava_bench_complex"]["prompt"]
    assert body["messages"][-1]["content"][0]["text"] == (
        "[Context]\nThree bars that grow from left to right: red, green and blue.\n\n"
        "[Question]\nWhy might the third bar be the longest?\n\n"
        "[Assistant 1]\nThe bars seem to count something that grows.\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\nAn answer to 2.\n\n[End of Assistant 2]\n\n[System]\n{rule}\n\n"
    )
    assert body["messages"][0]["content"][0]["text"] == "Be precise."
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("org/judge", 0.2, 50)


def test_model_temperature_and_prompt_of_the_judge_are_in_the_metrics_name(server: Server) -> None:
    def name(config: LlavaBench, changes: dict[str, Any]) -> str:
        items, rows = answered(config)
        items = [replace(item, references={**item.references, **changes}) for item in items]
        given = [replace(row, judge_reply="8 6") for row in rows]
        (name,) = numbers(given, items, config)
        return name

    plain = name(with_judge(server), {})
    assert plain.startswith("llava_bench_by_org-judge_t0.2_")
    others = [
        name(with_judge(server, model="other"), {}),
        name(with_judge(server, temperature=0), {}),
        name(with_judge(server, system=""), {}),
        name(with_judge(server, revision="2026"), {}),
        name(with_judge(server), {"prompt": "Another rule."}),
    ]
    assert len({plain, *others}) == 6
    assert name(with_judge(server, url="http://elsewhere"), {}) == plain


def test_a_judge_that_fails_is_named_and_gives_no_number(
    server: Server, resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_judge(server)

    def overloaded(text: str, tries: int) -> Answer:
        return 503, {"error": "overloaded"}, {}

    server.answer = overloaded
    items, rows = answered(config)
    rows = judged(items, rows, config, resources)
    assert [row.judge_reply for row in rows] == [None] * 3
    assert "llava_bench: the judge org/judge failed on 3 items: {'0': 'error'" in caplog.text
    measurement = score(items, rows, config, SETTINGS).measurement
    assert (measurement.metrics, measurement.failed) == ((), {"not_judged": 3})


def test_replies_are_sealed_and_another_temperature_asks_again(server: Server, resources: Resources) -> None:
    config = with_judge(server)
    items, rows = answered(config)
    with pytest.raises(ValueError, match="the judge org/judge was not asked yet; evaluate without --rescore"):
        judged(items, rows, config, resources, asks=False)
    once = judged(items, rows, config, resources)
    assert judged(items, rows, config, resources, asks=False) == once
    assert len(server.bodies) == 3
    judged(items, rows, with_judge(server, temperature=0), resources)
    assert len(server.bodies) == 6


@pytest.mark.slow
def test_a_judge_that_timed_out_is_asked_once_more_if_the_resources_say_so(
    server: Server, resources: Resources
) -> None:
    config, released, is_late = with_judge(server), threading.Event(), True

    def sometimes_late(text: str, tries: int) -> Answer:
        if "[Assistant 1]" not in text:
            return completion("An answer.")
        if is_late and "third" in text:
            released.wait(timeout=60)
        return completion(next(reply for word, reply in REPLIES.items() if word in text))

    server.answer = sometimes_late
    suite = OfficialSuite(name="s", benchmarks={"llava_bench": config}, bootstrap_resamples=50)
    endpoint = Endpoint(url=server.url, name="a-model")
    own = resources.with_changes({"storage.benchmarks": str(SAMPLES), "evaluate.endpoint.max_retries": 0})
    first = evaluate(suite, endpoint, None, own.with_changes({"evaluate.endpoint.timeout_seconds": 3.0}))
    released.set()
    is_late = False
    assert read_report(first).benchmarks["llava_bench"].failed == {"not_judged": 2}  # one reply is prose
    assert evaluate(suite, endpoint, None, own) == first
    asked = len(server.bodies)
    second = evaluate(suite, endpoint, None, own.with_changes({"evaluate.endpoint.ask_again": True}))
    assert len(server.bodies) == asked + 1
    assert read_report(second).benchmarks["llava_bench"].failed == {"not_judged": 1}
    assert read_report(first).metrics == ()  # one judged item has no interval
    assert [metric.value for metric in read_report(second).metrics] == [pytest.approx((6 + 5) / (8 + 10))]
    assert rescore(suite, endpoint, None, own) == evaluate(suite, endpoint, None, own) == second
    assert len(server.bodies) == asked + 1


def test_a_failed_answer_is_judged_as_an_empty_one_or_left_out(server: Server, resources: Resources) -> None:
    config = with_judge(server)
    items = sample_items(config)
    rows = rows_of(items, config, lambda item, _: None if item.id == "0" else "Some answer.")
    judged(items, rows, config, resources)
    told = [body["messages"][-1]["content"][0]["text"] for body in server.bodies]
    assert sum("[Assistant 2]\n\n\n[End of Assistant 2]" in text for text in told) == 1
    left_out = LlavaBench.model_validate({**config.model_dump(), "failed_items": "left_out"})
    assert judged(items, rows, left_out, resources)[0].judge_reply is None


@pytest.mark.parametrize(
    ("reply", "pair"),
    [
        ("8 9", (8, 9)),
        ("8, 9\nBecause", (8, 9)),
        (" 7.5 10 \n", (7.5, 10)),
        ("Assistant 1 gets 8 and 9", None),
        ("8 9 10", None),
        ("8", None),
        ("", None),
        ("nan 9", None),
        ("0 9", None),
        ("\n8 9", None),
    ],
)
def test_only_two_numbers_from_1_to_10_are_scores(reply: str, pair: tuple[float, float] | None) -> None:
    assert score_pair(reply) == pair


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("answers_gpt4.jsonl", "answers_gpt4.jsonl has nothing for question 2"),
        ("context.jsonl", "context.jsonl has nothing for question 2"),
    ],
)
def test_files_of_several_versions_are_refused(name: str, message: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAMPLES / "llava_bench", tmp_path / "llava_bench"))
    lines = (folder / name).read_text().splitlines()
    (folder / name).write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=message):
        list(llava_bench.read(folder, PLAIN))


def test_a_category_without_a_rule_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAMPLES / "llava_bench", tmp_path / "llava_bench"))
    (folder / "rule.json").write_text("{}")
    with pytest.raises(ValueError, match="has no rule 'llava_bench_conv', which question 0 needs"):
        list(llava_bench.read(folder, PLAIN))
