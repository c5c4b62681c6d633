"""The request of /v1/chat/completions. A parameter that has no effect here is refused, never ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError

from vila_ops.serve.app.errors import ApiError


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Closed):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Closed):
    """The bytes of an image, as a data URL."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"
    """Has no effect, but clients send it: an image always becomes one square of the model's side."""


class ImagePart(_Closed):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Closed):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts), Field(min_length=1)]


class ChatRequest(_Closed):
    """A chat request. The parameters in `UNSUPPORTED` may only have the value that changes nothing."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    seed: int | None = None
    """Greedy answers are the same for every seed."""
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    stream: Any = None
    temperature: Any = None
    top_p: Any = None
    n: Any = None
    stop: Any = None
    logprobs: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    response_format: Any = None

    def requested_tokens(self) -> int | None:
        """Most tokens of the answer; None: the request sets no limit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


GREEDY = "decoding is greedy"
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "stream": (False, "answers are sent whole; set stream to false or leave it out"),
    "temperature": (0, f"{GREEDY}; set temperature to 0 or leave it out"),
    "top_p": (1, f"{GREEDY}; set top_p to 1 or leave it out"),
    "n": (1, f"{GREEDY}, so every answer would be the same; set n to 1 or leave it out"),
    "stop": ([], "stop sequences are not supported; leave stop out"),
    "logprobs": (False, "log-probabilities are not returned; set logprobs to false or leave it out"),
    "frequency_penalty": (0, f"{GREEDY}; set frequency_penalty to 0 or leave it out"),
    "presence_penalty": (0, f"{GREEDY}; set presence_penalty to 0 or leave it out"),
    "response_format": ({"type": "text"}, "answers are plain text; set response_format to text or leave it out"),
}
"""Parameter -> the value that changes nothing, and the rule that a refusal states."""


def parse(body: bytes) -> ChatRequest:
    """Parse a JSON body. Raises ApiError 400 that names the first wrong parameter."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is not valid JSON: {first['msg']}", code="invalid_json") from None
        param = _param(first["loc"])
        raise ApiError(400, f"{param or 'body'}: {first['msg']}", param=param, code="invalid_value") from None
    for name, (neutral, rule) in UNSUPPORTED.items():
        value = getattr(request, name)
        if value is not None and value != neutral:
            raise ApiError(400, f"{name}: {rule}", param=name, code="unsupported_value")
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise ApiError(400, "give max_completion_tokens or max_tokens, not both", param="max_tokens")
    return request


def _param(loc: tuple[int | str, ...]) -> str | None:
    """The path of a parameter, such as messages[0].content[1].image_url.url.

    pydantic's location also names the member of a union, which is left out here.
    """
    text = ""
    for before, item in zip((None, *loc), loc, strict=False):
        if isinstance(item, int):
            text += f"[{item}]"
        elif not (isinstance(before, int) and item in ("text", "image_url")):
            text += f".{item}" if text else item
    return text or None
