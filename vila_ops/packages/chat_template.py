"""A chat template that others wrote: refused if it reaches beyond the conversation or works without end.

transformers renders in jinja's ImmutableSandboxedEnvironment, which stops what reaches for Python's inner names while
it renders. Here the same is refused before anything renders, and what the sandbox does not bound: time and memory.
"""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import TemplateError, nodes
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

MAX_CHARACTERS = 128 * 1024
MAX_NUMBER = 100_000
"""Of a number in a template: also the sandbox's longest range."""
MAX_LINES = 20_000
"""Lines of the compiled template that a trial runs; real ones run about a thousand."""
MAX_GROWTH_KIB = 32 * 1024
"""Of the process's memory in a trial."""
BEYOND = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
MAX_FACTOR = 100
"""Of a number in a template that multiplies: a text must not become huge in one step, which no budget bounds."""
TRIAL = [
    {"role": "user", "content": "<image>\nWhat is it?"},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "And now?"},
]
FLATTEN = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- if content is string -%}{%- set content = [{'type': 'text', 'text': content}] -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=content)] -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
)
"""Put before a template that reads a message as a list of parts, as LLaVA-HF's do: we write images in the text."""


class _Spent(Exception):
    """A trial used up its budget."""


def check_template(template: str, *, where: str) -> None:
    """Refuse a template by what it says and by a trial rendering. Raises ValueError with the rule."""
    if len(template) > MAX_CHARACTERS:
        raise ValueError(f"{where}: the chat template has {len(template)} characters, more than {MAX_CHARACTERS}")
    try:
        compiled = _compile_jinja_template(template)
        parsed = compiled.environment.parse(template)
    except (TemplateError, RecursionError, SyntaxError, MemoryError) as error:
        raise ValueError(f"{where}: the chat template is not one ({type(error).__name__}: {error})") from error
    if found := next(_faults(parsed), None):
        raise ValueError(f"{where}: the chat template {found}, which a conversation does not need; change the template")
    try:
        with _budget():
            compiled.render(messages=TRIAL, add_generation_prompt=True, bos_token="", eos_token="")
    except TemplateError:
        return  # it refuses such a conversation: its right, and reported where one is rendered
    except (_Spent, MemoryError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{where}: the chat template does not come to an end with three short messages within {MAX_LINES} steps "
            f"and {MAX_GROWTH_KIB} KiB ({type(error).__name__}); change the template"
        ) from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        return  # it wants another form of messages: reported where one is rendered


def reads_text(tokenizer: PreTrainedTokenizerFast, template: str) -> str:
    """The template as it is, or behind FLATTEN where it only then writes what the messages say."""

    def says(text: str) -> bool:
        try:
            rendered = _compile_jinja_template(text).render(messages=TRIAL[:2], **tokenizer.special_tokens_map)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
            return False
        return all(message["content"].split()[-1] in rendered for message in TRIAL[:2])

    return FLATTEN + template if not says(template) and says(FLATTEN + template) else template


def _faults(parsed: nodes.Template) -> Iterator[str]:
    largest = MAX_FACTOR if parsed.find(nodes.Mul) else MAX_NUMBER
    for node in parsed.find_all(nodes.Node):
        if isinstance(node, BEYOND):
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
    """Raises _Spent in whatever runs in it after MAX_LINES lines or MAX_GROWTH_KIB more memory."""
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + MAX_GROWTH_KIB
    lines = 0

    def watch(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        if lines > MAX_LINES or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > limit:
            raise _Spent(f"{lines} lines")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
