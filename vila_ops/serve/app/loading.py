"""A spec to the app that serves it: the weights are read and checked here, inside the replica."""

import atexit
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from fastapi import FastAPI
from torch import Tensor

from vila_ops.artifacts.execution import versions
from vila_ops.generate.load import load_generator
from vila_ops.model.features import SUFFIX
from vila_ops.serve.app.routes import create_app
from vila_ops.serve.spec import Spec

KEPT_IMAGES = 256
"""Users' images whose features a replica keeps, on its own disk and for its own life only."""


def load_app(spec: Spec, *, replica: dict[str, Any]) -> FastAPI:
    """The app of a spec; `replica` adds to what the process says of itself. Raises CorruptArtifact."""
    started = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="vila-serve-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    generator = load_generator(spec.version.checkpoint, feature_root=scratch, threads=spec.threads(), precision="fp32")
    generator.features = _bounded(generator.features, scratch)
    itself = {
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "host": socket.gethostname(),
        "digest": spec.version.checkpoint.digest,
        "load_seconds": round(time.monotonic() - started, 3),
        "versions": versions(),
    }
    return create_app(spec, generator, replica=itself | replica)


def _bounded(features: Callable[[Sequence[bytes]], Tensor], folder: Path) -> Callable[[Sequence[bytes]], Tensor]:
    """The same features, of which only the last images' stay on disk."""

    def compute(images: Sequence[bytes]) -> Tensor:
        found = features(images)
        paths = sorted(folder.rglob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        for path in paths[:-KEPT_IMAGES]:
            path.unlink()
        return found

    return compute
