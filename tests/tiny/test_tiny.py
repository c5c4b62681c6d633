"""The committed fixtures of the `tiny` recipe are whole, licensed and consistent with our own files."""

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from PIL import Image as Pillow
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vila_ops.data.records import Image, Part, Record, Turn

TINY = Path(__file__).parent
CHAT_TEMPLATE = TINY.parents[1] / "vila_ops/templates/chatml.jinja"
COUNTS = {"pairs": 48, "documents": 24, "instructions": 24, "definitions": 48}
FOLDER_BYTES = 700_000
IMAGE_BYTES = 6_000
IM_END = "<|im_end|>"

Messages = list[dict[str, Any]]


def read_part(folder: Path, part: dict[str, str]) -> Part:
    """One part of our record layout."""
    match part:
        case {"text": text}:
            return text
        case {"image": path}:
            return Image((folder / path).read_bytes())
    raise ValueError(f"a part has a text or an image, not {sorted(part)}")


def read_record(folder: Path, line: str) -> Record:
    """One line of records.jsonl; a missing or an unknown key is an error."""
    fields: dict[str, Any] = json.loads(line)
    turns = tuple(
        Turn(role=turn["role"], parts=tuple(read_part(folder, part) for part in turn["parts"]))
        for turn in fields.pop("turns")
    )
    return Record(turns=turns, **fields)


def records(name: str) -> list[Record]:
    """All records of one folder."""
    folder = TINY / name
    return [read_record(folder, line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]


def parts(record: Record) -> list[Part]:
    """All parts of a record in order."""
    return [part for turn in record.turns for part in turn.parts]


def images(record: Record) -> list[Image]:
    """All images of a record in order."""
    return [part for part in parts(record) if isinstance(part, Image)]


def words(record: Record) -> int:
    """Words of a record, numbers of steps included."""
    return sum(len(part.split()) for part in parts(record) if isinstance(part, str))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """As a recipe loads it."""
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(TINY / "tokenizer", local_files_only=True)
    return loaded


def target_text(tokenizer: PreTrainedTokenizerFast, messages: Messages) -> str:
    """The text under the assistant mask."""
    encoded: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return str(tokenizer.decode([token for token, mask in marked if mask]))


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_every_record_parses_and_ids_are_unique(name: str, count: int) -> None:
    read = records(name)
    assert len(read) == count
    assert len({record.id for record in read}) == count
    for record in read:
        assert record.object == record.object.lower()
        assert record.category
        assert record.provenance
        assert all(part for part in parts(record))


@pytest.mark.parametrize("name", COUNTS)
def test_images_decode_and_none_is_left_over(name: str) -> None:
    named = [image.data for record in records(name) for image in images(record)]
    assert set(named) == {path.read_bytes() for path in (TINY / name).glob("*.png")}
    for data in set(named):
        assert len(data) < IMAGE_BYTES
        with Pillow.open(io.BytesIO(data)) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("PNG", "RGBA", (56, 56))


@pytest.mark.parametrize("name", COUNTS)
def test_every_licence_has_its_section(name: str) -> None:
    lines = (TINY / "LICENSES.md").read_text(encoding="utf-8").splitlines()
    sections = {line.removeprefix("## ") for line in lines if line.startswith("## ")}
    assert {licence for record in records(name) for licence in record.licence.split(" AND ")} <= sections


def test_pairs_are_six_distinct_objects_of_each_category() -> None:
    read = records("pairs")
    assert len({record.object for record in read}) == len({images(record)[0].data for record in read}) == len(read)
    categories = [record.category for record in read]
    assert {categories.count(category) for category in categories} == {6}
    for record in read:
        (turn,) = record.turns
        assert turn.role == "document"
        assert turn.parts[1:] == (record.object.capitalize() + ".",)


def test_documents_interleave_two_or_three_images_with_text() -> None:
    for record in records("documents"):
        (turn,) = record.turns
        assert turn.role == "document"
        assert len(images(record)) in (2, 3)
        kinds = [isinstance(part, Image) for part in turn.parts]
        assert all(kind != following for kind, following in pairwise(kinds))


def test_instructions_are_short_questions_with_an_answer() -> None:
    for record in records("instructions"):
        assert [turn.role for turn in record.turns] == ["user", "assistant"]
        assert words(record) < 60


def test_definitions_begin_with_their_noun() -> None:
    for record in records("definitions"):
        (turn,) = record.turns
        assert turn.role == "document"
        (text,) = turn.parts
        assert isinstance(text, str)
        assert text.startswith(f"{record.object}: ")
        assert record.category.startswith("noun.")


def test_folder_stays_small() -> None:
    files = [path for path in TINY.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= FOLDER_BYTES


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.is_fast
    assert len(tokenizer) == 512
    specials = ["<|endoftext|>", "<|im_start|>", IM_END, "<image>"]
    assert tokenizer.convert_tokens_to_ids(specials) == [0, 1, 2, 3]
    assert tokenizer("".join(specials))["input_ids"] == [0, 1, 2, 3]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", IM_END, IM_END)
    assert tokenizer.image_token_id == 3


def test_chat_template_is_ours(tokenizer: PreTrainedTokenizerFast) -> None:
    template = CHAT_TEMPLATE.read_bytes()
    assert (TINY / "tokenizer/chat_template.jinja").read_bytes() == template
    assert tokenizer.chat_template == template.decode()


@given(text=st.text())
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_renders_as_chatml_without_a_default_system_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    question = [{"type": "image"}, {"type": "text", "text": "What is it?"}, {"type": "image"}]
    messages: Messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "A dog."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\n<image>What is it?<image><|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n<image>What is it?<image><|im_end|>\n<|im_start|>assistant\n"


def test_chat_refuses_a_part_it_does_not_know(tokenizer: PreTrainedTokenizerFast) -> None:
    messages: Messages = [{"role": "user", "content": [{"type": "video"}]}]
    with pytest.raises(TemplateError, match="an image or a text, not: video"):
        tokenizer.apply_chat_template(messages, tokenize=False)


@given(answers=st.lists(st.text(), min_size=1, max_size=3), system=st.booleans(), in_parts=st.booleans())
def test_assistant_mask_marks_exactly_the_answers_and_their_ends(
    tokenizer: PreTrainedTokenizerFast, answers: list[str], system: bool, in_parts: bool
) -> None:
    messages: Messages = [{"role": "system", "content": "Be brief."}] if system else []
    for answer in answers:
        messages.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]})
        content = [{"type": "text", "text": answer}] if in_parts else answer
        messages.append({"role": "assistant", "content": content})
    assert target_text(tokenizer, messages) == "".join(answer + IM_END for answer in answers)
