"""The app of a spec. The replica reads and checks the weights here."""

import os
import socket
import time
from typing import Any

import psutil
from fastapi import FastAPI

from vila_ops.artifacts.execution import versions
from vila_ops.device import Device, describe, device_of
from vila_ops.generate.engine import EngineOptions
from vila_ops.generate.load import chosen, load_engine
from vila_ops.serve.app.routes import create_app
from vila_ops.serve.spec import Spec

PREFILL_TOKENS = 256
"""Most tokens of prompts that a replica reads at once: half a second of a small model on one CPU thread."""


def load_app(spec: Spec, device: Device, *, replica: dict[str, Any]) -> FastAPI:
    """Load the engine and return the app; /health shows `replica` beside the facts of the process.

    Raises CorruptArtifact, and ValueError for a device that is not there.
    """
    started = time.monotonic()
    options = EngineOptions(
        device=device,
        threads=spec.threads(),
        precision=spec.service.precision,
        max_batch=spec.capacity.max_batch,
        prefill_tokens=PREFILL_TOKENS,
        bound_pauses=True,
        keep_prefixes=True,
    )
    config = chosen(spec.version.checkpoint, spec.capacity.engine, options)
    engine = load_engine(spec.version.checkpoint, config, options)
    process = {
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "host": socket.gethostname(),
        "device": describe(device_of(device)),
        "engine": config.kind,
        "digest": spec.version.checkpoint.digest,
        "load_seconds": round(time.monotonic() - started, 3),
        "versions": versions(),
    }
    return create_app(spec, engine, replica=process | replica)
