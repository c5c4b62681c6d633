"""Templates in the forms of well-known models, shortened to what decides; taken or refused."""

import json
import shutil
from pathlib import Path

import pytest

from vila_ops.config.model import RandomLanguageModel
from vila_ops.packages.tokenizer import TEMPLATE_TOKENS, TEMPLATES, build_tokenizer

EACH = "{%- for message in messages -%}"
ASKS = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
QWEN_2_5 = (
    "{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' -}}{%- endif -%}"
    + EACH
    + "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}{%- endfor -%}"
    + ASKS
)
QWEN_3 = (
    "{%- set ns = namespace(last=0) -%}"
    + EACH
    + "{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    + EACH
    + "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.role == 'assistant' and loop.index0 > ns.last -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{- message.content + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}"
    "{%- endif -%}{%- endif -%}"
)
R1 = (
    EACH + "{%- if message.role == 'user' -%}{{- '<|User|>' + message.content -}}"
    "{%- else -%}{{- '<|Assistant|>' + message.content.split('</think>')[-1] + '<|im_end|>' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\\n' -}}{%- endif -%}"
)
LLAMA_2 = (
    EACH + "{%- if message.role == 'user' -%}{{- '[INST] ' + message.content | trim + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + message.content | trim + ' <|im_end|>' -}}{%- endif -%}{%- endfor -%}"
)
LLAMA_3_2 = (
    "{%- if not date_string is defined -%}{%- if strftime_now is defined -%}"
    "{%- set date_string = strftime_now('%d %b %Y') -%}{%- else -%}{%- set date_string = '26 Jul 2024' -%}{%- endif -%}"
    "{%- endif -%}{{- 'Today Date: ' + date_string -}}" + QWEN_2_5
)
WITHOUT_A_PROMPT = QWEN_2_5.removesuffix(ASKS)


def take(tiny: Path, tmp_path: Path, template: str, name: str = "tokenizer") -> str:
    """The template that is used of a tokenizer that comes with this one."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny / "tokenizer", folder)
    (folder / "chat_template.jinja").write_text(template)
    model = RandomLanguageModel(tokenizer=str(folder))
    taken: str = build_tokenizer(model, chat_template=name, cache=folder).chat_template
    return taken


@pytest.mark.parametrize("template", [QWEN_2_5, LLAMA_2], ids=["qwen2.5", "llama2"])
def test_a_template_whose_prompts_are_what_was_trained_is_taken(template: str, tiny: Path, tmp_path: Path) -> None:
    assert take(tiny, tmp_path, template) == template


def test_a_template_that_thinks_before_every_answer_is_told_not_to(tiny: Path, tmp_path: Path) -> None:
    """As TRL's qwen3_training.jinja, which has the block before every answer: the prompt has it with the flag alone."""
    everywhere = QWEN_3.replace(" and loop.index0 > ns.last", "")
    assert take(tiny, tmp_path, everywhere) == "{%- set enable_thinking = false -%}" + everywhere


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (QWEN_3, r"ends a prompt with '', but an answer that is trained on follows '<think>\\n\\n</think>\\n\\n'"),
        ("{%- set enable_thinking = false -%}" + QWEN_3, r"ends a prompt with '<think>\\n"),
        (R1, r"ends a prompt with '<think>\\n', but an answer that is trained on follows ''"),
        (WITHOUT_A_PROMPT, r"ends a prompt with '', .* follows '<\|im_start\|>assistant\\n'"),
        (QWEN_2_5.replace("assistant\\n", "assistant"), r"ends a prompt with '', .* follows '\\n'"),
        (QWEN_2_5 + "{{ ' ' }}", r"ends a prompt with ' '"),
        ("its own", "does not write the answer 'It is a red dog.'"),
        ("{{ raise_exception('no system turn') }}", r"does not render .*no system turn"),
        ("{{ messages[0].content[9:] + 1 }}", r"does not render .*TypeError"),
        (LLAMA_3_2, r"calls strftime_now \(line 1\)"),
        ("{%- set now = strftime_now -%}" + QWEN_2_5 + "{{ now('%Y') }}", "calls strftime_now"),
        ("{{ lipsum(1) }}" + QWEN_2_5, "calls lipsum"),
        ("{{ ['a', 'b'] | random }}" + QWEN_2_5, "draws at random"),
        ("{{ [['a', 'b']] | map('random') | first }}" + QWEN_2_5, "draws at random"),
        ("{{ messages[0].items }}" + QWEN_2_5, "writes a place in memory"),
        ("{{ cycler('a', 'b') }}" + QWEN_2_5, "writes a place in memory"),
        (QWEN_2_5 + "{% if messages[0].role == 'system' %}{{ lipsum }}{% endif %}", "calls lipsum"),
        (QWEN_2_5 + "{% if messages[0].role == 'system' %}{{ joiner() }}{% endif %}", "writes a place in memory"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_trained_with_is_refused_with_those_that_fit(
    template: str, told: str, tiny: Path, tmp_path: Path
) -> None:
    fitting = r"choose one of \['chatml', 'hermes_2', 'plain'\]"
    with pytest.raises(ValueError, match=rf"the chat template of the tokenizer in .* {told}.*{fitting}"):
        take(tiny, tmp_path, template)


@pytest.mark.parametrize("template", [LLAMA_3_2, QWEN_3])
def test_the_template_of_a_tokenizer_is_not_judged_where_ours_is_used(
    template: str, tiny: Path, tmp_path: Path
) -> None:
    assert take(tiny, tmp_path, template, "chatml") == (TEMPLATES / "chatml.jinja").read_text()


def test_a_prompt_that_the_tokenizer_joins_with_the_answer_is_refused(tiny: Path, tmp_path: Path) -> None:
    """The prompt ends with a blank, which the tokenizer joins with an answer's first word."""
    vocabulary = json.loads((tiny / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    assert "ĠT" in vocabulary or any(word.startswith("Ġ") and len(word) > 1 for word in vocabulary)
    template = EACH + "{{- message.role + ': ' + message.content + '<|im_end|>' -}}{%- endfor -%}"
    template += "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
    with pytest.raises(ValueError, match="which the tokenizer joins with the answer"):
        take(tiny, tmp_path, template)


def test_ours_pass_the_same_check(tiny: Path, tmp_path: Path) -> None:
    fitting = [name for name, tokens in TEMPLATE_TOKENS.items() if set(tokens) <= {"<|im_start|>", "<|im_end|>"}]
    assert fitting == ["chatml", "hermes_2", "plain"]
    for number, name in enumerate(fitting):
        text = (TEMPLATES / f"{name}.jinja").read_text()
        assert take(tiny, tmp_path / str(number), text) == text
