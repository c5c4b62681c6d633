"""Errors in OpenAI's form."""

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A refused request: the message says what is wrong and what would be accepted."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""Status -> type of the error, where it is neither a wrong request nor a fault of the server."""


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


def overloaded(message: str, *, code: str, wait_seconds: float) -> ApiError:
    """Status 429; the client may ask again after so many seconds, rounded up."""
    return ApiError(429, message, code=code, headers={"Retry-After": str(max(1, -int(-wait_seconds // 1)))})


def internal_error() -> ApiError:
    """The neutral error of a fault of the server."""
    return ApiError(500, "the server failed to answer this request; the reason is in its log", code="internal_error")
