"""Few-shot benchmarks from the committed sample to rows: pools, nearest images, own images, the context, endpoints."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration
from typer.testing import CliRunner

from tests.eval.benchmarks.sample import ROOT, SAMPLES, config_of
from tests.eval.stub_endpoint import Server
from vila_ops.artifacts.kinds import Endpoint, EvalReport, Pretrained
from vila_ops.artifacts.store import content
from vila_ops.cli import app
from vila_ops.config import OfficialSuite, Resources, Run, Suite
from vila_ops.config.benchmarks import CocoCaptions, OkVqa, Pope
from vila_ops.config.load import load_suite
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.records import Image
from vila_ops.data.shards import index_of, samples_of
from vila_ops.eval import runner
from vila_ops.eval.benchmark import SealedImage, TextPrompt
from vila_ops.eval.evaluate import evaluate, job_of, rescore
from vila_ops.eval.job import EvalJob
from vila_ops.eval.pools import FewShotPlan, FewShotPrompts
from vila_ops.eval.report import read_items, read_report
from vila_ops.eval.rows import ItemRow
from vila_ops.eval.sealed import SealedImages, items_of

SUITE = load_suite(ROOT / "configs/suites/sample_few_shot.yaml")


@pytest.fixture(scope="module")
def resources(run: Run) -> Resources:
    return run.resources.with_changes({"storage.benchmarks": str(SAMPLES)})


@pytest.fixture(scope="module")
def report(model: Pretrained, resources: Resources) -> EvalReport:
    return evaluate(SUITE, model, None, resources)


def one(name: str, **changes: Any) -> OfficialSuite:
    """A suite of one benchmark of the sample's, changed."""
    suite = OfficialSuite(name="one", benchmarks={name: SUITE.benchmarks[name]}, bootstrap_resamples=20)
    return suite.with_changes({f"benchmarks.{name}.{key.replace('__', '.')}": value for key, value in changes.items()})


def rows_of(model: Pretrained, resources: Resources, name: str) -> tuple[ItemRow, ...]:
    result = job_of(SUITE, model, None, resources).result(name)
    assert result is not None
    return read_items(result)


def prompts_of(job: EvalJob, name: str) -> FewShotPrompts:
    """The prompts of a benchmark whose demonstrations are drawn, so that no features are asked for."""
    files = [files[name] for files in (job.files, job.pools) if name in files]
    return FewShotPlan(
        job, name, items_of(files[0]), SealedImages(*files), lambda *_: pytest.fail("features")
    ).prompts()


@pytest.mark.slow
def test_rows_have_their_demonstrations_and_longer_prompts(
    report: EvalReport, model: Pretrained, resources: Resources
) -> None:
    lengths = {}
    for shots in (0, 1, 2, 4, 8):
        rows = rows_of(model, resources, f"okvqa_{shots}shot")
        assert {len(row.shots) for row in rows} == {shots}
        assert {row.response.status for row in rows} == {"ok"}
        assert not any("\n" in str(row.answer) for row in rows)
        assert {name for row in rows for name in row.scores if name == "copied"} == ({"copied"} if shots else set())
        lengths[shots] = sum(row.response.prompt_tokens or 0 for row in rows)
    assert sorted(lengths.values()) == list(lengths.values())
    names = {metric.name for metric in read_report(report).metrics}
    assert {"okvqa_0shot_official", "okvqa_8shot_official_8shot", "okvqa_8shot_copy_rate_8shot"} <= names
    assert "okvqa_nearest_official_4shot_nearest" in names


@pytest.mark.slow
def test_the_command_of_the_page_prints_the_numbers(
    report: EvalReport, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    storage = run.resources.storage
    command = [
        *("evaluate", "configs/recipes/tiny.yaml", "--stage", "base", "--suite", "configs/suites/sample_few_shot.yaml"),
        *("-s", "resources.storage.benchmarks=docs/samples", "-s", f"resources.storage.store={storage.store}"),
        *("-s", f"resources.storage.cache={storage.cache}"),
    ]
    printed = CliRunner().invoke(app, command)
    assert printed.exit_code == 0, printed.output
    assert {"okvqa_4shot_copy_rate_4shot", "okvqa_text_only_official_4shot_text_only"} <= {
        line.split()[0] for line in printed.stdout.splitlines() if line
    }


@pytest.mark.slow
def test_controls_show_the_same_questions_without_or_with_other_images(
    report: EvalReport, model: Pretrained, resources: Resources
) -> None:
    plain, text, shuffled = (rows_of(model, resources, f"okvqa_{name}") for name in ("4shot", "text_only", "shuffled"))
    image_tokens = 4
    for row, without in zip(plain, text, strict=True):
        assert without.shots == tuple(f"{shot} (text only)" for shot in row.shots)
        # A demonstration also loses the line end behind its image.
        assert (row.response.prompt_tokens or 0) - (without.response.prompt_tokens or 0) == 4 * (image_tokens + 1)
    assert all(" (images of " in shot for row in shuffled for shot in row.shots)


def test_no_shots_are_the_benchmark_without_the_setting(model: Pretrained, resources: Resources) -> None:
    prompt = SUITE.benchmarks["okvqa_0shot"].prompt.model_dump()
    plain = OfficialSuite(name="plain", benchmarks={"okvqa": config_of(OkVqa, prompt=prompt)})
    own, same = job_of(plain, model, None, resources), job_of(SUITE, model, None, resources)
    assert own.address("okvqa") == same.address("okvqa_0shot")


def test_pool_selection_order_and_control_are_part_of_the_identity(model: Pretrained, resources: Resources) -> None:
    suites = [
        one("okvqa_4shot"),
        *(
            one("okvqa_4shot", **{f"few_shot__{key}": value})
            for key, value in {
                "shots": 3,
                "seed": 1,
                "candidates": 5,
                "control": "text_only",
                "selection": {"kind": "seed", "order": "reversed"},
            }.items()
        ),
    ]
    keys = [job_of(suite, model, None, resources).address("okvqa_4shot").key for suite in suites]
    assert len(set(keys)) == len(suites)


def test_another_train_file_is_another_result_and_the_same_items(
    model: Pretrained, resources: Resources, tmp_path: Path
) -> None:
    shutil.copytree(SAMPLES / "okvqa", tmp_path / "okvqa")
    file = tmp_path / "okvqa/OpenEnded_mscoco_train2014_questions.json"
    file.write_text(file.read_text().replace("What does it run on?", "What moves it?"))
    moved = resources.with_changes({"storage.benchmarks": str(tmp_path)})
    own, other = (job_of(one("okvqa_4shot"), model, None, where) for where in (resources, moved))
    assert own.files["okvqa_4shot"].digest == other.files["okvqa_4shot"].digest
    assert own.address("okvqa_4shot").key != other.address("okvqa_4shot").key


@pytest.mark.slow
def test_scoring_again_asks_neither_the_tower_nor_the_model(
    report: EvalReport, model: Pretrained, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.EngineTarget, "engine", property(lambda of: pytest.fail("a model was loaded")))
    assert rescore(SUITE, model, None, resources).digest == report.digest


def test_questions_of_a_prepared_mixture_are_demonstrations_as_the_prompt_writes_them(
    run: Run, model: Pretrained, resources: Resources
) -> None:
    """Records of this source have one line for the question and one for the answer; the hint is not written twice."""
    stage = run.recipe.stages["sft"]
    data = prepare(stage.mixture, run.recipe.text("sft"), run.resources)
    few_shot = {"shots": 48, "pool": {"kind": "mixture", "sources": ["pairs"]}}
    prompt = {
        "user": "{image}\n{question}\n{hint}",
        "hint": "this?",
        "answer": {"kind": "generate", "max_new_tokens": 4},
    }
    config = config_of(Pope, version=None, few_shot=few_shot, prompt=prompt)
    settings = {"name": "m", "split": "test", "mixture": stage.mixture.model_dump()}
    suite = Suite.model_validate({**settings, "benchmarks": {"pope": config.model_dump()}})
    prompts = prompts_of(job_of(suite, model, data, resources), "pope")
    rows = [row for row in index_of(data).to_pylist() if (row["source"], row["split"]) == ("pairs", "train")]
    lines = {sample.key: sample.text.splitlines() for sample in samples_of(data, rows)}
    assert any(question == "What is this?" for question, _ in lines.values())
    first = prompts.requests[0]
    assert isinstance(first.prompt, TextPrompt)
    shown = dict(zip(first.shots, zip(first.prompt.turns[::2], first.prompt.turns[1::2], strict=False), strict=True))
    assert shown.keys() == lines.keys()
    for key, ((_, (image, text)), (_, (given,))) in shown.items():
        question, expected = lines[key]
        assert isinstance(image, Image)
        assert (text, given) == (f"\n{question.removesuffix(' this?')}\nthis?", expected)


def test_the_same_image_under_another_name_is_no_demonstration(
    model: Pretrained, resources: Resources, tmp_path: Path
) -> None:
    """Two of ten questions of the train file are then about the image of the first item."""
    shutil.copytree(SAMPLES / "okvqa", tmp_path / "okvqa")
    shutil.copyfile(
        tmp_path / "okvqa/val2014/COCO_val2014_000000000011.jpg",
        tmp_path / "okvqa/train2014/COCO_train2014_000000000023.jpg",
    )
    moved = resources.with_changes({"storage.benchmarks": str(tmp_path)})
    job = job_of(one("okvqa_8shot"), model, None, moved)
    prompts = prompts_of(job, "okvqa_8shot")
    first = prompts.requests[0]
    assert (first.item, len(first.shots)) == ("11005", 8)
    assert not {"23005", "23015"} & set(first.shots)
    assert {"23005", "23015"} & {shot for request in prompts.requests[1:] for shot in request.shots}
    with pytest.raises(ValueError, match="item '11005' has 8 candidates that do not show an image of it"):
        evaluate(one("okvqa_8shot", few_shot__shots=9), model, None, moved)


def test_what_exceeds_the_context_is_told_before_the_first_item(
    model: Pretrained, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The length is that of the text of the stock chat template, in which an image has four tokens for one."""
    monkeypatch.setattr(runner.EngineTarget, "answer", lambda *_: pytest.fail("an item was asked"))
    with pytest.raises(ValueError, match="take fewer") as told:
        evaluate(one("okvqa_4shot", prompt__answer__max_new_tokens=2000), model, None, resources)
    job = job_of(one("okvqa_4shot"), model, None, resources)
    request = prompts_of(job, "okvqa_4shot").requests[0]
    assert isinstance(request.prompt, TextPrompt)
    messages = [
        {"role": role, "content": "".join("<image>" if isinstance(part, SealedImage) else str(part) for part in parts)}
        for role, parts in request.prompt.turns
    ]
    stock = AutoTokenizer.from_pretrained(content(model))
    ids = stock.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    images = ids.count(stock.convert_tokens_to_ids("<image>"))
    assert images == 5
    length = len(ids) + images * (4 - 1) + 2000
    limit = json.loads((content(model) / "config.json").read_text())["text_config"]["max_position_embeddings"]
    assert (
        f"item '{request.item}' with its 4 demonstrations and the answer has {length} tokens, and the model's "
        in str(told.value)
    )
    assert f"context has {limit}; 4 of 4 requests do not fit" in str(told.value)


def test_a_benchmark_without_a_train_file_is_told_what_to_do(model: Pretrained, resources: Resources) -> None:
    config = config_of(Pope, version=None, few_shot={"shots": 1})
    with pytest.raises(ValueError, match=r"'pope' has no train file .* set few_shot.pool to kind mixture"):
        evaluate(OfficialSuite(name="p", benchmarks={"pope": config}), model, None, resources)


@pytest.mark.slow
def test_captions_of_a_prepared_mixture_are_demonstrations_and_never_of_the_same_pixels(
    run: Run, model: Pretrained, resources: Resources, tmp_path: Path
) -> None:
    """The first image to caption is the file of a record of the mixture, which has its square as another file."""
    data = prepare(run.recipe.final_suite.mixture, run.recipe.text("sft"), run.resources)
    pairs = [row for row in index_of(data).to_pylist() if (row["source"], row["split"]) == ("pairs", "train")]
    shutil.copytree(SAMPLES / "coco_captions", tmp_path / "coco_captions")
    first = tmp_path / "coco_captions/val2014/COCO_val2014_000000000101.jpg"
    shutil.copyfile(ROOT / f"tests/tiny/pairs/{pairs[0]['id']}.png", first)
    few_shot = {"shots": len(pairs) - 1, "pool": {"kind": "mixture", "sources": ["pairs"]}}
    config = config_of(CocoCaptions, tokenizers=["ptb_python"], few_shot=few_shot)
    mixture = run.recipe.final_suite.mixture.model_dump()
    suite = Suite.model_validate(
        {"name": "m", "split": "test", "mixture": mixture, "benchmarks": {"captions": config.model_dump()}}
    )
    job = job_of(suite, model, data, resources.with_changes({"storage.benchmarks": str(tmp_path)}))
    prompts = prompts_of(job, "captions")
    own, *others = prompts.requests
    assert set(own.shots) == {row["key"] for row in pairs[1:]}
    assert any(pairs[0]["key"] in request.shots for request in others)
    assert isinstance(own.prompt, TextPrompt)
    assert {role for role, _ in own.prompt.turns} == {"user", "assistant"}
    captions = {sample.key: sample.text for sample in samples_of(data, pairs)}
    assert prompts.answers == {key: captions[key] for key in prompts.answers}


def stock_features(model: Pretrained, images: list[bytes]) -> torch.Tensor:
    """Means over patches of the tower's features (I, C) by stock transformers, of length one."""
    stock = LlavaForConditionalGeneration.from_pretrained(content(model)).eval()
    processor = AutoProcessor.from_pretrained(content(model), backend="pil").image_processor
    pixels = processor(images=[Pillow.open(io.BytesIO(data)) for data in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = stock.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    means = states[stock.config.vision_feature_layer][:, 1:].mean(dim=1)
    return torch.nn.functional.normalize(means, dim=1)


@pytest.mark.slow
def test_the_nearest_are_those_of_stock_features(report: EvalReport, model: Pretrained, resources: Resources) -> None:
    """The two questions of an image are equally near: the smaller id is taken first, and so comes later."""
    job = job_of(SUITE, model, None, resources)
    files, pool = job.files["okvqa_nearest"], job.pools["okvqa_nearest"]
    images, items = SealedImages(files, pool), [*items_of(files), *items_of(pool)]
    features = stock_features(model, [images(item.readable_images()[0]) for item in items])  # type: ignore[arg-type]
    rows = rows_of(model, resources, "okvqa_nearest")
    for row, own in zip(rows, features[: len(rows)], strict=True):
        near = {item.id: float(own @ other) for item, other in zip(items, features, strict=True)}
        candidates = sorted((item.id for item in items[len(rows) :]), key=lambda id_: (-round(near[id_], 5), id_))
        assert row.shots == tuple(candidates[:4][::-1])
    sealed = list(Path(resources.storage.store).glob("demonstrations/*/manifest.json"))
    assert len(sealed) == 2, "of the four nearest, and of the two nearest as running text"


def test_an_endpoint_gets_demonstrations_as_messages_and_cannot_select_by_features(
    server: Server, resources: Resources, tmp_path: Path
) -> None:
    endpoint = Endpoint(url=server.url, name="m")
    fresh = resources.with_changes({"storage.store": str(tmp_path)})
    evaluate(one("okvqa_2shot"), endpoint, None, fresh)
    for body in server.bodies:
        assert [message["role"] for message in body["messages"]] == ["user", "assistant"] * 2 + ["user"]
        kinds = [[part["type"] for part in message["content"]] for message in body["messages"]]
        assert kinds == [["image_url", "text"], ["text"], ["image_url", "text"], ["text"], ["image_url", "text"]]
    with pytest.raises(ValueError, match=r"'okvqa_nearest' selects demonstrations by features .* kind seed"):
        evaluate(one("okvqa_nearest"), endpoint, None, fresh)
