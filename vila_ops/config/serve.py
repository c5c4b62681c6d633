"""The behaviour of a service, and who may use an endpoint and how much of it; its capacity is in the resources."""

from typing import Annotated, Literal

from pydantic import Field, IPvAnyNetwork, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vila_ops.config.base import Config
from vila_ops.config.engine import Precision

HostName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")]
Origin = Annotated[str, Field(pattern=r"^https?://[a-z0-9.-]+(:[0-9]+)?$")]
ImageFormat = Literal["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]


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
