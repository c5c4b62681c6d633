"""The behaviour of a service; its capacity is in the resources."""

from pydantic import Field, PositiveInt

from vila_ops.config.base import Config


class Service(Config):
    """One OpenAI-compatible endpoint."""

    name: str
    max_new_tokens: PositiveInt = 128
    """Upper bound of a request's max_tokens."""
    max_images: PositiveInt = 8
    max_image_pixels: PositiveInt = 40_000_000
    max_body_bytes: PositiveInt = 32 * 2**20
    request_timeout_seconds: float = Field(default=120, gt=0, le=3600)
