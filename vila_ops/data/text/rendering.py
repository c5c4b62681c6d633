"""A conversation to text through the chat template, with the character spans of its answers."""

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

Message = dict[str, str]
"""role and content; an image in the content is the image token."""
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.rstrip, str.lstrip)
"""The changes that a template may make to an answer."""


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """[start, stop) in characters of each answer with its end of turn, in order."""


def render(fast: PreTrainedTokenizerFast, messages: Sequence[Message], *, prompt: bool) -> str:
    """The text of a conversation, with a generation prompt if `prompt`. Raises ValueError if the template does."""
    try:
        text: str = fast.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        raise ValueError(_refusal(error)) from error
    return text


def render_with_targets(fast: PreTrainedTokenizerFast, messages: Sequence[Message], *, ends: Sequence[str]) -> Rendered:
    """The text of a conversation and the spans of its answers, ends of turn included.

    A template with {% generation %} blocks marks the answers itself. Otherwise the conversation is rendered a second
    time with a random word for each answer: the text between these words is the template's, the rest are the answers.
    The first of `ends` after an answer, with only blanks between, ends its turn.

    Raises ValueError if the spans are not certain: no answer, an answer that is left out, repeated or changed by more
    than a trim, or no end of turn.
    """
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("there is no assistant turn, so there are no target tokens; leave the conversation out")
    if GENERATION.search(fast.get_chat_template()):
        return _tagged(fast, messages, answers)
    text = render(fast, messages, prompt=False)
    between = _between(fast, messages, len(answers))
    spans = []
    stop = 0
    for answer, before in zip(_rendered_answers(text, between, answers), between, strict=False):
        start = stop + len(before)
        stop = start + len(answer)
        spans.append((start, _end_of_turn(text, stop, ends)))
    return Rendered(text, tuple(spans))


def _tagged(fast: PreTrainedTokenizerFast, messages: Sequence[Message], answers: list[str]) -> Rendered:
    try:
        texts, blocks = render_jinja_template(
            [list(messages)],
            chat_template=fast.get_chat_template(),
            return_assistant_tokens_mask=True,
            **fast.special_tokens_map,
        )
    except TemplateError as error:
        raise ValueError(_refusal(error)) from error
    text, spans = texts[0], tuple(blocks[0])
    matches = [answer.strip() in text[start:stop] for answer, (start, stop) in zip(answers, spans, strict=False)]
    if len(spans) != len(answers) or not all(matches):  # a block inside a macro is misplaced by jinja's tracker
        raise ValueError(
            f"the chat template marks {len(spans)} generation blocks, {sum(matches)} of them with their answer, for "
            f"{len(answers)} assistant turns; put one block around each assistant turn, outside of macros"
        )
    return Rendered(text, spans)


def _between(fast: PreTrainedTokenizerFast, messages: Sequence[Message], count: int) -> list[str]:
    """The template's text before, between and after `count` answers."""
    words = [f"answer{secrets.token_hex(16)}" for _ in range(count)]
    unused = iter(words)
    masked = [{**m, "content": next(unused)} if m["role"] == "assistant" else m for m in messages]
    text = render(fast, masked, prompt=False)
    pattern = "|".join(words)
    if re.findall(pattern, text) != words:
        raise ValueError(
            "the chat template omits, repeats, changes or reorders assistant turns, so the target tokens are not "
            "certain; fix it, or put {% generation %} blocks around them"
        )
    return re.split(pattern, text)


def _rendered_answers(text: str, between: list[str], answers: list[str]) -> list[str]:
    """The answers as the template renders them."""
    for trim in TRIMS:
        trimmed = [trim(answer) for answer in answers]
        pieces = [piece for pair in zip(between, [*trimmed, ""], strict=True) for piece in pair]
        if "".join(pieces) == text:
            return trimmed
    raise ValueError(
        "the chat template changes an answer by more than a trim, so the target tokens are not certain; "
        "fix it, or put {% generation %} blocks around them"
    )


def _end_of_turn(text: str, stop: int, ends: Sequence[str]) -> int:
    """The end of the end-of-turn token after an answer."""
    end = re.compile(rf"\s*(?:{'|'.join(map(re.escape, ends))})").match(text, stop)
    if end is None:
        raise ValueError(
            f"the chat template writes {text[stop : stop + 20]!r} after an answer and no end-of-turn token, so that "
            f"generation would not end; use a template that ends every assistant turn"
        )
    return end.end()


def _refusal(error: TemplateError) -> str:
    return f"the chat template refuses the conversation ({error}); change the conversation or the template"
