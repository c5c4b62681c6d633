"""Check a third-party chat template: refuse one that uses more than the conversation or does not end.

transformers renders in jinja's ImmutableSandboxedEnvironment, which refuses Python's internal names while rendering.
Here they are refused before rendering, and time and memory are bounded, which the sandbox does not do.
"""

import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from types import FrameType
from typing import Any

from jinja2 import TemplateError, nodes
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

MAX_CHARACTERS = 128 * 1024
MAX_NUMBER = 100_000
"""Largest number in a template, which is also the sandbox's longest range."""
MAX_LINES = 20_000
"""Lines of the compiled template that a trial may run; real templates run about a thousand."""
MAX_GROWTH_KIB = 32 * 1024
"""Growth of the process's memory that a trial may cause."""
OTHER_TEMPLATES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
MAX_FACTOR = 100
"""Largest number in a template that multiplies: one step could make a huge text, which no budget bounds."""
TRIAL = [
    {"role": "user", "content": "<image>\nWhat is it?"},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "And now?"},
]
TALK = [
    {"role": "user", "content": "<image>\nWhat is it?"},
    {"role": "assistant", "content": "It is a red dog."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Two cats are there."},
]
"""The conversation by which a template is judged before it is used."""
CHANGING = ("strftime_now", "lipsum")
"""What a template can call whose result depends on more than the conversation: the date, and a random text."""
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")
"""How Python shows an object by its place in memory."""
NO_THINKING = "{%- set enable_thinking = false -%}"
"""Prefix for a template that lets the model think unless it is told not to, as Qwen3's do."""
FLATTEN = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- if content is string -%}{%- set content = [{'type': 'text', 'text': content}] -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=content)] -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
)
"""Prefix for a template that reads a message as a list, as LLaVA-HF's do: our messages have images in the text."""


class _BudgetExceeded(Exception):
    """A trial used up its budget."""


def check_template(template: str, *, where: str) -> None:
    """Check a template's syntax tree and a trial rendering. Raises ValueError with the rule that it breaks."""
    if len(template) > MAX_CHARACTERS:
        raise ValueError(f"{where}: the chat template has {len(template)} characters, more than {MAX_CHARACTERS}")
    try:
        compiled = _compile_jinja_template(template)
        parsed = compiled.environment.parse(template)
    except (TemplateError, RecursionError, SyntaxError, MemoryError) as error:
        raise ValueError(f"{where}: the chat template is not valid ({type(error).__name__}: {error})") from error
    if fault := next(_faults(parsed), None):
        raise ValueError(f"{where}: the chat template {fault}, which a conversation does not need; change the template")
    try:
        with _budget():
            compiled.render(messages=TRIAL, add_generation_prompt=True, bos_token="", eos_token="")
    except TemplateError:
        return  # it may refuse this conversation; that is reported where one is rendered
    except (_BudgetExceeded, MemoryError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{where}: the chat template does not end with three short messages within {MAX_LINES} steps "
            f"and {MAX_GROWTH_KIB} KiB ({type(error).__name__}); change the template"
        ) from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        return  # it expects another form of messages; that is reported where one is rendered


def fitted(tokenizer: PreTrainedTokenizerFast, template: str) -> str:
    """A checked template, as it is or after NO_THINKING, whichever is fit. Raises ValueError if neither is."""
    reason = unfit(tokenizer, template)
    if reason is None:
        return template
    if unfit(tokenizer, NO_THINKING + template) is None:
        return NO_THINKING + template
    raise ValueError(reason)


def unfit(tokenizer: PreTrainedTokenizerFast, template: str) -> str | None:
    """Why a checked template cannot be trained with, as the rest of a sentence about it; None if it can.

    The same conversation must always have the same text, and the prompt of every answer must be what stands before the
    answer in the text that is trained on: otherwise generation starts where nothing was trained.
    """
    compiled = _compile_jinja_template(template)
    if reason := next(_changes(compiled.environment.parse(template)), None):
        return reason
    special = tokenizer.special_tokens_map

    def render(messages: list[dict[str, str]], *, prompt: bool) -> str:
        text: str = compiled.render(messages=messages, add_generation_prompt=prompt, **special)
        return text

    try:
        whole = render(TALK, prompt=False)
        prompts = [(render(TALK[:turn], prompt=True), TALK[turn]["content"]) for turn in (1, 3)]
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        return f"does not render a conversation of two questions and answers ({type(error).__name__}: {error})"
    texts = [whole, *(prompt for prompt, _ in prompts)]
    with suppress(TemplateError):  # it may refuse a system turn
        texts.append(render([{"role": "system", "content": "Be brief."}, *TALK], prompt=False))
    if any(ADDRESS.search(text) for text in texts):
        return "writes a place in memory, so the same conversation has another text each time"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    for prompt, answer in prompts:
        common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))))
        before, written, _ = whole[common:].partition(answer)
        if not written:
            return f"does not write the answer {answer!r} after its prompt"
        if common < len(prompt) or before not in ("", " "):
            return f"ends a prompt with {prompt[common:]!r}, but an answer that is trained on follows {before[:60]!r}"
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if ids[: len(prompt_ids)] != prompt_ids:
            return f"ends a prompt with {prompt[-20:]!r}, which the tokenizer joins with the answer in training"
    return None


def reads_text(tokenizer: PreTrainedTokenizerFast, template: str) -> str:
    """The template, or FLATTEN and the template if the messages' text is rendered only with it."""

    def renders_text(text: str) -> bool:
        try:
            rendered = _compile_jinja_template(text).render(messages=TRIAL[:2], **tokenizer.special_tokens_map)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
            return False
        return all(message["content"].split()[-1] in rendered for message in TRIAL[:2])

    return FLATTEN + template if not renders_text(template) and renders_text(FLATTEN + template) else template


def _changes(parsed: nodes.Template) -> Iterator[str]:
    """The expressions of a template whose result is not a function of the conversation."""
    for name in parsed.find_all(nodes.Name):
        if name.name in CHANGING:
            yield f"calls {name.name} (line {name.lineno}), so the same conversation has another text on another day"
    for one in parsed.find_all(nodes.Filter):
        if one.name == "random" or any(isinstance(word, nodes.Const) and word.value == "random" for word in one.args):
            yield f"draws at random (line {one.lineno}), so the same conversation has another text each time"


def _faults(parsed: nodes.Template) -> Iterator[str]:
    largest = MAX_FACTOR if parsed.find(nodes.Mul) else MAX_NUMBER
    for node in parsed.find_all(nodes.Node):
        if isinstance(node, OTHER_TEMPLATES):
            yield f"reads another template ({type(node).__name__})"
        if isinstance(node, nodes.Pow):
            yield f"raises to a power (line {node.lineno})"
        if isinstance(node, nodes.Filter) and node.name == "attr":
            yield f"chooses attributes at run time (line {node.lineno})"
        for value in (getattr(node, name, None) for name in ("name", "attr", "value", "key")):
            if isinstance(value, str) and "__" in value and not isinstance(node, nodes.TemplateData):
                yield f"names {value[:40]!r} (line {node.lineno})"
            if isinstance(value, int | float) and abs(value) > largest:
                yield f"holds the number {value} (line {node.lineno})"


@contextmanager
def _budget() -> Iterator[None]:
    """Raise _BudgetExceeded in the code inside after MAX_LINES lines or MAX_GROWTH_KIB more memory."""
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + MAX_GROWTH_KIB
    lines = 0

    def watch(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        if lines > MAX_LINES or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > limit:
            raise _BudgetExceeded(f"{lines} lines")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
