"""How a model is served."""

from pydantic import Field, PositiveFloat, PositiveInt

from vila_ops.config.base import Config


class Service(Config):
    """One OpenAI-compatible endpoint."""

    name: str
    replicas: PositiveInt = 1
    cpus_per_replica: PositiveFloat = 1
    max_batch: PositiveInt = 8
    """Requests decoded together."""
    max_new_tokens: PositiveInt = 128
    """Upper bound of a request's max_tokens."""
    max_images: PositiveInt = 8
    max_image_pixels: PositiveInt = 40_000_000
    max_body_bytes: PositiveInt = 32 * 2**20
    request_timeout_seconds: PositiveFloat = Field(default=120, le=3600)
