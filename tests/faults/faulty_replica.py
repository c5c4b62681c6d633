"""A replica with the real app and an engine that fails as the stage of its checkpoint says."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import uvicorn

from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.data.images import Fit
from vila_ops.generate.load import context_of, tokenizer_of
from vila_ops.generate.request import Delta, Prompt, Sampling
from vila_ops.serve.app.routes import create_app
from vila_ops.serve.backends.http_protocol import options
from vila_ops.serve.spec import Spec

RIGHT, WRONG = "a red circle on a table", "no idea what this might be"
TOKEN_SECONDS = 0.03
SLOW = 4
"""How much slower the slow version is."""
CRASHES_AT = 5
"""The request in whose answer the crashing version ends."""
LEAK_BYTES = 64 * 2**20
"""What a request to the leaking version leaves behind."""


class ScriptedEngine:
    """Says the same words again and again until `max_tokens`, and has one fault."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tokenizer = tokenizer_of(checkpoint)
        self.context_length = context_of(checkpoint) or 4096
        self.image_size = 56
        self.image_aspect_ratio = Fit("resize", (0.5, 0.5, 0.5))
        self._fault, self._requests = checkpoint.stage, 0
        self._leaked: list[bytes] = []
        if self._fault == "does not load":
            raise OSError("no weights here")

    async def generate(self, prompt: Prompt, sampling: Sampling, request_id: str) -> AsyncIterator[Delta]:
        self._requests += 1
        if self._fault == "leaks":
            self._leaked.append(os.urandom(LEAK_BYTES))
        words = self.tokenizer.text_ids(WRONG if self._fault == "answers wrongly" else RIGHT)
        for number in range(sampling.max_new_tokens):
            if self._fault == "crashes" and self._requests >= CRASHES_AT and number > 0:
                os._exit(1)
            await asyncio.sleep(TOKEN_SECONDS * (SLOW if self._fault == "slow" else 1))
            yield Delta([words[number % len(words)]])
        yield Delta([], "length")

    def close(self) -> None:
        pass


def serve(text: str, host: str, port: int, log: str) -> None:
    """Serve a spec in a session of this process's own; a port that answers is ready."""
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    spec = Spec.model_validate_json(text)
    engine: Any = ScriptedEngine(spec.version.checkpoint)
    app = create_app(spec, engine, replica={"pid": os.getpid()})
    uvicorn.run(app, host=host, port=port, log_level="warning", **options())
