"""What an engine refuses before it computes anything. Light: no torch."""

from typing import TYPE_CHECKING

from vila_ops.generate.request import Prompt, Sampling

if TYPE_CHECKING:  # heavy: transformers
    from vila_ops.data.text.conversation import Tokenizer


def check_length(length: int, context: int) -> None:
    """Raises ValueError for more tokens than the context has."""
    if length > context:
        raise ValueError(f"{length} tokens, more than the model's context of {context}")


def check_images(prompt: Prompt, tokenizer: "Tokenizer", name: str) -> None:
    """Each prompt is checked alone, so that an image of one row cannot fill a position of another.

    Raises ValueError, which calls the prompt by `name`.
    """
    positions = prompt.input_ids.count(tokenizer.image_id)
    if positions != len(prompt.images) * tokenizer.image_tokens:
        raise ValueError(
            f"{name} has {positions} image positions for {len(prompt.images)} images of "
            f"{tokenizer.image_tokens} each; write one placeholder for each image"
        )


def check_request(prompt: Prompt, sampling: Sampling, request_id: str, tokenizer: "Tokenizer", context: int) -> None:
    """Raises ValueError for what cannot be generated."""
    name = f"the prompt of request {request_id!r}"
    if not prompt.input_ids:
        raise ValueError(f"{name} has no token; give it at least one")
    check_length(len(prompt.input_ids) + sampling.max_new_tokens, context)
    check_images(prompt, tokenizer, name)
    vocabulary = len(tokenizer.fast)
    if unknown := [one for one in sampling.logit_bias if not 0 <= one < vocabulary]:
        raise ValueError(f"logit_bias has the token ids {unknown[:3]}; ids of this model are below {vocabulary}")
