"""The behaviour of a service, and who may use an endpoint and how much of it; its capacity is in the resources."""

import re
from typing import Annotated, Any, Literal

import re2
from pydantic import (
    Field,
    IPvAnyNetwork,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from vila_ops.config.base import Config
from vila_ops.config.engine import Precision

HostName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")]
Origin = Annotated[str, Field(pattern=r"^https?://[a-z0-9.-]+(:[0-9]+)?$")]
ImageFormat = Literal["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]


class Golden(Config):
    """A question about an image with a known answer. No version gets requests before it has answered it."""

    image: str
    """Path of the image file."""
    question: str
    answer: str
    """Regular expression that the answer has to match somewhere."""
    max_tokens: PositiveInt = 64

    @field_validator("answer")
    @classmethod
    def _answer_is_an_expression(cls, answer: str) -> str:
        try:
            re.compile(answer)
        except re.error as error:
            raise ValueError(f"golden.answer {answer!r} is not a regular expression: {error}") from error
        return answer


class Service(Config):
    """One OpenAI-compatible endpoint."""

    name: str
    precision: Precision = "fp32"
    """Precision of the language model. It changes answers; a suite has a setting of the same name to measure that."""
    max_new_tokens: PositiveInt = 128
    """Upper bound of a request's max_tokens."""
    max_images: PositiveInt = 8
    max_image_pixels: PositiveInt = 40_000_000
    max_body_bytes: PositiveInt = 32 * 2**20
    request_timeout_seconds: float = Field(default=120, gt=0, le=3600)
    golden: Golden | None = None
    """None: a new version has to answer a question about an image, whatever it says."""


class Access(Config):
    """Who may use an endpoint, from where, and what is recorded of it."""

    key_file: str | None = None
    """File of API keys, which `vila-ops keys` writes and every replica reads; None: no key is needed, which is refused
    for an address other than loopback."""
    hosts: tuple[HostName, ...] = ()
    """Host names that requests may be sent to. None given: with keys any; without, loopback names alone, so that a web
    page cannot reach the endpoint through a name of its own."""
    origins: tuple[Origin, ...] = ()
    """Origins of web pages that may call the endpoint, such as `https://chat.example.org`."""
    audit: str | None = None
    """Folder of the audit log, a file for each service and host; None: nothing is recorded."""


class RemoteImages(Config):
    """Images that a request names by an http or https URL. Nothing is fetched unless a host is named here."""

    hosts: tuple[HostName, ...] = ()
    """Hosts that images are fetched from. Redirects are refused."""
    networks: tuple[IPvAnyNetwork, ...] = ()
    """Networks in which these hosts may be although they are not public."""
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = (80, 443)
    max_bytes: PositiveInt = 20_000_000
    timeout_seconds: PositiveFloat = 10.0
    """Time limit of one image."""

    @model_validator(mode="after")
    def _networks_are_of_hosts(self) -> "RemoteImages":
        if self.networks and not self.hosts:
            raise ValueError("networks has no effect without hosts: nothing is fetched; name hosts, or remove networks")
        return self


class CanaryRules(Config):
    """How many conversations a canary gets, and when it is worse than the stable version."""

    share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the conversations that the canary answers."""
    level: float = Field(default=0.05, gt=0, lt=1)
    """Largest chance of rolling back a canary that is not worse, however long it runs."""
    slower: float = Field(default=1.2, ge=1)
    """Ratio of response times above which the canary is worse."""
    more_errors: float = Field(default=1.5, ge=1)
    """Ratio of the rates of errors, and of empty or repeating answers, above which it is worse."""
    drift: float = Field(default=1.5, ge=1)
    """Ratio of the lengths of answers, in either direction, above which it is worse."""


class Autoscale(Config):
    """Replicas by the number of requests under way, for launch ray; `replicas` is the smallest number."""

    max_replicas: PositiveInt
    requests_per_replica: PositiveFloat = 8.0
    """Requests under way, waiting ones included, that each replica should have."""
    up_seconds: PositiveFloat = 10.0
    """How long there must be more before replicas are added."""
    down_seconds: PositiveFloat = 300.0
    """How long there must be fewer before replicas are removed."""


class Samples(Config):
    """Which requests are kept with their answers, as raw records for the next training."""

    share: float = Field(gt=0, le=1)
    """Share of the requests. Feedback is taken for any, but trains nothing unless the request was kept."""
    keep_days: PositiveFloat = 30.0
    """After which records are removed, ratings too."""
    redact: tuple[str, ...] = (
        r"[\pL\pM\pN_.+-]+@[\pL\pM\pN_-]+\.[\pL\pM\pN_.-]+",
        r"\+?\p{Nd}[\p{Nd} ()/-]{7,}\p{Nd}",
    )
    """Regular expressions of text that is removed before it is kept: by default e-mail addresses and long numbers. They
    are RE2's, without look-around and back references, so that no text that people send makes a search long. `\\w` and
    `\\d` mean ASCII there: `\\pL` is any letter, `\\p{Nd}` any digit."""
    images: bool = True
    """Whether requests with images are kept. Nothing is removed from images."""
    place: str | None = None
    """Folder, or `s3://bucket/prefix`; None: `samples/SERVICE` of the store."""

    @field_validator("redact")
    @classmethod
    def _redact_are_expressions(cls, redact: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in redact:
            try:
                _expression(pattern)
            except re2.error as error:
                raise ValueError(
                    f"redact {pattern!r} is not a regular expression of RE2, which has no look-around and no back "
                    f"references: {error.args[0].decode()}"
                ) from error
        return redact

    def expressions(self) -> list[Any]:
        """The compiled expressions of `redact`."""
        return [_expression(pattern) for pattern in self.redact]


def _expression(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False  # on the standard error, beside the exception
    return re2.compile(pattern, options)


class RequestLimits(Config):
    """What the requests to one replica may take together."""

    max_waiting: NonNegativeInt = 64
    """Answers beyond `max_batch` that may be under way; a request for more gets status 429."""
    max_choices: PositiveInt = 8
    """Upper bound of a request's `n`."""
    upload_seconds: PositiveFloat = 20.0
    """Time limit of the first MiB of a body; each further MiB has a second more."""
    held_bytes: PositiveInt = 256 * 2**20
    """Bytes of all bodies that are being received; beyond it the oldest upload ends with status 408."""
    decoders: PositiveInt = 2
    """Processes that decode images."""
    decode_seconds: PositiveFloat = 10.0
    """Time limit of decoding one image, after which its process is killed."""
    image_formats: Annotated[tuple[ImageFormat, ...], Field(min_length=1)] = ("PNG", "JPEG", "WEBP", "GIF")
    """Formats of images, recognised by their bytes."""
