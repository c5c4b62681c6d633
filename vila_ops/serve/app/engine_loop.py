"""One request of an HTTP client through the engine, within the time that the service grants."""

import asyncio
import uuid

from vila_ops.generate.engine import Engine, generate_output
from vila_ops.generate.request import Output, Prompt, Sampling
from vila_ops.serve.app.errors import ApiError


class EngineLoop:
    """Runs requests in the engine, which decodes those that arrive together in one batch."""

    def __init__(self, engine: Engine, *, timeout_seconds: float) -> None:
        self.engine, self.timeout_seconds = engine, timeout_seconds

    async def generate(self, prompt: Prompt, *, max_new_tokens: int) -> Output:
        """The whole output. Raises ApiError 504 after the timeout; the engine then aborts the request."""
        sampling = Sampling(max_new_tokens=max_new_tokens, stop_ids=self.engine.tokenizer.stop_ids)
        request = generate_output(self.engine, prompt, sampling, uuid.uuid4().hex)
        try:
            return await asyncio.wait_for(request, self.timeout_seconds)
        except TimeoutError:
            text = f"there was no answer within {self.timeout_seconds:g} seconds; try again, or ask for fewer tokens"
            raise ApiError(504, text, code="timeout", kind="server_error") from None

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()
