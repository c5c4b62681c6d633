"""The request of /v1/chat/completions. A parameter that has no effect here is refused, never ignored."""

import codecs
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError

from vila_ops.serve.app.errors import ApiError

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_BIASES = 1024


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(_Closed):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Closed):
    """An image: a data URL with its bytes, or the address of one on a host that the endpoint fetches from."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None
    """Has no effect, but clients send it: an image always becomes one square of the model's side."""


class ImagePart(_Closed):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]], Field(max_length=MAX_STOPS)
]
Biases = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES),
]


class ChatMessage(_Closed):
    """One turn of the conversation. What else clients send back of an answer must have its neutral value."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts), Field(min_length=1)]
    name: Any = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    tool_calls: Any = None
    function_call: Any = None


class StreamOptions(_Closed):
    """How a stream ends."""

    include_usage: bool | None = None
    include_obfuscation: Any = None


class PlainTextFormat(_Closed):
    """Answers are plain text."""

    type: Literal["text"]


class ObjectFormat(_Closed):
    """Answers are JSON objects."""

    type: Literal["json_object"]


class NamedSchema(_Closed):
    """A JSON schema, which every answer follows whether strict is true or not."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(_Closed):
    """Answers follow a JSON schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[PlainTextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class ChatRequest(_Closed):
    """A chat request. The parameters in `NEUTRAL` may only have a value that changes nothing."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    """None: 0, which decodes greedily."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=2**31)
    """0 and -1 draw from all tokens."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: PositiveInt | None = None
    stop: Annotated[Stops | None, BeforeValidator(_as_list)] = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    logit_bias: Biases | None = None
    """Token id -> what is added to its logit."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: Any = None
    """False: this request is not kept, whatever share of them is."""
    response_format: ResponseFormat | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    service_tier: Any = None
    web_search_options: Any = None

    def requested_tokens(self) -> int | None:
        """Most tokens of the answer; None: the request sets no limit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def json_schema(self) -> str | None:
        """JSON text of the schema that answers follow; None for plain text."""
        if isinstance(self.response_format, SchemaFormat):
            return json.dumps(self.response_format.json_schema.schema_)
        return json.dumps({"type": "object"}) if isinstance(self.response_format, ObjectFormat) else None


NO_TOOLS = "this model calls no tools"
TEXT_ONLY = "answers are text"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "store": ((False,), "answers are not stored"),
    "tools": (([],), NO_TOOLS),
    "tool_choice": (("none", "auto"), NO_TOOLS),
    "parallel_tool_calls": ((True, False), NO_TOOLS),
    "functions": (([],), NO_TOOLS),
    "function_call": (("none", "auto"), NO_TOOLS),
    "modalities": ((["text"],), TEXT_ONLY),
    "audio": ((), TEXT_ONLY),
    "prediction": ((), "predicted outputs are not supported"),
    "reasoning_effort": (("none",), "the model answers without a reasoning step"),
    "verbosity": (("medium",), "the length of answers cannot be chosen but by max_tokens"),
    "service_tier": (("auto", "default"), "there is one tier of service"),
    "web_search_options": ((), "nothing is searched"),
}
"""Parameter -> the values that change nothing, and the rule that a refusal states."""
NEUTRAL_IN_MESSAGE: dict[str, tuple[tuple[Any, ...], str]] = {
    "name": ((), "participants have no names"),
    "refusal": ((), "refusals are not supported"),
    "annotations": (([],), "annotations are not supported"),
    "audio": ((), TEXT_ONLY),
    "tool_calls": (([],), NO_TOOLS),
    "function_call": ((), NO_TOOLS),
}


def parse(body: bytes) -> ChatRequest:
    """Parse a JSON body, which may begin with a byte order mark. Raises ApiError 400 that names the first wrong
    parameter."""
    try:
        request = ChatRequest.model_validate_json(body.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is not valid JSON: {first['msg']}", code="invalid_json") from None
        param = _param(first["loc"])
        raise ApiError(400, f"{param or 'body'}: {first['msg']}", param=param, code="invalid_value") from None
    _check_neutral(request, NEUTRAL, prefix="")
    for number, message in enumerate(request.messages):
        _check_neutral(message, NEUTRAL_IN_MESSAGE, prefix=f"messages[{number}].")
    if None not in (request.max_tokens, request.max_completion_tokens):
        text = "give max_completion_tokens or max_tokens, not both"
        raise ApiError(400, text, param="max_tokens", code="invalid_value")
    if request.top_logprobs is not None and not request.logprobs:
        text = "top_logprobs: log-probabilities are returned only if logprobs is true"
        raise ApiError(400, text, param="top_logprobs", code="invalid_value")
    if request.stream_options is not None and not request.stream:
        text = "stream_options: there is no stream unless stream is true"
        raise ApiError(400, text, param="stream_options", code="invalid_value")
    return request


def _check_neutral(values: BaseModel, neutral: dict[str, tuple[tuple[Any, ...], str]], *, prefix: str) -> None:
    for name, (harmless, rule) in neutral.items():
        value = getattr(values, name)
        if value is not None and value not in harmless:
            param = prefix + name
            text = f"{param}: {rule}; leave {name} out{_or_one_of(harmless)}"
            raise ApiError(400, text, param=param, code="unsupported_value")


def _or_one_of(harmless: tuple[Any, ...]) -> str:
    return f" or set it to {' or '.join(map(repr, harmless))}" if harmless else ""


def _param(loc: tuple[int | str, ...]) -> str | None:
    """The path of a parameter, such as messages[0].content[1].image_url.url.

    pydantic's location also names the member of a union, which is left out here. Names that the client chose are cut.
    """
    text = ""
    for before, item in zip((None, *loc), loc, strict=False):
        if isinstance(item, int):
            text += f"[{item}]"
        elif not (
            (isinstance(before, int) and item in ("text", "image_url"))
            or (before == "response_format" and item in ("text", "json_object", "json_schema"))
            or item == "[key]"
        ):
            text += f".{item[:100]}" if text else item[:100]
    return text or None
