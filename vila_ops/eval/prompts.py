"""Items and the prompt of a config to requests, and these to what a target reads. Pure."""

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vila_ops.config import fingerprint
from vila_ops.config.benchmarks import GenerateAnswer, PromptTemplate
from vila_ops.data.records import Image
from vila_ops.eval.benchmark import (
    GenerateRequest,
    Item,
    Parts,
    Request,
    ScoreRequest,
    SealedImage,
    StatesRequest,
    TextPrompt,
    Unreadable,
)
from vila_ops.generate.request import Prompt

if TYPE_CHECKING:
    from vila_ops.data.text.conversation import Tokenizer

ImageOf = Callable[[SealedImage], bytes]
"""The file of a sealed image, or the square that a model reads of it."""
_FIELD = re.compile(r"{(\w+)}")


def requests_of(
    items: Sequence[Item], template: PromptTemplate, *, rotations: Callable[[Item], int] | None = None
) -> list[Request]:
    """One request for each item and rotation of its options, as its template says.

    `rotations` says how many an item has (None: one each).
    """
    return [
        _request(item, template, rotation) for item in items for rotation in range(rotations(item) if rotations else 1)
    ]


def _request(item: Item, template: PromptTemplate, rotation: int) -> Request:
    options = rotated(item.options, rotation)
    identity: dict[str, Any] = {
        "item": item.id,
        "rotation": rotation,
        "prompt": text_prompt(item, template, rotation=rotation),
    }
    answer = template.answer
    if isinstance(answer, GenerateAnswer):
        return GenerateRequest(**identity, max_new_tokens=answer.max_new_tokens, stop=answer.stop)
    letters = template.letters[: len(options)]
    return ScoreRequest(
        **identity,
        continuations=tuple(
            answer.continuation.format(letter=letter, option=option)
            for letter, option in zip(letters, options, strict=True)
        ),
        labels=tuple(letters),
        per_token=answer.per_token,
    )


def rotated(options: tuple[str, ...], rotation: int) -> tuple[str, ...]:
    """Options moved on by so many places: option 0 is then at place `rotation`."""
    place = len(options) - rotation
    return options[place:] + options[:place] if options else ()


def text_prompt(item: Item, template: PromptTemplate, *, rotation: int = 0) -> TextPrompt:
    """The prompt of an item: the turn of a user after a system's, or one running text."""
    question = written(item, template, rotation=rotation)
    if template.format == "text":
        return TextPrompt((("user", question),), is_chat=False)
    system = (("system", (template.system,)),) if template.system else ()
    return TextPrompt((*system, ("user", question)))


def after_demonstrations(prompt: TextPrompt, shown: Sequence[tuple[Parts, str]]) -> TextPrompt:
    """A prompt after questions with their answers: more turns of a chat, or running text with blank lines between."""
    *before, (role, question) = prompt.turns
    if prompt.is_chat:
        turns = [turn for parts, answer in shown for turn in ((role, parts), ("assistant", (answer,)))]
        return TextPrompt((*before, *turns, (role, question)))
    running = [part for parts, answer in shown for part in (*parts, f" {answer}\n\n")]
    return TextPrompt((*before, (role, _joined([*running, *question]))), is_chat=False)


def written(item: Item, template: PromptTemplate, *, rotation: int = 0) -> Parts:
    """The user's part of the prompt of an item. Raises ValueError for a part that the item does not have."""
    options = rotated(item.options, rotation)
    lines = [
        template.option.format(letter=letter, option=option)
        for letter, option in zip(template.letters, options, strict=False)
    ]
    parts: dict[str, Parts] = {**item.parts, "hint": (template.hint,), "options": ("\n".join(lines),)}
    if unknown := [name for name in template.fields() if name not in parts]:
        raise ValueError(f"the prompt names {{{unknown[0]}}}, but item {item.id!r} has {sorted(parts)}")
    kept: list[Parts] = []
    for line in template.user.split("\n"):
        pieces = _FIELD.split(line)  # text, name, text, name, ..., text
        values = [parts[name] for name in pieces[1::2]]
        if values and not any(part != "" for value in values for part in value):
            continue
        between: list[Parts] = [(text,) for text in pieces[0::2]]
        whole = [part for text, value in zip(between, [*values, ()], strict=True) for part in (*text, *value)]
        kept.append(tuple(whole))
    return _joined([part for number, line_ in enumerate(kept) for part in (*(("\n",) if number else ()), *line_)])


def _joined(parts: Sequence[Any]) -> Parts:
    """The same with neighbouring texts as one and without empty ones."""
    joined: list[Any] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return tuple(joined)


def tokenised(prompt: TextPrompt | Prompt, tokenizer: "Tokenizer", image_of: ImageOf) -> Prompt:
    """What an engine reads: token ids and images. A running text has one bos, a chat what its template writes.

    Raises ValueError for a chat template that writes a second bos.
    """
    if isinstance(prompt, Prompt):
        return prompt
    turns = [(role, tuple(_with_bytes(part, image_of) for part in parts)) for role, parts in prompt.turns]
    images = tuple(part.data for _, parts in turns for part in parts if isinstance(part, Image))
    if prompt.is_chat:
        ids = tokenizer.prompt(turns)
    else:
        ids = [*tokenizer.context]
        for part in (part for _, parts in turns for part in parts):
            ids += tokenizer.image if isinstance(part, Image) else tokenizer.text_ids(part)
    if tokenizer.bos and ids[:2] == [*tokenizer.bos, *tokenizer.bos]:
        raise ValueError("the prompt begins with two bos tokens; it needs one: look at the model's chat template")
    return Prompt(ids, images)


def _with_bytes(part: Any, image_of: ImageOf) -> str | Image:
    if isinstance(part, SealedImage):
        return Image(image_of(part))
    if isinstance(part, (str, Image)):
        return part
    raise TypeError(f"a prompt with {part!r} cannot be asked")


def unreadable(request: Request) -> str | None:
    """Why a request cannot be asked: an image of it, or of a demonstration, cannot be read. None if it can."""
    turns = request.prompt.turns if isinstance(request.prompt, TextPrompt) else ()
    return next((part.reason for _, parts in turns for part in parts if isinstance(part, Unreadable)), None)


def request_hash(request: Request) -> str:
    """sha256 of everything that a request asks a model, without the item that it is about."""
    own: dict[str, Any] = {"prompt": _identity(request.prompt), "kind": type(request).__name__}
    match request:
        case GenerateRequest():
            own |= {"max_new_tokens": request.max_new_tokens, "stop": request.stop}
        case ScoreRequest():
            own |= {"continuations": request.continuations, "labels": request.labels, "per_token": request.per_token}
        case StatesRequest():
            own |= {
                "continuation": request.continuation,
                "reduce": f"{request.reduce.__module__}.{request.reduce.__name__}",
            }
    return fingerprint(own)


def prompt_hash(prompt: Prompt) -> str:
    """sha256 of the token ids and images that an engine reads."""
    return fingerprint(_identity(prompt))


def reference_hash(references: Any) -> str:
    """sha256 of the references of an item."""
    return fingerprint(references)


def _identity(prompt: TextPrompt | Prompt) -> Any:
    if isinstance(prompt, Prompt):
        return [prompt.input_ids, [_digest(image) for image in prompt.images]]
    return [prompt.is_chat, [[role, [_part(part) for part in parts]] for role, parts in prompt.turns]]


def _part(part: Any) -> Any:
    match part:
        case SealedImage(key):
            return {"image": key}
        case Image(data):
            return {"image": _digest(data)}
        case Unreadable(reason):
            return {"unreadable": reason}
    return part


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
