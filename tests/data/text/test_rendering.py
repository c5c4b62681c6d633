import re
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from vila_ops.data.text.rendering import Message, render, render_with_targets
from vila_ops.packages.tokenizer import TEMPLATE_TOKENS, TEMPLATES

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TALK: list[Message] = [
    {"role": "user", "content": "<image>\nWhat is it?"},
    {"role": "assistant", "content": " A dog.\n"},
    {"role": "user", "content": "And <image>?"},
    {"role": "assistant", "content": "A cat."},
]
ENDS = ["<|im_end|>", "<|eot_id|>", "</s>", "<|end_of_text|>"]
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' </s>' }}{% endif %}{% endfor %}"
)

Make = Callable[..., PreTrainedTokenizerFast]


def said(fast: PreTrainedTokenizerFast, messages: list[Message]) -> list[str]:
    """The target text."""
    rendered = render_with_targets(fast, messages, ends=ENDS)
    assert rendered.text == render(fast, messages, prompt=False)
    return [rendered.text[start:stop] for start, stop in rendered.spans]


def test_there_is_a_file_for_each_template() -> None:
    assert sorted(path.stem for path in TEMPLATES.glob("*.jinja")) == sorted(TEMPLATE_TOKENS)


@pytest.mark.parametrize(
    ("template", "text", "targets"),
    [
        (
            "chatml",
            "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n A dog.\n<|im_end|>\n"
            "<|im_start|>user\nAnd <image>?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n",
            [" A dog.\n<|im_end|>", "A cat.<|im_end|>"],
        ),
        (
            "vicuna_v1",  # LLaVA's conv_vicuna_v1: SeparatorStyle.TWO, " " and "</s>"; bos from the tokenizer
            f"<|im_start|>{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:  A dog.\n</s>USER: And <image>? "
            "ASSISTANT: A cat.</s>",
            ["  A dog.\n</s>", " A cat.</s>"],
        ),
        (
            "llama_3",  # Meta's template trims every turn
            "<|im_start|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA dog.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd <image>?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>",
            ["A dog.<|eot_id|>", "A cat.<|eot_id|>"],
        ),
        ("plain", "<|im_start|><image> A dog.\n\n<image>A cat.\n", [" A dog.\n\n", "A cat.\n"]),
    ],
)
def test_our_templates_by_hand(fast_with: Make, template: str, text: str, targets: list[str]) -> None:
    fast = fast_with(template)
    assert render(fast, TALK, prompt=False) == text
    assert said(fast, TALK) == targets


@pytest.mark.parametrize("template", TEMPLATE_TOKENS)
def test_the_sentinels_find_the_answers_that_the_tags_mark(fast_with: Make, template: str) -> None:
    untagged = re.sub(r"\{%-? (end)?generation -?%\}", "", (TEMPLATES / f"{template}.jinja").read_text())
    tagged, plain = said(fast_with(template), TALK), template == "plain"
    found = render_with_targets(fast_with(untagged), TALK, ends=["\n"] if plain else ENDS)
    lead = " " if template == "vicuna_v1" else ""  # the space that the prompt leaves to the model
    assert [lead + found.text[start:stop] for start, stop in found.spans] == tagged


@pytest.mark.parametrize("template", TEMPLATE_TOKENS)
def test_a_prompt_is_what_stands_before_the_answer(fast_with: Make, template: str) -> None:
    fast = fast_with(template)
    rendered = render_with_targets(fast, TALK, ends=ENDS)
    for number, (start, _) in enumerate(rendered.spans):
        assert render(fast, TALK[: 2 * number + 1], prompt=True) == rendered.text[:start]


@pytest.mark.parametrize("template", TEMPLATE_TOKENS)
def test_an_image_part_and_a_text_part_render_as_one_string(fast_with: Make, template: str) -> None:
    fast = fast_with(template)
    parts = [{"type": "text", "text": "See "}, {"type": "image"}, {"type": "text", "text": "<b>."}]
    answer = {"role": "assistant", "content": "Yes."}
    whole = fast.apply_chat_template([{"role": "user", "content": parts}, answer], tokenize=False)
    assert whole == fast.apply_chat_template([{"role": "user", "content": "See <image><b>."}, answer], tokenize=False)


def test_a_system_turn_takes_the_place_of_vicunas_sentence(fast_with: Make) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *TALK[2:]]
    assert render(fast_with("vicuna_v1"), messages, prompt=False) == (
        "<|im_start|>Be brief. USER: And <image>? ASSISTANT: A cat.</s>"
    )


def test_a_template_without_tags_that_trims_and_puts_a_blank_before_the_end(fast_with: Make) -> None:
    assert said(fast_with(LLAMA_2), TALK) == ["A dog. </s>", "A cat. </s>"]


def test_equal_answers_and_questions_are_not_mixed_up(fast_with: Make) -> None:
    messages = [{"role": role, "content": "Yes"} for role in ("user", "assistant", "user", "assistant", "assistant")]
    rendered = render_with_targets(fast_with(LLAMA_2), messages, ends=ENDS)
    question, answer = len("<|im_start|>[INST] Yes [/INST]"), len(" Yes </s>")
    starts = [question + 1, 2 * question + answer + 1, 2 * question + 2 * answer + 1]
    assert rendered.spans == tuple((start, start + answer - 1) for start in starts)


def test_an_empty_answer_is_its_end_of_turn(fast_with: Make) -> None:
    messages = [TALK[0], {"role": "assistant", "content": ""}]
    assert said(fast_with("chatml"), messages) == ["<|im_end|>"]
    assert said(fast_with(LLAMA_2), messages) == [" </s>"]


EACH = "{{% for m in messages %}}{}{{% endfor %}}"


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        (EACH.format("{{ m.content | replace('dog', 'cow') + '</s>' }}"), "changes an answer by more than a trim"),
        (
            EACH.format("{% if loop.last %}{{ m.content + '</s>' }}{% endif %}"),
            "omits, repeats, changes or reorders assistant turns",
        ),
        (EACH.format("{{ m.content + m.content + '</s>' }}"), "repeats"),
        (EACH.format("{{ m.content | upper + '</s>' }}"), "changes"),
        (EACH.format("{{ m.role + ': ' + m.content }}"), "no end-of-turn token"),
        (EACH.format("{{ raise_exception('not ' + m.role) }}"), "refuses the conversation .not user."),
        (
            EACH.format("{% if loop.first %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"),
            "1 generation",
        ),
        (
            "{% macro say(m) %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
            + EACH.format("{% if m.role == 'assistant' %}{{ say(m) }}{% endif %}"),
            "outside of macros",
        ),
    ],
)
def test_a_template_that_leaves_the_answers_uncertain_is_refused(fast_with: Make, template: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        render_with_targets(fast_with(template), TALK, ends=ENDS)


def test_a_conversation_without_an_answer_is_refused(fast_with: Make) -> None:
    with pytest.raises(ValueError, match="no assistant turn"):
        render_with_targets(fast_with("chatml"), TALK[:1], ends=ENDS)
