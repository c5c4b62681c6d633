"""An endpoint as the target, against a real HTTP server that does what each test says."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.eval.benchmarks.sample import SAMPLES, config_of
from tests.eval.stub_endpoint import Answer, Server, completion
from vila_ops.artifacts.kinds import Endpoint
from vila_ops.cli import app
from vila_ops.config import OfficialSuite, Run, Suite
from vila_ops.config.benchmarks import Pope
from vila_ops.config.resources import EndpointResources
from vila_ops.data.records import Image
from vila_ops.errors import EndpointRefused, EndpointUnreachable
from vila_ops.eval.benchmark import GenerateRequest, ScoreRequest, SealedImage, TextPrompt
from vila_ops.eval.endpoint_target import Concurrency, EndpointTarget, check_answerable
from vila_ops.eval.evaluate import evaluate, rescore
from vila_ops.eval.report import read_report
from vila_ops.eval.rows import Response

PNG = b"\x89PNG\r\n\x1a\n"


def target(server: Server, **changes: Any) -> EndpointTarget:
    return EndpointTarget(Endpoint(url=server.url, name="a-model"), EndpointResources(**changes))


def question(text: str, *parts: Any, stop: tuple[str, ...] = ()) -> GenerateRequest:
    prompt = TextPrompt((("user", (*parts, text)),))
    return GenerateRequest(item=text, prompt=prompt, max_new_tokens=5, stop=stop)


def no_image(image: SealedImage) -> bytes:
    raise AssertionError(image)


def ask(of: EndpointTarget, *texts: str) -> list[Response]:
    return of.answer([question(text) for text in texts], no_image)


def test_a_question_is_sent_with_its_images_and_the_key_of_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.answer = lambda text, tries: completion(" A cat.\nNo", "length")
    request = question("what", SealedImage("k"), Image(b"\xff\xd8"), stop=("\n",))
    (response,) = target(server).answer([request], lambda image: PNG)
    expected = Response(answer="A cat.", finish_reason="stop", prompt_tokens=7, answer_tokens=2)
    assert response == Response(**{**vars(expected), "prompt_hash": response.prompt_hash})
    (body,) = server.bodies
    content = body["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert [part["image_url"]["url"][:15] for part in content[:2]] == ["data:image/png;", "data:image/jpeg"]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("a-model", 5, 0)
    assert server.keys == ["Bearer secret"]


def test_answers_are_in_the_order_of_the_requests_and_never_more_than_the_bound_are_under_way(server: Server) -> None:
    texts = [f"q{number}" for number in range(60)]
    barrier = threading.Barrier(8)

    def waits_for_eight(text: str, tries: int) -> Answer:
        if int(text[1:]) in range(20, 28):  # passes only if eight are under way
            barrier.wait(timeout=60)
        return completion(text.upper())

    server.answer = waits_for_eight
    responses = ask(target(server, max_concurrency=8), *texts)
    assert [response.answer for response in responses] == [text.upper() for text in texts]
    assert server.most == 8


def test_the_number_of_requests_grows_and_is_halved_once_by_an_overload() -> None:
    concurrency = Concurrency(64)
    assert concurrency.limit == 16
    for _ in range(16):
        concurrency.answered()
    assert concurrency.limit == 32
    sent = [float(number) for number in range(1, 33)]
    for started in sent:  # one burst, sent before the first of its refusals came back
        concurrency.overloaded(started=started)
    assert concurrency.limit == 16
    for _ in range(16):
        concurrency.answered()
    assert 16.9 < concurrency.limit < 17


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_overload_is_tried_again(server: Server, status: int) -> None:
    server.answer = lambda text, tries: (status, {}, {"Retry-After": "0"}) if tries < 3 else completion("yes")
    assert [response.answer for response in ask(target(server), "a", "b")] == ["yes", "yes"]
    assert len(server.bodies) == 6


def test_what_fails_again_and_again_is_a_status_and_never_an_answer(server: Server) -> None:
    server.answer = lambda text, tries: (503, {"error": "busy: no"}, {}) if text == "bad" else completion("yes")
    bad, good = ask(target(server, max_retries=2), "bad", "good")
    assert (bad.status, bad.answer, bad.detail) == ("error", None, 'HTTP 503: {"error": "busy: no"}')
    assert (good.status, good.answer) == ("ok", "yes")
    assert len(server.bodies) == 4


def test_a_time_out_is_a_status(server: Server) -> None:
    released = threading.Event()

    def late(text: str, tries: int) -> Answer:
        if text == "slow":
            released.wait(timeout=60)
        return completion("yes")

    server.answer = late
    slow, good = ask(target(server, max_retries=0, timeout_seconds=0.5), "slow", "good")
    released.set()
    assert (slow.status, slow.answer, slow.detail) == ("timeout", None, "no answer in 0.5 s")
    assert good.answer == "yes"


@pytest.mark.parametrize(
    ("answer", "status", "detail"),
    [
        (completion(None, "stop", refusal="I can't help"), "refused", "I can't help"),
        (completion("", "content_filter"), "refused", "content_filter"),
        ((400, {"error": {"code": "context_length_exceeded"}}, {}), "too_long", "HTTP 400"),
        ((400, {"error": {"message": "bad image"}}, {}), "error", "bad image"),
        ((200, {"choices": []}, {}), "error", "no chat completion"),
    ],
    ids=["refusal", "filter", "too long", "bad request", "no choice"],
)
def test_what_is_no_answer_has_its_status(server: Server, answer: Answer, status: str, detail: str) -> None:
    server.answer = lambda text, tries: answer
    (response,) = ask(target(server), "a")
    assert (response.status, response.answer) == (status, None)
    assert detail in response.detail
    assert len(server.bodies) == 1, "another try would not help"


@pytest.mark.parametrize(("text", "answer"), [("", ""), ("a\ud800b", "a\ufffdb"), ("y" * 10**5, "y" * 10**5)])
def test_an_answer_may_be_empty_broken_or_huge(server: Server, text: str, answer: str) -> None:
    server.answer = lambda _, tries: completion(text)
    (response,) = ask(target(server), "a")
    assert (response.status, response.answer) == ("ok", answer)


def test_a_wrong_key_and_an_endpoint_that_is_not_there_end_the_evaluation(server: Server) -> None:
    server.answer = lambda text, tries: (401, {"error": "wrong key"}, {})
    with pytest.raises(EndpointRefused, match=r"refused with HTTP 401.*wrong key"):
        ask(target(server), "a", "b")
    nowhere = Endpoint(url="http://127.0.0.1:9/v1", name="a-model")
    with pytest.raises(EndpointUnreachable, match=r"http://127.0.0.1:9/v1 does not answer"):
        EndpointTarget(nowhere, EndpointResources(max_retries=1)).answer([question("a")], no_image)


def test_benchmarks_that_need_more_than_text_are_refused_by_name(run: Run, server: Server) -> None:
    prompt = TextPrompt((("user", ("?",)),))
    score = ScoreRequest(item="1", prompt=prompt, continuations=(" A",))
    with pytest.raises(ValueError, match="benchmark 'mmlu' needs likelihoods, which no chat endpoint gives"):
        check_answerable("mmlu", [score])
    running = GenerateRequest(item="1", prompt=TextPrompt(prompt.turns, is_chat=False), max_new_tokens=1)
    with pytest.raises(ValueError, match="benchmark 'bbh' is written as running text"):
        check_answerable("bbh", [running])
    template = {**config_of(Pope).prompt.model_dump(), "answer": {"kind": "score"}}
    suite = OfficialSuite(
        name="two",
        benchmarks={"first": config_of(Pope, version=None), "second": config_of(Pope, version=None, prompt=template)},
    )
    with pytest.raises(ValueError, match="benchmark 'second' needs likelihoods"):
        evaluate(suite, Endpoint(url=server.url, name="a"), None, run.resources.with_changes(SAMPLED))
    assert server.bodies == [], "the first benchmark was not asked either"


SAMPLED = {"storage.benchmarks": str(SAMPLES)}


@pytest.mark.slow
def test_a_suite_on_an_endpoint_has_the_numbers_of_its_answers(run: Run, server: Server, tmp_path: Path) -> None:
    server.answer = lambda text, tries: completion("Yes") if "zebra" not in text else (400, {}, {})
    resources = run.resources.with_changes({**SAMPLED, "storage.store": str(tmp_path / "store")})
    suite = OfficialSuite(name="s", benchmarks={"pope": config_of(Pope, version=None)}, bootstrap_resamples=50)
    endpoint = Endpoint(url=server.url, name="a-model")
    report = evaluate(suite, endpoint, None, resources)
    content = read_report(report)
    assert content.benchmarks["pope"].failed == {"error": 4}  # the zebra of each image
    values = {metric.name: metric.value for metric in content.metrics}
    assert values["pope_random_recall_official"] == 1
    assert values["pope_popular_accuracy_official"] == 0.5
    assert len(server.bodies) == 48
    assert evaluate(suite, endpoint, None, resources) == report
    other = Endpoint(url=server.url, name="a-model", revision="2")
    assert evaluate(suite, other, None, resources) != report
    assert len(server.bodies) == 96


@pytest.mark.slow
def test_what_timed_out_is_asked_once_more_if_the_resources_say_so(run: Run, server: Server, tmp_path: Path) -> None:
    """The endpoint is late for the zebra of each of four images, and then has recovered."""
    released, is_late = threading.Event(), True

    def sometimes_late(text: str, tries: int) -> Answer:
        if is_late and "zebra" in text:
            released.wait(timeout=60)
        return completion("No" if "zebra" in text else "Yes")

    server.answer = sometimes_late
    changes = {**SAMPLED, "storage.store": str(tmp_path / "store"), "evaluate.endpoint.max_retries": 0}
    resources = run.resources.with_changes({**changes, "evaluate.endpoint.timeout_seconds": 3.0})
    suite = OfficialSuite(name="s", benchmarks={"pope": config_of(Pope, version=None)}, bootstrap_resamples=50)
    endpoint = Endpoint(url=server.url, name="a-model")
    first = evaluate(suite, endpoint, None, resources)
    released.set()
    is_late = False
    assert read_report(first).benchmarks["pope"].failed == {"timeout": 4}
    assert evaluate(suite, endpoint, None, resources) == first
    asked = len(server.bodies)
    asks_again = resources.with_changes({"evaluate.endpoint.ask_again": True})
    second = evaluate(suite, endpoint, None, asks_again)
    assert len(server.bodies) == asked + 4
    assert read_report(second).benchmarks["pope"].failed == {}
    values = [
        {metric.name: metric.value for metric in read_report(report).metrics}["pope_random_accuracy_official"]
        for report in (first, second)
    ]
    assert values[1] == pytest.approx(values[0] + 4 / 24)
    for later in (asks_again, resources):
        assert evaluate(suite, endpoint, None, later) == second
        assert rescore(suite, endpoint, None, later) == second
    assert len(server.bodies) == asked + 4


def test_a_suite_on_held_out_data_is_refused_on_an_endpoint(run: Run, server: Server) -> None:
    from vila_ops.data.preprocess.prepare import prepare

    recipe = run.recipe
    suite = Suite.model_validate({**recipe.stage_suite.model_dump(), "benchmarks": {"loss": {"kind": "text_loss"}}})
    data = prepare(suite.mixture, recipe.text(max_tokens=suite.max_tokens), run.resources)
    with pytest.raises(ValueError, match="benchmark 'loss' is written in token ids, which the endpoint"):
        evaluate(suite, Endpoint(url=server.url, name="a"), data, run.resources)


def test_the_command_measures_an_endpoint_on_a_suite_file(run: Run, server: Server, tmp_path: Path) -> None:
    server.answer = lambda text, tries: completion("Yes")
    storage = {"store": str(tmp_path / "store"), "cache": run.resources.storage.cache}
    (tmp_path / "here.yaml").write_text(json.dumps({"launch": "inline", "storage": storage}))
    suite = SAMPLES.parents[1] / "configs/suites/sample.yaml"
    command = ["evaluate", str(suite), "--endpoint", f"a-model@{server.url}", "-r", str(tmp_path / "here.yaml")]
    command += ["-s", f"resources.storage.benchmarks={SAMPLES}"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    asked = len(server.bodies)
    again = CliRunner().invoke(app, [*command, "--rescore"])
    line, *_ = [line for line in first.stdout.splitlines() if line.startswith("pope_random_recall_official ")]
    assert line.split()[1:3] == ["model", "1.000"]
    assert again.stdout == first.stdout
    assert len(server.bodies) == asked >= 48
    wrong = CliRunner().invoke(app, [*command, "-s", "final_suite.precision=bf16"])
    assert "here only resources.KEY=VALUE has an effect" in str(wrong.exception)
