"""One question: the answer of stock transformers to the same chat, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

from vila_ops.artifacts.kinds import Pretrained
from vila_ops.artifacts.store import content
from vila_ops.cli import app
from vila_ops.config import Model, Resources
from vila_ops.config.engine import TorchEngine
from vila_ops.generate.ask import ask
from vila_ops.generate.engine import Engine, EngineOptions
from vila_ops.generate.load import load_engine
from vila_ops.model.assemble import assemble


@pytest.fixture(scope="module")
def model(
    make_model: Callable[..., Model], make_resources: Callable[..., Resources], tmp_path_factory: pytest.TempPathFactory
) -> Pretrained:
    return assemble(make_model(), make_resources(tmp_path_factory.mktemp("ask")))


@pytest.fixture(scope="module")
def engine(model: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_engine(model, TorchEngine(), EngineOptions(tmp_path_factory.mktemp("features")))


@pytest.fixture
def images(tiny: Path) -> list[Path]:
    return sorted((tiny / "pairs").glob("*.png"))[:2]


def stock_answer(model: Pretrained, said: str, images: list[Path]) -> str:
    """What stock transformers generates after the chat, with its own processor on the original images."""
    folder = content(model)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    stock = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    chat = [{"role": "user", "content": said}]
    text = processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    opened = [Image.open(path).convert("RGB") for path in images] or None
    inputs = processor(text=text, images=opened, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        ids = stock.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer: str = processor.tokenizer.decode(ids, skip_special_tokens=True)
    return answer.strip()


@pytest.mark.parametrize(
    ("question", "count", "said"),
    [
        ("What is this?", 1, "<image>What is this?"),
        ("What is this?", 2, "<image><image>What is this?"),
        ("Is <image> as large as <image>?", 2, "Is <image> as large as <image>?"),
        ("Hello?", 0, "Hello?"),
    ],
)
def test_the_answer_is_that_of_stock_transformers(
    question: str, count: int, said: str, engine: Engine, model: Pretrained, images: list[Path]
) -> None:
    answer = ask(engine, question, images[:count], max_new_tokens=6)
    assert answer.text == stock_answer(model, said, images[:count])
    assert answer.answer_tokens <= 6


def test_places_of_images_are_as_many_as_images(engine: Engine, images: list[Path]) -> None:
    with pytest.raises(ValueError, match="the question says <image> 1 times for 2 images"):
        ask(engine, "What is <image>?", images, max_new_tokens=6)


def test_a_file_that_is_no_image_is_named(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"note\.txt: "):
        ask(engine, "What is this?", [tmp_path / "note.txt"], max_new_tokens=6)


def test_a_question_that_fills_the_context_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="ask with fewer images or words"):
        ask(engine, "word " * 3000, [], max_new_tokens=6)


def test_the_command_checks_its_images_before_it_loads_the_model(tmp_path: Path) -> None:
    words = ["generate", str(tmp_path / "no model"), "What?", "--image", str(tmp_path / "a.png")]
    done = CliRunner().invoke(app, words)
    assert f"no such image file: {tmp_path / 'a.png'}" in str(done.exception)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")
def test_the_command_checks_its_device_before_it_reads_the_model(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["generate", str(tmp_path / "no model"), "What?", "--device", "cuda"])
    assert "device is cuda, but torch" in str(done.exception)


def test_the_command_prints_the_answer_alone(model: Pretrained, images: list[Path]) -> None:
    words = [
        "generate",
        model.uri,
        "What is this?",
        "--image",
        str(images[0]),
        "--max-new-tokens",
        "6",
        "--threads",
        "1",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert done.stdout == stock_answer(model, "<image>What is this?", images[:1]) + "\n"
