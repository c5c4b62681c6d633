"""One question with images to an engine, and its answer."""

import re
from collections.abc import Sequence
from pathlib import Path

from vila_ops.config import Config
from vila_ops.config.images import Webp
from vila_ops.data.containers import BadImage
from vila_ops.data.images import square
from vila_ops.data.records import Image, Part
from vila_ops.generate.engine import Engine, generate_all
from vila_ops.generate.request import FinishReason, Prompt, Sampling
from vila_ops.packages.tokenizer import IMAGE_TOKEN


class GivenAnswer(Config):
    """The answer to a question."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    answer_tokens: int


def ask(engine: Engine, question: str, images: Sequence[Path], *, max_new_tokens: int) -> GivenAnswer:
    """Ask one question, decoded greedily.

    The images come before the question, or where it says `<image>`. Raises ValueError for an image that cannot be read,
    for other than one `<image>` for each image, and for a question that leaves no token of the context.
    """
    parts = _parts(question, [_square(engine, path) for path in images])
    shown = tuple(part.data for part in parts if isinstance(part, Image))
    prompt = Prompt(engine.tokenizer.prompt([("user", parts)]), shown)
    left = engine.context_length - len(prompt.input_ids)
    if left < 1:
        raise ValueError(
            f"the question has {len(prompt.input_ids)} tokens, images included, and the model's context "
            f"{engine.context_length}; ask with fewer images or words"
        )
    sampling = Sampling(min(max_new_tokens, left), engine.tokenizer.stop_ids)
    (output,) = generate_all(engine, [prompt], sampling)
    return GivenAnswer(
        text=engine.tokenizer.decode(output.ids).strip(),
        finish_reason=output.finish_reason,
        prompt_tokens=len(prompt.input_ids),
        answer_tokens=len(output.ids),
    )


def _parts(question: str, images: list[Image]) -> tuple[Part, ...]:
    pieces = re.split(re.escape(IMAGE_TOKEN), question)
    if len(pieces) == 1:
        return (*images, question)
    if len(pieces) - 1 != len(images):
        raise ValueError(f"the question says {IMAGE_TOKEN} {len(pieces) - 1} times for {len(images)} images")
    placed: list[Part] = [pieces[0]]
    for image, piece in zip(images, pieces[1:], strict=True):
        placed += [image, piece]
    return tuple(part for part in placed if part != "")


def _square(engine: Engine, path: Path) -> Image:
    try:
        return Image(square(path.read_bytes(), size=engine.image_size, fit=engine.image_aspect_ratio, encoding=Webp()))
    except BadImage as error:
        raise ValueError(f"{path}: {error}") from error
